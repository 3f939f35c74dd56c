"""How much is left to learn of a domain controls exploration in the server, entropy and replay in the learner."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.tiny_models import VOCAB
from support.tiny_server import MODEL, TinyServers

from aurora_lit.request import Source
from aurora_lit.traces.log import read_index, read_shard
from aurora_lit.traces.record import Trace

FOLLOWED_S = 2.0  # the learner writes its page twice a second, the worker reads it as often


@pytest.fixture
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    """In a folder of its own: what one test's learner has published, another test's server would load."""
    with TinyServers(tmp_path_factory.mktemp("f")) as running:
        yield running


def ask(servers: TinyServers, number: int, *, domain: str) -> None:
    prompt = [7 + (5 * (number % 12) + 3 * place) % (VOCAB - 7) for place in range(4)]
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "user": f"user {number % 2}",
        "metadata": {"aurora_domain": domain},
    }
    assert httpx.post(f"{servers.url}/v1/completions", json=body, timeout=40).status_code == 200


@pytest.mark.process
@pytest.mark.slow
def test_a_new_domain_makes_a_live_server_explore_and_a_learned_one_does_not(
    servers: TinyServers, tmp_path: Path
) -> None:
    constants = {"aurora_lit.learn.online.build.DECAY_TOKENS": 2500, "aurora_lit.learn.online.build.WARMUP_STEPS": 0}
    servers.constants |= constants
    server = servers.start(
        f"trace.record={tmp_path / 'traces'}",
        "memory.scope=off",  # the same prompts come again and again: copies would leave the draft nothing to propose
        "engine.explore_share=0.0",
        "schedule.explore_share=0.8",
    )
    servers.wait_ready()
    numbers = itertools.count()

    def learner() -> dict[str, Any]:
        return dict(servers.status()["learner"])

    def ask_until(domain: str, condition: Any) -> dict[str, Any]:
        """Ask about a domain until what the learner says of domains fulfils a condition; that."""

        def asked() -> dict[str, Any] | None:
            ask(servers, next(numbers), domain=domain)
            now = learner()["domains"]
            return dict(now) if now["now"] and condition(now) else None

        found = servers.wait(asked, timeout_s=120)
        assert isinstance(found, dict)
        return found

    def ask_on(domain: str, *, times: int) -> list[float]:
        """The shares asked of serving before, between and after so many requests: the learner goes on beside them."""
        shares = [learner()["domains"]["explore_share"]]
        for _ in range(times):
            ask(servers, next(numbers), domain=domain)
            shares.append(learner()["domains"]["explore_share"])
        return shares

    hot = ask_until("chat", lambda now: now["explore_share"] > 0.4)
    cold = ask_until("chat", lambda now: now["explore_share"] < 0.08)
    time.sleep(FOLLOWED_S)
    first_cold = next(numbers)
    learned_shares = ask_on("chat", times=24)
    last_cold = next(numbers)
    again = ask_until("code", lambda now: now["explore_share"] > 0.3)
    time.sleep(FOLLOWED_S)
    first_again = next(numbers)
    new_shares = ask_on("code", times=12)
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
    servers.wait(lambda: not servers.alive(server))

    assert hot["rate_factor"] > cold["rate_factor"] < again["rate_factor"]

    # And serving did it: rounds explored where there was something to learn, and hardly else.
    traces = [t for shard in read_index(tmp_path / "traces") for t in read_shard(tmp_path / "traces" / shard.name)]
    assert len(traces) > last_cold - first_cold
    learned, new = explored(traces[first_cold : last_cold - 1]), explored(traces[first_again - 1 :])
    learned_share, new_share = max(learned_shares), min(new_shares)
    assert new_share > 0.2 > 2 * learned_share, "the two shares lie well apart"
    assert learned.mean() < learned_share + by_chance(learned, learned_share)
    assert new.mean() > new_share - by_chance(new, new_share)
    assert new.mean() > 2 * learned.mean()
    assert len({trace.client for trace in traces}) == 2, "a client is its user"
    assert all(len(trace.client) == 16 for trace in traces)


def explored(traces: list[Trace]) -> torch.Tensor:
    """Which of the draft's rounds explored, 1 or 0. Shape [R]."""
    return torch.cat([trace.explored_R[trace.source_R == Source.DRAFT] for trace in traces]).float()


def by_chance(rounds_R: torch.Tensor, share: float) -> float:
    """How far from its share the mean of so many draws lies at most: four standard deviations."""
    return 4 * math.sqrt(share * (1 - share) / len(rounds_R))


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
