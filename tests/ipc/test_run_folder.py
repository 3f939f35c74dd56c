"""The run folder: private, removed at the end, or by the next server if its own was killed."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from aurora_lit.ipc.run_folder import default_parent, live_folders, run_folder

HOLD = (
    "import sys, time, pathlib; from aurora_lit.ipc.run_folder import run_folder\n"
    "with run_folder(pathlib.Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(60)"
)


def test_it_is_private_and_goes_at_the_end(tmp_path):
    with run_folder(tmp_path) as folder:
        (folder / "status").write_text("x")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []


def test_only_the_folders_of_dead_servers_are_removed(tmp_path):
    (tmp_path / "something else").mkdir()
    with run_folder(tmp_path) as mine:
        other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with other:
            theirs = other.stdout.readline().strip()
            with run_folder(tmp_path) as third:
                assert {str(mine), theirs, str(third)} <= {str(path) for path in tmp_path.iterdir()}
            other.send_signal(signal.SIGKILL)
        with run_folder(tmp_path):
            assert theirs not in {str(path) for path in tmp_path.iterdir()}
        assert mine.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["something else"]


def test_a_pipe_of_such_a_name_does_not_keep_a_server_from_starting(tmp_path):
    os.mkfifo(tmp_path / "aurora-lit-run-x")
    with run_folder(tmp_path) as folder:
        assert folder.is_dir()


@pytest.mark.parametrize(
    ("platform", "shared", "expected"),
    [
        ("linux", True, "/dev/shm"),
        ("linux", False, "temporary"),
        ("darwin", False, "home/.cache/aurora-lit/run"),  # it sweeps temporary files that nobody reads for three days
    ],
)
def test_it_is_made_where_nobody_sweeps_it(platform, shared, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "access", lambda *_: shared)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    found = default_parent()
    assert found == tmp_path / expected
    if platform == "darwin":
        assert stat.S_IMODE(os.stat(found).st_mode) == 0o700
        assert default_parent() == found, "it may be there already"


def test_running_servers_are_found_the_newest_first(tmp_path):
    (tmp_path / "aurora-lit-run-dead").mkdir()
    with run_folder(tmp_path) as first:
        time.sleep(0.01)
        with run_folder(tmp_path) as second:
            assert live_folders(tmp_path) == [second, first]
        assert live_folders(tmp_path) == [first]
    assert live_folders(tmp_path) == []
