"""Faults of real processes beside the installed vLLM: serving goes on, and what is wrong is said.

Each server's tests run in order. Needs vLLM and the cached default model; run with -m slow.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from support.fake_server import free_port
from support.spoiled_drafts import SPOILED
from support.vllm_faults import PLACES, Faults
from support.vllm_server import DRAFT, MODEL, VllmServer

from aurora_lit.cli.status import read
from aurora_lit.drafts.checkpoint import load_draft, read_config, save_draft
from aurora_lit.errors import AuroraError

pytest.importorskip("vllm.version", reason="vLLM is not installed: nothing here is checked")
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(1200)]

PROMPTS = ["def fibonacci(n):\n    ", "The capital of France is", "SELECT name FROM users WHERE"]
ARGUMENTS = ("--max-model-len", "768", "--max-num-seqs", "4")
SHARED_MEMORY = Path("/dev/shm")


def until(condition: Callable[[], Any]) -> None:
    """Wait long: a learner of low priority starts slowly on a loaded machine."""
    end = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def answers(server: VllmServer) -> list[str]:
    return [server.complete(prompt, max_tokens=32)["choices"][0]["text"] for prompt in PROMPTS]


def learner(server: VllmServer) -> Any:
    """What `aurora-lit status` says of the learner."""
    return read(server.run_folder)["learner"]


def recorded(server: VllmServer) -> int:
    """Traces made since the ring is there."""
    return int(read(server.run_folder)["traces"]["ring"]["pushed"])


def processes_of(server: VllmServer) -> list[psutil.Process]:
    """All processes that were started, and theirs, the learner among them."""
    started = [psutil.Process(process.pid) for process in server.processes if process.poll() is None]
    return [*started, *(child for each in started for child in each.children(recursive=True))]


def end_and_check_that_nothing_is_left(server: VllmServer, shared_before: set[str]) -> None:
    running = processes_of(server)
    assert all(code == 0 for code in server.end())
    _, left = psutil.wait_procs(running, timeout=20)
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []
    assert not server.run_folder.exists()
    assert new_files(shared_before) == set()


def new_files(shared_before: set[str]) -> set[str]:
    """Files of vLLM in shared memory."""
    new = set(os.listdir(SHARED_MEMORY)) - shared_before
    return {name for name in new if name.startswith(("psm_", "sem.", "vllm", "torch_"))}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults") / "plugin")


@pytest.fixture(scope="module")
def shared_before() -> set[str]:
    return set(os.listdir(SHARED_MEMORY))


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def by_hand(
    shared_before: set[str], faults: Faults, metrics_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """A vLLM started by hand, with a learner and a ring for few traces, of which an eighth may be unread."""
    with VllmServer(
        tmp_path_factory.mktemp("hand"),
        by_hand=True,
        learner=True,
        settings=("trace.capacity_mb=16",),
        arguments=(*ARGUMENTS, "--learner-metrics-port", str(metrics_port)),
        environment=faults.environment,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def wanted(by_hand: VllmServer) -> list[str]:
    """The answers before any fault."""
    return answers(by_hand)


def test_a_learner_that_is_killed_is_started_again_while_requests_go_on(
    by_hand: VllmServer, wanted: list[str], metrics_port: int
) -> None:
    until(lambda: learner(by_hand)["state"] == "running" and learner(by_hand)["activity"] != "loading")
    killed = learner(by_hand)["pid"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: learner(by_hand)["state"] == "dead")
    assert answers(by_hand) == wanted
    until(lambda: learner(by_hand)["state"] == "running" and learner(by_hand)["pid"] != killed)
    assert learner(by_hand)["restarts"] == 1
    metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
    for name in ("restarts_total", "running"):
        assert f'aurora_learner_{name}{{engine="0",model_name="{MODEL}"}} 1.0' in metrics
    until(lambda: learner(by_hand)["activity"] != "loading")
    read_before = learner(by_hand)["traces"]["read"]
    assert answers(by_hand) == wanted
    until(lambda: learner(by_hand)["traces"]["read"] >= read_before + len(PROMPTS))


def test_while_the_learner_stands_still_requests_are_answered_unrecorded_and_counted(
    by_hand: VllmServer, wanted: list[str]
) -> None:
    def ring() -> Any:
        return read(by_hand.run_folder)["traces"]["ring"]

    stopped = learner(by_hand)["pid"]
    os.kill(stopped, signal.SIGSTOP)
    try:
        pushed, unrecorded = recorded(by_hand), by_hand.status.unrecorded
        for i in range(16):
            by_hand.complete(f"{PROMPTS[i % 3]} {i}", max_tokens=64, ignore_eos=True)
        assert answers(by_hand) == wanted
        counted = pushed + unrecorded + 16 + len(PROMPTS)
        until(lambda: recorded(by_hand) + by_hand.status.unrecorded == counted)
        print(f"unrecorded: {by_hand.status.unrecorded - unrecorded}")
        assert recorded(by_hand) > pushed
        assert by_hand.status.unrecorded > unrecorded
        assert ring()["dropped"]["overwritten"] == 0
        until(lambda: learner(by_hand)["state"] == "stalled")
    finally:
        os.kill(stopped, signal.SIGCONT)
    until(lambda: ring()["queued"] == 0)
    assert learner(by_hand)["pid"] == stopped
    made = recorded(by_hand)
    assert answers(by_hand) == wanted
    until(lambda: recorded(by_hand) == made + len(PROMPTS))


def test_exceptions_in_the_wraps_are_counted_and_after_three_no_more_traces_are_made(
    by_hand: VllmServer, wanted: list[str], faults: Faults
) -> None:
    for number, place in enumerate(PLACES[:3], start=1):
        made = recorded(by_hand)
        faults.next(place)
        assert answers(by_hand) == wanted
        assert faults.has_raised
        said = f"making traces failed ({number} of 3 times"
        assert said in by_hand.log.read_text()
        error = read(by_hand.run_folder)["worker"]["error"]
        assert said in error
        assert f"injected in {place}" in error
        until(lambda: read(by_hand.run_folder)["queue"]["running"] == 0)
        if number < 3:  # the requests after that of the fault
            until(lambda made=made: recorded(by_hand) == made + len(PROMPTS) - 1)
    made = recorded(by_hand)
    assert answers(by_hand) == wanted
    time.sleep(1)
    assert recorded(by_hand) == made
    assert "no more traces are made until the next start" in read(by_hand.run_folder)["worker"]["error"]


def test_a_vllm_that_is_killed_and_started_again_makes_traces_and_has_a_new_learner(
    by_hand: VllmServer, wanted: list[str], shared_before: set[str]
) -> None:
    """The one before made none any more. An engine outlives its API server, with us or without, so it is killed too."""
    attach, vllm = by_hand.processes
    of_vllm = [psutil.Process(vllm.pid), *psutil.Process(vllm.pid).children(recursive=True)]
    old_learner = psutil.Process(learner(by_hand)["pid"])
    vllm.kill()
    by_hand.processes.remove(vllm)
    vllm.wait()
    _, left = psutil.wait_procs(of_vllm, timeout=10)
    print(f"10 s after vLLM's API server was killed, there are still {[each.name() for each in left]}")
    for each in left:
        if each.name().startswith("VLLM::"):  # what else there is tidies up
            each.kill()
    began = time.monotonic()
    assert psutil.wait_procs(of_vllm, timeout=30)[1] == []
    psutil.wait_procs([old_learner], timeout=60)
    assert not old_learner.is_running()
    print(f"the learner had ended {time.monotonic() - began:.1f} s after the engine was killed")
    assert learner(by_hand)["state"] == "absent"
    assert new_files(shared_before) == set()
    assert attach.poll() is None
    by_hand.start_vllm()
    assert read(by_hand.run_folder)["worker"]["error"] is None
    made = recorded(by_hand)
    assert answers(by_hand) == wanted
    until(lambda: recorded(by_hand) == made + len(PROMPTS))
    until(lambda: learner(by_hand)["state"] == "running")
    assert learner(by_hand)["pid"] != old_learner.pid
    until(lambda: learner(by_hand)["activity"] != "loading")


def test_exceptions_in_the_last_wrap_turn_capture_off_too(
    by_hand: VllmServer, wanted: list[str], faults: Faults
) -> None:
    for _ in range(3):
        faults.next(PLACES[3])
        assert answers(by_hand) == wanted
        assert faults.has_raised
    assert "(3 of 3 times; no more traces" in read(by_hand.run_folder)["worker"]["error"]
    assert answers(by_hand) == wanted


def test_a_clean_stop_by_hand_leaves_nothing(by_hand: VllmServer, shared_before: set[str]) -> None:
    end_and_check_that_nothing_is_left(by_hand, shared_before)


@pytest.fixture(scope="module")
def together(shared_before: set[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A vLLM that `aurora-lit vllm` started, without a learner."""
    with VllmServer(tmp_path_factory.mktemp("together"), arguments=ARGUMENTS) as server:
        yield server


def test_drafts_that_cannot_be_served_are_refused_and_the_served_one_stays(together: VllmServer) -> None:
    good = together.store.publish(load_draft(DRAFT, read_config(DRAFT)), record={})
    until(lambda: together.status.draft_version == good)
    wanted = answers(together)
    for number, spoiled in enumerate(SPOILED, start=2):
        name = f"draft-{number:06d}"
        shutil.copytree(together.store.folder / good, together.store.folder / name)
        spoiled.spoil(together.store.folder / name)
        together.store.promote(name)
        until(lambda name=name: together.status.refused_version == name)
        print(f"{spoiled.name}: {together.status.refused_reason}")
        assert spoiled.reason in together.status.refused_reason
        assert together.status.draft_version == good
        assert f"draft {name} is not served: " in together.log.read_text()
        assert answers(together) == wanted
    assert read(together.run_folder)["draft"]["swaps"] == 1


def test_a_clean_stop_leaves_nothing(together: VllmServer, shared_before: set[str]) -> None:
    end_and_check_that_nothing_is_left(together, shared_before)


def errors_seen(server: VllmServer) -> set[str]:
    """The learner's errors from now on, of which `aurora-lit status` shows the last."""
    seen: set[str] = set()

    def look() -> None:
        while server.run_folder.exists():
            with contextlib.suppress(AuroraError):  # it ends
                seen.update(filter(None, [learner(server)["error"]]))
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    return seen


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory that holds less than a draft."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_for_drafts_is_said_and_the_next_draft_is_published_when_there_is_room(small_disk: Path) -> None:
    folder = small_disk.parent
    weak = load_draft(DRAFT, read_config(DRAFT))
    with torch.no_grad():
        weak.lm_head.weight.zero_()  # so that a better one is found soon
    save_draft(weak, folder / "weak")
    settings = ("compute_share=1.0", "learning_rate=1e-3", "publish_every_s=2")
    with VllmServer(
        folder,
        learner=True,
        draft=folder / "weak",
        settings=tuple(f"learn.{each}" for each in settings),
        arguments=ARGUMENTS,
    ) as server:
        wanted = answers(server)
        topics = iter(range(10_000))
        said = errors_seen(server)

        def ask_until(condition: Callable[[], Any]) -> None:
            end = time.monotonic() + 500
            while not condition():
                assert time.monotonic() < end, read(server.run_folder)
                server.complete(f"{PROMPTS[0]}# Variant {next(topics)}\n", max_tokens=64)

        ask_until(lambda: any("a draft could not be published" in error for error in list(said)))
        print(said)
        assert all("No space left" in error for error in said)
        assert learner(server)["restarts"] == 0
        assert answers(server) == wanted
        assert server.store.current() is None
        subprocess.run(["mount", "-o", "remount,size=2g", small_disk], check=True)
        ask_until(lambda: server.status.draft_version.startswith("draft-"))
        assert answers(server) == wanted
        assert learner(server)["restarts"] == 0
