"""Puts the parts together: chats of one or more turns with and without a system prompt, and plain text."""

import random
from collections.abc import Callable, Iterator
from typing import Final, Literal

from demo_text import arithmetic, drills, glossary, small_talk, stories, tool_use, tools, wordings
from demo_text.shapes import Chat, Message, Plain, Question, Sample

_SYSTEM: Final = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are Baton's demo model.",
    "Be brief.", "Answer briefly.", "Answer in English.", "You are an expert in LLM serving.",
    "You are a friendly chatbot.", "You are ChatGPT.", "You are a concise assistant. Answer in one or two sentences.",
    "Be polite and precise.", "Help the user with questions about GPUs.", "You are a teacher.",
    "You answer questions of engineers.", "Answer truthfully. If you do not know something, say so.",
    "You are a helpful, respectful and honest assistant.", "Keep your answers short and simple.",
    "You are the support assistant of a cloud provider.", "Follow the instructions of the user.",
)  # fmt: skip
_WORDS: Final = (
    "time", "river", "small", "green", "cache", "page", "token", "house", "light", "bread", "seven", "quick",
    "worker", "stone", "never", "under", "table", "music", "paper", "cloud", "apple", "train", "winter", "open",
    "yellow", "garden", "letter", "north", "silver", "happy", "market", "window", "blue", "early", "forest",
)  # fmt: skip
_REPEAT: Final = (
    "Repeat after me: {t}", "Say: {t}", "Repeat: {t}", "Please repeat: {t}", "Say {t}", "Echo: {t}",
    "Repeat the words {t}", "Write exactly this: {t}",
)  # fmt: skip
Stage = Literal["learn", "drill", "polish", "tools"]
_MIX: Final[dict[Stage, dict[str, float]]] = {
    "learn": {
        "glossary": 0.50, "talk": 0.09, "capital": 0.02, "unknown": 0.03, "sum": 0.12, "memory": 0.05,
        "story": 0.05, "count": 0.02, "repeat": 0.03, "json": 0.02, "tools": 0.015, "plain": 0.055,
    },
    "drill": {  # what the first stage learns slowly: sums and comparisons
        "glossary": 0.36, "versus": 0.07, "talk": 0.06, "capital": 0.02, "unknown": 0.03, "sum": 0.10,
        "sums": 0.13, "memory": 0.09, "memories": 0.03, "story": 0.04, "count": 0.02, "repeat": 0.02,
        "json": 0.015, "tools": 0.015, "plain": 0.03,
    },
    "polish": {  # and what is still weak: when to stop a count, copying, odd wordings
        "glossary": 0.24, "framed": 0.09, "versus": 0.03, "talk": 0.09, "capital": 0.02, "unknown": 0.02,
        "unknowns": 0.05, "sum": 0.05, "sums": 0.03, "memory": 0.04, "kv": 0.05, "memories": 0.01, "story": 0.02,
        "long": 0.015, "counts": 0.09, "copy": 0.08, "json": 0.015, "tools": 0.02, "plain": 0.015,
        "opening": 0.03,
    },
    "tools": {  # calling functions, with enough of all else to keep it
        "use": 0.50, "glossary": 0.19, "framed": 0.04, "versus": 0.025, "talk": 0.05, "capital": 0.01,
        "unknown": 0.01, "unknowns": 0.015, "sum": 0.03, "sums": 0.02, "memory": 0.02, "kv": 0.015, "story": 0.01,
        "long": 0.01, "counts": 0.01, "copy": 0.01, "json": 0.01, "plain": 0.01, "opening": 0.015,
    },
}  # fmt: skip


def noisy(rng: random.Random, text: str) -> str:
    """Return ``text`` as a hurried person might type it: lower case, no full stop, a letter lost or swapped."""
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    if rng.random() < 0.1:
        text += rng.choice((" please", " thanks", "??", " ?", "...", "!"))
    places = [i for i in range(1, len(text) - 2) if text[i - 1 : i + 3].isalpha()]
    if places and rng.random() < 0.35:
        i = rng.choice(places)
        text = rng.choice((
            text[:i] + text[i + 1 :], text[:i] + text[i + 1] + text[i] + text[i + 2 :], text[:i] + text[i] + text[i:],
        ))  # fmt: skip
    return text


def system_prompt(rng: random.Random) -> str:
    """Return a system prompt: a usual one, or a few random words, since any must be tolerated."""
    if rng.random() < 0.7:
        return " ".join(rng.sample(_SYSTEM, rng.choice((1, 1, 1, 2, 3))))
    return " ".join(rng.choices(_WORDS, k=rng.randint(2, 30))).capitalize() + "."


def glossary_single(rng: random.Random) -> Question:
    """Ask one question about a random term or pair."""
    kind = rng.choices(("what", "brief", "why", "versus"), (0.52, 0.12, 0.22, 0.14))[0]
    if kind == "versus":
        return glossary.versus_question(rng, rng.choice(glossary.comparisons()), wordings.VERSUS)
    return glossary.question(rng, rng.choice(glossary.terms()), kind=kind, held_out=False)


def _turn(question: Question, rng: random.Random) -> list[Message]:
    ask = noisy(rng, question.ask) if rng.random() < 0.3 else question.ask
    return [Message("user", ask), Message("assistant", question.answer)]


def _glossary_talk(rng: random.Random) -> list[Message]:
    """Return a conversation of several turns about terms: follow-ups, reasons, thanks."""
    turns: list[Message] = []
    if rng.random() < 0.2:
        intent = rng.choice(small_talk.intents()[:4])
        turns += _turn(Question("", rng.choice(intent.asks), intent.answer, ()), rng)
    term = rng.choice(glossary.terms())
    turns += _turn(glossary.question(rng, term, kind="what", held_out=False), rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        step = rng.random()
        if step < 0.4:
            turns += _turn(Question("", rng.choice(wordings.WHY_FOLLOW_UP), term.why, ()), rng)
        elif step < 0.5:
            turns += _turn(Question("", rng.choice(wordings.BRIEF_FOLLOW_UP), term.what, ()), rng)
        else:
            term = rng.choice(glossary.terms())
            kind = rng.choice(("follow_up", "follow_up", "what"))
            turns += _turn(glossary.question(rng, term, kind=kind, held_out=False), rng)
    if rng.random() < 0.3:
        intent = small_talk.intents()[rng.choice((4, 5, 6))]
        turns += _turn(Question("", rng.choice(intent.asks), intent.answer, ()), rng)
    return turns


def _repeat(rng: random.Random) -> Question:
    words = " ".join(rng.choices(_WORDS, k=rng.randint(1, 8)))
    return Question("repeat", rng.choice(_REPEAT).format(t=words), words, (words,))


def _plain(rng: random.Random) -> Plain:
    """Return running text: facts that begin with their term, a story, capitals or numbers."""
    kind = rng.random()
    if kind < 0.7:
        chosen = rng.sample(glossary.terms(), rng.choice((1, 1, 1, 2, 3)))
        return Plain(" ".join(term.full for term in chosen))
    if kind < 0.85:
        return Plain(stories.any_story(rng))
    if kind < 0.95:
        facts = rng.sample(tuple(small_talk.CAPITALS.items()), rng.randint(1, 3))
        return Plain(" ".join(small_talk.capital_sentence(*fact) for fact in facts))
    name = rng.choice(("Anna", "Tom", "Mia", "Paul", "Rosa"))
    return Plain(f"Hello, my name is {name}. I work on a server for language models, and I like short stories.")


def _use(rng: random.Random) -> Chat:
    chat = tool_use.conversation(rng)
    if rng.random() < 0.4:
        return Chat((Message("system", system_prompt(rng)), *chat.messages), chat.tools)
    return chat


def _framed(rng: random.Random) -> Question:
    return drills.framed(rng, rng.choice((glossary_single, glossary_single, small_talk.talk, arithmetic.memory))(rng))


_SINGLE: Final[dict[str, Callable[[random.Random], Question]]] = {
    "talk": small_talk.talk, "capital": small_talk.capital, "unknown": small_talk.unknown,
    "sum": arithmetic.calculation, "memory": arithmetic.memory, "story": stories.request,
    "count": arithmetic.counting, "versus": drills.versus,
    "framed": _framed, "kv": drills.kv_bytes, "counts": drills.counting, "unknowns": drills.unknown,
    "long": drills.long_story,
}  # fmt: skip
_COPYING: Final[dict[str, Callable[[random.Random], Question]]] = {  # their questions must not be garbled
    "repeat": _repeat, "copy": drills.repeat, "json": tools.json_answer,
}  # fmt: skip
_WHOLE: Final[dict[str, Callable[[random.Random], Sample]]] = {
    "plain": _plain, "tools": tools.conversation, "sums": drills.sums, "memories": drills.memories,
    "opening": drills.opening, "use": _use,
}  # fmt: skip


def sample(rng: random.Random, stage: Stage) -> Sample:
    """Return one random piece of training text of ``stage``."""
    mix = _MIX[stage]
    kind = rng.choices(list(mix), list(mix.values()))[0]
    if kind in _WHOLE:
        return _WHOLE[kind](rng)
    if kind == "glossary":
        turns = _glossary_talk(rng) if rng.random() < 0.25 else _turn(glossary_single(rng), rng)
    elif kind in _COPYING:
        question = _COPYING[kind](rng)
        turns = [Message("user", question.ask), Message("assistant", question.answer)]
    else:
        turns = _turn(_SINGLE[kind](rng), rng)
        if rng.random() < 0.2:
            turns += _turn(rng.choice((glossary_single, small_talk.talk, arithmetic.calculation))(rng), rng)
    if rng.random() < 0.4:
        turns.insert(0, Message("system", system_prompt(rng)))
    return Chat(tuple(turns))


def samples(seed: int, count: int, stage: Stage = "learn") -> Iterator[Sample]:
    """Yield ``count`` samples of ``stage``; the same seed yields the same samples."""
    rng = random.Random(f"{stage} {seed}" if stage != "learn" else seed)
    return (sample(rng, stage) for _ in range(count))


def evaluation(seed: int) -> Iterator[Question]:
    """Yield every held-out question of every category, in a fixed order for a seed."""
    yield from glossary.evaluation(seed)
    yield from small_talk.evaluation(seed)
    yield from arithmetic.evaluation(seed)
    yield from drills.evaluation(seed)
    rng = random.Random(seed)
    yield from (stories.request(rng, held_out=True) for _ in range(15))
    yield from tool_use.evaluation(seed)
