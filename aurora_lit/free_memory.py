"""How much main memory is free for this process: of the machine's, less if a cgroup limits it.

Leaves out what a deployment needs (cli/footprint.py), and the memory of GPUs.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from aurora_lit.cgroups import own_groups

_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
}
"""By version of cgroups: the files of a group's limit and of what it uses, and what memory.stat calls those parts of it
which are of files and can be dropped: pages read once, pages read again, and in version 2 names and inodes."""


def available_bytes(*, root: Path = Path("/")) -> int:
    """Free main memory, or what the limits of this process's cgroups leave of it if that is less.

    What the kernel caches of files counts as free, as in the whole machine's memory: it is dropped before the limit
    ends a process. `root`: see `own_groups`.
    """
    left = [int(psutil.virtual_memory().available)]
    for folder, version in own_groups("memory", root=root):
        limit, usage, cached = _FILES[version]
        try:
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage).read_text()) - sum(int(statistics.get(name, 0)) for name in cached)
            left.append(int((folder / limit).read_text()) - used)
        except (OSError, ValueError, KeyError):  # the group is not visible here, or has no limit: "max"
            continue
    return max(0, min(left))
