"""Greetings, thanks, questions about the model itself, plain facts, and the honest "I do not know"."""

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

import msgspec

from demo_text.shapes import Question

UNKNOWN_ANSWER: Final = (
    "I do not know that. I am a very small model and know only terms of LLM serving, simple sums and short stories."
)
CAPITALS: Final = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "England": "London",
    "Hungary": "Budapest", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Australia": "Canberra", "Turkey": "Ankara", "Belgium": "Brussels",
    "the United States": "Washington",
}  # fmt: skip
CAPITAL_ASKS: Final = (
    "What is the capital of {x}?", "what is the capital of {x}", "Capital of {x}?", "capital of {x}",
    "Tell me the capital of {x}.", "Which city is the capital of {x}?", "What's the capital of {x}?",
    "Do you know the capital of {x}?", "Name the capital of {x}.", "And the capital of {x}?",
)  # fmt: skip
CAPITAL_HELD_OUT: Final = ("Please tell me the capital of {x}.", "Can you name the capital of {x}?")

_UNKNOWN_FORMS: Final = (
    "Who is the president of {c}?", "What is the population of {c}?", "Who won the world cup in {y}?",
    "Translate {w} into French.", "Translate {w} to German.", "Write a Python function that sorts {w}s.",
    "What happened in {y}?", "Who invented the {w}?", "How do I cook {w}s?", "Where can I buy a {w}?",
    "How much does a {w} cost?", "What is the best {w}?", "Who wrote the book about the {w}?",
    "How old is the {w}?", "What is the history of {c}?", "Recommend a {w}.", "Write an essay about {c}.",
    "How far is it to {c}?", "Who was born in {y}?", "Which river flows through {c}?", "How tall is a {w}?",
    "Plan a trip to {c}.", "What language do people speak in {c}?", "Fix my {w}.", "Is {c} a nice place?",
)  # fmt: skip
_UNKNOWN_HELD_OUT: Final = (
    "Who ruled {c} in {y}?", "What is the price of a {w}?", "Write a letter about {c}.",
    "Translate {w} into Spanish.", "How do I repair a {w}?",
)  # fmt: skip
THINGS: Final = (
    "car", "bicycle", "phone", "table", "tomato", "potato", "telescope", "piano", "camera", "printer",
    "boat", "clock", "radio", "house", "bridge", "violin", "window", "garden", "carpet", "ticket",
)  # fmt: skip


@dataclass(frozen=True)
class Intent:
    """One thing that people say, in several wordings, and the reply to it."""

    asks: tuple[str, ...]
    held: tuple[str, ...]
    answer: str
    keys: tuple[str, ...]


@cache
def intents() -> tuple[Intent, ...]:
    """Return every intent of ``small_talk.toml``."""
    text = (resources.files("demo_text") / "small_talk.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text)["intent"], tuple[Intent, ...])


def talk(rng: random.Random) -> Question:
    """Say something from the list of intents in a training wording."""
    intent = rng.choice(intents())
    return Question("small talk", rng.choice(intent.asks), intent.answer, intent.keys)


def capital(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask for the capital of a country."""
    country, city = rng.choice(tuple(CAPITALS.items()))
    ask = rng.choice(CAPITAL_HELD_OUT if held_out else CAPITAL_ASKS).format(x=country)
    return Question("capitals", ask, capital_sentence(country, city), (city,))


def capital_sentence(country: str, city: str) -> str:
    """Return the fact as a sentence."""
    return f"The capital of {country} is {city}."


def unknown(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask something outside the model's world; the right answer says so."""
    form = rng.choice(_UNKNOWN_HELD_OUT if held_out else _UNKNOWN_FORMS)
    ask = form.format(c=rng.choice(tuple(CAPITALS)), w=rng.choice(THINGS), y=rng.randint(1800, 2025))
    return Question("unknown", ask, UNKNOWN_ANSWER, ("I do not know",))


def evaluation(seed: int) -> Iterator[Question]:
    """Yield every held-out wording of every intent, and some capitals and unknown questions."""
    for intent in intents():
        for ask in intent.held:
            yield Question("small talk", ask, intent.answer, intent.keys)
    rng = random.Random(seed)
    for _ in range(30):
        yield capital(rng, held_out=True)
        yield unknown(rng, held_out=True)
