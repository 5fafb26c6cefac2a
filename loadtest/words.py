"""Plain words that prompts are made of: short, common, mostly one token each in large vocabularies."""

_TEXT = """
a at all and any air age arm art ask able away area army axe bad bag bed big bird blue boat body book
born both box boy bread bridge bring brown build burn bus buy call calm camp car card care carry cat
chair child city class clean clear clock close cloud coal coat cold come cook cool copy corn cost count
cover cow cross crowd cup cut dance dark day deep deer desk dinner dog door down draw dream dress drink
drive dry dust each ear early earth east easy eat edge egg eight empty end enter even ever every eye
face fact fall family far farm fast father feel few field fight fill find fine finger fire fish five
floor flower fly follow food foot forest four free fresh friend from front fruit full game garden gate
gave girl give glass goat gold good grain grass great green grow guess guide hair half hall hand happy
hard hat head hear heart heavy help here high hill hold home hope horse hot hour house hundred ice idea
in inch iron island join juice jump just keep key kind king kitchen knee know lake lamp land large last
late laugh lead leaf learn leave left leg letter light line lion list little live long look lost loud
love low make many map mark market meal measure meat meet metal middle milk mind minute moon more
morning mother mountain mouth move much music name narrow near neck need never new next nine noise north
nose note nothing number ocean of oil old once one only open orange other over own page paint pair paper
park part party past path pay pencil people piece place plain plant plate play point poor post price
pull push queen question quick quiet race rain read ready red rest rice rich ride right ring river road
rock room root rope rose round row run safe salt same sand school sea season seat second seed sell send
seven shade shape ship shoe shop short side sign silver sing sister six size skin sleep slow small smile
smoke snow soap soft soil song soon south space speak spoon spring stand star start station step stick
stone stop store storm story street strong sugar summer sun sweet swim table tail take talk tall taste
teach ten test that think three time today together tooth top touch town trade train tree true turn two
uncle under until up use valley very village visit voice wait walk wall warm wash watch water way wear
week west wheel white wide wife wild wind window winter wire wise with wood word work world write yard
year yellow yes young zero
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
