"""More of what a small model learns slowly: sums, comparisons, stopping a count, copying, saying "I do not know".

The first stage of training uses none of this; the later ones mix it in (see ``dialogue``).
"""

import random
from collections.abc import Iterator
from typing import Final

from demo_text import arithmetic, glossary, small_talk, stories, wordings
from demo_text.shapes import Chat, Message, Plain, Question, Sample

KV_ASKS: Final = (
    "Given {l} layers, {h} KV heads and head_dim {d} in {f}, how many KV bytes per token?",
    "{l} layers, {h} KV heads, head_dim {d}, {f}: KV bytes per token?",
    "My model has {l} layers, {h} KV heads, head_dim {d} and uses {f}. How big is its KV cache per token?",
    "With {l} layers, {h} KV heads and head_dim {d} in {f}, what does one token cost in the KV cache?",
    "The model: {l} layers, {h} KV heads, head_dim {d}, {f}. The question: KV bytes per token.",
)
REPEAT_ASKS: Final = (
    "Repeat after me: {t}", "Say: {t}", "Repeat: {t}", "Please repeat: {t}", "Say {t}", "Echo: {t}",
    "Repeat the words {t}", "Write exactly this: {t}", "repeat after me: {t}", "Copy this: {t}",
    "Can you say {t}", "Say this back to me: {t}", "Print {t}",
)  # fmt: skip
REPEAT_HELD_OUT: Final = ("Please say exactly this: {t}", "Please copy: {t}")
COUNT_TO: Final = ("Count to {b}.", "count to {b}", "Please count to {b}.", "Can you count to {b}?")
_COMMON: Final = (
    "hello", "world", "foo", "bar", "one", "two", "three", "red", "cat", "dog", "sun", "moon", "tree", "baton", "this",
    "is", "a", "test", "the", "stream", "works", "good", "morning", "friend", "we", "like", "tea", "and", "cake",
)  # fmt: skip
_WRITE: Final = ("a report", "a speech", "a song", "an article", "a blog post", "an email", "a book", "a novel")
_ASPECTS: Final = ("size", "weight", "colour", "area", "currency", "anthem", "age", "shape", "height", "name")
_TASKS: Final = ("draw", "paint", "clean", "build", "sell", "open", "design", "carry", "throw away", "use")
_LANGUAGES: Final = ("French", "German", "Italian", "Dutch", "Polish", "Greek", "Latin", "Japanese")
_FRAMES: Final = (
    "{q}", "{q}", "Question: {q}", "I wonder: {q}", "One more thing: {q}", "Hello! {q}", "Ah, {q}", "Well, {q}",
    "Can you answer this? {q}", "{q} I need it for a talk.", "{q} Thank you!", "So: {q}", "Please answer: {q}",
)  # fmt: skip
_STARTS: Final = (
    "The president of the United States is the head of its government.",
    "The future of AI is open, and much of it will run on small and fast models.",
    "Large language models are neural networks that predict the next token of a text.",
    "The quick brown fox jumps over the lazy dog.",
)


def framed(rng: random.Random, question: Question) -> Question:
    """Return ``question`` with a few words before or after it."""
    ask = rng.choice(_FRAMES).format(q=question.ask)
    return Question(question.category, ask, question.answer, question.keys)


def versus(rng: random.Random) -> Question:
    """Compare two terms in one of the further wordings."""
    return glossary.versus_question(rng, rng.choice(glossary.comparisons()), wordings.VERSUS_DRILL)


def sums(rng: random.Random) -> Sample:
    """Return many sums at once: each token of such a text teaches more than one sum in a chat does."""
    open_sums, solved = arithmetic.sums(rng)
    if rng.random() < 0.5:
        return Plain(" ".join(solved))
    ask = rng.choice(("Calculate {q}.", "What are {q}?", "{q}", "Solve these: {q}.")).format(q=", ".join(open_sums))
    return Chat((Message("user", ask), Message("assistant", " ".join(solved))))


def memories(rng: random.Random) -> Sample:
    """Return several lines of memory arithmetic as plain text."""
    return Plain(" ".join(arithmetic.memory(rng).answer for _ in range(rng.randint(2, 5))))


def kv_bytes(rng: random.Random) -> Question:
    """Ask for KV bytes per token in one of the further wordings."""
    return arithmetic.kv_bytes(rng, KV_ASKS)


def counting(rng: random.Random) -> Question:
    """Ask for a count, mostly a short one, since only its end is hard."""
    first = rng.choice((1, 1, rng.randint(0, 99)))
    last = first + (rng.randint(1, 100) if rng.random() < 0.15 else rng.randint(2, 24))
    if first == 1 and rng.random() < 0.4:
        ask = rng.choice(COUNT_TO).format(b=last)
    else:
        ask = rng.choice(arithmetic.COUNT_ASKS).format(a=first, b=last)
    numbers = ", ".join(str(n) for n in range(first, last + 1))
    return Question("counting", ask, f"{numbers}.", (f"{numbers}.",))


def repeat(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask to copy a few words, drawn from all that the glossary says."""
    pool = rng.choice(glossary.terms()).full.split() + list(_COMMON)
    words = " ".join(rng.choices(pool, k=rng.randint(1, 8))).rstrip(".,;:")
    ask = rng.choice(REPEAT_HELD_OUT if held_out else REPEAT_ASKS).format(t=words)
    return Question("repeat", ask, words, (words,))


def unknown(rng: random.Random) -> Question:
    """Ask something that the model cannot know."""
    thing = rng.choice((*small_talk.THINGS, "king", "planet", "movie", "song", "team", "shop", "poet", "law"))
    country = rng.choice(tuple(small_talk.CAPITALS))
    ask = rng.choice((
        "Write {w} about {c}.", "Write {w} about the {t}.", "What is the {a} of {c}?", "What is the {a} of the {t}?",
        "How do I {k} a {t}?", "How can I {k} my {t}?", "Translate {t} into {g}.", "How do you say {t} in {g}?",
        "When was the {t} invented?", "Who owns the {t}?", "Is there a {t} in {c}?", "What is a {t}?",
        "Who governed {c} in {y}?", "What did {c} do in {y}?", "Show me a {t}.", "Which {t} is the best?",
    )).format(
        w=rng.choice(_WRITE), c=country, t=thing, a=rng.choice(_ASPECTS), k=rng.choice(_TASKS),
        g=rng.choice(_LANGUAGES), y=rng.randint(1500, 2025),
    )  # fmt: skip
    return Question("unknown", ask, small_talk.UNKNOWN_ANSWER, ("I do not know",))


def long_story(rng: random.Random) -> Question:
    """Ask for a long story."""
    kind, name = rng.choice(stories.HEROES)
    ask = rng.choice(stories.ASKS_LONG).format(x=kind)
    return Question("stories", ask, stories.story(rng, kind, name, long=True), (kind, name))


def opening(rng: random.Random) -> Sample:
    """Return plain text that begins as people begin prompts for completion."""
    if rng.random() < 0.2:
        return Plain(rng.choice(_STARTS))
    term = rng.choice(glossary.terms())
    name = term.names[0][0].upper() + term.names[0][1:] if term.names[0].islower() else term.names[0]
    middle = "are words" if term.plural else "is a word"
    return Plain(f"{name} {middle} from LLM serving. {term.full}")


def evaluation(seed: int) -> Iterator[Question]:
    """Yield 30 requests to copy words, in held-out wordings."""
    rng = random.Random(seed)
    return (repeat(rng, held_out=True) for _ in range(30))
