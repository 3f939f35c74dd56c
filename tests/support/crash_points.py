"""Kills a process at every step of its work on disk: before each file-system call, and in the middle of each write.

killed = kill_at_every_step(action, folder=folder)     # forks once a step; `action` runs in the child
for step in killed: ...check the folder...   (each step starts from the folder as it was at first)
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aurora_lit.drafts import checkpoint as checkpoints

_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def kill_at_every_step(action: Callable[[], object], *, folder: Path) -> Iterator[int]:
    """Yield after each child that was killed at step 0, 1, 2, …, until one finishes."""
    first = folder.with_name("as it was")
    shutil.copytree(folder, first)
    for step in itertools.count():
        shutil.rmtree(folder)
        shutil.copytree(first, folder)
        child = os.fork()
        if child == 0:
            _die_at(step, folder)
            action()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        assert os.WIFSIGNALED(status), f"the action failed by itself at step {step}"
        yield step


def _die_at(step: int, folder: Path) -> None:
    left = [step]

    def passed() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(folder) in str(arguments[:2]):
            passed()

    def half(write: Callable[..., Any], path_of: Callable[..., Path]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            result = write(*args, **options)
            path = path_of(*args)
            whole = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(len(whole) // 2)
            passed()
            path.write_bytes(whole)
            return result

        return wrapped

    checkpoints.save_file = half(checkpoints.save_file, lambda tensors, path, **_: Path(path))  # type: ignore[attr-defined]
    Path.write_text = half(Path.write_text, lambda path, *_: path)  # type: ignore[method-assign]
    sys.addaudithook(hook)
