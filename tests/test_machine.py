"""The cores and the memory that may be used, by affinity and this process's cgroups; and how long threads spin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import child_environment
from support.fork_host import run_program

from aurora_lit import machine as machine_module
from aurora_lit.machine import available_bytes, available_cores

CORES = sorted(os.sched_getaffinity(0))
V2 = "31 23 0:28 {root} {folder} rw,relatime - cgroup2 cgroup2 rw"
V1 = "32 23 0:29 {root} {folder} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "33 23 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A new interpreter, which torch's threads need to see an environment."""
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)


class FakeMachine:
    """/proc/self and cgroup folders under `root`."""

    def __init__(self, root: Path, *, groups: str, mounts: list[str]) -> None:
        self.root = root
        self.write("proc/self/cgroup", groups)
        self.write("proc/self/mountinfo", "\n".join(["24 1 8:1 / / rw - ext4 /dev/sda rw", *mounts]))

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


def cores_of(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, *, affinity: int = 16) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    return available_cores(root=machine.root)


def test_affinity_limits_the_cores_of_a_real_process() -> None:
    code = "import os; from aurora_lit.machine import available_cores as cores"
    for count in range(1, len(CORES) + 1):
        code += f"\nos.sched_setaffinity(0, {CORES[:count]}); print(cores())"
    found = [int(line) for line in run_program(code).stdout.split()]
    assert found[0] == 1
    assert all(each <= count for count, each in enumerate(found, start=1))


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "pinning"),
    [
        ("aurora_lit.__main__, aurora_lit.machine", {"OMP_PROC_BIND": "true"}),
        ("aurora_lit.serve.engine_process", {"GOMP_CPU_AFFINITY": f"{CORES[0]}-{CORES[-1]}"}),
    ],
)
def test_the_cores_are_those_of_before_openmp_has_bound_this_thread_to_one(
    module: str, pinning: dict[str, str]
) -> None:
    code = f"import {module}, torch; from aurora_lit.machine import available_cores as cores; print(cores())"
    assert int(run(code, child_environment(**pinning)).stdout) == len(CORES)


@pytest.mark.process
def test_a_learner_is_not_bound_to_a_core() -> None:
    code = (
        "import os; from aurora_lit.learn.online.process import _lower_priority as begin; begin(1, 1)\n"
        "import torch; print(len(os.sched_getaffinity(0)))"
    )
    assert int(run(code, child_environment(OMP_PROC_BIND="true", OMP_PLACES="cores")).stdout) == len(CORES)


@pytest.mark.process
def test_threads_budgets_and_niceness_follow_affinity_in_a_real_process() -> None:
    code = f"""
import os
import torch
torch.set_num_threads(4)
os.sched_setaffinity(0, {CORES[:1]})
from aurora_lit.machine import use_threads
use_threads(0)
from aurora_lit.learn.online.budget import Budget
from aurora_lit.serve.engine.thread_budget import ThreadBudget
budget = Budget(idle_share=0.5, share=0.5)
print(torch.get_num_threads(), budget._cpus, ThreadBudget(threads=1)._cores)
"""
    assert run_program(code).stdout == "1 1 1\n"


@pytest.mark.parametrize(
    ("default", "used"),
    [(8, [6, 3, 1, 5]), (2, [2, 2, 1, 5])],  # 2: OMP_NUM_THREADS=2, or two physical cores
)
def test_threads_are_divided_among_processes_and_never_more_than_torch_would_use(
    default: int, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "available_cores", lambda: 6)
    before, found = torch.get_num_threads(), list[int]()
    try:
        for threads, processes in ((0, 1), (0, 2), (0, 16), (5, 2)):
            torch.set_num_threads(default)
            machine_module.use_threads(threads, processes=processes)
            found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == used


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("400000 50000", 8), ("9900000 100000", 16)],
)
def test_the_limit_of_a_cgroup_of_version_2(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [V2.format(root="/", folder="/sys/fs/cgroup")]
    machine = FakeMachine(tmp_path, groups="0::/app.slice/server", mounts=mounts)
    machine.write("sys/fs/cgroup/app.slice/server/cpu.max", limit)
    assert cores_of(machine, monkeypatch) == expected


def test_a_parents_limit_holds_too_and_another_groups_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [V2.format(root="/", folder="/sys/fs/cgroup")]
    machine = FakeMachine(tmp_path, groups="0::/app.slice/server", mounts=mounts)
    machine.write("sys/fs/cgroup/app.slice/server/cpu.max", "800000 100000")
    machine.write("sys/fs/cgroup/other/cpu.max", "100000 100000")
    assert cores_of(machine, monkeypatch) == 8
    # Paths of any bytes, and with what str.splitlines takes for the end of a line.
    odd = ["34 1 8:1 / /mnt/\udcfc rw - ext4 /dev/sdb rw", "35 1 8:1 / /mnt/a\u2028b rw - ext4 /dev/sdc rw", *mounts]
    (tmp_path / "proc/self/mountinfo").write_bytes("\n".join(odd).encode(errors="surrogateescape"))
    machine.write("sys/fs/cgroup/app.slice/cpu.max", "300000 100000")
    assert cores_of(machine, monkeypatch) == 3
    assert cores_of(machine, monkeypatch, affinity=2) == 2


def test_inside_a_container_the_group_is_the_root_of_what_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [V2.format(root="/", folder="/sys/fs/cgroup")]
    machine = FakeMachine(tmp_path, groups="0::/", mounts=mounts)
    machine.write("sys/fs/cgroup/cpu.max", "200000 100000")
    assert cores_of(machine, monkeypatch) == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("350000", 3), ("1000", 1)])
@pytest.mark.parametrize("root", ["/", "/docker/abc"])
def test_the_limit_of_a_cgroup_of_version_1(
    root: str, quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [V1_MEMORY, V1.format(root=root, folder="/sys/fs/cgroup/cpu,cpuacct")]
    machine = FakeMachine(tmp_path, groups="9:memory:/x\n4:cpu,cpuacct:/docker/abc/server\n0::/", mounts=mounts)
    folder = "sys/fs/cgroup/cpu,cpuacct" + ("/docker/abc/server" if root == "/" else "/server")
    machine.write(f"{folder}/cpu.cfs_quota_us", quota)
    machine.write(f"{folder}/cpu.cfs_period_us", "100000")
    assert cores_of(machine, monkeypatch) == expected


def test_a_group_that_is_not_visible_in_a_container_falls_back_to_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [V1.format(root="/docker/xyz", folder="/sys/fs/cgroup/cpu")]
    machine = FakeMachine(tmp_path, groups="4:cpu,cpuacct:/docker/abc", mounts=mounts)
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000")
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert cores_of(machine, monkeypatch) == 2


def test_without_cgroups_or_with_unreadable_files_affinity_alone_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine(tmp_path, groups="0::/a", mounts=[V2.format(root="/", folder="/sys/fs/cgroup")])
    assert cores_of(machine, monkeypatch) == 16
    machine.write("sys/fs/cgroup/a/cpu.max", "nonsense")
    assert cores_of(machine, monkeypatch) == 16
    assert available_cores(root=tmp_path / "nowhere") == 16


COMMAND = """
import contextlib, sys
from aurora_lit.__main__ import run
sys.argv = ["aurora-lit", "--help"]
with contextlib.suppress(SystemExit):
    run()
import torch
"""


@pytest.mark.parametrize(
    ("code", "given", "spins"),
    [
        pytest.param("from aurora_lit import LLM", {}, "60000", marks=pytest.mark.process),
        (COMMAND, {}, "60000"),
        pytest.param("from aurora_lit import LLM", {"GOMP_SPINCOUNT": "7"}, "7", marks=pytest.mark.process),
        pytest.param("from aurora_lit import LLM", {"OMP_WAIT_POLICY": "passive"}, "0", marks=pytest.mark.process),
    ],
)
def test_threads_that_wait_for_each_other_sleep_soon_unless_the_environment_says_something_else(
    code: str, given: dict[str, str], spins: str
) -> None:
    """libgomp prints what it has understood."""
    env = {**child_environment(), "OMP_DISPLAY_ENV": "verbose"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        env.pop(name, None)
    assert f"GOMP_SPINCOUNT = '{spins}'" in run(code, {**env, **given}).stderr


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_cgroup_leaves_counts_what_is_cached_as_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a parent holds too: a service's own group may have none."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 << 30))
    mount = "/sys/fs/cgroup" if version == 2 else "/sys/fs/cgroup/memory"
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    groups = "0::/box/app" if version == 2 else "3:cpu:/other\n4:memory:/box/app"
    machine = FakeMachine(tmp_path, groups=groups, mounts=[f"31 23 0:28 / {mount} rw,relatime - {kind}"])
    assert available_bytes(root=tmp_path) == 64 << 30, "no group is visible"
    limit, usage, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    for group, most, used, cached in (("box", 8 << 30, 7 << 30, 5 << 30), ("box/app", None, 6 << 30, 0)):
        machine.write(f"{mount[1:]}/{group}/{limit}", str(most or ("max" if version == 2 else (1 << 63) - 4096)))
        machine.write(f"{mount[1:]}/{group}/{usage}", str(used))
        read_once = cached // 2
        names = (1 << 20 if cached else 0) if version == 2 else 0
        parts = f"{prefix}inactive_file {read_once}\n{prefix}active_file {cached - read_once - names}"
        parts += f"\nslab_reclaimable {names}" if version == 2 else ""
        machine.write(f"{mount[1:]}/{group}/memory.stat", f"anon 5\ninactive_file 3\nactive_file 4\n{parts}")
    assert available_bytes(root=tmp_path) == 6 << 30
    machine.write(f"{mount[1:]}/box/{usage}", str(20 << 30))
    assert available_bytes(root=tmp_path) == 0


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc keeps what is freed; others may not")
def test_what_a_burst_took_is_given_back() -> None:
    code = """
import time, psutil
from aurora_lit import machine
machine._GIVES_BACK_EVERY_S = 0.05
held = [bytes(2000) for _ in range(50_000)]
last = bytes(2000)  # above all others, so that freeing alone gives nothing back
del held
resident = lambda: psutil.Process().memory_info().rss >> 20
before, until = resident(), time.monotonic() + 20
machine.keep_giving_back_freed_memory()
while resident() > before - 80 and time.monotonic() < until:
    time.sleep(0.05)
print(before - resident())
"""
    assert int(run(code, child_environment()).stdout) >= 80
