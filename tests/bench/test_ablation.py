"""bench ablation: arms differ as their names say, and runs are resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import random_draft, save_model

from aurora_lit.bench.ablation import run as ablation
from aurora_lit.bench.ablation.arms import ARMS, arms_named
from aurora_lit.bench.ablation.phases import order_of_phases, takes
from aurora_lit.bench.ablation.report import summary
from aurora_lit.bench.ablation.result import stored
from aurora_lit.bench.stream_plan import phase_of
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.kernels import native
from aurora_lit.learn.data.online_batcher import informativeness
from aurora_lit.learn.offline import copies
from aurora_lit.learn.offline.replay import read_traces
from aurora_lit.models.loading import load_target
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.domains.detector import acceptance_rate
from aurora_lit.request import Source
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace

K = 3
LOOKUP_TOKENS = 15
COSTS = {"draft_tokens": K, "target_s": [1 + 0.1 * n for n in range(9)], "first_step_s": 0.2, "next_step_s": 0.1}
needs_kernels = pytest.mark.skipif(native.library() is None, reason="there is no memory without kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of two phases that repeat their prompts, as `bench stream` records it, and a starting draft."""
    folder = tmp_path_factory.mktemp("ablation")
    target = load_target(save_model("llama", folder / "target", num_hidden_layers=4), precision="fp32")
    save_draft(random_draft(target), folder / "start", dtype=torch.float32)
    traffic = TraceLogWriter(folder / "traces" / "traffic", kind="traffic", shard_positions=500)
    for number, (domain, seed) in enumerate((("chat", 0), ("code", 1))):
        asked = some_requests(6, seed=seed, domain=domain, max_tokens=30)
        requests = [replace(r, request_id=f"{number}-{domain}/{n}-{r.request_id}") for n in range(6) for r in asked]
        if number:  # sampled requests are not scored
            sampled = [replace(r, params=replace(r.params, temperature=0.7, seed=5)) for r in asked[:2]]
            requests += [replace(r, request_id=f"{number}-{domain}/9-{r.request_id}") for r in sampled]
        for trace in sorted(serve(target, None, requests), key=lambda trace: trace.request_id):
            traffic.append(trace)
    traffic.flush()
    measured = TraceLogWriter(folder / "traces" / "measure", kind="measure")
    for domain, seed in (("chat", 0), ("code", 1)):
        for trace in serve(target, None, some_requests(6, seed=seed, domain=domain, max_tokens=30)):
            measured.append(trace)
    measured.flush()
    stream = {"phases": [{"name": "chat", "requests": 36}, {"name": "code", "requests": 38}]}
    traffic_of = {"chat": {"segments": 36}, "code": {"segments": 36}}
    about = {"complete": True, "stream": stream, "traffic": traffic_of}
    (folder / "traces" / "stream.json").write_text(json.dumps(about))
    return folder


def a_config(folder: Path, *, lookup: bool = False, memory_mb: int = 0, **learn: Any) -> AuroraConfig:
    settings = ("engine.explore_share=0.1", "domain.detect=false", f"engine.max_draft_tokens={K}")
    copied = (f"engine.lookup={lookup}", f"memory.capacity_mb={memory_mb}")
    config = load_config(None, [*settings, *copied])
    fields = {
        "batch_positions": 512,
        "unroll_steps": K,
        "publish_every_steps": 6,
        "learning_rate": 4e-3,
        "gate_requests": 12,
    }
    return replace(
        config,
        target=replace(config.target, source=str(folder / "target"), sha256=None, precision="fp32"),
        draft=replace(config.draft, checkpoint=str(folder / "start")),
        learn=replace(config.learn, **{**fields, **learn}),
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with known costs, so that none are measured."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "costs.json").write_text(json.dumps(COSTS))
    return tmp_path / "out"


def run(folder: Path, out: Path, arms: str, config: AuroraConfig | None = None, **options: Any) -> dict[str, Any]:
    fields = {"seeds": (0,), "steps_per_request": 0.8, "every": 1, "block": 18, **options}
    return ablation.run(config or a_config(folder), traces=folder / "traces", arms=arms.split(","), out=out, **fields)


@pytest.mark.slow
def test_arms_learn_differently_and_the_report_says_how(folder: Path, out: Path) -> None:
    report = run(folder, out, "static,kl,lk,ppo,full", a_config(folder, learning_rate=1e-2, gate_requests=6))
    arms = report["arms"]
    assert list(arms) == ["static", "kl", "lk", "ppo", "full"]
    after = {name: found["measured"]["all_after"]["accepted_length"] for name, found in arms.items()}
    assert len(set(after.values())) == 5, "no two arms learn the same"
    assert arms["static"]["measured"]["all_before"]["accepted_length"] == after["static"]
    for name in ("kl", "lk", "full"):
        assert after[name] > after["static"] + 0.2
        over_static = arms[name]["traffic"]["over_static"]
        assert (over_static["ratio"] if name == "full" else over_static["interval"][0]) > 1, "full passes its gate late"
    steps = [found["cost"]["steps"] for found in arms.values()]
    assert steps[0] == 0
    assert len(set(steps[1:])) == 1
    assert steps[1] > 40
    assert [found["cost"]["explored_rounds"] > 0 for found in arms.values()] == [False, False, False, True, True]
    for found in arms.values():
        by_phase = found["traffic"]["by_phase"]
        assert sum(each["requests"] for each in by_phase.values()) == found["traffic"]["requests"] == 72
        assert sum(each["rounds"] for each in by_phase.values()) == found["traffic"]["rounds"]
        assert list(found["forgetting"]) == ["0-chat"]
        assert len(found["measured"]["length_after_phase"]) == 3
    for part in (lambda arm: arms[arm]["traffic"], lambda arm: arms[arm]["measured"]["all_after"]):
        ratio = part("full")["accepted_length"] / part("kl")["accepted_length"]
        assert part("full")["over_kl"]["ratio"] == pytest.approx(ratio, abs=1e-3)
        assert "over_kl" not in part("kl")
    assert (out / "ablation.png").stat().st_size > 1000
    assert json.loads((out / "report.json").read_text())["arms"]["kl"]["traffic"] == arms["kl"]["traffic"]


@pytest.mark.slow
@needs_kernels
def test_memory_and_learner_are_told_apart(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Recorded(copies.SuffixMemory):
        def __init__(self, capacity_bytes: int) -> None:
            made.append(capacity_bytes)
            super().__init__(capacity_bytes)

    monkeypatch.setattr(copies, "SuffixMemory", Recorded)
    config = a_config(folder, memory_mb=1, lookup=True, learning_rate=1e-2)
    arms = run(folder, out, "static,memory,full,both", config)["arms"]
    assert made == [1 << 20] * 2, "arms without memory make none"
    traffic = {name: found["traffic"] for name, found in arms.items()}
    measured = {name: found["measured"]["all_after"] for name, found in arms.items()}
    for part in (traffic, measured):
        assert part["memory"]["over_static"]["interval"][0] > 1, "answers come again"
        assert part["both"]["over_full"]["interval"][0] > 1
        for name, other in (("both", "full"), ("both", "memory"), ("memory", "static")):
            lengths = [part[arm]["accepted_length"] for arm in (name, other)]
            over = part[name][f"over_{other}"]
            assert over["ratio"] == pytest.approx(lengths[0] / lengths[1], abs=1e-3)
            assert over["difference"] == pytest.approx(lengths[0] - lengths[1], abs=1e-3)
            low, high = over["difference_interval"]
            assert low <= over["difference"] <= high
    assert measured["full"]["over_static"]["interval"][0] > 1, "its gate has passed a draft by the end"
    assert traffic["static"]["proposed_copies"] > 0, "all arms copy from earlier in the request"
    assert traffic["memory"]["proposed_copies"] > traffic["static"]["proposed_copies"] + 1
    assert [each["cost"]["steps"] > 0 for each in arms.values()] == [False, False, True, True]
    before = arms["memory"]["measured"]["all_before"]["accepted_length"]
    assert before == arms["static"]["measured"]["all_before"]["accepted_length"], "nothing is remembered yet"
    (result,) = (json.loads(path.read_text()) for path in (out / "arms").glob("memory-0.json"))
    assert {len(counts) for counts in result["counts"]} == {3}
    assert {len(row) for counts in result["counts"] for row in counts} == {LOOKUP_TOKENS + 1}


def test_an_arm_that_remembers_needs_a_memory(folder: Path, out: Path) -> None:
    config = a_config(folder, memory_mb=1)
    alone = replace(config, memory=replace(config.memory, scope="client"))
    for arm in ("memory", "both"):
        for each in (a_config(folder), alone):
            with pytest.raises(ConfigError, match=r"memory\.scope=domain"):
                run(folder, out, arm, each)


def test_seeds_may_have_their_own_orders_of_phases(folder: Path, out: Path) -> None:
    seed = next(seed for seed in range(1, 20) if order_of_phases(2, seed=seed, shuffled=True) == [1, 0])
    options = {"seeds": (0, seed), "every": 2, "shuffle_phases": True, "steps_per_request": 0.2}
    static = run(folder, out, "static,lk", **options)["arms"]["lk"]
    results = [json.loads((out / "arms" / f"lk-{each}.json").read_text()) for each in (0, seed)]
    assert [result["order"] for result in results] == [[0, 1], [1, 0]]
    assert [sorted(set(result["phases"])) for result in results] == [[0, 1], [0, 1]]
    assert [result["phases"][0] for result in results] == [0, 1]
    asked = sum(len(t.token_ids_T) - t.answer_start for t in read_traces(folder / "traces" / "traffic"))
    for result in results:  # what comes after a phase's last scored answer is of no interest
        assert 0.8 * asked < sum(result["answer_tokens"]) <= asked
    assert static["orders"] == 2
    first = summary([next(stored(out, "lk"))], base=[], others={}, costs=COSTS, names=["chat", "code"])["measured"]
    assert static["measured"]["length_after_phase"] == first["length_after_phase"], "of the recorded order alone"
    assert {phase: lost["seeds"] for phase, lost in static["forgetting"].items()} == {"0-chat": 1, "1-code": 1}
    with pytest.raises(ConfigError, match="other settings"):
        run(folder, out, "static,lk", seeds=(0,), every=2, steps_per_request=0.2)


def test_only_missing_results_are_computed(folder: Path, out: Path) -> None:
    halves = {"seeds": (0, 1), "every": 2, "steps_per_request": 0.2}
    first = run(folder, out, "static,lk", **halves)
    files = {path.name: path.read_bytes() for path in (out / "arms").iterdir()}
    assert sorted(files) == ["lk-0.json", "lk-1.json", "static-0.json", "static-1.json"]
    scored = [set(json.loads(files[f"lk-{seed}.json"])["requests"]) for seed in (0, 1)]
    assert len(scored[0] | scored[1]) == 72
    assert min(len(each) for each in scored) > 24
    assert not scored[0] & scored[1], "each seed has other requests"
    assert first["arms"]["lk"]["traffic"]["requests"] == 72
    assert json.loads(files["lk-0.json"])["measured"] != json.loads(files["lk-1.json"])["measured"]
    assert list(run(folder, out, "static", **halves)["arms"]) == ["static", "lk"], "all results in the folder"
    (out / "arms" / "lk-1.json").unlink()  # killed in the middle: there is no file
    written = {path.name: path.stat().st_mtime_ns for path in (out / "arms").iterdir()}
    again = run(folder, out, "static,lk", **halves)
    assert {name: (out / "arms" / name).stat().st_mtime_ns for name in written} == written
    lengths = [report["arms"]["lk"]["traffic"]["by_seed"] for report in (first, again)]
    assert lengths[0] == lengths[1], "an arm and seed are reproducible"
    with pytest.raises(ConfigError, match="other settings"):
        run(folder, out, "static", a_config(folder, learning_rate=1e-3), **halves)
    with pytest.raises(ConfigError, match="use some of static,memory,kl"):
        run(folder, out, "static,best")
    with pytest.raises(AuroraError, match="has no complete stream"):
        ablation.run(a_config(folder), traces=out, arms=["static"], seeds=(0,), out=out)


@pytest.mark.parametrize("change", ["draft", "fewer answers", "other answers"])
def test_results_of_another_draft_or_recording_are_not_taken_for_these(
    change: str, folder: Path, out: Path, tmp_path: Path
) -> None:
    """They are in the folders of the same names."""
    shutil.copytree(folder, tmp_path / "own")
    options = {"every": 6, "steps_per_request": 0.2}
    run(tmp_path / "own", out, "static", **options)
    if change == "draft":
        target = load_target(tmp_path / "own" / "target", precision="fp32")
        save_draft(random_draft(target, seed=7), tmp_path / "own" / "start", dtype=torch.float32)
    else:
        traces = list(read_traces(tmp_path / "own" / "traces" / "measure"))
        shutil.rmtree(tmp_path / "own" / "traces" / "measure")
        again = TraceLogWriter(tmp_path / "own" / "traces" / "measure", kind="measure")
        if change == "other answers":  # of the same lengths
            traces = [replace(trace, token_ids_T=trace.token_ids_T.flip(0)) for trace in traces]
        for trace in traces[:3] if change == "fewer answers" else traces:
            again.append(trace)
        again.close()
    with pytest.raises(ConfigError, match="another draft or another stream; name another folder"):
        run(tmp_path / "own", out, "static", **options)


def test_a_draft_that_is_not_there_yet_leaves_nothing_behind(folder: Path, out: Path, tmp_path: Path) -> None:
    """Nothing says then from which draft the results in --out begin."""
    own = tmp_path / "own"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("start"))
    for there in ("nothing", "config.json"):
        if there != "nothing":
            (own / "start").mkdir()
            shutil.copy(folder / "start" / there, own / "start")
        with pytest.raises(AuroraError, match="start"):
            run(own, out, "static", every=6)
    assert [path.name for path in out.iterdir()] == ["costs.json"]
    shutil.copytree(folder / "start", own / "start", dirs_exist_ok=True)
    run(own, out, "static", every=6)


def test_a_stream_of_another_target_is_refused(folder: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "traces", tmp_path / "traces")
    path = tmp_path / "traces" / "stream.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target": {"source": "other", "precision": "bf16"}}))
    with pytest.raises(
        ConfigError, match="--traces .*traces: holds answers of {'source': 'other', 'precision': 'bf16'}"
    ):
        ablation.run(a_config(folder), traces=tmp_path / "traces", arms=["static"], seeds=(0,), out=out)


def test_the_detector_sees_no_rounds_of_the_draft_that_was_recorded(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only greedy requests that the seed takes have rounds of the arm's own draft."""
    seen: list[Trace] = []
    assign_domain = DomainController.assign_domain

    def noted(self: DomainController, trace: Trace) -> Trace:
        seen.append(trace)
        return assign_domain(self, trace)

    monkeypatch.setattr(DomainController, "assign_domain", noted)
    traces = []
    for trace in read_traces(folder / "traces" / "traffic"):
        ones_R = torch.ones_like(trace.num_proposed_R)
        rounds: dict[str, Any] = {"source_R": torch.full_like(trace.source_R, Source.DRAFT), "num_proposed_R": ones_R}
        versions_R = torch.zeros_like(trace.round_version_R)
        traces.append(replace(trace, num_accepted_R=ones_R, round_version_R=versions_R, **rounds))
    assert all(acceptance_rate(trace) == 1.0 for trace in traces)
    monkeypatch.setattr(ablation, "phases_in_order", lambda *_: groupby(traces, key=lambda t: phase_of(t.request_id)))
    run(folder, out, "static,lk", a_config(folder, max_repeated_share=1.0), every=4, steps_per_request=0.0)
    unknown = {trace.request_id for trace in traces if not takes(trace.request_id, seed=0, every=4)}
    unknown |= {trace.request_id for trace in traces if trace.verify == "sampled"}
    assert 36 < len(unknown) < len(traces)
    assert all(acceptance_rate(trace) is None for trace in seen if trace.request_id in unknown)
    assert any(acceptance_rate(trace) is not None for trace in seen if trace.request_id not in unknown)
    learned = [trace for trace in seen if trace.verify == "sampled" and takes(trace.request_id, seed=0, every=4)]
    assert learned
    assert all(informativeness(trace) == 0.0 for trace in learned), "batches take them by their own rate, as a server's"


def test_each_arm_changes_what_its_name_says(folder: Path) -> None:
    config = a_config(folder)
    config = replace(config, domain=replace(config.domain, detect=True))
    config = replace(config, memory=replace(config.memory, capacity_mb=8))
    config = replace(config, engine=replace(config.engine, explore_share=0.0))
    made = {arm.name: arm.settings(config, seed=3) for arm in arms_named(list(ARMS))}
    assert {each.learn.seed for each in made.values()} == {3}
    assert made["both"] == replace(config, learn=replace(config.learn, seed=3))
    assert made["full"] == replace(made["both"], memory=replace(config.memory, capacity_mb=0))
    assert {name for name, each in made.items() if each.memory.capacity_mb} == {"memory", "both"}
    assert made["static"] == replace(made["memory"], memory=made["full"].memory)
    assert {name for name, arm in ARMS.items() if not arm.learns} == {"static", "memory"}
    assert {name: each.learn.base_loss for name, each in made.items() if each.learn.base_loss != "lk"} == {
        "kl": "kl",
        "ppo": "none",
    }
    for name in ("static", "memory", "kl", "lk"):
        assert (made[name].learn.ppo_weight, made[name].engine.explore_share) == (0, 0)
    assert {name for name, each in made.items() if each.engine.explore_share} == {"ppo", "full-with-ppo"}
    for name in ("kl", "lk", "ppo", "full-without-detector"):
        assert not made[name].domain.detect
    for name in ("kl", "lk", "ppo", "full-without-replay"):
        assert made[name].learn.replay_share == 0
    assert made["full-uniform"].learn.trace_selection == "uniform"
    assert {name for name, arm in ARMS.items() if not arm.gated} == {"kl", "lk", "ppo", "full-without-gate"}


def test_costs_are_measured_once_and_longer_passes_cost_no_less(folder: Path, tmp_path: Path) -> None:
    config = a_config(folder, lookup=True)
    config = replace(config, engine=replace(config.engine, max_seq_len=128, prefill_chunk_tokens=64))
    costs = ablation.measure_costs(config, tmp_path / "costs.json")
    assert len(costs["target_s"]) == 1 + K + LOOKUP_TOKENS
    assert costs["draft_tokens"] == K
    assert costs["target_s"] == sorted(costs["target_s"])
    assert min(costs["target_s"]) > 0
    assert costs["first_step_s"] > 0
    assert ablation.measure_costs(config, tmp_path / "costs.json") == costs
