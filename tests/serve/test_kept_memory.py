"""A real server's traffic memory after a restart, with memory.keep, over HTTP."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.tiny_server import MODEL, TinyServers

from aurora_lit.kernels import native

pytestmark = [pytest.mark.process, pytest.mark.skipif(native.library() is None, reason="needs kernels")]


@pytest.mark.parametrize("scope", ["domain", "client"])
def test_an_answer_is_proposed_again_after_a_restart_to_whom_it_was_given(tmp_path: Path, scope: str) -> None:
    with TinyServers(tmp_path) as servers:

        def serve() -> int:
            keep = f"memory.keep={tmp_path / 'memory'}"
            pid = servers.start("learn.enabled=false", f"memory.scope={scope}", keep)
            servers.wait_ready()
            return pid

        def end(pid: int) -> None:
            os.kill(pid, signal.SIGTERM)
            servers.wait(lambda: not servers.alive(pid))

        def ask(**fields: Any) -> tuple[list[str], int]:
            """The answer, and how many of its tokens the memory proposed."""
            body = {"model": MODEL, "prompt": [7, 8, 9], "max_tokens": 40, "temperature": 0, "user": "ann", **fields}
            answer = httpx.post(f"{servers.url}/v1/completions", json=body, timeout=60).json()
            return [choice["text"] for choice in answer["choices"]], servers.status()["memory"]["accepted"]

        pid = serve()
        text, _ = ask()
        end(pid)
        pid = serve()
        servers.wait(lambda: servers.status()["memory"]["tokens"])
        before = servers.status()["memory"]["accepted"]
        assert ask(cache_salt="another") == (text, before)
        if scope == "client":
            assert ask(user="bob") == (text, before)
        again, accepted = ask()
        assert again == text
        assert accepted > before
        end(pid)
