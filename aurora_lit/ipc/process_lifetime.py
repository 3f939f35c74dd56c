"""Who lives as long as whom: children die with their parent, and the death of a process wakes an event loop.

Leaves out restarting anything: a server whose worker died is restarted whole, from outside.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel signal this process when `parent_pid` ends, even by SIGKILL (Linux; elsewhere nothing happens).

    Goes on to apply to a program that the process then becomes.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it went before we asked
        os._exit(1)


def lead_forked_children() -> None:
    """From now on, children that this process forks die with it, and leave SIGTERM to it until they say otherwise.

    A service manager sends SIGTERM to all processes of a service: those that serve the others must outlive them.
    """
    me = os.getpid()

    def follow() -> None:
        if os.getppid() == me:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            die_with_parent(me)

    os.register_at_fork(after_in_child=follow)


def call_when_process_ends(pid: int, callback: Callable[[], None]) -> Callable[[], None]:
    """Run `callback` in the running event loop as soon as `pid` ends; returns what stops the watch.

    Where the system has no pidfd (not Linux) nothing is watched: the heartbeat alone tells.
    """
    if not hasattr(os, "pidfd_open"):
        return lambda: None
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_soon(callback)
        return lambda: None

    watching = True

    def stop() -> None:
        nonlocal watching
        if watching:  # once: the number of a closed descriptor may be in use again
            watching = False
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def ended() -> None:
        stop()
        callback()

    loop.add_reader(descriptor, ended)
    return stop
