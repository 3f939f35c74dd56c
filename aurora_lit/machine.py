"""What of the machine this process may use: how many CPU cores, and how much main memory, by its affinity and cgroups.

`os.cpu_count()` counts the machine's cores. A container with a limit of two cores on a machine of 64 would run 64
threads, which the kernel stops together for most of each period. Leaves out what cores and memory are used for, and the
memory of GPUs.

    available_cores()                       # 2
    spin_briefly()                          # before torch is imported
    use_threads(config.engine.threads)      # torch and the kernels compute on so many threads
    available_bytes()                       # 3_221_225_472
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables that bind OpenMP's threads to cores: the main thread, and all that it starts, once torch is loaded."""
_SPINS = "60000"
"""How often a thread that waits for others asks again before it sleeps: for a millisecond, longer than threads of
undisturbed rounds wait. libgomp's own 300,000 take five times as long, at each of the 180 meetings in a pass that
another process has taken a core from."""

_GIVES_BACK_EVERY_S, _WORTH_GIVING_BACK = 10.0, 8 << 20
"""How often, and how many bytes more than after the last time a process must hold."""


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
    limits = (_cores_of(folder, version) for folder, version in _own_groups("cpu", root=root))
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


_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
}
"""By version of cgroups: the files of a group's limit and of what it uses, and what memory.stat calls those parts of it
which are of files and can be dropped: pages read once, pages read again, and in version 2 names and inodes."""


def available_bytes(*, root: Path = Path("/")) -> int:
    """Free main memory, or what the limits of this process's cgroups leave of it if that is less.

    What the kernel caches of files counts as free, as in the whole machine's memory: it is dropped before the limit
    ends a process. `root`: as `available_cores`'s.
    """
    import psutil  # here, because processes import this file before they know whether they need it

    left = [int(psutil.virtual_memory().available)]
    for folder, version in _own_groups("memory", root=root):
        limit, usage, cached = _MEMORY_FILES[version]
        try:
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage).read_text()) - sum(int(statistics.get(name, 0)) for name in cached)
            left.append(int((folder / limit).read_text()) - used)
        except (OSError, ValueError, KeyError):  # the group is not visible here, or has no limit: "max"
            continue
    return max(0, min(left))


def _cores_of(group: Path, version: int) -> float | None:
    """A group's own limit in cores; None if it has none, or if the group is not visible here."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None


# -- cgroups, in version 1 and 2 (cgroups(7)) --------------------------------------------------------------------------


def _own_groups(controller: str, *, root: Path) -> Iterator[tuple[Path, int]]:
    """Folder and version of each group that limits `controller` for this process; not all of them need be visible."""
    try:
        groups, mounts = (_lines(root / "proc/self" / name) for name in ("cgroup", "mountinfo"))
    except OSError:  # not Linux
        return
    mounted = _mounted_cgroups(mounts, controller)
    for line in groups:  # "ID:CONTROLLERS:PATH", without controllers in version 2
        _, controllers, path = line.split(":", 2)
        version = 1 if controller in controllers.split(",") else 2 if not controllers else 0
        if version not in mounted:
            continue
        mount_root, folder = mounted[version]
        own = PurePosixPath(path)
        if own.is_relative_to(mount_root):  # in a container the hierarchy may be mounted from its own group on
            own = "/" / own.relative_to(mount_root)
        for group in (own, *own.parents):
            yield root / folder.lstrip("/") / str(group).lstrip("/"), version


def _lines(path: Path) -> list[str]:
    """Paths in it may be of any bytes, and hold what str.splitlines takes for the end of a line."""
    return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")


def _mounted_cgroups(mounts: list[str], controller: str) -> dict[int, tuple[str, str]]:
    """By version: which group is mounted, and where. Of version 1 only the hierarchy of the controller."""
    mounted = {}
    for line in mounts:  # "ID PARENT DEVICE ROOT FOLDER OPTIONS … - TYPE SOURCE OPTIONS", see proc(5)
        before, _, after = line.partition(" - ")
        (_, _, _, mount_root, folder, *_), (kind, *_, options) = before.split(), after.split()
        if kind == "cgroup2":
            mounted[2] = (mount_root, folder)
        elif kind == "cgroup" and controller in options.split(","):
            mounted[1] = (mount_root, folder)
    return mounted


def give_back_freed_memory() -> None:
    """Return what was freed to the system, after work that needed much for a moment; without glibc nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_giving_back_freed_memory() -> None:
    """Do so in a thread from now on, whenever this process has grown: what one burst of requests took returns."""
    import psutil  # as above

    def run() -> None:
        process, least = psutil.Process(), 0
        while True:
            time.sleep(_GIVES_BACK_EVERY_S)
            if process.memory_info().rss > least + _WORTH_GIVING_BACK:
                give_back_freed_memory()
                least = process.memory_info().rss

    threading.Thread(target=run, name="freed-memory", daemon=True).start()
