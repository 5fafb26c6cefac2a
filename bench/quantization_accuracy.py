"""What FP8 and int8 cost in accuracy: perplexity of the demo model, logits of a real shape, rounding of pages.

    python bench/quantization_accuracy.py [--texts 24] [--tokens 96] [--skip-shape]

Runs on a CPU. FP8 products quantise their inputs as a GPU's do (`engine.fp8.product_twin`, the specification of both
GPU paths), so the figures are those of a GPU but for the order of sums; int8 rounds weights alone, as CPUs compute it.
Weights are quantised per output channel as they are loaded. Texts are the demo model's kind, of a seed that it was not
trained on. Everything is compared with bfloat16 on the same tokens: difference of logits (largest, root mean square)
and Kullback-Leibler divergence per token.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cpu_engine import PAGE_SIZE, Engine
from model_directory import DEMO
from random_checkpoint import random_checkpoint
from tokenizers import Tokenizer
from torch.nn import functional

from engine import load
from engine.backend import Linear, TorchBackend
from engine.cpu.panels import rounded_by_output
from engine.fp8 import Fp8Matrix, product_twin, quantise, to_e4m3
from engine.plan import Row, StepPlan

UNSEEN_SEED = 90_210
VARIANTS: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "FP8 weights": {"quantization": "fp8"},
    "FP8 pages": {"kv_cache_dtype": "fp8_e4m3"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"},
    "int8 weights": {"quantization": "int8"},
}


class TwinBackend(TorchBackend):
    """Plain torch with FP8 and int8 products by definition."""

    rounds = True

    def named_linear(
        self, name: str, read: Callable[[], torch.Tensor], bias: torch.Tensor | None, *, rounded: bool = False
    ) -> tuple[Linear, int]:
        """Weights are rounded to whole numbers; inputs stay as they are."""
        if not rounded:
            return super().named_linear(name, read, bias)
        numbers, scales = rounded_by_output(read())
        matrix = numbers * scales.unsqueeze(1)
        wide = None if bias is None else bias.float()
        return lambda hidden: functional.linear(hidden.float(), matrix, wide).to(hidden.dtype), numbers.nbytes

    def fp8_linear(self, matrix: Fp8Matrix, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
        """Inputs are quantised too."""
        del dtype
        return lambda hidden: product_twin(hidden, matrix, bias)


@dataclass(frozen=True)
class Reading:
    """One variant's logits over all texts: `[T, V]` float32 each, and the pool that they left behind."""

    logits: list[torch.Tensor]
    pool: torch.Tensor


def read(directory: Path, texts: list[list[int]], how: dict[str, str]) -> Reading:
    """Logits of every token of every text, the second half of each read from pages token by token in a later step."""
    load._backend = lambda *_: TwinBackend()  # noqa: SLF001 - the bench stands in for a device
    model = load.load_model(
        directory,
        "bfloat16",
        quantization=how.get("quantization", "auto"),
        kv_cache_dtype=how.get("kv_cache_dtype", "auto"),
    )
    engine = Engine(model, sum(len(text) + PAGE_SIZE for text in texts))
    found = []
    for text in texts:
        sequence = engine.admit(len(text), 0)
        sequence.token_ids[:] = text
        parts = []
        for start, end in ((0, len(text) // 2), (len(text) // 2, len(text))):
            hidden = engine.runner.hidden_states(StepPlan((Row(sequence, start, end - start, sample=False),)))
            with torch.inference_mode():
                parts.append(model.transformer.logits(hidden))
        found.append(torch.cat(parts))
    return Reading(found, engine.pool)


def perplexity(logits: list[torch.Tensor], texts: list[list[int]]) -> float:
    """Of each next token, over all texts."""
    losses = [
        functional.cross_entropy(one[:-1], torch.tensor(text[1:]), reduction="none")
        for one, text in zip(logits, texts, strict=True)
    ]
    return math.exp(float(torch.cat(losses).double().mean()))


def compare(directory: Path, texts: list[list[int]], *, with_perplexity: bool) -> None:
    """Print one line per variant."""
    print(
        f"{'':14}{'perplexity':>12}{'max':>10}{'RMS':>10}{'RMS, relative':>16}{'KL, nats/token':>16}{'same best':>12}"
    )
    exact: list[torch.Tensor] = []
    for name, how in VARIANTS.items():
        reading = read(directory, texts, how)
        exact = exact or reading.logits
        ours, theirs = torch.cat(exact), torch.cat(reading.logits)
        apart = (theirs - ours).double()
        spread = float((ours - ours.mean(dim=-1, keepdim=True)).double().square().mean().sqrt())
        logs = [functional.log_softmax(one.double(), dim=-1) for one in (ours, theirs)]
        divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean())
        rms = float(apart.square().mean().sqrt())
        same = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
        shown = f"{perplexity(reading.logits, texts):.4f}" if with_perplexity else "-"
        print(
            f"{name:14}{shown:>12}{float(apart.abs().max()):10.4f}{rms:10.4f}{rms / spread:16.4f}"
            f"{divergence:16.2e}{same:12.2%}",
            flush=True,
        )
        if name == "bfloat16" and with_perplexity:
            rounding = rounding_of_pages(reading.pool, sum(-(-len(text) // PAGE_SIZE) for text in texts))
        del reading
        gc.collect()
    if with_perplexity:
        print("\nrounding keys and values to e4m3, relative error (root mean square):")
        for line in rounding:
            print(line)


def rounding_of_pages(pool: torch.Tensor, num_used: int) -> list[str]:
    """What scales would change: one for all, one per layer, one per page and head."""
    lines = []
    for half, name in enumerate(("keys", "values")):
        values = pool[:num_used, :, half].float()  # [n, layers, Hkv, P, D]
        by_layer = values.transpose(0, 1).flatten(1)
        by_head = values.flatten(0, 2).flatten(1)
        rows = {
            "scale 1": (values.flatten(), to_e4m3(values.flatten()).float()),
            "per layer": (by_layer, _rounded(by_layer)),
            "per page and head": (by_head, _rounded(by_head)),
        }
        errors = ", ".join(
            f"{kind} {float((rounded - exact).square().sum().sqrt() / exact.square().sum().sqrt()):.4f}"
            for kind, (exact, rounded) in rows.items()
        )
        largest, small = float(values.abs().max()), float((values.abs() < 2.0**-6).float().mean())
        lines.append(f"  {name}: {errors}; largest {largest:.3g}, {small:.1%} below the smallest normal number")
    return lines


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """`[n, K]` through e4m3 and back, each row by its own scale."""
    values, scales = quantise(rows, tile_rows=1, tile_columns=rows.shape[1])
    return values.float() * scales


def demo_texts(count: int) -> list[list[int]]:
    """Token ids of fixed texts that the demo model was not trained on."""
    sys.path.insert(0, str(DEMO.parent))
    train_demo = importlib.import_module("train_demo")  # needs transformers
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in train_demo.rendered(UNSEEN_SEED, count, "polish")]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=24, help="of the demo model")
    parser.add_argument("--tokens", type=int, default=96, help="random ids through the real shape")
    parser.add_argument("--skip-shape", action="store_true", help="leave the random Qwen3-0.6B out")
    options = parser.parse_args()
    torch.manual_seed(0)
    texts = demo_texts(options.texts)
    print(f"demo model, {len(texts)} texts of {sum(map(len, texts))} tokens")
    compare(DEMO, texts, with_perplexity=True)
    if not options.skip_shape:
        print(f"\nQwen3-0.6B's shape, random weights, {options.tokens} random ids")
        compare(random_checkpoint(), [torch.randint(3, 150_000, (options.tokens,)).tolist()], with_perplexity=False)


if __name__ == "__main__":
    main()
