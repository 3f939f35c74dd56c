"""The end of a process is watched where the kernel allows it."""

import asyncio
import errno
import os

import pytest

from aurora_lit.ipc.process_lifetime import call_when_process_ends


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
