"""Real servers with real learners on a tiny model, whose processes are killed or stopped and whose ring is damaged.

Which test injects which fault:

| fault | test |
|---|---|
| learner killed | here: killed at random moments; test_server_learning: is restarted |
| learner stalled | here: stopped learner; test_server_learning: a stalled learner is reported |
| learner never started, or cannot start | test_server_learning: absent, dies, its program is missing |
| learner killed while it saves or publishes | here: at random moments; test_versions: at every step |
| server's main process killed | here: killed at random moments, attached learner; test_server_faults: leaves nothing |
| HTTP process killed | here: killed at random moments; test_server_faults: ends the server |
| ring full, not read | here: stopped learner and damaged ring; test_ring: overwrites and counts |
| no room for a ring in shared memory | test_ring: no room, a file system that takes less |
| torn or damaged record | here: stopped learner and damaged ring; test_ring: damage, death at any line; test_record |
| wrong layout, other version | test_ring: another layout; test_status: a page of another record |
| checkpoint truncated, NaN, wrong shapes, layers, target | test_live_draft: poisoned draft; test_checkpoint |
| draft whose head is zeroed, published by force | test_live_draft: rolled back; test_rollback: when a version is bad |
| damaged traces, loss not finite | test_loop, test_learner: counted, no weight changes |
| crash while publishing, at any byte | test_versions: killed at every step |
| damaged CURRENT, truncated history, deleted folder | test_versions, test_hot_reload |
| full disk | test_trace_sinks: recording; test_loop: learner's state and drafts; test_hot_reload: rollback |
| client disconnects | test_server_faults: frees its slot within a second, or its place in the queue |
| worker dies in a stream | here: killed at random moments; test_server_faults: health red, clients get an error |
| queue full | test_server_faults: 429 with Retry-After |
| prompt too long, bad field, bad JSON, n=0 | test_bad_requests |
| a character split over tokens | test_detokenizer |
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.live_traces import make_controller, online_module
from support.tiny_models import VOCAB, make_engine, random_draft, request, run
from support.tiny_server import MODEL, TinyServers, text_of

from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.ring import read_counters
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.training_state import from_bytes
from aurora_lit.learn.online.build import STATE_NAME
from aurora_lit.learn.online.learner import Learner

NEW = 24
PROMPTS = [[7 + (5 * number + 3 * place) % (VOCAB - 7) for place in range(4)] for number in range(12)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    with TinyServers(tmp_path_factory.mktemp("f")) as running:
        yield running


@pytest.fixture(scope="module")
def answers(servers: TinyServers) -> list[list[int]]:
    """The answer of plain decoding to each prompt."""
    asked = [request(str(number), prompt, max_tokens=NEW) for number, prompt in enumerate(PROMPTS)]
    plain = run(make_engine(servers.target, max_seq_len=128), asked)
    return [plain[str(number)].token_ids for number in range(len(PROMPTS))]


@dataclass(kw_only=True)
class Asked:
    """A request as its client saw it."""

    began: float
    ended: float
    prompt: int
    text: str | None
    """None: it failed."""
    how: str = ""


@dataclass(kw_only=True)
class Traffic:
    """Clients that send requests without a break; half of them stream."""

    url: str
    clients: int = 2
    asked: list[Asked] = field(default_factory=list)
    _ending: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        # No connection is kept, since one to a server that was killed fails when it is used again.
        with httpx.Client(timeout=40, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not self._ending.is_set():
                prompt, began = rng.randrange(len(PROMPTS)), time.monotonic()
                body = {"model": MODEL, "prompt": PROMPTS[prompt], "max_tokens": NEW, "temperature": 0}
                try:
                    text, how = self._stream(client, body) if number % 2 else self._whole(client, body)
                except httpx.HTTPError as error:
                    text, how = None, f"{type(error).__name__}: {error}"
                self.asked.append(Asked(began=began, ended=time.monotonic(), prompt=prompt, text=text, how=how))
                time.sleep(0.05)

    def _whole(self, client: httpx.Client, body: dict[str, Any]) -> tuple[str | None, str]:
        answer = client.post(f"{self.url}/v1/completions", json=body)
        return (answer.json()["choices"][0]["text"] if answer.status_code == 200 else None), answer.text

    def _stream(self, client: httpx.Client, body: dict[str, Any]) -> tuple[str | None, str]:
        text, whole = "", False
        with client.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}) as answer:
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    whole = True
                elif data:
                    event = json.loads(data)
                    if "choices" not in event:
                        return None, data
                    text += "".join(choice["text"] for choice in event["choices"])
        return (text if whole else None), "the stream broke off"

    @property
    def num_answered(self) -> int:
        return sum(each.text is not None for each in self.asked)


def check_answers(traffic: Traffic, answers: list[list[int]], outages: list[tuple[float, float]]) -> None:
    """Every answer is that of plain decoding; only requests that met a killed server failed, and soon."""
    for each in traffic.asked:
        if each.text is not None:
            assert each.text == text_of(answers[each.prompt])
        else:
            met = [(down, up) for down, up in outages if each.began <= up and each.ended >= down]
            assert met, f"a request failed and no server was killed: {each}"
            assert each.ended - max(each.began, met[0][0]) < 20, f"the client was kept waiting: {each}"


def check_used(servers: TinyServers, answers: list[list[int]]) -> int:
    """Every trace that was used is of an answer that was given, and none was used twice; returns their number."""
    given = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    path = servers.folder / "used"
    used = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for trace in used:
        first, ids = trace["first"], trace["ids"]
        assert any(ids == each[first : first + len(ids)] for each in given), f"a wrong record was used: {trace}"
    places = [(trace["id"], trace["first"]) for trace in used]
    assert len(set(places)) == len(places), "a record was used twice"
    return len(used)


def check_current(servers: TinyServers) -> None:
    """CURRENT names a complete checkpoint."""
    current = servers.store.current()
    if current is not None:
        load_draft(servers.store.folder / current, servers.target)


def saved_steps(servers: TinyServers) -> int:
    path = servers.store.folder / STATE_NAME
    return int(from_bytes(path.read_bytes())["steps"]) if path.exists() else 0


def check_left(servers: TinyServers, *, older_than: float) -> None:
    """There is no folder in shared memory but the running server's, and no temporary file."""
    assert len(servers.run_folders) <= 1
    check_old(servers.folder / "tmp", "*", older_than=older_than)


def check_left_by_learners(servers: TinyServers, *, older_than: float) -> None:
    """There is nothing half published or half saved; to be called once another learner has started."""
    check_old(servers.store.folder, ".new.*", older_than=older_than)
    check_old(servers.store.folder, "*.tmp", older_than=older_than)


def check_old(folder: Path, pattern: str, *, older_than: float) -> None:
    old = []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # a running learner's own, and done with
            if path.stat().st_mtime < older_than:
                old.append(path)
    assert old == []


def end(servers: TinyServers, server: int) -> None:
    """End a server with SIGTERM, and wait for all its processes."""
    family = servers.family(server)
    os.kill(server, signal.SIGTERM)
    servers.wait(lambda: not any(map(servers.alive, family)))


def learning(servers: TinyServers, *, not_pid: int = 0) -> bool:
    """True once a learner, other than the killed `not_pid`, has attached and resumed."""
    now = servers.learner()
    return now is not None and now.pid not in (0, not_pid) and now.activity != "loading"


def storm(servers: TinyServers, answers: list[list[int]], *, kills: int, seed: int) -> None:
    """Kill one process after the other at random moments, under traffic, and check everything after each."""
    rng = random.Random(seed)
    victims = ["learner", "main", "worker", "http", "learner", "learner", "learner"]
    outages: list[tuple[float, float]] = []
    server, began = servers.start(), time.time()
    servers.wait_ready()
    with Traffic(url=servers.url) as traffic:
        for number in range(kills):
            victim = victims[number % len(victims)]
            if victim == "learner":
                pid = servers.wait(lambda: (now := servers.learner()) and servers.alive(now.pid) and now.pid)
                time.sleep(rng.uniform(0.0, 2.0))  # while it loads, learns, saves, publishes
                saved = saved_steps(servers)
                os.kill(pid, signal.SIGKILL)
                check_current(servers)
                servers.wait(lambda: learning(servers, not_pid=pid))  # noqa: B023
                assert servers.learner().steps >= saved, "what was saved is not learned again"
                assert servers.learner().skipped == 0
                check_left_by_learners(servers, older_than=began)
            else:
                time.sleep(rng.uniform(0.0, 1.0))
                family, pid, down = servers.family(server), processes(servers, server)[victim], time.monotonic()
                os.kill(pid, signal.SIGKILL)
                servers.wait(lambda: not any(map(servers.alive, family)))  # noqa: B023
                check_current(servers)
                server, began = servers.start(), time.time()
                servers.wait_ready()
                outages.append((down, time.monotonic()))
            check_left(servers, older_than=began)
        servers.wait(lambda: learning(servers))
        answered, steps = traffic.num_answered, servers.learner().steps
        servers.wait(lambda: traffic.num_answered > answered + 20 and servers.learner().steps > steps + 5)
        assert read_counters(servers.run_folders[0] / RING_NAME).torn == 0
    end(servers, server)
    check_left(servers, older_than=math.inf)
    check_left_by_learners(servers, older_than=math.inf)
    assert servers.run_folders == []
    check_current(servers)
    check_answers(traffic, answers, outages)
    assert check_used(servers, answers) > kills
    assert sum(each.text is None for each in traffic.asked) > 0, "no server was killed"


def processes(servers: TinyServers, server: int) -> dict[str, int]:
    """The processes that a server needs, identified by the order in which they are started."""
    children = sorted(psutil.Process(server).children(), key=lambda child: child.create_time())
    worker, http = [child.pid for child in children][:2]
    assert worker == servers.worker().worker_pid
    return {"main": server, "worker": worker, "http": http}


@pytest.mark.process
@pytest.mark.slow
def test_after_kills_at_random_moments_only_unsaved_work_is_lost(
    servers: TinyServers, answers: list[list[int]]
) -> None:
    storm(servers, answers, kills=6, seed=0)


@pytest.mark.process
def test_a_stopped_learner_and_a_damaged_ring_do_not_delay_requests(
    servers: TinyServers, answers: list[list[int]]
) -> None:
    server = servers.start()
    servers.wait_ready()
    ring = servers.run_folders[0] / RING_NAME
    with Traffic(url=servers.url, clients=6) as traffic:
        servers.wait(lambda: learning(servers))
        learner = servers.learner()
        os.kill(learner.pid, signal.SIGSTOP)
        servers.wait(lambda: servers.status()["traces"]["ring"]["dropped"]["overwritten"] > 5)
        servers.wait(lambda: servers.status()["learner"]["state"] == "stalled")
        answered = traffic.num_answered
        servers.wait(lambda: traffic.num_answered > answered + 10)
        rng = random.Random(2)

        def is_damage_met() -> bool:
            """Damages more of it: what a learner has no time to read, the server overwrites."""
            with ring.open("r+b") as file:
                for _ in range(200):
                    file.seek(rng.randrange(4096, ring.stat().st_size))
                    file.write(rng.randbytes(8))
            return bool(servers.status()["traces"]["ring"]["dropped"]["torn"])

        is_damage_met()
        os.kill(learner.pid, signal.SIGCONT)
        servers.wait(is_damage_met)
        before = servers.learner().records
        servers.wait(lambda: servers.learner().records > before + 10)
        assert servers.learner().pid == learner.pid, "damage does not end it"
        assert servers.status()["learner"]["state"] == "running"
    end(servers, server)
    check_answers(traffic, answers, [])
    check_used(servers, answers)


@pytest.mark.process
def test_an_attached_learner_saves_and_exits_on_sigterm_and_when_its_server_is_killed(
    servers: TinyServers, answers: list[list[int]]
) -> None:
    server = servers.start("learn.enabled=false")
    servers.wait_ready()
    page = LearnerStatusPage.open(servers.run_folders[0] / LEARNER_STATUS_NAME)
    half_published, half_saved = (
        servers.store.folder / name for name in (".new.draft-000099", ".learner.safetensors.tmp")
    )
    half_published.mkdir(parents=True)
    half_saved.write_bytes(b"half")
    old = half_saved.stat().st_ino
    learner = servers.run("learn", "--run-folder", str(servers.run_folders[0]))
    steps = saved_steps(servers)
    with Traffic(url=servers.url):
        servers.wait(lambda: learning(servers) and servers.learner().steps > steps + 3)
        assert not half_published.exists(), "what a killed learner left is deleted"
        assert not half_saved.exists() or half_saved.stat().st_ino != old
        os.kill(learner, signal.SIGTERM)
        servers.wait(lambda: not servers.alive(learner), 20)
        assert f"process {learner} ended with exit code 0" in servers.log
        assert page.read().state == "absent", "it exited in order"
        steps = saved_steps(servers)
        assert steps == page.read().steps
        learner = servers.run("learn", "--run-folder", str(servers.run_folders[0]))
        servers.wait(lambda: learning(servers) and servers.learner().steps > steps)
    os.kill(server, signal.SIGKILL)
    servers.wait(lambda: not servers.alive(learner), 20)
    assert page.read().state == "absent", "it exited in order"
    assert saved_steps(servers) == page.read().steps > steps
    check_current(servers)
    check_used(servers, answers)
    server = servers.start("learn.enabled=false")
    servers.wait_ready()
    check_left(servers, older_than=time.time())
    end(servers, server)


def test_a_learner_saves_without_temporary_files_elsewhere(
    servers: TinyServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it saves, it leaves nothing that the next one does not find."""
    module = online_module(servers.target, random_draft(servers.target))
    target_head = TargetHead(servers.target)
    learner = Learner(module, make_controller(), tmp_path / STATE_NAME, target_head=target_head, version="draft-000001")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    learner.save()
    assert [path.name for path in tmp_path.iterdir()] == [STATE_NAME]
    (tmp_path / ".learner.safetensors.tmp").write_bytes(b"half")
    assert learner.resume()
    assert [path.name for path in tmp_path.iterdir()] == [STATE_NAME]
