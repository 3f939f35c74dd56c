"""The cgroups that limit this process: its own and all their parents, in version 1 and 2 (cgroups(7)).

Leaves out what a limit means: cores.py reads that of the processor, free_memory.py that of memory.

    for folder, version in own_groups("cpu"):
        limit = (folder / "cpu.max").read_text()
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def own_groups(controller: str, *, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Folder and version of each group that limits `controller` for this process; not all of them need be visible.

    `root`: where /proc and the cgroups are, for tests.
    """
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
