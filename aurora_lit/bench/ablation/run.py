"""`aurora-lit bench ablation`: runs several learners (arms) on one recorded stream and reports what each achieves.

    for each seed and arm:   a block of traffic → rounds simulated with the served draft → learn → trial → …
                             after each phase: the served draft on the measured prompts

All arms of a seed see the same requests in the same order and take the same number of steps with batches of the same
size. An arm without replay fills its batches only while enough traffic waits, so compare positions too, and choose a
small `every`.
Rounds are those that a live server would have run with the arm's draft, with exploration and with copies beside the
draft's chain (learn/offline/on_policy.py and copies.py); measured prompts are decoded without exploration, with what is
remembered by then. Of the traffic, one of `every` requests is scored and offered to learning, different ones with each
seed; the others only inform the domain detector, since a learner with a small budget could not learn from them anyway,
and the memory, which remembers all. Of these, and of sampled ones, no rounds of the arm's draft are known: those that
were recorded are another draft's, and the detector leaves them out. Labels are hidden from learners and memory. Sampled
requests are learned from but not scored, and batches take them by their recorded rounds. Policy and gate see what is
accepted of the draft alone. In all arms, rounds that could reach beyond an answer's recorded end with the longest
copies are left out.

With `shuffle_phases` every seed but 0 has its own order of phases, so that intervals include what the order does.
An arm and seed that is done is not run again; one that was killed starts anew.

Leaves out the arms (bench/ablation/arms.py), what a seed takes of the stream (bench/ablation/phases.py), statistics
(bench/ablation/statistics.py) and the report (bench/ablation/report.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aurora_lit.bench.ablation.arms import Arm, arms_named
from aurora_lit.bench.ablation.phases import order_of_phases, phases_in_order, short_phases, takes
from aurora_lit.bench.ablation.report import save_report
from aurora_lit.bench.ablation.result import Result, result_path, store
from aurora_lit.bench.ablation.statistics import round_counts
from aurora_lit.bench.reporting import progress_bar
from aurora_lit.bench.stream import MEASURED, TRAFFIC, check_target, read_stream_info
from aurora_lit.bench.stream_plan import phase_of
from aurora_lit.config import AuroraConfig, copied_tokens, draft_folder, max_proposal_length, resolved_memory_scope
from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.durable import is_as_begun
from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.on_policy import RECORDED_VERSION, RoundSimulator
from aurora_lit.learn.offline.replay import Replay, blocks, read_traces
from aurora_lit.learn.online.build import load_head_and_draft
from aurora_lit.learn.training_precision import one_process_fabric
from aurora_lit.machine import use_threads
from aurora_lit.models.loading import safetensors_digest
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.serve.speculation.calibration import calibration_steps
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.drafter import Drafter
from aurora_lit.serve.speculation.planner import SpeculationLimits
from aurora_lit.serve.worker.load_models import load_target, starting_draft
from aurora_lit.traces.record import Trace

INFO_NAME, COSTS_NAME = "ablation.json", "costs.json"
_CALIBRATIONS = 10


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that all arms share."""

    steps_per_request: float
    """Optimiser steps per request of the traffic."""
    every: int
    """One of this many requests is scored and offered to learning."""
    block: int
    """Requests of traffic between two trials."""
    shuffle_phases: bool = False
    """True if each seed but 0 has its own order of phases."""


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
    shuffle_phases: bool = False,
) -> dict[str, Any]:
    """Run the arms that are not done yet on the stream in `traces`; returns the report of all results in `out`.

    Raises ConfigError if the stream is of another target, or `out` holds arms of other settings, another draft or
    another stream; AuroraError if the stream is not complete, or the draft cannot be read.
    """
    folder = draft_folder(config)
    if folder is None:
        raise ConfigError("draft.checkpoint=null: there is no draft to learn from; name a checkpoint folder")
    read_config(folder)  # a draft that cannot be read is an error before `out` says that it is begun with it
    wanted, stream = arms_named(arms), read_stream_info(traces)
    options = RunOptions(steps_per_request=steps_per_request, every=every, block=block, shuffle_phases=shuffle_phases)
    check_target(stream, config, folder=f"--traces {traces}")
    for arm in wanted:
        _check_memory(arm, config)
    phases = stream["stream"]["phases"]
    short = short_phases(config, phases, steps_per_request=steps_per_request, every=every)
    begun_with = {
        "stream": stream["stream"],
        "recording": [safetensors_digest(traces / part) for part in (TRAFFIC, MEASURED)],
        "weights": safetensors_digest(folder),
    }
    _start_or_resume(out, config, options, begun_with)
    use_threads(config.engine.threads)
    costs = measure_costs(config, out / COSTS_NAME)
    todo = [(arm, seed) for seed in seeds for arm in wanted if not result_path(out, arm.name, seed).exists()]
    if todo:
        target_head, starting = load_head_and_draft(config)
        measured = list(read_traces(traces / MEASURED))
        total = sum(part["segments"] for part in stream[TRAFFIC].values())
        with progress_bar(Console(stderr=True)) as bar:
            for arm, seed in todo:
                task = bar.add_task(f"{arm.name}, seed {seed}", total=total)
                runner = ArmRunner(
                    arm.settings(config, seed=seed),
                    options,
                    target_head=target_head,
                    starting=starting,
                    reach=max_proposal_length(config),
                )
                result = Result(
                    arm=arm.name,
                    seed=seed,
                    order=order_of_phases(len(phases), seed=seed, shuffled=shuffle_phases),
                )
                runner.run(arm, result, traces=traces / TRAFFIC, measured=measured, on_block=partial(bar.advance, task))
                store(out, result)
    return save_report(out, stream=stream, costs=costs, short_phases=short)


class ArmRunner:
    """Runs one arm along the stream.

    >>> runner = ArmRunner(arm.settings(config, seed=0), options, target_head=target_head, starting=draft)
    >>> runner.run(arm, result, traces=folder, measured=traces, on_block=print)
    """

    def __init__(
        self,
        config: AuroraConfig,
        options: RunOptions,
        *,
        target_head: TargetHead,
        starting: Eagle3Draft,
        reach: int,
    ) -> None:
        """`config`: the settings of the arm. reach: most tokens that a round of any arm can accept."""
        self._config, self._options, self._target_head, self._starting = config, options, target_head, starting
        self._reach = reach
        self._fabric = one_process_fabric()

    def run(
        self, arm: Arm, result: Result, *, traces: Path, measured: Sequence[Trace], on_block: Callable[[int], None]
    ) -> None:
        """Fill the result of the whole stream in the log `traces`, with the phases in its order.

        `on_block` is called with the number of requests of each block.
        """
        torch.manual_seed(result.seed)
        with tempfile.TemporaryDirectory() as scratch:
            replay = Replay(
                self._config,
                target_head=self._target_head,
                starting=self._starting,
                folder=Path(scratch) / "versions",
                scratch=Path(scratch),
                steps_per_trace=self._options.steps_per_request * self._options.every,
                fabric=self._fabric,
                gated=arm.gated,
                keep_versions=False,
            )
            replay.simulator.reach = self._reach
            result.measured.append(self._measure(replay, measured))
            number = 0
            for _, phase in phases_in_order(traces, result.order):
                tokens = 0
                for block in blocks(phase, self._options.block):
                    tokens = self._run_block(replay, block, number, result, learns=arm.learns, tokens=tokens)
                    number += len(block)
                    on_block(len(block))
                result.measured.append(self._measure(replay, measured))
            result.steps, result.positions = replay.learner.steps, replay.learner.positions
            result.published, result.trials = replay.published, len(replay.trials)

    def _run_block(
        self, replay: Replay, block: Sequence[Trace], number: int, result: Result, *, learns: bool, tokens: int
    ) -> int:
        """Score a block of traffic and learn from it; `number` requests came before it.

        `tokens`: of the phase's answers since the last one that was scored. Returns the same for the next block.
        """
        every = self._options.every
        taken = [i for i, trace in enumerate(block) if takes(trace.request_id, seed=result.seed, every=every)]
        started = time.process_time()
        copied = None if replay.copies is None else replay.copies.along(_without_labels(block))
        with self._fabric.autocast():
            rounds = replay.simulate_rounds(
                [block[i] for i in taken], None if copied is None else [copied[i].accepted_T for i in taken]
            )
        simulated = dict(zip(taken, rounds, strict=True))
        result.simulation_s += time.process_time() - started
        controller = replay.learner.controller
        started = time.process_time()
        for i, trace in enumerate(block):
            tokens += len(trace.token_ids_T) - trace.answer_start
            own = simulated.get(i)
            if own is not None and own.verify == "greedy":  # rounds of sampled requests are not simulated
                result.requests.append(trace.request_id)
                result.domains.append(trace.domain)
                result.phases.append(phase_of(trace.request_id))
                result.counts.append(round_counts(own, None if copied is None else copied[i], reach=self._reach))
                result.answer_tokens.append(tokens)
                result.explored_rounds += int(own.explored_R.sum())
                tokens = 0
            if not learns:
                continue
            before = controller.num_shifts
            if own is None:
                recorded_R = torch.full_like(trace.round_version_R, RECORDED_VERSION)
                controller.assign_domain(replace(trace, domain="", round_version_R=recorded_R))
            else:
                replay.learn_from(replace(own, domain=""))
            if controller.num_shifts > before and controller.last_shift is not None:
                result.shifts.append((number + i, controller.last_shift.cause, controller.last_shift.domain))
        if learns:
            replay.hold_trial()
        result.learner_s += time.process_time() - started
        return tokens

    def _measure(self, replay: Replay, measured: Sequence[Trace]) -> dict[str, list[list[list[int]]]]:
        """The rounds of the served draft on the measured prompts, by domain, with copies of what is remembered now."""
        counts: dict[str, list[list[list[int]]]] = {}
        copied = None if replay.copies is None else replay.copies.peek(_without_labels(measured))
        with self._fabric.autocast():
            own = RoundSimulator(module=replay.simulator.module, reach=self._reach).simulate_rounds(
                measured, version=0, copied=None if copied is None else [each.accepted_T for each in copied]
            )
        for i, trace in enumerate(own):
            of_trace = round_counts(trace, None if copied is None else copied[i], reach=self._reach)
            counts.setdefault(trace.domain, []).append(of_trace)
        return counts


def _without_labels(traces: Sequence[Trace]) -> list[Trace]:
    return [replace(trace, domain="") for trace in traces]


def _check_memory(arm: Arm, config: AuroraConfig) -> None:
    """Raise ConfigError if the arm remembers and there is nothing to remember with."""
    if not arm.remembers:
        return
    if native.library() is None:
        raise ConfigError(f"--arms {arm.name}: the traffic memory needs the kernels; aurora-lit doctor says more")
    if not copied_tokens(config.engine, config.memory) or resolved_memory_scope(config) != "domain":
        raise ConfigError(
            f"--arms {arm.name}: the settings have no memory that a stream without clients could fill; it needs "
            "engine.speculate=true, memory.capacity_mb and memory.scope=domain"
        )


def measure_costs(config: AuroraConfig, path: Path) -> dict[str, Any]:
    """Seconds of target passes by query length, as wide as drafts and copies together, and of draft steps; one request.

    They are measured once and then read from `path`. Each is the minimum of several measurements, since other work on
    the machine only adds to it, and no pass costs more than a longer one.
    """
    if not path.exists():
        target, proposals = load_target(config), config.engine.max_draft_tokens
        widest = proposals + copied_tokens(config.engine, config.memory)
        draft, _ = starting_draft(config, target)
        assert draft is not None
        capacity = config.engine.prefill_chunk_tokens
        tokens_SL = torch.zeros(1, capacity + 1, dtype=torch.int64, device=target.device)
        drafter = Drafter(draft, target, tokens_SL=tokens_SL, capacity=capacity)
        kv_cache = target.make_kv_cache(num_slots=1, capacity=capacity)
        limits = SpeculationLimits(draft_tokens=proposals, copied_tokens=widest)
        measured_costs = [Costs(ragged=target.has_native_decoder) for _ in range(_CALIBRATIONS)]
        for found in measured_costs:
            deque(calibration_steps(found, limits, target, drafter, kv_cache=kv_cache, max_batch_size=1), maxlen=0)
        minimum_s = [min(c.round_s(1, [count]) for c in measured_costs) for count in range(widest + 1)]
        first_s, longest_s = (min(c.draft_s(1, n) for c in measured_costs) for n in (1, proposals))
        costs = {
            "draft_tokens": proposals,
            "target_s": [min(minimum_s[i:]) for i in range(len(minimum_s))],
            "first_step_s": first_s,
            "next_step_s": (longest_s - first_s) / max(1, proposals - 1),
        }
        path.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return measured


def _start_or_resume(out: Path, config: AuroraConfig, options: RunOptions, begun_with: dict[str, Any]) -> None:
    """Create `out`, or check that its results have the same settings, draft and stream: only these are comparable."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("target", "draft", "engine", "memory", "learn", "domain", "schedule")
    sections = {name: asdict(getattr(config, name)) for name in names}
    sections["engine"].pop("threads")
    sections["memory"]["scope"] = resolved_memory_scope(config)
    how = {"options": asdict(options), "settings": sections, **begun_with}
    if not is_as_begun(out / INFO_NAME, how):
        raise ConfigError(
            f"--out {out}: holds arms of other settings, another draft or another stream; name another folder"
        )
