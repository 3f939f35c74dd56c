"""The main memory that is free, by what the system and this process's cgroups say of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from aurora_lit.machine import available_bytes


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_cgroup_leaves_counts_what_is_cached_as_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a parent holds too: a service's own group may have none."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 << 30))

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    mount = "/sys/fs/cgroup" if version == 2 else "/sys/fs/cgroup/memory"
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    write("proc/self/cgroup", "0::/box/app" if version == 2 else "3:cpu:/other\n4:memory:/box/app")
    write("proc/self/mountinfo", f"31 23 0:28 / {mount} rw,relatime - {kind}")
    assert available_bytes(root=tmp_path) == 64 << 30, "no group is visible"
    limit, usage, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    for group, most, used, cached in (("box", 8 << 30, 7 << 30, 5 << 30), ("box/app", None, 6 << 30, 0)):
        write(f"{mount[1:]}/{group}/{limit}", str(most or ("max" if version == 2 else (1 << 63) - 4096)))
        write(f"{mount[1:]}/{group}/{usage}", str(used))
        read_once = cached // 2
        names = (1 << 20 if cached else 0) if version == 2 else 0
        parts = f"{prefix}inactive_file {read_once}\n{prefix}active_file {cached - read_once - names}"
        parts += f"\nslab_reclaimable {names}" if version == 2 else ""
        write(f"{mount[1:]}/{group}/memory.stat", f"anon 5\ninactive_file 3\nactive_file 4\n{parts}")
    assert available_bytes(root=tmp_path) == 6 << 30
    write(f"{mount[1:]}/box/{usage}", str(20 << 30))
    assert available_bytes(root=tmp_path) == 0
