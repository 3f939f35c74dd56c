"""How many CPU cores this process may use: those of its affinity, fewer if a cgroup limits its processor time.

`os.cpu_count()` counts the machine's cores. A container with a limit of two cores on a machine of 64 would run 64
threads, which the kernel stops together for most of each period. Leaves out what the cores are used for.

    available_cores()                       # 2
    spin_briefly()                          # before torch is imported
    use_threads(config.engine.threads)      # torch and the kernels compute on so many threads
"""

from __future__ import annotations

import os
from pathlib import Path

from aurora_lit.cgroups import own_groups

PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that bind OpenMP's threads to cores: the main thread, and all that it starts, once torch is loaded."""
_SPINS = "60000"
"""How often a thread that waits for others asks again before it sleeps: for a millisecond, longer than threads of
undisturbed rounds wait. libgomp's own 300,000 take five times as long, at each of the 180 meetings in a pass that
another process has taken a core from."""


def _num_allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_NUM_AT_START = _num_allowed()
"""Before torch is loaded: processes import this file first."""


def available_cores(*, root: Path = Path("/")) -> int:
    """Number of cores that this process may use, at least 1; a limit of 2.5 cores counts as 2.

    The smallest limit of the process's cgroups and of all their parents holds (`cpu.max` in version 2,
    `cpu.cfs_quota_us` and `cpu.cfs_period_us` in version 1). `root`: where /proc and the cgroups are, for tests.
    """
    cores = _NUM_AT_START if any(name in os.environ for name in PINNING) else _num_allowed()
    limits = (_limit(folder, version) for folder, version in own_groups("cpu", root=root))
    return max(1, int(min([cores, *(limit for limit in limits if limit is not None)])))


def spin_briefly() -> None:
    """Let threads that wait for each other sleep soon, unless the environment says something else.

    For this process, if it has not loaded libgomp yet, which torch does, and for those that it starts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def use_threads(threads: int, *, processes: int = 1) -> None:
    """Compute on `threads` threads in this process. 0: its part of the available cores, if `processes` share them.

    Then there are never more threads than torch would use by itself, so OMP_NUM_THREADS holds.
    """
    import torch  # here, because a learner must lower its priority before it imports torch

    torch.set_num_threads(threads or max(1, min(torch.get_num_threads(), available_cores() // processes)))


def _limit(group: Path, version: int) -> float | None:
    """A group's own limit in cores; None if it has none, or if the group is not visible here."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None
