"""Load generator for any server that speaks the OpenAI HTTP interface.

Run it as ``python -m loadtest --url http://127.0.0.1:8000/v1 --rate 4``; ``docs/loadtest.md`` says
what each number means. The package stands alone: it imports none of Baton's other packages, so what it
measures is what a stranger's client would see.
"""

__version__ = "0.1.0"
