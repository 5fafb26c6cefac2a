"""The rotary part of `config.json`, in both spellings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fleet.errors import UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how it is stretched.

    Attributes:
        kind: `linear` (position interpolation, arXiv 2306.15595), `dynamic` (NTK-aware, base grows with the length),
            `llama3` (by wavelength), `yarn` (arXiv 2309.00071).
        theta: base of the frequencies.
        dim: how many dimensions of a head turn; here always all of them.
        original_max_positions: length the frequencies were trained for, before stretching.
        max_length: longest sequence the stretched embedding is made for: for `linear` and `dynamic`
            `max_position_embeddings * factor`, for `yarn` `original_max_positions * factor`, else
            `max_position_embeddings`. The larger of this and `max_position_embeddings`.
        factor: of stretching.
        low_freq_factor, high_freq_factor: llama3 only.
        beta_fast, beta_slow, truncate: yarn's ramp.
        attention_factor: multiplies cosine and sine, resolved from `mscale` and `mscale_all_dim` where not given.
    """

    kind: RopeKind
    theta: float
    dim: int
    original_max_positions: int
    max_length: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(raw: dict[str, Any], *, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4).

    Raises UnsupportedModel naming an unknown type, partial rotation, or a missing or bad parameter.
    """
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise UnsupportedModel("config.json: rope_scaling or rope_parameters must be an object")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UnsupportedModel(f"rope_parameters per layer type ({', '.join(scaling)}) are not supported")
    named = scaling.get("rope_type", scaling.get("type", "default"))
    kind = next((known for known in _KINDS if known == named), None)
    if kind is None:
        raise UnsupportedModel(f"rope type {named!r} is not supported; supported are {', '.join(_KINDS)}")
    for holder in (scaling, raw):
        partial = holder.get("partial_rotary_factor")
        if partial is not None and partial != 1:
            raise UnsupportedModel(f"partial_rotary_factor={partial} is not supported; heads turn whole")
    reader = _Reader({"rope_theta": raw.get("rope_theta"), **_given(scaling)}, kind)
    theta = reader.number("rope_theta", 10_000.0)
    if kind == "default":
        return RopeConfig(
            kind=kind,
            theta=theta,
            dim=head_dim,
            original_max_positions=max_position_embeddings,
            max_length=max_position_embeddings,
        )
    original = max_position_embeddings
    if kind in {"llama3", "yarn"}:
        outside = raw.get("original_max_position_embeddings")
        inside = reader.number("original_max_position_embeddings", max_position_embeddings)
        original = int(outside or inside)
    factor = reader.number("factor", max_position_embeddings / original if kind == "yarn" else None)
    stretched = max_position_embeddings if kind == "llama3" else int(original * factor)
    return RopeConfig(
        kind=kind,
        theta=theta,
        dim=head_dim,
        original_max_positions=original,
        max_length=max(stretched, max_position_embeddings),
        factor=factor,
        low_freq_factor=reader.number("low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=reader.number("high_freq_factor", None if kind == "llama3" else 4.0),
        beta_fast=reader.number("beta_fast", 32.0),
        beta_slow=reader.number("beta_slow", 1.0),
        truncate=bool(scaling.get("truncate", True)),
        attention_factor=_attention_factor(reader, factor) if kind == "yarn" else 1.0,
    )


class _Reader:
    """Numbers out of one rope object, with errors that name the type and the key."""

    def __init__(self, values: dict[str, Any], kind: str) -> None:
        self._values = values
        self._kind = kind

    def number(self, key: str, default: float | None) -> float:
        """A positive number; `default` where absent or null. Raises UnsupportedModel."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise UnsupportedModel(f"rope type {self._kind}: {key} must be a positive number, got {value!r}")
        return float(value)

    def given(self, key: str) -> bool:
        """Whether the key is there and neither null nor zero."""
        return bool(self._values.get(key))


def _given(scaling: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, so that they do not hide values written elsewhere."""
    return {key: value for key, value in scaling.items() if value is not None}


def _attention_factor(reader: _Reader, factor: float) -> float:
    """YaRN's temperature on attention, equation 22; DeepSeek's two `mscale` keys divide two of them."""
    if reader.given("attention_factor"):
        return reader.number("attention_factor", None)
    if reader.given("mscale") and reader.given("mscale_all_dim"):
        upper = _mscale(factor, reader.number("mscale", None))
        return upper / _mscale(factor, reader.number("mscale_all_dim", None))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    """`0.1 * weight * ln(factor) + 1`, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
