"""How many cores this process may use: its affinity, and the quota of its control group if that is less."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """At least 1; a quota of 2.5 cores counts as 2. The argument is for tests."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(cgroup)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Cores granted by the control group (v2, then v1), None where there is no limit."""
    words = _words(cgroup / "cpu.max")
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _words(cgroup / "cpu" / "cpu.cfs_quota_us"), _words(cgroup / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def threads_per_worker(num_workers: int, cores: int) -> int:
    """An even share of the cores; where there are more than workers, one is left to the gateway."""
    spare = cores - 1 if cores > num_workers else cores
    return max(1, spare // num_workers)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
