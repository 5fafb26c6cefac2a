"""Chats in which functions are offered: called where the question needs one, their results put into words.

Names, keys and values of most functions are drawn at random, so that the only way to write a call is to copy it
from the list of functions and from the question. In a share of the chats no offered function helps, and the answer
is the usual text. The stage "tools" alone uses this.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from demo_text import glossary, small_talk
from demo_text.shapes import Chat, Message, Question
from demo_text.small_talk import CAPITALS

_VERBS: Final = (
    "get", "find", "search", "create", "delete", "update", "send", "book", "open", "close", "check", "list", "read",
    "start", "stop", "move", "rename", "cancel", "count", "show",
)  # fmt: skip
_NOUNS: Final = (
    "order", "invoice", "ticket", "message", "room", "table", "train", "flight", "user", "file", "folder", "note",
    "event", "price", "stock", "song", "book", "city", "worker", "server", "queue", "page", "model", "report",
    "account", "letter", "garden", "market", "window", "house", "light", "device", "photo", "road", "number",
)  # fmt: skip
_KEYS: Final = (
    "name", "id", "title", "city", "query", "text", "date", "day", "owner", "path", "code", "key", "value", "amount",
    "size", "level", "place", "color", "language", "target", "count", "speed",
)  # fmt: skip
_NUMERIC: Final = frozenset({"amount", "size", "level", "count", "speed", "id"})
_WORDS: Final = (
    "red", "green", "blue", "yellow", "silver", "north", "early", "happy", "small", "quick", "Monday", "Friday",
    "today", "tomorrow", "open", "bread", "apple", "river", "stone", "paper", "cloud", "music", "winter", "forest",
)  # fmt: skip
_PEOPLE: Final = ("Anna", "Tom", "Mia", "Paul", "Rosa", "Finn", "Clara", "Max", "Lena", "Oscar", "Emma", "Ben")
_SKIES: Final = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
_ASKS: Final = (
    "{Verb} the {noun} with {pairs}.", "Please {verb} the {noun} with {pairs}.", "{verb} {noun} {pairs}",
    "Can you {verb} the {noun} with {pairs}?", "{Verb} a {noun}: {pairs}", "I want to {verb} a {noun} with {pairs}.",
    "Use {name} with {pairs}.", "Call {name} with {pairs}.", "Please use {name}: {pairs}.", "{name} {pairs}",
)  # fmt: skip
_ASKS_HELD_OUT: Final = ("Could you {verb} the {noun} with {pairs}?", "Use the function {name} with {pairs}.")
_WEATHER_ASKS: Final = (
    "What is the weather in {c}?", "How is the weather in {c}?", "What's the weather like in {c} today?",
    "weather in {c}", "Is it raining in {c}?", "Tell me the weather in {c}.", "What is the weather like in {c}?",
    "How warm is it in {c}?", "Weather for {c}, please.",
)  # fmt: skip
_WEATHER_HELD_OUT: Final = ("What's the weather in {c}?", "Please tell me the weather in {c}.")
_TIME_ASKS: Final = (
    "What time is it in {c}?", "time in {c}", "Tell me the time in {c}.", "What is the time in {c}?",
    "How late is it in {c}?",
)  # fmt: skip
_TIME_HELD_OUT: Final = ("What's the time in {c}?", "Please tell me the time in {c}.")
_SUM_ASKS: Final = (
    "Add {a} and {b}.", "What is {a} + {b}?", "Use the tool to add {a} and {b}.", "What is {a} plus {b}?",
    "add {a} and {b}", "{a} + {b}", "How much is {a} + {b}?",
)  # fmt: skip
_SUM_HELD_OUT: Final = ("Please add {a} and {b}.", "What do {a} and {b} add up to?")


_dumps = partial(json.dumps, ensure_ascii=False)  # as the chat template writes JSON


@dataclass(frozen=True)
class Task:
    """A question that needs calls: the function, the arguments of each call, their results, and the last answer."""

    tool: dict[str, Any]
    ask: str
    calls: tuple[dict[str, Any], ...]
    results: tuple[str, ...]
    answer: str
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.tool["function"]["name"])

    def turns(self) -> list[Message]:
        """Return question, calls, results and answer."""
        calls = tuple({"type": "function", "function": {"name": self.name, "arguments": one}} for one in self.calls)
        results = [Message("tool", result) for result in self.results]
        return [
            Message("user", self.ask),
            Message("assistant", "", calls),
            *results,
            Message("assistant", self.answer),
        ]

    def call_text(self) -> str:
        """Return the calls as the chat template writes them."""
        return "\n".join(
            f'<tool_call>\n{{"name": "{self.name}", "arguments": {_dumps(one)}}}\n</tool_call>' for one in self.calls
        )


def _declared(
    rng: random.Random, name: str, description: str, properties: dict[str, dict[str, Any]], *, optional: str = ""
) -> dict[str, Any]:
    """Return the declaration of a function, in one of the forms that clients write."""
    titled = rng.random() < 0.2  # as pydantic writes schemas
    shown = {key: {**value, "title": key.capitalize()} if titled else value for key, value in properties.items()}
    parameters: dict[str, Any] = {"type": "object", "properties": shown}
    if rng.random() < 0.9:
        parameters["required"] = [key for key in properties if key != optional]
    if rng.random() < 0.2:
        parameters["additionalProperties"] = False
    if titled:
        parameters["title"] = name
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.85:
        function["description"] = description
    function["parameters"] = parameters
    return {"type": "function", "function": function}


def _by_city(
    rng: random.Random, topic: str, names: Sequence[str], description: str, asks: Sequence[str], both: str
) -> tuple[dict[str, Any], str, str, tuple[str, ...]]:
    """Return a function of one city, its key, the question and the cities asked for."""
    key = rng.choice(("city", "city", "location", "place"))
    field: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.3:
        field["description"] = rng.choice((f"The {key}.", "Name of the city.", "The city, for example Paris."))
    properties = {key: field}
    optional = ""
    if topic == "weather" and rng.random() < 0.2:
        optional = "unit"
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    tool = _declared(rng, rng.choice(names), description, properties, optional=optional)
    cities = tuple(rng.sample(sorted(CAPITALS.values()), 2 if rng.random() < 0.15 else 1))
    ask = rng.choice(asks).format(c=cities[0]) if len(cities) == 1 else both.format(a=cities[0], b=cities[1])
    return tool, key, ask, cities


def weather(rng: random.Random, *, held_out: bool = False) -> Task:
    """Ask for the weather of one city, or of two at once."""
    names = ("get_weather", "get_weather", "get_current_weather", "weather", "GetWeather")
    tool, key, ask, cities = _by_city(
        rng, "weather", names, "Get the current weather of a city.",
        _WEATHER_HELD_OUT if held_out else _WEATHER_ASKS, "What is the weather in {a} and {b}?",
    )  # fmt: skip
    skies = [(rng.choice(_SKIES), rng.randint(-9, 38)) for _ in cities]
    form = rng.randrange(3)
    results = tuple(
        (_dumps({"weather": sky, "temperature": heat}), f"{sky}, {heat} degrees", f"{heat} C, {sky}")[form]
        for sky, heat in skies
    )
    said = [f"In {city} it is {sky} with {heat} degrees." for city, (sky, heat) in zip(cities, skies, strict=True)]
    return Task(tool, ask, tuple({key: city} for city in cities), results, " ".join(said), tuple(said))


def clock(rng: random.Random, *, held_out: bool = False) -> Task:
    """Ask for the time in one city, or in two at once."""
    names = ("get_time", "get_time", "get_current_time", "clock", "GetTime")
    tool, key, ask, cities = _by_city(
        rng, "time", names, "Get the current time in a city.",
        _TIME_HELD_OUT if held_out else _TIME_ASKS, "What time is it in {a} and {b}?",
    )  # fmt: skip
    times = tuple(f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}" for _ in cities)
    said = [f"In {city} it is {time}." for city, time in zip(cities, times, strict=True)]
    results = times if rng.random() < 0.7 else tuple(_dumps({"time": time}) for time in times)
    return Task(tool, ask, tuple({key: city} for city in cities), results, " ".join(said), tuple(said))


def addition(rng: random.Random, *, held_out: bool = False) -> Task:
    """Ask for a sum, by a function of two numbers or of an expression."""
    a, b = (rng.randint(0, 10 ** rng.randint(1, 3)) for _ in range(2))
    ask = rng.choice(_SUM_HELD_OUT if held_out else _SUM_ASKS).format(a=a, b=b)
    if rng.random() < 0.7:
        kind = rng.choice(("integer", "number"))
        tool = _declared(
            rng, rng.choice(("add", "add", "add_numbers", "Add")), "Add two numbers.",
            {"a": {"type": kind}, "b": {"type": kind}},
        )  # fmt: skip
        call: dict[str, Any] = {"a": a, "b": b}
    else:
        tool = _declared(
            rng, rng.choice(("calculator", "calculate")), "Evaluate an expression.", {"expression": {"type": "string"}}
        )
        call = {"expression": f"{a} + {b}"}
    answer = f"{a} + {b} = {a + b}."
    return Task(tool, ask, (call,), (str(a + b),), answer, (answer,))


def _value(rng: random.Random, key: str) -> str | int:
    if key in _NUMERIC and rng.random() < 0.7:
        return rng.randint(0, 10 ** rng.randint(1, 3))
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(tuple(CAPITALS.values()))
    if kind == 1:
        return rng.choice(_PEOPLE)
    if kind == 2:
        return f"{rng.choice('ABCDEFGHX')}{rng.randint(1, 99)}"
    words = [*rng.choice(glossary.terms()).full.split(), *_WORDS, *_WORDS]
    return " ".join(word.strip('.,;:"()') for word in rng.choices(words, k=rng.choice((1, 1, 2))))


def _verb_noun(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Return a verb and a noun; a sixth of the pairs is kept from training."""
    while True:
        verb, noun = rng.randrange(len(_VERBS)), rng.randrange(len(_NOUNS))
        if ((verb + 3 * noun) % 6 == 0) == held_out:
            return _VERBS[verb], _NOUNS[noun]


def _named(rng: random.Random, verb: str, noun: str) -> str:
    style = rng.random()
    if style < 0.7:
        return f"{verb}_{noun}"
    return f"{verb}{noun.capitalize()}" if style < 0.85 else f"{verb.capitalize()}{noun.capitalize()}"


def anything(rng: random.Random, *, held_out: bool = False) -> Task:
    """Ask for a call of a function whose name and keys are drawn at random."""
    verb, noun = _verb_noun(rng, held_out=held_out)
    name = _named(rng, verb, noun)
    call = {key: _value(rng, key) for key in rng.sample(_KEYS, rng.choice((1, 1, 2)))}
    kinds = {key: {"type": "integer" if isinstance(value, int) else "string"} for key, value in call.items()}
    tool = _declared(rng, name, f"{verb.capitalize()} the {noun}.", kinds)
    pairs = " and ".join(f"{key} {value}" for key, value in call.items())
    ask = rng.choice(_ASKS_HELD_OUT if held_out else _ASKS).format(
        Verb=verb.capitalize(), verb=verb, noun=noun, name=name, pairs=pairs
    )
    word = rng.choice((rng.choice(_WORDS), rng.choice(_PEOPLE), "done", "ok", "failed", str(rng.randint(0, 999))))
    result = word if rng.random() < 0.6 else _dumps({rng.choice(("result", "status", noun)): word})
    answer = f"The result is {word}."
    return Task(tool, ask, (call,), (result,), answer, (answer,))


_TASKS: Final[tuple[Callable[..., Task], ...]] = (weather, clock, addition, anything, anything, anything)


def _others(rng: random.Random, count: int, taken: str) -> list[dict[str, Any]]:
    """Return declarations of ``count`` functions whose names differ from ``taken``."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        task = rng.choice((weather, clock, addition, anything, anything, anything, anything))(rng)
        if task.name.casefold() != taken.casefold():
            found[task.name] = task.tool
    return list(found.values())


def _offered(rng: random.Random, task: Task) -> tuple[dict[str, Any], ...]:
    """Return the task's function among others that have nothing to do with it."""
    kind = task.name.casefold()
    near = next((word for word in ("weather", "time", "clock", "add", "calculat") if word in kind), "")
    offered = [task.tool, *_others(rng, rng.choice((0, 0, 1, 1, 2, 3)), task.name)]
    if near:  # two clocks or two adders would leave the choice to chance
        alike = ("time", "clock") if near in {"time", "clock"} else (near,)
        alike = ("add", "calculat") if near in {"add", "calculat"} else alike
        offered = offered[:1] + [
            tool for tool in offered[1:] if not any(word in tool["function"]["name"].casefold() for word in alike)
        ]
    rng.shuffle(offered)
    return tuple(offered)


def conversation(rng: random.Random) -> Chat:
    """Return a chat with functions on offer: mostly calls, their results and answers, else an ordinary question."""
    if rng.random() < 0.25:
        question = _ordinary(rng)
        return Chat(
            (Message("user", question.ask), Message("assistant", question.answer)),
            tuple(_others(rng, rng.choice((1, 1, 2, 3)), "")),
        )
    task = rng.choice(_TASKS)(rng)
    turns = task.turns()
    step = rng.random()
    if step < 0.25:  # the call alone: the decision and the copying are what is hard
        turns = turns[:2]
    elif step < 0.35:
        question = _ordinary(rng)
        turns += [Message("user", question.ask), Message("assistant", question.answer)]
    return Chat(tuple(turns), _offered(rng, task))


def _ordinary(rng: random.Random) -> Question:
    if rng.random() < 0.25:
        return small_talk.talk(rng)
    if rng.random() < 0.1:
        return small_talk.unknown(rng)
    kind = rng.choice(("what", "what", "what", "brief", "why"))
    return glossary.question(rng, rng.choice(glossary.terms()), kind=kind, held_out=False)


def evaluation(seed: int) -> Iterator[Question]:
    """Yield held-out wordings and names: 60 calls, 40 results to put into words, 30 questions that need no call."""
    rng = random.Random(seed)
    for number in range(60):
        known = number % 2 == 0
        task = rng.choice((weather, clock, addition))(rng, held_out=True) if known else anything(rng, held_out=True)
        category = "calls, usual tools" if known else "calls, unseen tools"
        yield Question(category, task.ask, task.call_text(), (task.call_text(),), tools=_offered(rng, task))
    for _ in range(40):
        task = rng.choice(_TASKS)(rng, held_out=True)
        history = tuple(task.turns()[:-1])
        yield Question("results in words", "", task.answer, task.keys, history, tools=_offered(rng, task))
    for _ in range(30):
        question = glossary.question(rng, rng.choice(glossary.terms()), kind="what", held_out=True)
        offered = tuple(_others(rng, rng.choice((1, 2)), ""))
        yield Question("no call needed", question.ask, question.answer, question.keys, tools=offered)
