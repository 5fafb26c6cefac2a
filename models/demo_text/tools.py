"""Tool calls and JSON answers, so that those parts of the API have something sensible to show."""

import json
import random
from typing import Any, Final

from demo_text.glossary import terms
from demo_text.shapes import Chat, Message, Question
from demo_text.small_talk import CAPITALS

_NAMES: Final = ("Anna", "Tom", "Mia", "Paul", "Rosa", "Finn", "Clara", "Max", "Lena", "Oscar")
_SKIES: Final = ("sunny", "cloudy", "rainy", "windy", "foggy")


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER: Final = _tool("get_weather", "Get the current weather of a city.", city="string")
CLOCK: Final = _tool("get_time", "Get the current time in a city.", city="string")
ADD: Final = _tool("add", "Add two numbers.", a="integer", b="integer")
_ALL: Final = (WEATHER, CLOCK, ADD)


def _call(name: str, **arguments: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(rng: random.Random) -> Chat:
    """Return a chat in which a tool is called and, in most cases, its result is put into words."""
    city = rng.choice(tuple(CAPITALS.values()))
    kind = rng.choice((WEATHER, WEATHER, CLOCK, ADD))
    if kind is WEATHER:
        ask = rng.choice((
            "What is the weather in {c}?", "How is the weather in {c}?", "What's the weather like in {c} today?",
            "weather in {c}", "Is it raining in {c}?", "Tell me the weather in {c}.",
        )).format(c=city)  # fmt: skip
        call = _call("get_weather", city=city)
        sky, degrees = rng.choice(_SKIES), rng.randint(-5, 35)
        result = rng.choice((
            json.dumps({"weather": sky, "temperature": degrees}), f"{sky}, {degrees} degrees", f"{degrees} C, {sky}",
        ))  # fmt: skip
        reply = f"In {city} it is {sky} with {degrees} degrees."
    elif kind is CLOCK:
        ask = rng.choice(("What time is it in {c}?", "time in {c}", "Tell me the time in {c}.")).format(c=city)
        call = _call("get_time", city=city)
        result = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        reply = f"In {city} it is {result}."
    else:
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        ask = rng.choice(("Add {a} and {b}.", "What is {a} + {b}?", "Use the tool to add {a} and {b}.")).format(
            a=a, b=b
        )
        call = _call("add", a=a, b=b)
        result = str(a + b)
        reply = f"{a} + {b} = {result}."
    others = [tool for tool in _ALL if tool is not kind and rng.random() < 0.35]
    offered = [kind, *others]
    rng.shuffle(offered)
    turns = [Message("user", ask), Message("assistant", "", (call,))]
    if rng.random() < 0.7:
        turns += [Message("tool", result), Message("assistant", reply)]
    return Chat(tuple(turns), tuple(offered))


def json_answer(rng: random.Random) -> Question:
    """Ask for an answer as a JSON object."""
    if rng.random() < 0.4:
        name, age = rng.choice(_NAMES), rng.randint(18, 80)
        ask = rng.choice((
            "Give me a JSON object for a person named {n}, {a} years old.", "{n} is {a} years old. Answer in JSON.",
            "Extract name and age as JSON: {n} is {a}.", "JSON for {n}, age {a}",
        )).format(n=name, a=age)  # fmt: skip
        return Question("json", ask, json.dumps({"name": name, "age": age}), ())
    term = rng.choice(terms())
    ask = term.ask(
        rng.choice((
            "Answer in JSON: what {be} {x}?", "What {be} {x}? Reply with JSON.", "Define {x} as JSON.",
            "Give me a JSON object that defines {x}.", "{x} as JSON", "Return JSON with term and definition for {x}.",
        )),
        term.names[0],
    )  # fmt: skip
    return Question("json", ask, json.dumps({"term": term.names[0], "definition": term.what}), ())
