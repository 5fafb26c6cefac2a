"""Pages of order `page-major-1` as pages of order `page-major-pairs-1`, and back."""

from __future__ import annotations

import torch


def paired(pages: torch.Tensor) -> torch.Tensor:
    """`[..., 2, Hkv, P, D]` with pairs side by side; new memory of the same shape."""
    keys, values = pages.unbind(-4)
    keys = keys.unflatten(-1, (-1, 2)).transpose(-3, -2)  # [..., D / 2, P, 2]
    values = values.unflatten(-2, (-1, 2)).transpose(-2, -1)  # [..., P / 2, D, 2]
    return torch.stack(
        (keys.reshape(keys_shape := pages.shape[:-4] + pages.shape[-3:]), values.reshape(keys_shape)), -4
    )


def unpaired(pages: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    page_size, head_dim = pages.shape[-2:]
    keys, values = pages.unbind(-4)
    keys = keys.flatten(-2).unflatten(-1, (head_dim // 2, page_size, 2)).transpose(-3, -2).flatten(-2)
    values = values.flatten(-2).unflatten(-1, (page_size // 2, head_dim, 2)).transpose(-2, -1).flatten(-3, -2)
    return torch.stack((keys, values), -4)
