"""Terms of LLM serving: definitions, reasons and comparisons, asked in many wordings."""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from demo_text import wordings
from demo_text.shapes import Message, Question

TERM_FILES = ("glossary.toml", "glossary_model.toml", "glossary_fleet.toml")


@dataclass(frozen=True)
class Term:
    """One entry of the glossary; the fields are described at the top of ``glossary.toml``."""

    names: tuple[str, ...]
    group: str
    what: str
    why: str
    keys: tuple[str, ...]
    why_keys: tuple[str, ...]
    article: str = ""
    plural: bool = False

    @property
    def full(self) -> str:
        """The definition followed by the reason: the ordinary answer."""
        return f"{self.what} {self.why}"

    def say(self, rng: random.Random) -> str:
        """Return one of the names, sometimes with its article."""
        name = self.names[0] if rng.random() < 0.6 else rng.choice(self.names)
        if self.article and name[0].islower() and rng.random() < 0.5:
            return f"{self.article} {name}"
        return name

    def ask(self, template: str, name: str) -> str:
        """Fill ``template`` with ``name`` and the verb forms that agree with it."""
        words = {"be": "are", "do": "do"} if self.plural else {"be": "is", "do": "does"}
        return template.format(x=name, **words)


@dataclass(frozen=True)
class Versus:
    """A pair of terms and how they differ."""

    names: tuple[tuple[str, ...], tuple[str, ...]]
    answer: str
    keys: tuple[str, ...]

    def ask(self, template: str, rng: random.Random) -> str:
        """Fill ``template`` with the two terms in a random order."""
        first, second = rng.sample(self.names, 2)
        return template.format(a=rng.choice(first), b=rng.choice(second), do="does")


def _read(name: str) -> Any:
    return tomllib.loads((resources.files("demo_text") / name).read_text(encoding="utf-8"))


@cache
def terms() -> tuple[Term, ...]:
    """Return every term of the glossary, in the order of the files."""
    entries = [entry for name in TERM_FILES for entry in _read(name)["term"]]
    return msgspec.convert(entries, tuple[Term, ...])


@cache
def comparisons() -> tuple[Versus, ...]:
    """Return every comparison."""
    return msgspec.convert(_read("comparisons.toml")["versus"], tuple[Versus, ...])


def question(rng: random.Random, term: Term, *, kind: str, held_out: bool) -> Question:
    """Ask about ``term``; ``kind`` is what, brief, why, follow_up or why_follow_up."""
    template = rng.choice((wordings.HELD_OUT if held_out else wordings.TRAINING)[kind])
    ask = term.ask(template, term.say(rng))
    if kind.startswith("why"):
        return Question(term.group, ask, term.why, term.why_keys)
    if kind == "brief":
        return Question(term.group, ask, term.what, term.keys)
    return Question(term.group, ask, term.full, term.keys)


def versus_question(rng: random.Random, pair: Versus, templates: Sequence[str]) -> Question:
    """Ask how the two sides of ``pair`` differ, in one of the wordings of ``templates``."""
    return Question("comparisons", pair.ask(rng.choice(templates), rng), pair.answer, pair.keys)


def evaluation(seed: int, per_term: int = 4) -> Iterator[Question]:
    """Yield the held-out questions: ``per_term`` definitions, one brief, two reasons and one follow-up a term.

    Only templates of ``wordings.HELD_OUT`` are used. The category is the term's group, or "reasons",
    "follow-ups" or "comparisons".
    """
    rng = random.Random(seed)
    everything = terms()
    for term in everything:
        for template in rng.sample(wordings.WHAT_HELD_OUT, per_term):
            yield Question(term.group, term.ask(template, term.say(rng)), term.full, term.keys)
        yield question(rng, term, kind="brief", held_out=True)
        for template in rng.sample(wordings.WHY_HELD_OUT, 2):
            yield Question("reasons", term.ask(template, term.say(rng)), term.why, term.why_keys)
        other = rng.choice([one for one in everything if one is not term])
        opening = Question("", other.ask(rng.choice(wordings.WHAT), other.say(rng)), other.full, ())
        history = (*opening.messages(), Message("assistant", opening.answer))
        follow = question(rng, term, kind="follow_up", held_out=True)
        yield Question("follow-ups", follow.ask, follow.answer, follow.keys, history)
        reason = rng.choice(wordings.WHY_FOLLOW_UP_HELD_OUT)
        yield Question("follow-ups", reason, other.why, other.why_keys, history)
    for pair in comparisons():
        for template in wordings.VERSUS_HELD_OUT:
            yield Question("comparisons", pair.ask(template, rng), pair.answer, pair.keys)
