"""bench ablation: arms differ as their names say, runs are resumed, and the statistics are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import random_draft, save_model

from aurora_lit.bench.ablation import run as ablation
from aurora_lit.bench.ablation.arms import ARMS, arms_named
from aurora_lit.bench.ablation.statistics import (
    acceptance_by_position,
    acceptance_rate,
    accepted_histogram,
    accepted_length,
    interval,
    length_ratio,
    rate_when_tested,
    speed_up,
    tokens_to_adapt,
)
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.models.target import Target
from aurora_lit.traces.log import TraceLogWriter

K = 3
COSTS = {"target_s": [1.0, 1.1, 1.2, 1.3], "first_step_s": 0.2, "next_step_s": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of two phases that repeat their prompts, as `bench stream` records it, and a starting draft."""
    folder = tmp_path_factory.mktemp("ablation")
    target = Target.load(save_model("llama", folder / "target", num_hidden_layers=4), precision="fp32")
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
    stream = {"phases": [{"name": "chat"}, {"name": "code"}]}
    traffic_of = {"chat": {"segments": 36}, "code": {"segments": 36}}
    about = {"complete": True, "stream": stream, "traffic": traffic_of}
    (folder / "traces" / "stream.json").write_text(json.dumps(about))
    return folder


def a_config(folder: Path, **learn: Any) -> AuroraConfig:
    config = load_config(None, [f"engine.max_draft_tokens={K}", "engine.explore_share=0.1", "domain.detect=false"])
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


def test_arms_learn_differently_and_the_report_says_how(folder: Path, out: Path) -> None:
    report = run(folder, out, "static,kl,lk,ppo,full", a_config(folder, learning_rate=1e-2))
    arms = report["arms"]
    assert list(arms) == ["static", "kl", "lk", "ppo", "full"]
    after = {name: found["measured"]["all_after"]["accepted_length"] for name, found in arms.items()}
    assert len(set(after.values())) == 5, "no two arms learn the same"
    assert arms["static"]["measured"]["all_before"]["accepted_length"] == after["static"]
    for name in ("kl", "lk", "full"):
        assert after[name] > after["static"] + 0.2
        assert arms[name]["traffic"]["over_static"]["interval"][0] > 1
    steps = [found["cost"]["steps"] for found in arms.values()]
    assert steps[0] == 0
    assert len(set(steps[1:])) == 1
    assert steps[1] > 40
    assert [found["cost"]["explored_rounds"] > 0 for found in arms.values()] == [False, False, False, True, True]
    for found in arms.values():
        by_phase = found["traffic"]["by_phase"]
        assert sum(each["requests"] for each in by_phase.values()) == found["traffic"]["requests"] == 72
        assert sum(each["rounds"] for each in by_phase.values()) == found["traffic"]["rounds"]
        assert list(found["forgetting"]) == ["0-chat … code"]
        assert len(found["measured"]["length_after_phase"]) == 3
    for part in (lambda arm: arms[arm]["traffic"], lambda arm: arms[arm]["measured"]["all_after"]):
        ratio = part("full")["accepted_length"] / part("kl")["accepted_length"]
        assert part("full")["over_kl"]["ratio"] == pytest.approx(ratio, abs=1e-3)
        assert "over_kl" not in part("kl")
    assert (out / "ablation.png").stat().st_size > 1000
    assert json.loads((out / "report.json").read_text())["arms"]["kl"]["traffic"] == arms["kl"]["traffic"]


def test_only_missing_results_are_computed(folder: Path, out: Path) -> None:
    first = run(folder, out, "static,lk", seeds=(0, 1), every=2)
    files = {path.name: path.read_bytes() for path in (out / "arms").iterdir()}
    assert sorted(files) == ["lk-0.json", "lk-1.json", "static-0.json", "static-1.json"]
    scored = [set(json.loads(files[f"lk-{seed}.json"])["requests"]) for seed in (0, 1)]
    assert [len(each) for each in scored] == [36, 36]
    assert not scored[0] & scored[1], "each seed has other requests"
    assert first["arms"]["lk"]["traffic"]["requests"] == 72
    assert json.loads(files["lk-0.json"])["measured"] != json.loads(files["lk-1.json"])["measured"]
    assert list(run(folder, out, "static", seeds=(0, 1), every=2)["arms"]) == ["static", "lk"], (
        "all results in the folder"
    )
    (out / "arms" / "lk-1.json").unlink()  # killed in the middle: there is no file
    written = {path.name: path.stat().st_mtime_ns for path in (out / "arms").iterdir()}
    again = run(folder, out, "static,lk", seeds=(0, 1), every=2)
    assert {name: (out / "arms" / name).stat().st_mtime_ns for name in written} == written
    lengths = [report["arms"]["lk"]["traffic"]["by_seed"] for report in (first, again)]
    assert lengths[0] == lengths[1], "an arm and seed are reproducible"
    with pytest.raises(ConfigError, match="other settings"):
        run(folder, out, "static", a_config(folder, learning_rate=1e-3), seeds=(0, 1), every=2)
    with pytest.raises(ConfigError, match="use some of static,kl"):
        run(folder, out, "static,best")
    with pytest.raises(AuroraError, match="has no complete stream"):
        ablation.run(a_config(folder), traces=out, arms=["static"], seeds=(0,), out=out)


def test_each_arm_changes_what_its_name_says(folder: Path) -> None:
    config = a_config(folder)
    config = replace(config, domain=replace(config.domain, detect=True))
    made = {arm.name: arm.settings(config, seed=3) for arm in arms_named(list(ARMS))}
    assert {each.learn.seed for each in made.values()} == {3}
    full = replace(config, learn=replace(config.learn, seed=3))
    assert made["full"] == full
    assert {name: each.learn.base_loss for name, each in made.items() if each.learn.base_loss != "lk"} == {
        "kl": "kl",
        "ppo": "none",
    }
    for name in ("static", "kl", "lk", "full-without-ppo"):
        assert (made[name].learn.ppo_weight, made[name].engine.explore_share) == (0, 0)
    for name in ("kl", "lk", "ppo", "full-without-detector"):
        assert not made[name].domain.detect
    for name in ("kl", "lk", "ppo", "full-without-replay"):
        assert made[name].learn.replay_share == 0
    assert made["full-uniform"].learn.trace_selection == "uniform"
    assert {name for name, arm in ARMS.items() if not arm.gated} == {"kl", "lk", "ppo", "full-without-gate"}


def test_accepted_length_and_rates_follow_from_histograms() -> None:
    histograms = np.array([[4.0, 2, 0, 2], [1, 0, 0, 1]])  # rounds that accepted 0, 1, 2, 3
    assert accepted_length(histograms) == pytest.approx(1 + (2 * 1 + 3 * 3) / 10)
    assert acceptance_by_position(histograms) == pytest.approx([0.5, 0.3, 0.3])
    assert acceptance_rate(histograms) == pytest.approx(11 / 30)
    assert rate_when_tested(histograms) == pytest.approx(11 / (11 + 7))
    assert accepted_length(np.zeros((0, 4))) == 1


def test_the_histogram_of_a_trace_counts_its_rounds(folder: Path) -> None:
    target = Target.load(folder / "target", precision="fp32")
    trace = serve(target, random_draft(target), some_requests(1))[0]
    counts = accepted_histogram(trace, num_proposed=3)
    assert sum(counts) == len(trace.num_accepted_R)
    assert sum(n * count for n, count in enumerate(counts)) == int(trace.num_accepted_R.sum())


def test_the_modelled_speed_up_uses_the_best_number_of_proposals() -> None:
    always = np.array([[0.0, 0, 0, 5]])
    assert speed_up(always, COSTS) == pytest.approx(4 / (1.3 + 0.2 + 2 * 0.1))
    never = np.array([[5.0, 0, 0, 0]])
    assert speed_up(never, COSTS) == 1, "plain decoding is a choice too"
    once = np.array([[2.0, 8, 0, 0]])
    assert speed_up(once, COSTS) == pytest.approx(1.8 / (1.1 + 0.2))


def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        histograms = rng.multinomial(12, [0.5, 0.3, 0.1, 0.1], size=60).astype(float)
        low, high = interval(accepted_length, histograms, seed=trial)
        covered += low <= 1.8 <= high
    assert 0.87 <= covered / 150 <= 0.995
    low, high = interval(length_ratio, histograms, histograms)
    assert low == high == 1, "both are resampled with the same requests"


def test_adaptation_is_counted_until_the_gain_nears_its_final_value() -> None:
    base = np.tile([6.0, 4, 0, 0], (100, 1))
    gain = np.minimum(1.0, np.arange(100) / 50)  # reaches its final value at request 50
    own = base + gain[:, None] * np.array([-4.0, 0, 0, 4])
    tokens = tokens_to_adapt(own, base, [10] * 100, window=5)
    assert tokens is not None
    assert 450 <= tokens <= 530
    assert tokens_to_adapt(base, base, [10] * 100, window=5) is None, "nothing is gained"
    assert tokens_to_adapt(own[:9], base[:9], [10] * 9, window=5) is None, "too few requests"


def test_costs_are_measured_once_and_longer_passes_cost_no_less(folder: Path, tmp_path: Path) -> None:
    config = a_config(folder)
    config = replace(config, engine=replace(config.engine, max_seq_len=128, prefill_chunk_tokens=64))
    costs = ablation.measure_costs(config, tmp_path / "costs.json")
    assert len(costs["target_s"]) == K + 1
    assert costs["target_s"] == sorted(costs["target_s"])
    assert min(costs["target_s"]) > 0
    assert costs["first_step_s"] > 0
    assert ablation.measure_costs(config, tmp_path / "costs.json") == costs
