"""How many pages fit: a plan made once, at start, and said in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from fleet.errors import SettingsError

MIN_MODEL_LEN = 128  # tokens; a worker that cannot hold even this is misconfigured
_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The pool that a worker makes.

    Attributes:
        num_pages: of `page_size` tokens.
        page_bytes: of one page.
        max_model_len: longest sequence in tokens; what was asked for, or less if the pool cannot hold that.
        sentence: what fits, and what was cut and why, for the log and `baton doctor`.
    """

    num_pages: int
    page_size: int
    page_bytes: int
    max_model_len: int
    sentence: str

    @property
    def total_bytes(self) -> int:
        """Of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def num_tokens(self) -> int:
        """That fit at once."""
        return self.num_pages * self.page_size


def plan_pool(
    *,
    page_bytes: int,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    available_bytes: int,
    fraction: float = 0.5,
    kv_cache_bytes: int | None = None,
    ceiling_bytes: int | None = None,
) -> PoolPlan:
    """Decide the number of pages.

    Args:
        page_bytes: of one page.
        page_size: tokens per page.
        max_model_len: wanted longest sequence.
        max_num_seqs: sequences that run at once; more pages than they can fill are not taken.
        available_bytes: memory that is free now, after the weights (`available_memory_bytes`).
        fraction: of `available_bytes` to take where `kv_cache_bytes` is None.
        kv_cache_bytes: exact size of the pool; asking for more than is available is refused.
        ceiling_bytes: a further bound, e.g. what is free in `/dev/shm` when the pool lies there.

    Raises:
        SettingsError: `kv_cache_bytes` is more than there is, or what is there does not hold one sequence of
            `min(max_model_len, MIN_MODEL_LEN)` tokens.
    """
    hard_limit = available_bytes if ceiling_bytes is None else min(available_bytes, ceiling_bytes)
    if kv_cache_bytes is not None and kv_cache_bytes > hard_limit:
        raise SettingsError(f"kv_cache_bytes is {_size(kv_cache_bytes)}, but only {_size(hard_limit)} can be had")
    budget = kv_cache_bytes if kv_cache_bytes is not None else min(int(available_bytes * fraction), hard_limit)
    pages_per_sequence = -(-max_model_len // page_size)
    affordable = budget // page_bytes
    least = min(max_model_len, MIN_MODEL_LEN)
    if affordable * page_size < least:
        raise SettingsError(
            f"kv_cache_bytes: {_size(budget)} holds {affordable * page_size} tokens of {_size(page_bytes)} per "
            f"{page_size}; at least {least} are needed, {_size(-(-least // page_size) * page_bytes)}"
        )
    num_pages = min(affordable, pages_per_sequence * max_num_seqs)
    held_len = min(max_model_len, num_pages * page_size)
    sentence = (
        f"{num_pages} pages of {page_size} tokens ({_size(num_pages * page_bytes)}) hold {num_pages * page_size} "
        f"tokens: {num_pages // -(-held_len // page_size)} sequences of {held_len} tokens"
    )
    if held_len < max_model_len:
        sentence += f"; max_model_len is cut from {max_model_len} to {held_len}, which is all that fits"
    return PoolPlan(num_pages, page_size, page_bytes, held_len, sentence)


def available_memory_bytes(*, cgroup_v2: Path = _CGROUP_V2, cgroup_v1: Path = _CGROUP_V1) -> int:
    """Memory that this process may still take: the machine's, or the container's if that is less.

    File pages that the kernel would drop under pressure count as free. The arguments are for tests.
    """
    free = int(psutil.virtual_memory().available)
    for folder, limit_name, usage_name, file_key in (
        (cgroup_v2, "memory.max", "memory.current", "inactive_file"),
        (cgroup_v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number_in(folder / limit_name), _number_in(folder / usage_name)
        if limit is not None and usage is not None:
            reclaimable = _stat(folder / "memory.stat", file_key)
            free = min(free, max(0, limit - usage + reclaimable))
    return free


def _number_in(path: Path) -> int | None:
    """The number that a control file holds; None if there is no file or no limit (`max`)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, key: str) -> int:
    """One line of `memory.stat`, 0 where missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0


def _size(num_bytes: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
