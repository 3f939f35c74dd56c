"""The end of a process is watched where the kernel allows it; a module is not taken from the working directory."""

import asyncio
import errno
import os
import subprocess
from pathlib import Path

import pytest
from support import ROOT

from aurora_lit.ipc.process_lifetime import call_when_process_ends, module_command
from aurora_lit.serve.learner_child import learner_command


def test_a_file_in_the_working_directory_is_not_imported_by_what_is_started_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('this click.py was run')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([*learner_command(tmp_path), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Attach a learner" in done.stdout


def test_a_checkout_that_is_not_installed_can_be_run_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "-P" not in module_command("aurora_lit")


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
