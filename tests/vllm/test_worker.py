"""What the follower asks of a worker: nothing raises, traces reach the ring, and a second start finds the first."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support.made_vllm import HIDDEN, MadeRunner, MadeV1Runner, Traffic, made_deployment
from torch import nn

from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, WorkerState
from aurora_lit.ipc.ring import RingCounters, RingReader, read_counters
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.learn.online.budget import LoadWatch, ServerLoad
from aurora_lit.traces.record import LAYOUT_DIGEST, from_bytes
from aurora_lit.vllm.capture import Capture
from aurora_lit.vllm.runners import V1
from aurora_lit.vllm.worker import WorkerExtension, _is_behind

MakeWorker = Callable[[], Any]


class MadeWorker(WorkerExtension):
    """As vLLM's worker after it has added the extension's methods."""

    def __init__(self, runner: MadeRunner) -> None:
        self.model_runner = runner
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=0),
            model_config=SimpleNamespace(get_hidden_size=lambda: HIDDEN, max_model_len=512, get_vocab_size=lambda: 700),
            speculative_config=SimpleNamespace(num_speculative_tokens=3),
            scheduler_config=SimpleNamespace(max_num_seqs=1024),
        )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    made_deployment(tmp_path, tmp_path, ring_bytes=1 << 18)
    return tmp_path


@pytest.fixture
def make_worker(monkeypatch: pytest.MonkeyPatch) -> MakeWorker:
    """Makes workers of rank 0 on a V1 runner, where vLLM's modules are made too."""
    package, state, distributed = ModuleType("vllm"), ModuleType(V1.module), ModuleType("parallel_state")
    fields = [(name, Any) for name in V1.state_fields]
    made: dict[str, Any] = {
        "version": "0.32.0",
        "ExecuteModelState": NamedTuple("ExecuteModelState", fields),  # type: ignore[misc]
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_pp_group": lambda: SimpleNamespace(is_last_rank=True),
    }
    package.__dict__["__version__"] = made["version"]
    state.__dict__.update(ExecuteModelState=made["ExecuteModelState"])
    distributed.__dict__.update(made)
    for name, module in {
        "vllm": package,
        "vllm.distributed": ModuleType("vllm.distributed"),
        "vllm.distributed.parallel_state": distributed,
        V1.module: state,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    runner_class = type("GPUModelRunner", (MadeV1Runner,), {"__module__": V1.module})
    return lambda: MadeWorker(runner_class())


def run(worker: Any) -> None:
    for step in Traffic(requests={"r1": (10, 40), "r2": (20, 30)}).steps():
        worker.model_runner.run(step)


def traces_in(run_folder: Path) -> list[str]:
    reader = RingReader.open(run_folder / RING_NAME, layout=LAYOUT_DIGEST)
    found = [from_bytes(payload).request_id for payload in iter(reader.pop, None)]
    reader.close()
    return sorted(found)


def test_traces_reach_the_ring_and_counts_the_page(run_folder: Path, make_worker: MakeWorker) -> None:
    worker = make_worker()
    assert worker.aurora_lit_start(str(run_folder)) == {"error": None}
    assert worker.aurora_lit_start(str(run_folder)) == {"error": None}  # wraps nothing twice
    run(worker)
    assert traces_in(run_folder) == ["r1", "r2"]
    page = EngineStatusPage.open(run_folder / STATUS_NAME)
    status = page.read()
    assert (status.state, status.worker_pid, status.vocab_size) == (WorkerState.READY, os.getpid(), 700)
    assert status.generated_tokens >= 70
    assert status.prompt_tokens == 30
    assert status.running == 0  # though no step comes after the last request has ended
    assert status.mean_accepted_length is not None
    assert status.draft_version == "first"
    until = time.monotonic() + 10
    while page.read().heartbeat_ns == status.heartbeat_ns:  # an idle engine's, too
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_page_shows_what_running_requests_have_made(run_folder: Path, make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.aurora_lit_start(str(run_folder))
    for step in itertools.islice(Traffic(requests={"r1": (10, 400)}).steps(), 5):
        worker.model_runner.run(step)
    status = EngineStatusPage.open(run_folder / STATUS_NAME).read()
    assert (status.running, status.prompt_tokens) == (1, 10)
    assert status.generated_tokens > 0


def test_an_engine_that_was_killed_and_started_again_takes_up_its_ring(
    run_folder: Path, make_worker: MakeWorker
) -> None:
    for _ in range(2):
        worker = make_worker()
        assert worker.aurora_lit_start(str(run_folder)) == {"error": None}
        run(worker)
    assert traces_in(run_folder) == ["r1", "r1", "r2", "r2"]


def test_an_unknown_version_is_an_answer_and_nothing_is_wrapped(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.99.0")
    assert "vLLM 0.99.0 is not known" in worker.aurora_lit_start(str(run_folder))["error"]
    run(worker)
    assert not (run_folder / RING_NAME).exists()


def test_a_server_without_a_draft_is_told_what_it_needs(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    monkeypatch.setattr(type(worker.model_runner), "get_draft_model", lambda self: None)
    assert "--speculative-config" in worker.aurora_lit_start(str(run_folder))["error"]


def test_an_earlier_pipeline_stage_has_no_draft_and_stops_neither_traces_nor_swaps(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in vllm/v1/worker/gpu_model_runner.py and gpu/model_runner.py: only the last stage makes a drafter."""
    stages, loaded = [make_worker(), make_worker()], list[Any]()
    stages[0].model_runner.get_draft_model = lambda: None
    monkeypatch.setattr("aurora_lit.vllm.worker.load_into", lambda runner, folder, last_good: loaded.append(runner))
    for stage in stages:
        group = SimpleNamespace(is_last_rank=stage is stages[-1])
        monkeypatch.setattr(sys.modules["vllm.distributed.parallel_state"], "get_pp_group", lambda: group)  # noqa: B023
        assert stage.aurora_lit_start(str(run_folder)) == {"error": None}
        assert stage.aurora_lit_swap("/a/draft-000001", "draft-000001", False, "/a/first")["error"] is None
    assert loaded == [stages[-1].model_runner]
    run(stages[-1])
    assert traces_in(run_folder) == ["r1", "r2"]


def test_a_draft_that_has_the_targets_head_is_refused_before_anything_is_wrapped(
    run_folder: Path, make_worker: MakeWorker
) -> None:
    worker = make_worker()
    runner = worker.model_runner
    runner.draft.lm_head = runner.target.lm_head = nn.Linear(2, 3, bias=False)
    error = worker.aurora_lit_start(str(run_folder))["error"]
    assert "lm_head.weight of the draft is the target's own" in error
    assert "start with one that has its own" in error
    run(worker)
    assert not (run_folder / RING_NAME).exists()


def test_a_full_disk_leaves_serving_alone(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **_how: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("aurora_lit.ipc.ring.reserve_space", full)
    worker = make_worker()
    assert "No space left" in worker.aurora_lit_start(str(run_folder))["error"]
    run(worker)


def test_a_full_ring_overwrites_and_counts(run_folder: Path, make_worker: MakeWorker) -> None:
    made_deployment(run_folder, run_folder, ring_bytes=1 << 17)
    worker = make_worker()
    worker.aurora_lit_start(str(run_folder))
    worker._aurora_lit_recorder.hooks._capture._limit_bytes = (
        1 << 20
    )  # else what runs is never more than the ring holds
    running = [Traffic(requests={f"r{i}": (40, 60)}, seed=i).steps() for i in range(31)]
    for steps in running:  # all begin before a trace is made, so all are recorded
        while not steps[0].new:
            worker.model_runner.run(steps.pop(0))
        worker.model_runner.run(steps.pop(0))
    for steps in running:
        for step in steps:
            worker.model_runner.run(step)
    assert worker._aurora_lit_recorder.hooks.num_errors == 0
    overwritten = read_counters(run_folder / RING_NAME).overwritten
    found = traces_in(run_folder)
    assert 0 < len(found) == 31 - overwritten < 31
    assert "r30" in found


def test_while_many_traces_are_unread_requests_are_served_unrecorded_and_counted(
    run_folder: Path, make_worker: MakeWorker
) -> None:
    worker = make_worker()
    worker.aurora_lit_start(str(run_folder))

    def answer(number: int) -> None:
        for step in Traffic(requests={f"r{number}": (40, 40)}, seed=number).steps():
            worker.model_runner.run(step)

    for number in range(30):
        answer(number)
    ring = read_counters(run_folder / RING_NAME)
    assert ring.queued_bytes > ring.capacity_bytes / 8
    assert ring.queued_bytes < ring.capacity_bytes / 6  # what was being recorded then is kept
    found = traces_in(run_folder)
    assert found == sorted(f"r{number}" for number in range(len(found)))
    status = EngineStatusPage.open(run_folder / STATUS_NAME).read()
    assert status.unrecorded == 30 - len(found)
    answer(30)  # all has been read
    assert traces_in(run_folder) == ["r30"]


def test_a_few_large_traces_are_not_too_many() -> None:
    """Of a model of 8B one trace may fill an eighth of the ring."""
    none_read = {"popped": 0, "overwritten": 0, "too_large": 0, "torn": 0}
    for number, size, is_behind in ((1, 300, False), (7, 700, False), (8, 700, True), (8, 100, False)):
        ring = RingCounters(pushed=number, queued_records=number, queued_bytes=size, capacity_bytes=800, **none_read)
        assert _is_behind(ring) == is_behind


def test_a_rank_without_the_hidden_states_only_swaps(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["vllm.distributed.parallel_state"], "get_tensor_model_parallel_rank", lambda: 1, raising=False
    )
    loaded: list[Path] = []
    monkeypatch.setattr("aurora_lit.vllm.worker.load_into", lambda runner, folder, last_good: loaded.append(folder))
    worker = make_worker()
    assert worker.aurora_lit_start(str(run_folder)) == {"error": None}
    assert not (run_folder / RING_NAME).exists()
    assert worker.aurora_lit_swap("/a/draft-000001", "draft-000001", False, "/a/first")["error"] is None
    assert loaded == [Path("/a/draft-000001")]


def test_a_swap_that_fails_is_an_answer_and_changes_no_version(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("aurora_lit.vllm.worker.load_into", fail)
    worker = make_worker()
    worker.aurora_lit_start(str(run_folder))
    assert worker.aurora_lit_swap("/a", "draft-000001", False, "/b")["error"] == "RuntimeError: out of memory"
    assert worker._aurora_lit_recorder.hooks.version == 0
    assert worker.aurora_lit_note({"refusals": 1, "refused_version": "v", "refused_reason": "r"})["error"] is None
    assert worker.aurora_lit_note({"no such field": 1})["error"] is not None
    assert EngineStatusPage.open(run_folder / STATUS_NAME).read().refused_version == "v"


def test_verdict_and_load_of_the_engine_before_are_not_taken_over(run_folder: Path, make_worker: MakeWorker) -> None:
    assert make_worker().aurora_lit_start(str(run_folder)) == {"error": None}
    page = EngineStatusPage.open(run_folder / STATUS_NAME, writable=True)
    page.write(waiting=1, rollbacks=2, rolled_back_version="draft-000005", rolled_back_reason="it was worse")
    assert make_worker().aurora_lit_start(str(run_folder)) == {"error": None}
    now = page.read()
    assert (now.waiting, now.rollbacks, now.rolled_back_version, now.rolled_back_reason) == (0, 0, "", "")


def test_beside_an_engine_whose_load_is_not_seen_any_more_a_learner_hardly_learns(
    run_folder: Path, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("injected")

    worker = make_worker()
    assert worker.aurora_lit_start(str(run_folder)) == {"error": None}
    load = LoadWatch(EngineStatusPage.open(run_folder / STATUS_NAME))
    run(worker)
    load()
    assert load() is ServerLoad.IDLE
    monkeypatch.setattr(Capture, "add", fail)
    run(worker)
    assert load() is load() is ServerLoad.QUEUEING


def test_a_learner_knows_how_many_requests_vllm_runs_together(run_folder: Path, make_worker: MakeWorker) -> None:
    assert make_worker().aurora_lit_start(str(run_folder)) == {"error": None}
    page = EngineStatusPage.open(run_folder / STATUS_NAME, writable=True)
    load = LoadWatch(page)
    page.write(running=200)
    assert load() is ServerLoad.SPARE
    page.write(running=1000)
    assert load() is ServerLoad.FULL
