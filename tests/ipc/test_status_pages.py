"""The status pages, and the metrics and JSON that show them."""

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import EngineCounters, EngineStatusPage, WorkerState
from aurora_lit.ipc.learner_status import LearnerCores, LearnerStatus, LearnerStatusPage
from aurora_lit.ipc.ring import RingWriter
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.request import Source
from aurora_lit.serve.http.metrics import LearnerCollector, ServerMetrics
from aurora_lit.serve.http.status import engine_json, learner_json, ring_counters


@pytest.fixture
def path(tmp_path):
    return tmp_path / "status"


def test_a_reader_sees_what_the_writer_wrote(path):
    EngineStatusPage.create(path)
    writer, reader = EngineStatusPage.open(path, writable=True), EngineStatusPage.open(path)
    writer.write(
        state=WorkerState.READY,
        running=3,
        max_draft_tokens=2,
        drafts=4,
        proposed=8,
        accepted=6,
        accepted_by_position=[4, 2, 0, 0],
        draft_version="draft-7",
        error="ü" * 2000,
    )
    writer.beat()
    now = reader.read()
    assert (now.state, now.running, now.draft_version) == (WorkerState.READY, 3, "draft-7")
    assert now.accepted_by_position == [4, 2]
    assert (now.acceptance_rate, now.mean_accepted_length) == (0.75, 2.5)
    assert set(now.error) == {"ü"}, "a long text is cut, but not in the middle of a character"
    assert 0 <= now.heartbeat_age_s < 1


def test_only_the_owner_may_read_it(path):
    EngineStatusPage.create(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_without_room_for_it_a_remedy_is_told(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(AuroraError, match=f"{path} cannot be made: No space left on device; .*--shm-size"):
        EngineStatusPage.create(path)
    assert not path.exists()


def test_where_no_call_reserves_space_a_page_takes_it_by_zeros(path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on a Mac
    page = EngineStatusPage.create(path)
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 0
    page.write(running=3)
    assert EngineStatusPage.open(path).read().running == 3


def test_another_file_is_refused(path):
    path.write_bytes(bytes(8192))
    with pytest.raises(ValueError, match="no EngineStatus page of this version"):
        EngineStatusPage.open(path)


def test_a_page_of_another_record_is_refused_whatever_its_size(path):
    LearnerStatusPage.create(path)
    content = path.read_bytes()
    status = path.with_name("status page")
    EngineStatusPage.create(status)
    path.write_bytes((content * 2)[: status.stat().st_size])
    with pytest.raises(ValueError, match="no EngineStatus page"):
        EngineStatusPage.open(path)


def test_every_field_comes_back_as_it_was_written(path):
    page = LearnerStatusPage.create(path)
    written = {
        field.name: index * 0.25 if field.type == "float" else f"word {index}" if field.type == "str" else index
        for index, field in enumerate(dataclasses.fields(LearnerStatus), 1)
    }
    page.write(**written)
    assert dataclasses.asdict(LearnerStatusPage.open(path).read()) == written


def test_a_learners_state_follows_from_its_process_and_heartbeat(path):
    page = LearnerStatusPage.create(path)
    assert page.read().state == "absent"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        page.write(pid=process.pid)
        page.beat()
        assert page.read().state == "running"
        page.write(heartbeat_ns=time.monotonic_ns() - int(11e9))
        assert page.read().state == "stalled"
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert page.read().state == "dead", "a zombie: its parent has not waited for it yet"
    assert page.read().state == "dead"
    page.write(pid=0)
    assert page.read().state == "absent"


def test_readings_are_never_torn(path):
    writer, reader = EngineStatusPage.create(path), EngineStatusPage.open(path)
    stop = threading.Event()

    def write():
        count = 0
        while not stop.is_set():
            count += 1
            writer.write(rounds=count, generated_tokens=count, running=count)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(2000):
            now = reader.read()
            assert now.rounds == now.generated_tokens == now.running
    finally:
        stop.set()
        thread.join()


def samples(metrics: ServerMetrics) -> dict[str, float]:
    """Metric → value; of one with several samples the last."""
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_have_the_names_that_vllm_uses(path):
    page = EngineStatusPage.create(path)
    page.write(
        max_draft_tokens=2,
        drafts=4,
        proposed=8,
        accepted=6,
        accepted_by_position=[4, 2],
        running=1,
        waiting=2,
        prompt_tokens=10,
        looked_up_tokens=8,
        cached_tokens=6,
        generated_tokens=20,
        swaps=5,
        draft_version="draft-000042",
        domains_version=12,
        domain_names="code\nunknown",
        domain_numbers=[1, 14, 2, 6, 5, 0, 6, 0, 0, 0],
    )
    learner = LearnerStatusPage.create(path.with_name("learner"))
    learner.write(pid=os.getpid(), steps=7, steps_before=7, compute_share=0.25)
    learner.beat()
    ring = RingWriter.create(path.with_name(RING_NAME), 4096, layout="12")
    ring.push(b"x" * 3000)
    ring.push(b"y" * 3000)
    ring.push(b"z" * 5000)
    metrics = ServerMetrics(model="m", status=page, learner=learner, ring=lambda: ring_counters(path.parent))
    metrics.finish("stop")
    metrics.refuse(429)
    for histogram in (metrics.first_token, metrics.between_tokens, metrics.whole_request):
        histogram.observe(0.5)
    lines = metrics.render().decode().splitlines()
    label = 'engine="0"'
    for name, value in {
        "vllm:spec_decode_num_drafts_total": 4,
        "vllm:spec_decode_num_draft_tokens_total": 8,
        "vllm:spec_decode_num_accepted_tokens_total": 6,
        "vllm:num_requests_running": 1,
        "vllm:num_requests_waiting": 2,
        "vllm:prompt_tokens_total": 10,
        "vllm:generation_tokens_total": 20,
        "vllm:prefix_cache_queries_total": 8,
        "vllm:prefix_cache_hits_total": 6,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        "aurora_mean_accepted_length": 2.5,
        "aurora_draft_version": 42,
        "aurora_draft_swaps_total": 5,
        "aurora_domains_version": 12,
        "aurora_learner_running": 1,
        "aurora_learner_steps_total": 0,
        "aurora_learner_compute_share": 0.25,
        "aurora_traces_pushed_total": 2,
    }.items():
        assert f'{name}{{{label},model_name="m"}} {float(value)}' in lines, name
    assert f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},model_name="m",position="1"}} 2.0' in lines
    assert f'vllm:request_success_total{{{label},finished_reason="stop",model_name="m"}} 1.0' in lines
    for domain, values in {"code": (1, 14, 2, 6, 5), "unknown": (0, 6, 0, 0, 0)}.items():
        for name, value in zip(("requests", "generated_tokens", "drafts", "proposed", "accepted"), values, strict=True):
            assert f'aurora_domain_{name}_total{{domain="{domain}",{label},model_name="m"}} {float(value)}' in lines
    of_domains = [line for line in lines if line.startswith("aurora_domain_mean_accepted_length{")]
    assert of_domains == [f'aurora_domain_mean_accepted_length{{domain="code",{label},model_name="m"}} 3.5']
    for cause in ("overwritten", "too_large"):
        assert f'aurora_traces_dropped_total{{cause="{cause}",{label},model_name="m"}} 1.0' in lines
    assert f'aurora_requests_refused_total{{{label},model_name="m",status="429"}} 1.0' in lines


def test_counters_are_shown_under_the_names_that_they_declare(path: Path) -> None:
    """In seconds where they are kept in microseconds; what grammars force counts with n-gram lookup."""
    counters = EngineCounters(compared_us=2_500_000, compared_plain_us=5_000_000, round_us=1_500_000)
    counters.count(generated=3, proposed=6, accepted_from=(Source.DRAFT, Source.MEMORY), remembered=2)
    counters.count(generated=3, proposed=2, accepted_from=(Source.NGRAM, Source.GRAMMAR))
    counters.count(generated=1, proposed=0, accepted_from=())
    counters.count_round("tree")
    page, learner = EngineStatusPage.create(path), LearnerStatusPage.create(path.with_name("learner"))
    page.write(max_draft_tokens=3, memory_tokens=4, **vars(counters))
    status = page.read()
    assert (status.drafts, status.accepted_by_position) == (2, [2, 2, 0])
    speculation, memory = (engine_json(status, None)[section] for section in ("speculation", "memory"))
    assert speculation["generated_by_source"] == {"target": 3, "draft": 1, "lookup": 2, "memory": 1}
    assert speculation["rounds_by_plan"] == {"plain": 0, "lookup": 0, "memory": 0, "chain": 0, "tree": 1}
    assert speculation["against_plain"] == {"seconds": 2.5, "plain_seconds": 5.0, "speedup": 2.0}
    assert (speculation["rounds"], speculation["accepted_by_position"]) == (1, [2, 2, 0])
    assert (memory["proposed"], memory["accepted"], memory["tokens"]) == (2, 1, 4)
    lines = ServerMetrics(model="m", status=page, learner=learner, ring=lambda: None).render().decode().splitlines()
    for sample in (
        'aurora_generated_tokens_total{engine="0",model_name="m",source="lookup"} 2.0',
        'aurora_rounds_total{engine="0",model_name="m",plan="tree"} 1.0',
        'aurora_round_seconds_total{engine="0",model_name="m"} 1.5',
        'aurora_memory_tokens{engine="0",model_name="m"} 4.0',
        'aurora_memory_accepted_tokens_total{engine="0",model_name="m"} 1.0',
    ):
        assert sample in lines, sample
    assert sum(line.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total{") for line in lines) == 3


def test_refusals_are_exported_before_the_first(path: Path) -> None:
    """Else the first burst would be no increase, and `rate` of it 0."""
    page, learner = EngineStatusPage.create(path), LearnerStatusPage.create(path.with_name("learner"))
    lines = ServerMetrics(model="m", status=page, learner=learner, ring=lambda: None).render().decode().splitlines()
    for status in (400, 429, 500, 503):
        assert f'aurora_requests_refused_total{{engine="0",model_name="m",status="{status}"}} 0.0' in lines


def test_a_worker_without_heartbeats_is_not_ready(path: Path) -> None:
    page, learner = EngineStatusPage.create(path), LearnerStatusPage.create(path.with_name("learner"))
    metrics = ServerMetrics(model="m", status=page, learner=learner, ring=lambda: None)
    page.write(state=WorkerState.READY)
    for age_s, ready in ((1, 1.0), (200, 0.0)):
        page.write(heartbeat_ns=time.monotonic_ns() - age_s * 10**9)
        assert samples(metrics)["aurora_worker_ready"] == ready


def test_json_reports_drafts_and_learner(path):
    page, learner_page = EngineStatusPage.create(path), LearnerStatusPage.create(path.with_name("learner"))
    report = engine_json(page.read(), ring_counters(path.parent))
    assert (report["draft"]["refused"], report["draft"]["rolled_back"]) == (None, None)
    assert report["traces"]["ring"] is None
    assert report["domains"] == {"version": None, "refused": None, "served": {}}
    learner = learner_json(learner_page.read())
    assert (learner["state"], learner["heartbeat_age_s"], learner["uptime_s"]) == ("absent", None, None)
    page.write(refused_version="draft-000003", refused_reason="NaN", refusals=1, swaps=2, draft_version="draft-000002")
    page.write(domains_version=3, domains_refused="NaN", domain_names="code", domain_numbers=[1, 14, 2, 6, 5])
    learner_page.write(pid=os.getpid(), challenger_score=float("nan"), champion_score=2.5)
    learner_page.beat()
    RingWriter.create(path.with_name(RING_NAME), 4096, layout="12").push(b"x" * 100)
    report = engine_json(page.read(), ring_counters(path.parent))
    assert report["draft"] == {
        "version": "draft-000002",
        "gain": None,
        "swaps": 2,
        "refusals": 1,
        "refused": {"version": "draft-000003", "reason": "NaN"},
        "rollbacks": 0,
        "rolled_back": None,
        "alarms": 0,
        "alarm": None,
    }
    assert report["domains"] == {
        "version": 3,
        "refused": "NaN",
        "served": {
            "code": {
                "requests": 1,
                "generated_tokens": 14,
                "drafts": 2,
                "proposed": 6,
                "accepted": 5,
                "acceptance_rate": 5 / 6,
                "mean_accepted_length": 3.5,
            }
        },
    }
    assert (report["traces"]["ring"]["queued"], report["traces"]["ring"]["dropped"]["torn"]) == (1, 0)
    learner = learner_json(learner_page.read())
    assert learner["state"] == "running"
    assert learner["gate"] == {"published": 0, "refused": 0, "champion": 2.5, "challenger": None}
    json.dumps([report, learner], allow_nan=False)


def test_share_and_loss_are_of_a_learner_that_runs_and_what_is_not_measured_is_unknown(tmp_path: Path) -> None:
    """They stay on the page of one that was killed, and are 0 before the first step and the first trial."""
    status, learner = EngineStatusPage.create(tmp_path / "status"), LearnerStatusPage.create(tmp_path / "learner")
    metrics = ServerMetrics(model="m", status=status, learner=learner, ring=lambda: None)

    def found() -> tuple[float | None, ...]:
        exported, report = samples(metrics), learner_json(learner.read())
        names = ("aurora_learner_compute_share", "aurora_learner_loss")
        return *map(exported.get, names), report["compute_share"], report["loss"], report["gate"]["champion"]

    learner.write(pid=os.getpid())
    learner.beat()
    assert found() == (0.0, None, 0.0, None, None)
    learner.write(steps=1, compute_share=0.04, loss=1.5, champion_score=2.5)
    assert found() == (0.04, 1.5, 0.04, 1.5, 2.5)
    learner.write(pid=1 << 30)
    assert found() == (None, None, None, None, 2.5), "the last trial's scores remain"


def test_a_learner_in_which_something_fails_is_told(tmp_path: Path) -> None:
    """It runs, and may learn: only its error says that nothing is saved or published."""
    status, learner = EngineStatusPage.create(tmp_path / "status"), LearnerStatusPage.create(tmp_path / "learner")
    metrics = ServerMetrics(model="m", status=status, learner=learner, ring=lambda: None)
    for error, failing in (("", 0.0), ("the learner's state could not be saved: no space left", 1.0), ("", 0.0)):
        learner.write(pid=os.getpid(), error=error)
        assert samples(metrics)["aurora_learner_failing"] == failing


def test_a_learners_counts_begin_at_0_with_the_server(tmp_path: Path) -> None:
    """It goes on from what the learner before had saved, which may be less than the server before had exported: for
    Prometheus a counter that falls began again, and all of its value is new."""
    learner = LearnerStatusPage.create(tmp_path / "learner")
    collector = LearnerCollector(learner, lambda: None, {})

    def counts() -> tuple[float, ...]:
        values = {family.name: family.samples[0].value for family in collector.collect()}
        return values["aurora_learner_steps"], values["aurora_learner_positions"]

    assert counts() == (0, 0)
    learner.write(steps=9, positions=3_000_500, steps_before=7, positions_before=3_000_000)
    assert counts() == (2, 500), "also what was learned before anyone asked"


def test_a_page_whose_writer_was_killed_while_it_wrote_is_whole_after_the_next_write(path):
    writer, reader = LearnerStatusPage.create(path), LearnerStatusPage.open(path)
    writer.write(steps=1)
    writer._integers[1] += 1  # killed in the middle of a write
    again = LearnerStatusPage.open(path, writable=True)
    for steps in (2, 3):
        again.write(steps=steps)
        assert reader._integers[1] % 2 == 0, "no reader waits"
        assert reader.read().steps == steps


def test_a_learner_tells_how_many_threads_compute_while_they_do(tmp_path: Path) -> None:
    page = LearnerStatusPage.create(tmp_path / "learner")
    with page.computing(3):
        assert page.read().busy_threads == 3
    assert page.read().busy_threads == 0


def test_a_learner_has_the_cores_that_it_computes_on_while_it_lives(path: Path) -> None:
    page, now = LearnerStatusPage.create(path), [0.0]
    cores = LearnerCores(page, monotonic_s=lambda: now[0])

    def taken(busy_threads: int) -> int:
        now[0] += 1.0
        page.write(busy_threads=busy_threads)
        return cores()

    assert taken(3) == 0, "no learner"
    page.beat()
    page.write(pid=os.getpid())
    assert [taken(1), taken(3), taken(0), taken(2)] == [1, 3, 0, 2]
    page.write(heartbeat_ns=time.monotonic_ns() - int(20e9))
    assert taken(3) == 0, "it was killed at work"
