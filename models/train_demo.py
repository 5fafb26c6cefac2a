"""Train the demo model from nothing: ``python models/train_demo.py --seed 0 --out models/demo``.

The text comes from ``demo_text`` (seeded), the tokenizer from ``demo_tokenizer``, the architecture from
transformers' Qwen3. Samples are never cut or joined: they are batched by length and padded on the right, which
causal attention makes harmless. Four stages: "learn" sees everything, "drill" and "polish" see more of what is hard,
"tools" teaches calling functions and mixes in the rest so that it stays.
Master weights are fp32, matrix products bf16, and the result is stored as bf16.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import demo_tokenizer
import torch
from demo_text import Plain, Sample, dialogue, samples
from demo_text.shapes import END_OF_TEXT, TURN_END, TURN_START
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE: Final = 3072
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": demo_tokenizer.CONTEXT_TOKENS,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}
GENERATION: Final[dict[str, Any]] = {
    "do_sample": False,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}
PROMPT_WEIGHT: Final = 0.1  # the loss counts answers; a little on prompts keeps plain text fluent
TOKENIZER_SAMPLES: Final = 20_000
TOKENS_PER_BATCH: Final = 4_096  # with padding
SAVE_EVERY_STEPS: Final = 400
POOL_SAMPLES: Final = 4_000  # samples sorted by length together


@dataclass(frozen=True)
class StagePlan:
    """One stage of training: which text, how much of it, for how many steps, at what peak learning rate."""

    stage: dialogue.Stage
    samples: int
    steps: int
    peak_rate: float


PLANS: Final = {
    "learn": StagePlan("learn", samples=40_000, steps=2_000, peak_rate=2e-3),
    "drill": StagePlan("drill", samples=40_000, steps=700, peak_rate=1e-3),
    "polish": StagePlan("polish", samples=40_000, steps=700, peak_rate=1e-3),
    "tools": StagePlan("tools", samples=30_000, steps=1_100, peak_rate=1e-3),
}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample, and for each of them how much predicting it counts."""

    ids: list[int]
    weights: list[float]


def render(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    """Return the text of ``sample`` with its markers; it ends where the model must stop."""
    if isinstance(sample, Plain):
        return sample.text + END_OF_TEXT
    messages = [message.as_dict() for message in sample.messages]
    text = tokenizer.apply_chat_template(messages, tools=list(sample.tools) or None, tokenize=False)
    return str(text).rstrip("\n")


def rendered(seed: int, count: int, stage: dialogue.Stage) -> list[str]:
    """Return ``count`` samples of ``stage`` as text with markers."""
    template_only = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    template_only.chat_template = demo_tokenizer.CHAT_TEMPLATE
    return [render(template_only, one) for one in samples(seed, count, stage)]


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    """Encode rendered text; answers of the assistant and plain texts weigh 1, all else ``PROMPT_WEIGHT``."""
    ids = tokenizer.encode(text).ids
    start, end = tokenizer.token_to_id(TURN_START), tokenizer.token_to_id(TURN_END)
    if start not in ids:
        return Encoded(ids, [1.0] * len(ids))
    opening = tokenizer.encode(f"{TURN_START}assistant\n").ids
    weights = [PROMPT_WEIGHT] * len(ids)
    inside = False
    for i, token in enumerate(ids):
        if inside:
            weights[i] = 1.0
        if token == end:
            inside = False
        elif ids[max(0, i + 1 - len(opening)) : i + 1] == opening:
            inside = True
    return Encoded(ids, weights)


def batches(data: list[Encoded], tokens_per_batch: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Yield batches of samples of like length for ever; each epoch is shuffled anew."""
    while True:
        order = rng.sample(data, len(data))
        for low in range(0, len(order), POOL_SAMPLES):
            pool = sorted(order[low : low + POOL_SAMPLES], key=lambda one: len(one.ids))
            found: list[list[Encoded]] = [[]]
            for one in pool:
                if found[-1] and len(one.ids) * (len(found[-1]) + 1) > tokens_per_batch:
                    found.append([])
                found[-1].append(one)
            rng.shuffle(found)
            yield from found


def loss_of(model: Any, batch: list[Encoded]) -> torch.Tensor:
    """Return the weighted cross-entropy of ``batch``, a scalar in fp32."""
    width = max(len(one.ids) for one in batch)
    ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in batch])  # [B, T] int64
    weights = torch.tensor([one.weights + [0.0] * (width - len(one.ids)) for one in batch])  # [B, T] fp32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # [B, T-1, H]
        logits = functional.linear(hidden.flatten(0, 1), model.lm_head.weight)  # [B * (T-1), V]
    each = functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (each * counted).sum() / counted.sum()


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in the Hugging Face layout; weights are rounded to bf16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, str(out / "model.safetensors.part"), metadata={"format": "pt"})
    (out / "model.safetensors.part").chmod(0o644)  # safetensors writes files that only their owner may read
    (out / "model.safetensors.part").replace(out / "model.safetensors")
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    demo_tokenizer.save(tokenizer, out)


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: 3 % linear warm-up, then half a cosine down to zero."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def prepare(seed: int, count: int, out: Path) -> Tokenizer:
    """Train the tokenizer on ``count`` samples of the first stage and store it in ``out``."""
    tokenizer = demo_tokenizer.train(rendered(seed, count, "learn"), VOCAB_SIZE)
    out.mkdir(parents=True, exist_ok=True)
    demo_tokenizer.save(tokenizer, out)
    return tokenizer


def fresh(seed: int) -> Any:
    """Return the model with random fp32 weights drawn from ``seed``."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**CONFIG, "dtype": "float32"})).float()


def run_stage(model: Any, tokenizer: Tokenizer, plan: StagePlan, seed: int, out: Path) -> None:
    """Train ``model`` in place as ``plan`` says, with a new optimizer, and store it in ``out`` now and then."""
    data = [encode(tokenizer, one) for one in rendered(seed, plan.samples, plan.stage)]
    total = sum(len(one.ids) for one in data)
    print(f"stage {plan.stage}: {len(data)} samples, {total} tokens", flush=True)
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    stream = batches(data, TOKENS_PER_BATCH, random.Random(seed))
    seen, smooth, began = 0, 0.0, time.monotonic()
    for step in range(plan.steps):
        batch = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, plan.steps, plan.peak_rate)
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += sum(len(one.ids) for one in batch)
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step + 1 == plan.steps:
            spent = time.monotonic() - began
            pace = f"{seen} tokens  {seen / spent:.0f} tokens/s  {spent:.0f} s"
            print(f"step {step:5d}  loss {smooth:.4f}  {pace}", flush=True)
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == plan.steps:
            save(model, tokenizer, out)


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the text, the weights and the order")
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder of the checkpoint")
    parser.add_argument("--stage", choices=["all", *PLANS], default="all", help="all but learn go on from --out")
    parser.add_argument("--steps", type=int, help="steps per stage instead of the usual number, for a trial")
    options = parser.parse_args()

    if options.stage not in {"all", "learn"}:
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    else:
        tokenizer = prepare(options.seed, TOKENIZER_SAMPLES, options.out)
        model = fresh(options.seed)
        print(f"{sum(value.numel() for value in model.parameters())} parameters", flush=True)
    for stage, plan in PLANS.items():
        if options.stage not in {"all", stage}:
            continue
        if stage != "learn":  # from the stored bf16 weights, so that the stages may run one by one
            model = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.float32)
        wanted = plan if options.steps is None else replace(plan, steps=options.steps)
        run_stage(model, tokenizer, wanted, options.seed, options.out)


if __name__ == "__main__":
    main()
