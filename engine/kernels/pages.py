"""Pages of all layers to and from one contiguous buffer, as a hand-off stages them. Letters in `engine.kernels`."""
# ruff: noqa: N803

from __future__ import annotations

import math

import torch
import triton.language as tl

from engine.kernels.jit import kernel, power_of_two, tiles

# The widest words that Triton moves as integers first; a page of any real model is a multiple of the first.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
_TILE_WORDS = 2048


def gather_pages(pool: torch.Tensor, page_ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy pages end to end into `staging`. Graph-safe.

    Args:
        pool: [N, ...] contiguous, any dtype; not mutated.
        page_ids: [n] int32 or int64; a negative id leaves its place in `staging` as it is.
        staging: [n or more, ...] contiguous, shaped and typed as `pool` but for the count; mutated.
    """
    _launch(pool, page_ids, staging, scatters=False)


def scatter_pages(staging: torch.Tensor, page_ids: torch.Tensor, pool: torch.Tensor) -> None:
    """Copy pages from `staging` to where they belong. Graph-safe.

    Args:
        staging: [n or more, ...] contiguous; not mutated.
        page_ids: [n] int32 or int64, without repeats; a negative id skips its page.
        pool: [N, ...] contiguous; mutated.
    """
    _launch(pool, page_ids, staging, scatters=True)


def gather_pages_twin(pool: torch.Tensor, page_ids: torch.Tensor, staging: torch.Tensor) -> None:
    """Specification of `gather_pages`."""
    kept = torch.nonzero(page_ids >= 0).squeeze(1)
    staging[kept] = pool[page_ids[kept].to(torch.int64)]


def scatter_pages_twin(staging: torch.Tensor, page_ids: torch.Tensor, pool: torch.Tensor) -> None:
    """Specification of `scatter_pages`."""
    kept = torch.nonzero(page_ids >= 0).squeeze(1)
    pool[page_ids[kept].to(torch.int64)] = staging[kept]


def _launch(pool: torch.Tensor, page_ids: torch.Tensor, staging: torch.Tensor, *, scatters: bool) -> None:
    if pool.shape[1:] != staging.shape[1:] or pool.dtype != staging.dtype or staging.shape[0] < page_ids.shape[0]:
        raise ValueError(
            f"{page_ids.shape[0]} pages of {list(pool.shape[1:])} {pool.dtype} "
            f"against a buffer of {list(staging.shape)} {staging.dtype}"
        )
    if not pool.is_contiguous() or not staging.is_contiguous():
        raise ValueError("pages move between contiguous tensors")
    page_bytes = math.prod(pool.shape[1:]) * pool.dtype.itemsize
    if page_ids.shape[0] == 0 or page_bytes == 0:
        return
    word = next(dtype for dtype in _WORDS if not (page_bytes | pool.data_ptr() | staging.data_ptr()) % dtype.itemsize)
    num_words = page_bytes // word.itemsize
    tile = min(_TILE_WORDS, power_of_two(num_words))
    _copy_pages[(page_ids.shape[0], tiles(num_words, tile))](
        pool.view(-1).view(word),
        page_ids,
        staging.view(-1).view(word),
        NUM_WORDS=num_words,
        TILE=tile,
        SCATTERS=scatters,
    )


@kernel
def _copy_pages(
    pool: tl.tensor,
    page_ids: tl.tensor,
    staging: tl.tensor,
    NUM_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    SCATTERS: tl.constexpr,
) -> None:
    """One program: TILE words of one page."""
    place = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = words < NUM_WORDS
    page = tl.load(page_ids + place).to(tl.int64)
    if page >= 0:
        in_pool = pool + page * NUM_WORDS + words
        staged = staging + place * NUM_WORDS + words
        if SCATTERS:
            tl.store(in_pool, tl.load(staged, mask=inside), mask=inside)
        else:
            tl.store(staged, tl.load(in_pool, mask=inside), mask=inside)
