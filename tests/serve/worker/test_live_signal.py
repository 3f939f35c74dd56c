"""A server assigns requests to the domains that its own learner has found."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator

import httpx
import pytest
from support.tiny_server import MODEL, TinyServers


@pytest.fixture
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    """In a folder of its own: what one test's learner has published, another test's server would load."""
    with TinyServers(tmp_path_factory.mktemp("f")) as running:
        yield running


@pytest.mark.process
@pytest.mark.slow
def test_a_server_assigns_the_domains_that_its_learner_has_found(servers: TinyServers) -> None:
    server = servers.start()
    servers.wait_ready()
    numbers = itertools.count()

    def domains_of(kind: int, *, label: str = "") -> list[str]:
        """The domain that a prompt of one of two kinds is served as: its tokens are even or odd."""
        number = next(numbers)
        prompt = [7 + 2 * ((11 * number + 5 * place) % 24) + kind for place in range(12)]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "user": f"user {number % 2}"}
        if label:
            body["metadata"] = {"aurora_domain": label}
        answer = httpx.post(f"{servers.url}/v1/completions", json=body, timeout=40).json()
        return list(answer["metrics"]["speculative_decoding"]["domains"])

    assert domains_of(0) == [], "nothing is published yet"

    def published() -> object:
        assert [domains_of(kind, label=label) for kind, label in enumerate(("even", "odd"))] == [["even"], ["odd"]]
        return servers.status()["domains"]["version"]

    servers.wait(published)
    for _ in range(20):
        published()
    servers.wait(lambda: published() and domains_of(0) == ["even"] and domains_of(1) == ["odd"])
    served = servers.status()["domains"]["served"]
    assert {"even", "odd", "unknown"} <= set(served)
    assert served["even"]["generated_tokens"] == 4 * served["even"]["requests"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
    servers.wait(lambda: not servers.alive(server))
