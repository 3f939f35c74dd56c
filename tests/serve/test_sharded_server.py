"""A real server whose target is sharded over two processes: answers, swaps, learning, and the loss of a process."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.tiny_models import VOCAB, make_engine, random_draft, request, run
from support.tiny_server import MODEL, TinyServers, text_of
from support.two_ranks import SHAPE

GONE_WITHIN_S = 5.0
END = VOCAB - 1
PROMPTS = [[7 + (5 * number + 3 * place) % (VOCAB - 7) for place in range(4)] for number in range(8)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    with TinyServers(tmp_path_factory.mktemp("s"), eos_token_id=END, **SHAPE) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(servers: TinyServers) -> Iterator[None]:
    yield
    servers.kill_all()


def start(servers: TinyServers, strategy: str, *overrides: str) -> int:
    server = servers.start(f"engine.strategy={strategy}", "engine.devices=2", *overrides)
    servers.wait_ready()
    return server


def ask(servers: TinyServers, prompt: list[int], **options: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, **options}
    return httpx.post(f"{servers.url}/v1/completions", json=body, timeout=100)


def versions(servers: TinyServers) -> tuple[str, str]:
    """The draft version that each rank reports, in one reading."""
    status = servers.status()
    (rank,) = status["ranks"]
    return status["draft"]["version"], rank["draft_version"]


def wait_until_gone(servers: TinyServers, family: list[int], began: float, *, timeout_s: float = 20) -> float:
    """Seconds until no process of the server was left; nor is its folder in shared memory, nor its port."""
    servers.wait(lambda: not any(map(servers.alive, family)), timeout_s=timeout_s)
    took = time.monotonic() - began
    assert servers.run_folders == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{servers.url}/health", timeout=5)
    return took


class RepeatingClient:
    """A client that sends requests until one fails; keeps the error and when it came."""

    def __init__(self, servers: TinyServers) -> None:
        self._servers = servers
        self.error: tuple[float, str] = (0.0, "")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for number in range(10**6):
            try:
                response = ask(self._servers, PROMPTS[number % len(PROMPTS)], stream=number % 2 == 0)
            except httpx.HTTPError as error:
                self.error = (time.monotonic(), type(error).__name__)
                return
            if response.status_code != 200 or '"error"' in response.text:
                self.error = (time.monotonic(), response.text)
                return

    def end(self) -> tuple[float, str]:
        self._thread.join(20)
        assert not self._thread.is_alive(), "a client hangs"
        return self.error


def check_answers(servers: TinyServers, prompts: list[list[int]]) -> None:
    """All at once, against plain decoding of the whole target."""
    plain = run(
        make_engine(servers.target, max_seq_len=128, eos_token_ids=frozenset([END])),
        [request(str(n), ids, max_tokens=24) for n, ids in enumerate(prompts)],
    )
    found: dict[int, str] = {}

    def note(number: int) -> None:
        found[number] = ask(servers, prompts[number]).json()["choices"][0]["text"]

    clients = [threading.Thread(target=note, args=(number,)) for number in range(len(prompts))]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)  # a busy machine
    expected = [[token for token in plain[str(number)].token_ids if token != END] for number in range(len(prompts))]
    assert found == dict(enumerate(map(text_of, expected)))


@pytest.mark.process
def test_answers_are_those_of_a_whole_target_swaps_reach_both_ranks_and_a_stopped_rank_ends_the_server(servers):
    server = start(servers, "tensor_parallel", "learn.enabled=false")
    (rank,) = servers.status()["ranks"]
    assert rank["pid"] not in (0, servers.status()["worker"]["pid"])
    check_answers(servers, PROMPTS)
    for seed in (1, 2):
        version = servers.store.publish(random_draft(servers.target, seed=seed), record={})
        servers.wait(lambda version=version: versions(servers) == (version, version))
        check_answers(servers, PROMPTS)

    for temperature in (0, 1):
        how = {"structured_outputs": {"regex": "A[BC]{3}D"}, "temperature": temperature}
        choice = ask(servers, PROMPTS[0], **how).json()["choices"][0]
        assert re.fullmatch("A[BC]{3}D", choice["text"])
        assert choice["finish_reason"] == "stop"

    family = servers.family(server)
    began = time.monotonic()
    os.kill(rank["pid"], signal.SIGSTOP)
    response = ask(servers, PROMPTS[0], stream=True)  # waits for a round that never ends
    assert '"engine_dead"' in response.text
    assert time.monotonic() - began < GONE_WITHIN_S
    assert wait_until_gone(servers, family, began) < GONE_WITHIN_S + 2  # a busy machine takes its time to end a process
    reason = "rank 1 of the engine's 2 processes gave no sign of life for 2.0 s"
    assert f"Error: the server failed: {reason}" in servers.log
    assert f"process {server} ended with exit code 2" in servers.log


@pytest.mark.process
@pytest.mark.slow
def test_it_learns_while_it_serves(servers):
    """At every order the ranks know the same draft, or they would have ended (test_sharding.py)."""
    server = start(servers, "tensor_parallel")
    swaps, number = servers.status()["draft"]["swaps"], 0
    ends = time.monotonic() + 240  # patience, no claim: two ranks and a learner may share two busy cores
    while servers.status()["draft"]["swaps"] == swaps:
        assert time.monotonic() < ends, f"{servers.learner()}\n{servers.log}"
        prompts = [
            [7 + (11 * n + 3 * place + n // 5) % (VOCAB - 7) for place in range(4)] for n in range(number, number + 4)
        ]
        check_answers(servers, prompts)
        number += 4
    servers.wait(lambda: len({*versions(servers)}) == 1, timeout_s=10)
    family = servers.family(server)
    os.kill(server, signal.SIGTERM)
    wait_until_gone(servers, family, time.monotonic())


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "lost_rank", "number", "busy"),
    [
        ("fsdp", 0, signal.SIGKILL, True),
        ("tensor_parallel", 1, signal.SIGKILL, True),
        ("fsdp", 1, signal.SIGKILL, False),
        ("tensor_parallel", 0, signal.SIGSTOP, False),
    ],
)
def test_a_lost_rank_ends_the_server(strategy, lost_rank, number, busy, servers):
    server = start(servers, strategy, "learn.enabled=false")
    status = servers.status()
    pid = [status["worker"]["pid"], status["ranks"][0]["pid"]][lost_rank]
    family = servers.family(server)
    client = RepeatingClient(servers) if busy else None
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(pid, number)
    took = wait_until_gone(servers, family, began)
    assert took < GONE_WITHIN_S
    if client is not None:
        when, what = client.end()
        assert when - began < GONE_WITHIN_S
        assert "engine_dead" in what
    how = "was killed (signal 9)" if number == signal.SIGKILL else "gave no sign of life"
    assert f"Error: the server failed: rank {lost_rank} of the engine's 2 processes {how}" in servers.log
    assert f"process {server} ended with exit code 2" in servers.log


@pytest.mark.process
@pytest.mark.slow
def test_sigterm_lets_running_requests_finish_on_all_ranks(servers):
    server = start(servers, "fsdp", "learn.enabled=false", "server.drain_s=100")  # other work may slow it down
    family = servers.family(server)
    texts: list[str] = []
    clients = [
        threading.Thread(target=lambda ids=ids: texts.append(ask(servers, ids, max_tokens=100).text)) for ids in PROMPTS
    ]
    for client in clients:
        client.start()
    servers.wait(lambda: servers.status()["queue"]["in_flight"] == len(PROMPTS))
    for pid in family:  # as a service manager does
        os.kill(pid, signal.SIGTERM)
    wait_until_gone(servers, family, time.monotonic(), timeout_s=120)
    for client in clients:
        client.join()
    assert len(texts) == len(PROMPTS)
    assert [text for text in texts if '"finish_reason"' not in text] == []
    assert f"process {server} ended with exit code 0" in servers.log


@pytest.mark.process
@pytest.mark.slow
def test_a_rank_that_cannot_load_its_part_ends_the_start_with_the_reason(servers):
    file = next(Path(servers.folder / "target").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    try:
        server = servers.start("engine.strategy=fsdp", "engine.devices=2", "learn.enabled=false")
        servers.wait(lambda: not servers.alive(server))
    finally:
        file.write_bytes(whole)
    assert f"process {server} ended with exit code 2" in servers.log
    assert "Error: the engine could not be built" in servers.log or "Error: the server failed: rank 1" in servers.log
