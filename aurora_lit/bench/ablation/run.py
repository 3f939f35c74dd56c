"""`aurora-lit bench ablation`: several learners on one recorded stream, and what each part of learning is worth.

    for each seed, each arm:   a block of traffic → its rounds with the draft that serves → learn → trial → …
                               after each phase: the draft that serves, on the measured prompts

All arms see the same requests in the same order and take as many steps, of batches of one size; an arm without replay
fills its batches only while enough traffic waits, so compare positions too, and choose `every` small enough. Rounds are
those that a live server would have had with the arm's draft (learn/offline/on_policy.py), exploring included; the measured
prompts are decoded without exploring. Of the traffic every `every`-th request is scored and offered to learning, others
with each seed; the rest only tells the detector what traffic is like, since a learner with a small budget could not
take it anyway. Labels of domains are kept from the learners. Sampled requests teach, but are not scored. An arm and
seed that is done is not run again; killed in the middle it begins again.

What is left out: what the arms are (bench/ablation/arms.py), statistics (bench/ablation/tallies.py), the report
(bench/ablation/report.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from aurora_lit.bench.ablation.arms import STATIC, Arm, arms_of
from aurora_lit.bench.ablation.report import save_report
from aurora_lit.bench.ablation.result import Result, result_path, store
from aurora_lit.bench.ablation.tallies import tally
from aurora_lit.bench.prompts import progress_bar
from aurora_lit.bench.stream import MEASURED, TRAFFIC, about
from aurora_lit.bench.stream_plan import phase_of
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.on_policy import RoundSimulator
from aurora_lit.learn.offline.replay import Replay, blocks, read_traces
from aurora_lit.learn.online.build import load_head_and_draft
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.serve.speculation.calibration import calibrate
from aurora_lit.serve.speculation.drafter import Drafter
from aurora_lit.serve.speculation.planner import SpeculationPlanner
from aurora_lit.serve.worker.build import load_target, starting_draft
from aurora_lit.traces.record import Trace

ABOUT_NAME, COSTS_NAME = "ablation.json", "costs.json"
_CALIBRATIONS = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all arms share."""

    steps_per_request: float
    """Of learning, over all requests of the traffic."""
    every: int
    """One request in so many is scored and offered to learning."""
    block: int
    """Requests of traffic between two trials."""


def run(
    config: AuroraConfig,
    *,
    traces: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    steps_per_request: float = 0.05,
    every: int = 4,
    block: int = 32,
) -> dict[str, Any]:
    """Run what is not done yet of the arms on the stream in `traces`; returns the report of all that `out` holds."""
    if config.draft.checkpoint is None:
        raise ConfigError("draft.checkpoint=null: there is no draft to learn from; name a checkpoint folder")
    wanted, stream = arms_of(arms), about(traces)
    plan = Plan(steps_per_request=steps_per_request, every=every, block=block)
    _claim(out, config, plan, stream)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    costs = measure_costs(config, out / COSTS_NAME)
    todo = [(arm, seed) for seed in seeds for arm in wanted if not result_path(out, arm.name, seed).exists()]
    if todo:
        target_head, starting = load_head_and_draft(config)
        measured = list(read_traces(traces / MEASURED))
        total = sum(part["segments"] for part in stream[TRAFFIC].values())
        with progress_bar(Console(stderr=True)) as bar:
            for arm, seed in todo:
                task = bar.add_task(f"{arm.name}, seed {seed}", total=total)
                found = Runner(arm.settings(config, seed=seed), plan, target_head=target_head, starting=starting)
                result = found.run(
                    arm, seed, traces=traces / TRAFFIC, measured=measured, on_block=lambda n, t=task: bar.advance(t, n)
                )
                store(out, result)
    return save_report(out, stream=stream, costs=costs)


class Runner:
    """Runs one arm.

    >>> Runner(arm.settings(config, seed=0), plan, ends=ends, starting=draft).run(arm, 0, traces=…, measured=…)
    """

    def __init__(self, config: AuroraConfig, plan: Plan, *, target_head: TargetHead, starting: Draft) -> None:
        """`config`: the arm's own."""
        self._config, self._plan, self._target_head, self._starting = config, plan, target_head, starting
        self._fabric = Fabric(accelerator="auto", devices=1, precision="bf16-mixed")

    def run(
        self, arm: Arm, seed: int, *, traces: Path, measured: Sequence[Trace], on_block: Any = lambda _: None
    ) -> Result:
        """Along the whole stream."""
        result = Result(arm=arm.name, seed=seed)
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as scratch:
            replay = Replay(
                self._config,
                target_head=self._target_head,
                starting=self._starting,
                folder=Path(scratch) / "versions",
                scratch=Path(scratch),
                steps_per_trace=self._plan.steps_per_request * self._plan.every,
                fabric=self._fabric,
                gated=arm.gated,
                keep_versions=False,
            )
            result.measured.append(self._measure(replay, measured))
            version, number = replay.version, 0
            for _, phase in groupby(read_traces(traces), key=lambda trace: phase_of(trace.request_id)):
                for block in blocks(phase, self._plan.block):
                    self._take(replay, block, number, result, learns=arm.name != STATIC)
                    number += len(block)
                    on_block(len(block))
                same = replay.version == version
                result.measured.append(result.measured[-1] if same else self._measure(replay, measured))
                version = replay.version
            result.steps, result.positions = replay.learner.steps, replay.learner.positions
            result.published, result.trials = replay.published, len(replay.trials)
        return result

    def _take(self, replay: Replay, block: Sequence[Trace], number: int, result: Result, *, learns: bool) -> None:
        """One block: `number` requests came before it."""
        every = self._plan.every
        offered = [trace for at, trace in enumerate(block) if (number + at) % every == result.seed % every]
        started = time.process_time()
        with self._fabric.autocast():
            proposed = {id(trace): own for trace, own in zip(offered, replay.simulate(offered), strict=True)}
        result.propose_s += time.process_time() - started
        tokens = 0
        controller = replay.learner.controller
        started = time.process_time()
        for at, trace in enumerate(block):
            tokens += len(trace.token_ids_T) - trace.answer_start
            own = proposed.get(id(trace))
            if own is not None and own.verify == "greedy":  # the rounds of others are not this draft's
                result.requests.append(trace.request_id)
                result.domains.append(trace.domain)
                result.phases.append(phase_of(trace.request_id))
                result.tallies.append(tally(own, num_proposed=self._config.engine.max_draft_tokens))
                result.answer_tokens.append(tokens)
                result.explored_rounds += int(own.explored_R.sum())
                tokens = 0
            if not learns:
                continue
            before = controller.num_shifts
            unlabelled = replace(trace if own is None else own, domain="")
            if own is None:
                controller.place(unlabelled)
            else:
                replay.learn_from(unlabelled)
            if controller.num_shifts > before and controller.last_shift is not None:
                result.shifts.append((number + at, controller.last_shift.cause, controller.last_shift.domain))
        if learns:
            replay.hold_trial()
        result.learner_s += time.process_time() - started

    def _measure(self, replay: Replay, measured: Sequence[Trace]) -> dict[str, list[list[int]]]:
        """The draft that serves, on prompts that teach nothing."""
        found: dict[str, list[list[int]]] = {}
        with self._fabric.autocast():
            own = RoundSimulator(module=replay.simulator.module).simulate(measured, version=0)
        for trace in own:
            one = tally(trace, num_proposed=self._config.engine.max_draft_tokens)
            found.setdefault(trace.domain, []).append(one)
        return found


def measure_costs(config: AuroraConfig, path: Path) -> dict[str, Any]:
    """Seconds of target passes by width 1 to K + 1, and of draft steps, for one request; measured once a folder.

    The least of many, since other work on the machine only adds to them; nor does a pass cost more than a wider one.
    """
    if not path.exists():
        target, proposals = load_target(config), config.engine.max_draft_tokens
        draft, _ = starting_draft(config, target)
        assert draft is not None
        capacity = config.engine.prefill_chunk_tokens
        tokens_SL = torch.zeros(1, capacity + 1, dtype=torch.int64, device=target.model.device)
        drafter = Drafter(draft, target, tokens_SL=tokens_SL, capacity=capacity)
        slots = target.make_kv_cache(num_slots=1, capacity=capacity)
        policies = [SpeculationPlanner(max_draft_tokens=proposals, adaptive=True) for _ in range(_CALIBRATIONS)]
        for policy in policies:
            calibrate(policy, target, drafter, slots=slots, max_batch_size=1)
        least_s = [min(p.target_cost(1, width) for p in policies) for width in range(1, proposals + 2)]
        costs = {
            "target_s": [min(least_s[at:]) for at in range(len(least_s))],
            "first_step_s": min(p.first_step_cost(1, 1) for p in policies),
            "next_step_s": min(p.next_step_cost(1, 1) for p in policies),
        }
        path.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _claim(out: Path, config: AuroraConfig, plan: Plan, stream: dict[str, Any]) -> None:
    """Begin or go on in `out`: arms of different settings are not compared."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("target", "draft", "engine", "learn", "domain", "schedule")
    sections = {name: asdict(getattr(config, name)) for name in names}
    sections["engine"].pop("threads")
    mine = json.loads(json.dumps({"plan": asdict(plan), "settings": sections, "stream": stream["stream"]}))
    path = out / ABOUT_NAME
    if not path.exists():
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != mine:
        raise ConfigError(f"--out {out}: holds arms of other settings or another stream; name another folder")
