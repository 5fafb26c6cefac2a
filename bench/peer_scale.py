"""How much `bench/peers.py` asks of each server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How much is asked.

    Attributes:
        streams: how many at once, one figure each. stream_prompt, outputs: tokens of their prompts and answers.
        prompts, repeats: prompt lengths, and how many of each are timed.
        intruder: shortest and longest prompt that keeps coming; phase_s: for how long.
        running_outputs: tokens of the streams beside those: many, since a stream's first interval holds its hand-off
            and must not be one of a hundred.
    """

    streams: tuple[int, ...]
    stream_prompt: int
    outputs: int
    prompts: tuple[int, ...]
    repeats: tuple[int, ...]
    intruder: tuple[int, int]
    phase_s: float
    running_outputs: int
    kv_bytes: int
    max_model_len: int


FULL = Scale((1, 8, 32), 64, 256, (1024, 4096), (3, 2), (2048, 4096), 24.0, 320, 2 * 2**30, 8192)
REHEARSAL = Scale((1, 4), 16, 240, (128, 256), (2, 1), (128, 256), 3.0, 320, 2**28, 1024)
