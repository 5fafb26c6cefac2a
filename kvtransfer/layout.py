"""What a page is made of, and the fingerprint by which two workers compare theirs (DESIGN section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fleet.types import PAGE_MAJOR, PAGE_MAJOR_PAIRS, Fingerprint
from kvtransfer.errors import LayoutMismatch

PROTOCOL_VERSION: Final = 1
"""Version of the hand-off protocol; workers of different versions exchange no pages."""

DTYPE_BYTES: Final = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1})
"""Bytes per element of the dtypes that a pool may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Shape and dtype of one page.

    Attributes:
        dtype: a key of `DTYPE_BYTES`; anything else raises ValueError, as does a size below 1.
        axis_order: `PAGE_MAJOR` or `PAGE_MAJOR_PAIRS`; anything else raises ValueError.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    axis_order: str = PAGE_MAJOR

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"page dtype {self.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        if self.axis_order not in (PAGE_MAJOR, PAGE_MAJOR_PAIRS):
            raise ValueError(f"order of axes {self.axis_order!r} is none of {PAGE_MAJOR}, {PAGE_MAJOR_PAIRS}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim, self.page_size) < 1:
            raise ValueError(f"a page needs at least one layer, head, dimension and token: {self}")

    @property
    def page_bytes(self) -> int:
        """Size of one page: keys and values of `page_size` tokens in all layers."""
        elements = self.num_layers * 2 * self.num_kv_heads * self.page_size * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    def fingerprint(self, model_hash: str) -> Fingerprint:
        """What peers compare. `model_hash` covers the model's configuration and weights, not its path."""
        return Fingerprint(
            model=model_hash,
            dtype=self.dtype,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            layout=self.axis_order,
            version=PROTOCOL_VERSION,
        )


def require_equal(*, expected: Fingerprint, got: Fingerprint) -> None:
    """Return if pages may move between the two.

    Raises:
        LayoutMismatch: naming what differs.
    """
    if expected != got:
        raise LayoutMismatch(expected=expected, got=got)
