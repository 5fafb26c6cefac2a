"""Small sums, counting, and the memory arithmetic of serving: bytes of weights and of KV cache."""

import random
from collections.abc import Iterator, Sequence
from typing import Final

from demo_text.shapes import Question

_SYMBOLS: Final = {"+": "plus", "-": "minus", "x": "times"}
ASKS: Final = (
    "What is {q}?", "what is {q}", "{q}", "{q} =", "{q}?", "How much is {q}?", "how much is {q}",
    "Calculate {q}.", "Compute {q}.", "Tell me what {q} is.", "What's {q}?", "Solve {q}.", "{q} = ?",
    "What does {q} make?", "Please calculate {q}.", "Work out {q}.", "And {q}?", "What is the result of {q}?",
)  # fmt: skip
ASKS_HELD_OUT: Final = ("Can you compute {q}?", "How much does {q} make?", "Please tell me what {q} is.")

KV_ASKS: Final = (
    "How many bytes of KV cache per token with {l} layers, {h} KV heads and head size {d} in {f}?",
    "KV bytes per token for {l} layers, {h} KV heads, head_dim {d}, {f}?",
    "Compute the KV bytes per token: {l} layers, {h} KV heads, head_dim {d}, {f}.",
    "How big is the KV cache of one token with {l} layers, {h} KV heads, head_dim {d} and {f}?",
    "What is the KV cache size per token for {l} layers, {h} KV heads and head_dim {d} in {f}?",
)
KV_HELD_OUT: Final = (
    "A model has {l} layers, {h} KV heads and head_dim {d} in {f}. How many KV bytes per token is that?",
    "Suppose {l} layers with {h} KV heads, head_dim {d}, in {f}; how large is the KV cache per token?",
)
WEIGHT_ASKS: Final = (
    "How much memory do {n} billion parameters need in {f}?", "How big is a {n}B model in {f}?",
    "Memory for the weights of a {n}B model in {f}?", "How many GB does a {n}B model take in {f}?",
    "What is the size of {n}B weights in {f}?", "How many gigabytes are {n} billion {f} weights?",
    "{n}B model in {f}, how much memory?",
)  # fmt: skip
WEIGHT_HELD_OUT: Final = (
    "How much memory does a {n}B model need in {f}?", "Tell me how many GB {n} billion weights take in {f}.",
)  # fmt: skip
COUNT_ASKS: Final = (
    "Count from {a} to {b}.", "count from {a} to {b}", "Count from {a} to {b}, please.",
    "Please count from {a} to {b}.", "List the numbers from {a} to {b}.", "Write the numbers from {a} to {b}.",
    "Can you count from {a} to {b}?",
)  # fmt: skip
COUNT_HELD_OUT: Final = ("Could you count from {a} to {b}?", "Give me the numbers from {a} to {b}.")

_LAYERS: Final = (16, 24, 28, 32, 36, 48, 64, 80)
_KV_HEADS: Final = (2, 4, 8)
_BYTES: Final = {"bf16": 2, "FP8": 1}
_BILLIONS: Final = (1, 2, 3, 4, 7, 8, 9, 12, 13, 14, 20, 24, 27, 30, 32, 34, 40, 65, 70, 72)


def _sum(rng: random.Random) -> tuple[int, str, int, int]:
    symbol = rng.choice("+++--x")
    if symbol == "x":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        return a, symbol, b, a * b
    if symbol == "-":
        a = rng.randint(0, 30)
        b = rng.randint(0, a)
        return a, symbol, b, a - b
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return a, symbol, b, a + b


def calculation(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask for a sum or difference of numbers up to 30, or a product of numbers up to 12."""
    a, symbol, b, result = _sum(rng)
    written = rng.choice((symbol, symbol, f" {_SYMBOLS[symbol]} ", "*" if symbol == "x" else symbol))
    gap = "" if written.startswith(" ") or rng.random() < 0.3 else " "
    ask = rng.choice(ASKS_HELD_OUT if held_out else ASKS).format(q=f"{a}{gap}{written}{gap}{b}")
    return Question("arithmetic", ask, f"{a} {symbol} {b} = {result}.", (f"= {result}.",))


def sums(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return several sums without their results, and the same sums with them."""
    drawn = [_sum(rng) for _ in range(rng.randint(2, 14))]
    return [f"{a} {o} {b}" for a, o, b, _ in drawn], [f"{a} {o} {b} = {r}." for a, o, b, r in drawn]


def kv_bytes(rng: random.Random, asks: Sequence[str]) -> Question:
    """Ask for 2 x layers x KV heads x head size x bytes per number, in one of the wordings of ``asks``."""
    layers, heads, head_dim = rng.choice(_LAYERS), rng.choice(_KV_HEADS), rng.choice((64, 128))
    form = rng.choice(tuple(_BYTES))
    total = 2 * layers * heads * head_dim * _BYTES[form]
    ask = rng.choice(asks).format(l=layers, h=heads, d=head_dim, f=form)
    unit = "bytes" if _BYTES[form] > 1 else "byte"
    answer = (
        f"Keys and values: 2 x {layers} layers x {heads} KV heads x {head_dim} x {_BYTES[form]} {unit} = "
        f"{total} bytes per token."
    )
    return Question("memory arithmetic", ask, answer, (f"= {total} bytes",))


def weight_bytes(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask how many gigabytes (10**9 bytes) some billions of weights take."""
    billions = rng.choice(_BILLIONS)
    form, size = rng.choice((("bf16", 2.0), ("FP8", 1.0), ("fp32", 4.0), ("INT4", 0.5)))
    ask = rng.choice(WEIGHT_HELD_OUT if held_out else WEIGHT_ASKS).format(n=billions, f=form)
    per = "half a byte" if size < 1 else f"{size:g} byte{'s' if size > 1 else ''}"
    answer = f"{billions} billion weights x {per} = {billions * size:g} GB."
    return Question("memory arithmetic", ask, answer, (f"= {billions * size:g} GB",))


def memory(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask for bytes of KV cache or of weights."""
    if rng.random() < 0.6:
        return kv_bytes(rng, KV_HELD_OUT if held_out else KV_ASKS)
    return weight_bytes(rng, held_out=held_out)


def counting(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask to count upwards; a stream of numbers makes a lost or doubled token plain to see."""
    if held_out:
        first, length = rng.choice((1, 1, rng.randint(0, 50))), rng.randint(5, 50)
    else:
        first = rng.choice((1, 1, 1, rng.randint(0, 90)))
        length = rng.randint(150, 200) if rng.random() < 0.08 else rng.choice((10, 20, 30, 50, rng.randint(4, 100)))
    last = min(first + length - 1, 200)
    ask = rng.choice(COUNT_HELD_OUT if held_out else COUNT_ASKS).format(a=first, b=last)
    numbers = ", ".join(str(n) for n in range(first, last + 1))
    return Question("counting", ask, f"{numbers}.", (f"{numbers}.",))


def evaluation(seed: int) -> Iterator[Question]:
    """Yield held-out wordings: 80 sums, 30 questions about memory, 15 counts."""
    rng = random.Random(seed)
    yield from (calculation(rng, held_out=True) for _ in range(80))
    yield from (memory(rng, held_out=True) for _ in range(30))
    yield from (counting(rng, held_out=True) for _ in range(15))
