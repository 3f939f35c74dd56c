"""Processes: the command of a module, children that end with their parent, an end that wakes an event loop, signals.

Leaves out restarting: a server whose worker died ends, and is restarted by whatever supervises it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that end a server: of a service manager, of Ctrl-C and of a closed terminal."""
_PR_SET_PDEATHSIG = 1
_LOOK_AT_PARENT_S = 1.0
"""How often a process looks whether its parent has ended where the kernel does not tell."""
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def module_command(module: str) -> list[str]:
    """The command that runs a module with this Python, as the command `aurora-lit` would find it.

    Not in the working directory, where `python -m` looks first: a `yaml.py` there would be run. Only where it is the
    checkout of this package does that stay, since the package may be installed nowhere.
    """
    is_checkout = os.path.samefile(os.curdir, _PACKAGE_PARENT)
    return [sys.executable, *([] if is_checkout else ["-P"]), "-m", module]


@contextlib.contextmanager
def imports_are_safe() -> Iterator[None]:
    """Inside the context multiprocessing's children do not look for modules in the working directory.

    They begin with `python -c`, which does, until they have been told their parent's path.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def die_with_parent(parent_pid: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Have this process signalled when its parent, `parent_pid`, ends, even by SIGKILL.

    On Linux the kernel does it, also after the process has replaced itself by another program (exec). Elsewhere a
    thread does it within a second, until an exec. Raises OSError.
    """
    if sys.platform != "linux":
        threading.Thread(target=_signal_without_parent, args=(parent_pid, by), daemon=True).start()
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # the parent ended before the call
        os._exit(1)


def _signal_without_parent(parent_pid: int, by: signal.Signals) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_LOOK_AT_PARENT_S)
    os.kill(os.getpid(), by)


def tie_forked_children_to_parent() -> None:
    """Make every child that this process forks from now on end with it and ignore SIGTERM until it sets a handler.

    SIGHUP, which a closed terminal sends to all, it ignores too: this process ends it.

    A service manager sends SIGTERM to all processes of a service; the HTTP process, which is forked, must not end
    before its own handler is there, which drains.
    """
    parent_pid = os.getpid()

    def tie() -> None:
        if os.getppid() == parent_pid:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            die_with_parent(parent_pid)

    os.register_at_fork(after_in_child=tie)


def forbid_core_dumps() -> None:
    """Of this process and those that it starts: they would hold prompts, answers and the API key."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def end_first_without_memory(pid: int) -> None:
    """Have the kernel choose this process before others of its size when memory runs out; nothing where it cannot."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")


def call_when_process_ends(pid: int, callback: Callable[[], None]) -> Callable[[], None]:
    """Run `callback` in the running event loop as soon as `pid` ends; returns a function that stops watching.

    Without pidfd (systems other than Linux, sandboxes that refuse it) nothing is watched; only the missing heartbeat
    shows that a process ended.
    """
    if not hasattr(os, "pidfd_open"):
        return lambda: None
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_soon(callback)
        return lambda: None
    except OSError:  # the kernel or a sandbox has no such call
        return lambda: None

    watching = True

    def stop() -> None:
        nonlocal watching
        if watching:  # only once: the descriptor's number may be reused after closing
            watching = False
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def ended() -> None:
        stop()
        callback()

    loop.add_reader(descriptor, ended)
    return stop


def handle_ending(handle: Callable[[int, FrameType | None], None]) -> None:
    """Have the signals that end a server handled so; under nohup SIGHUP stays ignored."""
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def raise_exit(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler that raises SystemExit, so that what was begun is cleaned up."""
    sys.exit(128 + number)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it began is cleaned up."""
    before = signal.signal(signal.SIGTERM, raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def sigterm_ends_at_once() -> Iterator[None]:
    """For a block whose threads SystemExit would wait for: where SIGTERM raises it, it ends the process instead."""
    if signal.getsignal(signal.SIGTERM) is not raise_exit or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, raise_exit)
