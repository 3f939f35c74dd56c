"""The ablation: arms differ as their names say, statistics are right, and runs are resumed."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.fake_engine import tiny_tokenizer
from support.tiny_models import random_draft, save_model
from support.trace_examples import numbered_trace
from torch.nn.utils import parameters_to_vector

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native
from aurora_lit.learn.offline.loop import OfflineLoop, read_traces
from aurora_lit.learn.offline.ngram_paths import CopiedTokens
from aurora_lit.learn.online import intake
from aurora_lit.models.loading import load_target
from aurora_lit.traces.log import read_index
from benchmarks import ablation
from benchmarks.ablation import (
    ARMS,
    Rows,
    accepted_length,
    interval,
    length_difference,
    length_ratio,
    order_of_phases,
    phase_of,
    round_counts,
    run,
    takes,
)

K = 3

# -- statistics --------------------------------------------------------------------------------------------------------


def rows_of(hist_NA: NDArray[np.float64], *, seed_N: list[int] | None = None, names: list[str] | None = None) -> Rows:
    N = len(hist_NA)
    return Rows(
        hist_NA=hist_NA,
        seed_N=np.array(seed_N if seed_N is not None else [0] * N),
        request_N=np.array(names if names is not None else [str(n) for n in range(N)]),
    )


def test_accepted_length_follows_from_histograms() -> None:
    histograms = np.array([[4.0, 2, 0, 2], [1, 0, 0, 1]])  # rounds that accepted 0, 1, 2, 3
    assert accepted_length(histograms) == pytest.approx(1 + (2 * 1 + 3 * 3) / 10)
    assert accepted_length(np.zeros((0, 4))) == 1
    assert accepted_length(Rows.of([]).hist_NA) == 1
    found = Rows.of([(3, "a", [1, 2]), (4, "b", [3, 4])])
    assert found.hist_NA.tolist() == [[1, 2], [3, 4]]
    assert (found.seed_N.tolist(), found.request_N.tolist()) == ([3, 4], ["a", "b"])


def test_rounds_accept_the_better_of_copies_and_draft() -> None:
    trace = replace(
        numbered_trace(20, answer_start=4),
        round_root_R=torch.tensor([4, 6, 10], dtype=torch.int32),
        num_accepted_R=torch.tensor([1, 0, 2], dtype=torch.int16),
    )
    accepted_T = [0] * 20
    accepted_T[6], accepted_T[10] = 3, 4
    assert round_counts(trace, CopiedTokens(accepted_T, accepted_T), reach=4) == [0, 1, 0, 1, 1]
    assert round_counts(trace, None, reach=4) == [1, 1, 1, 0, 0]


@pytest.mark.slow
def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        histograms = rng.multinomial(12, [0.5, 0.3, 0.1, 0.1], size=60).astype(float)
        low, high = interval(accepted_length, rows_of(histograms), seed=trial)
        covered += low <= 1.8 <= high
    assert 0.86 <= covered / 100 <= 0.995
    rows = rows_of(histograms)
    assert interval(length_ratio, rows, rows) == (1, 1), "both are resampled with the same requests"
    assert interval(length_difference, rows, rows) == (0, 0)
    assert interval(accepted_length, rows_of(histograms[:0])) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_intervals_know_that_training_varies_with_the_seed(shared: bool) -> None:
    """Differences between two arms, where each seed trained a draft that is better or worse by its own amount."""
    rng, seeds, requests = np.random.default_rng(1), 10, 25
    covered, narrow = 0, 0
    names = [f"{'' if shared else s} {n}" for s in range(seeds) for n in range(requests)]
    seed_N = [s for s in range(seeds) for _ in range(requests)]
    for trial in range(40):
        luck_S = rng.normal(0, 0.05, size=seeds)
        own, base = (
            np.concatenate([rng.multinomial(20, [0.5 - x, 0.5 + x], size=requests) for x in luck]).astype(float)
            for luck in (luck_S, np.zeros(seeds))
        )
        for is_known, labels in ((True, seed_N), (False, [0] * len(seed_N))):
            rows = [rows_of(each, seed_N=labels, names=names) for each in (own, base)]
            low, high = interval(length_difference, *rows, seed=trial)
            if is_known:
                covered += low <= 0 <= high
            else:
                narrow += low <= 0 <= high
    assert covered / 40 >= 0.85
    assert narrow < covered - 5, "requests alone vary less"


def test_requests_that_seeds_have_in_common_are_drawn_for_all_of_them() -> None:
    """Copies of one seed's results say nothing new about which prompts are easy."""
    one = np.random.default_rng(2).multinomial(12, [0.5, 0.3, 0.1, 0.1], size=50).astype(float)
    names, seed_N = [str(n) for n in range(50)] * 6, [s for s in range(6) for _ in range(50)]
    low, high = interval(accepted_length, rows_of(one))
    of_six = interval(accepted_length, rows_of(np.tile(one, (6, 1)), seed_N=seed_N, names=names))
    assert of_six[1] - of_six[0] == pytest.approx(high - low, rel=0.1)


# -- arms and seeds ----------------------------------------------------------------------------------------------------


def test_each_arm_changes_what_its_name_says() -> None:
    config = load_config(None, ["domain.detect=true", "memory.capacity_mb=8"])
    made = {name: arm.settings(config) for name, arm in ARMS.items()}
    assert made["both"] == config
    assert made["learner"] == replace(made["both"], memory=replace(config.memory, capacity_mb=0))
    assert {name for name, each in made.items() if each.memory.capacity_mb} == {"memory", "both"}
    assert made["static"] == replace(made["memory"], memory=made["learner"].memory)
    assert {name for name, arm in ARMS.items() if not arm.learns} == {"static", "memory"}
    assert {name: arm.base_loss for name, arm in ARMS.items() if arm.base_loss != "lk"} == {"kl": "kl"}
    assert {name for name, each in made.items() if not each.learn.ppo} == {"kl", "lk", "without-ppo"}
    assert {name for name, each in made.items() if not each.domain.detect} == {"kl", "lk", "without-detector"}
    assert {name for name, each in made.items() if not each.learn.replay_share} == {"kl", "lk", "without-replay"}
    assert {name for name, arm in ARMS.items() if not arm.gated} == {"kl", "lk", "without-gate"}
    assert made["kl"].learn.learning_rate == pytest.approx(0.3 * config.learn.learning_rate)


def test_seeds_take_other_requests_and_have_their_own_orders() -> None:
    requests = [f"0-chat/{n:05d}" for n in range(400)]
    for seeds in (range(4), range(4, 8)):
        taken = [{each for each in requests if takes(each, seed=seed, every=4)} for seed in seeds]
        assert set.union(*taken) == set(requests)
        assert sum(map(len, taken)) == 400
        assert min(map(len, taken)) > 60
    assert taken[0] != {each for each in requests if takes(each, seed=0, every=4)}
    assert all(takes(each, seed=2, every=1) for each in requests)
    assert order_of_phases(5, seed=0, shuffled=True) == order_of_phases(5, seed=3, shuffled=False) == [0, 1, 2, 3, 4]
    orders = {tuple(order_of_phases(5, seed=seed, shuffled=True)) for seed in range(1, 6)}
    assert len(orders) > 3
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def looping_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are learned from: those of a random target loop."""
    monkeypatch.setattr(intake, "MAX_REPEATED_SHARE", 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, a draft of random weights and prompts of two kinds."""
    folder = tmp_path_factory.mktemp("ablation")
    saved = save_model("llama", folder / "target", num_hidden_layers=4, vocab_size=len(tiny_tokenizer()))
    tiny_tokenizer().save_pretrained(saved)
    save_draft(random_draft(load_target(saved, precision="fp32")), folder / "start", dtype=torch.float32)
    for kind in ("chat", "code"):
        rows = [{"domain": kind, "messages": [{"role": "user", "content": f"{kind} {i % 6}"}]} for i in range(60)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def a_config(folder: Path, *overrides: str) -> AuroraConfig:
    settings = [f"target.source={folder / 'target'}", "target.sha256=null", "target.precision=fp32"]
    settings += [f"draft.checkpoint={folder / 'start'}", "engine.max_seq_len=64"]
    settings += ["engine.threads=1", "engine.lookup=false", f"engine.max_draft_tokens={K}", "domain.detect=false"]
    settings += ["learn.publish_every_steps=6", "learn.learning_rate=1e-2", "learn.gate_requests=6"]
    return load_config(None, [*settings, "memory.capacity_mb=0", *overrides])


def options(folder: Path, out: Path, *arms: str, **changes: Any) -> argparse.Namespace:
    chat, code = folder / "chat.jsonl", folder / "code.jsonl"
    fields = {"phases": [chat, code, chat], "requests": 18, "measure": [code], "measure_requests": 3, "max_tokens": 20}
    fields |= {"seeds": [0], "every": 1, "steps_per_request": 0.5, "block": 18, "shuffle_phases": False}
    return argparse.Namespace(**{**fields, "arms": list(arms), "out": out, **changes})


@pytest.mark.slow
def test_a_stream_is_recorded_once_and_only_missing_arms_are_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "_SHARD_POSITIONS", 150)
    config, out = a_config(folder), tmp_path / "out"
    halves: dict[str, Any] = {"seeds": [0, 1], "every": 2, "shuffle_phases": True}
    report = run(config, options(folder, out, "static", "lk", **halves))
    traffic = list(read_traces(out / "traffic"))
    assert [phase_of(trace.request_id) for trace in traffic] == sorted([0] * 18 + [1] * 18 + [2] * 18)
    assert len({trace.request_id for trace in traffic}) == 54
    assert [trace.domain for trace in read_traces(out / "measure")] == ["code"] * 3
    files = {path.name: json.loads(path.read_text()) for path in (out / "arms").iterdir()}
    assert sorted(files) == ["lk-0.json", "lk-1.json", "static-0.json", "static-1.json"]
    scored = [files[f"lk-{seed}.json"]["requests"] for seed in (0, 1)]
    assert set(scored[0]) | set(scored[1]) == {trace.request_id for trace in traffic}
    assert not set(scored[0]) & set(scored[1]), "each seed has other requests"
    for seed in (0, 1):
        order = order_of_phases(3, seed=seed, shuffled=True)
        assert files[f"lk-{seed}.json"]["order"] == order
        assert list(dict.fromkeys(map(phase_of, scored[seed]))) == order
        assert len(files[f"lk-{seed}.json"]["measured"]) == 4
    arms = report["arms"]
    assert arms["static"]["measured"]["before"] == arms["static"]["measured"]["after"]
    assert arms["static"]["cost"]["steps"] == 0 < arms["lk"]["cost"]["steps"]
    assert "static" not in arms["static"]["traffic"]["over"]
    over, lengths = (
        arms["lk"]["traffic"]["over"]["static"],
        [arms[n]["traffic"]["accepted_length"] for n in ("lk", "static")],
    )
    assert over["ratio"] == pytest.approx(lengths[0] / lengths[1])
    assert over["difference"] == pytest.approx(lengths[0] - lengths[1])
    assert over["difference_interval"][0] <= over["difference"] <= over["difference_interval"][1]
    assert len(arms["lk"]["measured"]["length_after_phase"]) == 4, "of the recorded order alone"
    # What is lost with a shard is recorded again, nothing else is; an arm that was killed has no file.
    whole = {trace.request_id: trace.token_ids_T.tolist() for trace in traffic}
    *_, last = read_index(out / "traffic")
    (out / "traffic" / last.name).unlink()
    (out / "arms" / "lk-1.json").unlink()
    written = {path.name: path.stat().st_mtime_ns for path in (out / "arms").iterdir()}
    again = run(config, options(folder, out, "static", "lk", **halves))
    assert {trace.request_id: trace.token_ids_T.tolist() for trace in read_traces(out / "traffic")} == whole
    assert {name: (out / "arms" / name).stat().st_mtime_ns for name in written} == written
    assert again["arms"]["static"] == arms["static"]
    for changed, changes in ((a_config(folder, "learn.learning_rate=1e-3"), {}), (config, {"requests": 17})):
        with pytest.raises(ConfigError, match="holds arms of other settings"):
            run(changed, options(folder, out, "static", **{**halves, **changes}))


def test_arms_that_cannot_be_run_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--arms best: there is no such arm; use some of static memory"):
        run(a_config(folder), options(folder, tmp_path, "static", "best"))
    if native.library() is not None:
        for config in (a_config(folder), a_config(folder, "memory.capacity_mb=1", "memory.scope=client")):
            with pytest.raises(ConfigError, match=r"--arms both: .*memory\.scope=domain"):
                run(config, options(folder, tmp_path, "both"))
    with pytest.raises(ConfigError, match="there is no draft to learn from"):
        run(a_config(folder, "draft.checkpoint=null"), options(folder, tmp_path, "static"))
    with pytest.raises(ConfigError, match=r"chat.jsonl has 20 prompts for 40 requests"):
        run(a_config(folder), options(folder, tmp_path, "static", requests=40))


@pytest.mark.slow
def test_arms_learn_differently_and_the_memory_remembers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[OfflineLoop] = []

    class KeptLoop(OfflineLoop):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            loops.append(self)

    monkeypatch.setattr(ablation, "OfflineLoop", KeptLoop)
    memory = ["engine.lookup=true", "memory.capacity_mb=1"] if native.library() is not None else []
    names = ["static", "kl", "lk", "learner", *(["memory", "both"] if memory else [])]
    config = a_config(folder, *memory, "learn.learning_rate=3e-2")
    arms = run(config, options(folder, tmp_path, *names, steps_per_request=2.0))["arms"]
    served = {name: parameters_to_vector(loop.served.parameters()) for name, loop in zip(names, loops, strict=True)}
    for one, other in combinations(("static", "kl", "lk", "learner"), 2):
        assert not torch.equal(served[one], served[other]), f"{one} and {other} learned the same"
    accepted = {name: arm["traffic"]["accepted_length"] for name, arm in arms.items()}
    assert accepted["learner"] > accepted["static"]
    steps = {name: arm["cost"]["steps"] for name, arm in arms.items()}
    assert len({steps[name] for name in ("kl", "lk", "learner")}) == 1
    if memory:
        assert steps["memory"] == 0 < steps["both"]
        assert arms["memory"]["traffic"]["over"]["static"]["interval"][0] > 1, "answers come again"
        assert arms["both"]["traffic"]["over"]["learner"]["interval"][0] > 1
        assert arms["memory"]["measured"]["before"] == arms["static"]["measured"]["before"], "nothing is remembered yet"
