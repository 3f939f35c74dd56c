"""The end of a process is watched where the kernel allows it; a module is not taken from the working directory."""

import asyncio
import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from support import ROOT

from aurora_lit.config import load_config
from aurora_lit.ipc.process_lifetime import call_when_process_ends, module_command
from aurora_lit.serve import engine_process
from aurora_lit.serve.learner_child import learner_command


def test_a_file_in_the_working_directory_is_not_imported_by_what_is_started_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('this click.py was run')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([*learner_command(tmp_path), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Attach a learner" in done.stdout


def test_nor_by_children_of_multiprocessing_before_they_have_their_parents_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin with `python -c`, which looks in the working directory first."""
    (tmp_path / "types.py").write_text("raise SystemExit('this types.py was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    code = """
import multiprocessing
from aurora_lit.ipc.process_lifetime import imports_are_safe
child = multiprocessing.get_context("spawn").Process(target=print, args=("ran",))
with imports_are_safe():
    child.start()
child.join()
raise SystemExit(child.exitcode)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


@pytest.mark.parametrize("given", [None, "1"])
def test_engine_processes_are_started_so_and_what_follows_is_not(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONSAFEPATH", given)
    seen: list[str | None] = []
    context = Mock()
    context.Process.return_value.start = lambda: seen.append(os.environ.get("PYTHONSAFEPATH"))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    config = load_config(None, ["engine.strategy=fsdp", "engine.devices=2", "target.precision=fp32"])
    engine_process.start_engine_processes(config, Mock(), tmp_path, Mock())
    assert seen == ["1", "1"]
    assert os.environ.get("PYTHONSAFEPATH") == given


def test_a_checkout_that_is_not_installed_can_be_run_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "-P" not in module_command("aurora_lit")


FORKS_A_CHILD = """
import os, sys, time
from aurora_lit.ipc import process_lifetime
sys.platform = "darwin"
process_lifetime._LOOK_AT_PARENT_S = 0.02
if sys.argv[1] == "forked":
    process_lifetime.tie_forked_children_to_parent()
parent = os.getpid()
if os.fork() == 0:
    if sys.argv[1] == "itself":
        process_lifetime.die_with_parent(parent)
    print("tied", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("tied", ["forked", "itself"])
def test_where_the_kernel_does_not_tell_a_child_ends_with_its_killed_parent_too(tied: str) -> None:
    command = [sys.executable, "-c", FORKS_A_CHILD, tied]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == b"tied\n"
            parent.kill()
            parent.communicate(timeout=10)  # returns when the child's end of the pipe is closed too
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_sandbox_that_refuses_to_watch_a_process_does_not_end_the_server(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    async def watch() -> None:
        stop = call_when_process_ends(os.getpid(), lambda: None)
        stop()

    monkeypatch.setattr(os, "pidfd_open", refuse)
    asyncio.run(watch())
