"""Rotary embedding: cosines and sines for the tokens of one step.

Letters: T tokens of the step, D head_dim, R = D / 2 pairs.
"""

from __future__ import annotations

import math

import torch

from engine.exactness import padded
from engine.rope_config import RopeConfig


class Rotary:
    """Makes `cos` and `sin` for given positions.

    No table over the longest possible length is kept: one step's angles are cheap, are computed once for all layers,
    and take the lengths that dynamic NTK scaling needs.

    Dynamic NTK: `transformers` derives the base from the length that the forward pass reaches, once that exceeds
    the original maximum, and leaves cached keys as they were turned. In `generate` that means: a prompt is turned
    whole by the base of its own length, each later token by the base of the length that ends with it. `lengths` carries
    that number for each token, so chunking, batching and replay change nothing.
    """

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self._config = config
        self._frequencies = inverse_frequencies(config).to(device)  # [R] float32

    @property
    def needs_lengths(self) -> bool:
        """Whether `angles` depends on more than positions."""
        return self._config.kind == "dynamic"

    def cos_sin(
        self, positions: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each `[T, 1, R]` of `dtype`.

        Args:
            positions: [T] int64, from 0.
            lengths: [T] int64, sequence length that decides a token's base; read under dynamic scaling only.
            dtype: of queries and keys.
        """
        num_tokens = positions.shape[0]
        if positions.device.type == "cpu":  # see `engine.exactness`
            positions, lengths = padded(positions), padded(lengths)
        frequencies = self._frequencies
        if self.needs_lengths:
            frequencies = self._dynamic_frequencies(lengths)  # [T, R]
        angles = (positions.to(torch.float32).unsqueeze(-1) * frequencies).unsqueeze(1)  # [T, 1, R] float32
        scale = self._config.attention_factor
        cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        return cos[:num_tokens], sin[:num_tokens]

    def _dynamic_frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """`[T, R]` float32: the NTK base of each token's length, the trained one up to the original maximum."""
        config = self._config
        grown = lengths.clamp(min=config.original_max_positions).to(torch.float32)
        stretch = (config.factor * grown / config.original_max_positions) - (config.factor - 1)
        bases = config.theta * stretch ** (config.dim / (config.dim - 2))
        return 1.0 / bases.unsqueeze(-1) ** _exponents(config.dim, lengths.device)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs `(i, i + D/2)`, the order in which Hugging Face checkpoints store heads.

    Args:
        heads: [T, H, D] queries or keys; not mutated.
        cos: [T, 1, R], same dtype.
        sin: [T, 1, R], same dtype.

    Returns:
        [T, H, D], new memory.
    """
    half = heads.shape[-1] // 2
    turned = heads * torch.cat((cos, cos), dim=-1)
    turned[..., :half].addcmul_(heads[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin)
    return turned


def inverse_frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians per position of each pair, `[R]` float32, before any growth with the length."""
    plain: torch.Tensor = 1.0 / config.theta ** _exponents(config.dim, torch.device("cpu"))
    match config.kind:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / config.factor
        case "llama3":
            return _llama3_frequencies(config, plain)
        case "yarn":
            return _yarn_frequencies(config)


def _exponents(dim: int, device: torch.device) -> torch.Tensor:
    """`2i / D`, `[R]` float32."""
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _llama3_frequencies(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Short waves stay, long waves are stretched by `factor`, those between are blended (Llama 3.1 model card)."""
    wavelengths = 2 * math.pi / plain
    longest_kept = config.original_max_positions / config.high_freq_factor
    shortest_stretched = config.original_max_positions / config.low_freq_factor
    blend = (config.original_max_positions / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - blend) * plain / config.factor + blend * plain
    stretched = torch.where(wavelengths > shortest_stretched, plain / config.factor, plain)
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
    return torch.where(between, blended, stretched)


def _yarn_frequencies(config: RopeConfig) -> torch.Tensor:
    """YaRN's "NTK-by-parts": a ramp over dimensions between keeping and interpolating (arXiv 2309.00071, 3.2)."""
    powers = config.theta ** _exponents(config.dim, torch.device("cpu"))
    kept = 1.0 / powers
    stretched = 1.0 / (config.factor * powers)

    def dimension_of(rotations: float) -> float:
        """The dimension whose wave turns this often over the original length."""
        wave = config.original_max_positions / (rotations * 2 * math.pi)
        return config.dim * math.log(wave) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = torch.arange(config.dim // 2, dtype=torch.float32)
    share_stretched = ((ramp - low) / (high - low)).clamp(0, 1)
    return stretched * share_stretched + kept * (1 - share_stretched)
