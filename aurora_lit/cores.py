"""How many CPU cores this process may use: those of its affinity, fewer if a cgroup limits its processor time.

`os.cpu_count()` counts the machine's cores. A container with a limit of two cores on a machine of 64 would run 64
threads, which the kernel stops together for most of each period. Leaves out what the cores are used for.

    available_cores()                       # 2
    use_threads(config.engine.threads)      # torch and the kernels compute on so many threads
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cores(*, root: Path = Path("/")) -> int:
    """Number of cores that this process may use, at least 1; a limit of 2.5 cores counts as 2.

    The smallest limit of the process's cgroups and of all their parents holds (`cpu.max` in version 2,
    `cpu.cfs_quota_us` and `cpu.cfs_period_us` in version 1). `root`: where /proc and the cgroups are, for tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_cgroup_limits(root)])))


def use_threads(threads: int, *, processes: int = 1) -> None:
    """Compute on `threads` threads in this process. 0: its part of the available cores, if `processes` share them.

    Then there are never more threads than torch would use by itself, so OMP_NUM_THREADS holds.
    """
    import torch  # here, because a learner must lower its priority before it imports torch

    torch.set_num_threads(threads or max(1, min(torch.get_num_threads(), available_cores() // processes)))


def _cgroup_limits(root: Path) -> Iterator[float]:
    """The limits, in cores, of this process's cgroups and their parents."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    mounted = _mounted_cgroups(mounts)
    for line in groups:  # "ID:CONTROLLERS:PATH", without controllers in version 2
        _, controllers, path = line.split(":", 2)
        version = 1 if "cpu" in controllers.split(",") else 2 if not controllers else 0
        if version not in mounted:
            continue
        mount_root, folder = mounted[version]
        own = PurePosixPath(path)
        if own.is_relative_to(mount_root):  # in a container the hierarchy may be mounted from its own group on
            own = "/" / own.relative_to(mount_root)
        for group in (own, *own.parents):
            limit = _limit(root / folder.lstrip("/") / str(group).lstrip("/"), version)
            if limit is not None:
                yield limit


def _mounted_cgroups(mounts: list[str]) -> dict[int, tuple[str, str]]:
    """By cgroup version: which group is mounted, and where. Of version 1 only the hierarchy that limits CPU time."""
    mounted = {}
    for line in mounts:  # "ID PARENT DEVICE ROOT FOLDER OPTIONS … - TYPE SOURCE OPTIONS", see proc(5)
        before, _, after = line.partition(" - ")
        (_, _, _, mount_root, folder, *_), (kind, *_, options) = before.split(), after.split()
        if kind == "cgroup2":
            mounted[2] = (mount_root, folder)
        elif kind == "cgroup" and "cpu" in options.split(","):
            mounted[1] = (mount_root, folder)
    return mounted


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
