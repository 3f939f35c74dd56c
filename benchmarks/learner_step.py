"""What learning costs in processor time: each part of an optimiser step, a trial, and a learner beside traffic.

    python benchmarks/learner_step.py --prompts sql.jsonl --limit 64

Prompts are answered by the configured engine in a process of its own, which records their traces; with `--traces` they
are kept in that folder, and taken from there if it has those of the same answers, or if no prompts are named. The
learner is the one that the settings describe.

First table: steps on batches of these traces, the parts timed exclusively, and one trial. Second table: the learner's
loop beside `--rate` such requests a second for `--live` seconds of a clock that advances by what the loop computes and
sleeps, so that budget, idle turns, trials and traces that no step takes all count; what the ring itself costs does not.
All times are processor time of the learner's process (`time.process_time`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.prompts import BenchPrompt, answer_prompts, load_prompts, params_for
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.store import DraftStore
from aurora_lit.durable import is_as_begun
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.learn.data import online_batcher, trace_parts
from aurora_lit.learn.data.online_batcher import OnlineBatcher
from aurora_lit.learn.offline.loop import read_traces
from aurora_lit.learn.online import learner as learner_module
from aurora_lit.learn.online.budget import Budget, ServerLoad
from aurora_lit.learn.online.build import (
    controller_for,
    for_scoring,
    load_head_and_draft,
    make_batcher,
    make_trial,
    online_module,
)
from aurora_lit.learn.online.environment import LearnerEnvironment
from aurora_lit.learn.online.intake import TraceIntake
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.learn.online.loop import OnlineLoop
from aurora_lit.learn.online.trial import Trial
from aurora_lit.learn.pretrain.prompts import read_prompts
from aurora_lit.models.package_index import file_sha256
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses import chain_losses, draft_module
from aurora_lit.serve.worker.build import build_engine
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace, to_bytes

_MIB = 1 << 20
_BEGUN_NAME = "begun.json"
_WARM_UP_STEPS = 2
_CONTINUED_TOKENS = 96
"""Beginning of a prompt that is continued without a chat template."""


class Parts:
    """Processor seconds by part. A part inside another one counts only for itself."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = time.process_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside as this part."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, owner: Any, attribute: str, name: str) -> Any:
        """A patch with which a function or method counts as this part."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        return mock.patch.object(owner, attribute, call)

    def _charge(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def record(config: AuroraConfig, folder: Path, prompts: list[Path], **how: Any) -> None:
    """`_record` in a process of its own, so that the memory of this one is the learner's.

    The folder gets its name once it is whole; one that has the traces of these answers is kept. Which draft proposed
    makes no difference to answers, so traces may be of another draft's rounds. Raises ConfigError if the folder holds
    traces of other answers, AuroraError if recording fails.
    """
    texts = {path.name: file_sha256(path) for path in prompts}
    target = [config.target.source, config.target.precision]
    answers = {"target": target, "max_seq_len": config.engine.max_seq_len, "prompts": texts, **how}
    if folder.exists():
        if not (folder / _BEGUN_NAME).exists() or not is_as_begun(folder / _BEGUN_NAME, answers):
            raise ConfigError(
                f"--traces {folder}: holds traces of other prompts, options or target; name another folder"
            )
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    args = (config, unfinished, prompts)
    recorder = multiprocessing.get_context("spawn").Process(target=_record, args=args, kwargs=how)
    recorder.start()
    recorder.join()
    if recorder.exitcode:
        raise AuroraError(f"--traces {folder}: answering the prompts failed, as printed above")
    is_as_begun(unfinished / _BEGUN_NAME, answers)
    unfinished.rename(folder)


def _record(
    config: AuroraConfig,
    folder: Path,
    prompts: list[Path],
    *,
    limit: int,
    max_tokens: int,
    temperatures: list[float],
    continued: bool = False,
) -> None:
    """Answer the prompts, the temperatures in turn, and keep their traces in a log.

    continued: the beginnings of the prompts are continued as text, without a chat template.
    """
    traces: list[Trace] = []
    engine, tokenizer = build_engine(config, sink=lambda trace: traces.append(trace.copy()))
    if continued:
        texts = [prompt.messages[0] for path in prompts for prompt in read_prompts(path)[:limit]]
        loaded = [BenchPrompt(domain="", token_ids=tuple(tokenizer.encode(t)[:_CONTINUED_TOKENS])) for t in texts]
    else:
        loaded = load_prompts(
            prompts, limit=limit, tokenizer=tokenizer, max_prompt_tokens=config.engine.max_seq_len - max_tokens
        )
    log = TraceLogWriter(folder, kind="traffic", shard_positions=1 << 14)
    for number, temperature in enumerate(temperatures):
        part = loaded[number :: len(temperatures)]
        answer_prompts(engine, part, params_for(temperature, max_tokens=max_tokens))
        for trace in traces:
            log.append(dataclasses.replace(trace, request_id=f"{number}-{trace.request_id}"))
        traces.clear()
    log.close()


class Deployment:
    """The parts of a learner, as `learn/online/build.py` makes them, without a server."""

    def __init__(self, config: AuroraConfig, folder: Path) -> None:
        torch.set_num_threads(config.learn.threads)
        self.config, self.folder = config, folder
        self.target_head, self.starting = load_head_and_draft(config)

    def learner(self) -> Learner:
        """A new learner that starts from the served draft."""
        learn = self.config.learn
        return Learner(
            online_module(self.config, copy.deepcopy(self.starting), self.target_head),
            controller_for(self.config),
            self.folder / "learner.safetensors",
            target_head=self.target_head,
            version=STARTING_VERSION,
            ema_decay=learn.ema_decay,
        )

    def champion(self) -> draft_module.DraftModule:
        """The served draft in a module of its own, with the precision that the learner gives it."""
        return online_module(self.config, for_scoring(copy.deepcopy(self.starting)), self.target_head)

    def served_draft(self, version: str | None) -> Eagle3Draft:
        """Every version is the starting draft: drafts that pass the gate are not served here."""
        return self.starting


def time_steps(deployment: Deployment, traces: list[Trace], *, steps: int) -> tuple[Table, Table]:
    """Tables of the parts of a step, and of a trial."""
    learner = deployment.learner()
    batcher, tried_on = _filled(deployment, learner, traces)
    parts, positions, live = Parts(), 0, 0
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in _parts_of_a_step(learner):
            patches.enter_context(parts.timed(owner, attribute, name))
        for step in range(_WARM_UP_STEPS + steps):
            if step == _WARM_UP_STEPS:
                parts.seconds.clear()
            with parts.part("rest"):
                batch = batcher.next_batch()
                assert batch is not None, "too few traces for so many steps: give more prompts"
                learner.update(batch)
            if step >= _WARM_UP_STEPS:
                positions += int((batch.traces.weight_BT > 0).sum())
                live += int((batch.traces.weight_BT > 0)[batch.live_B].sum())
    total = sum(parts.seconds.values())
    table = Table(
        title=f"processor time of {steps} steps: {positions / steps:.0f} positions each, {live / steps:.0f} live"
    )
    for column in ("part", "ms a step", "ms a position", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in [*parts.seconds.most_common(), ("all", total)]:
        table.add_row(
            name, f"{seconds / steps * 1e3:.1f}", f"{seconds / positions * 1e3:.3f}", f"{seconds / total:.0%}"
        )
    trial = Table(title="processor time of a trial on new requests, and of the next one on the same requests")
    for column in ("trial", "requests", "positions", "ms", "ms a request", "champion", "challenger"):
        trial.add_column(column, justify="left" if column == "trial" else "right")
    champion = deployment.champion()
    for name in ("first", "again"):  # the second one generates no code for new shapes, and labels no traces
        tried_on.clear_champion_scores()
        for request in tried_on:
            request.was_tried = False
        started = time.process_time()
        with learner.averaged() as challenger, learner.fabric.autocast():
            decision = tried_on.hold(champion=champion, challenger=challenger)
        spent_s = time.process_time() - started
        assert decision is not None, "too few requests are held out: give more prompts"
        tried = [trace for request in tried_on if request.was_tried for trace in request.traces]
        positions = sum(len(trace.token_ids_T) - trace_parts.first_trained_position(trace) for trace in tried)
        figures = [f"{spent_s * 1e3:.0f}", f"{spent_s / decision.num_requests * 1e3:.0f}"]
        scores = [f"{decision.champion:.3f}", f"{decision.challenger:.3f}"]
        trial.add_row(name, str(decision.num_requests), str(positions), *figures, *scores)
    return table, trial


def _parts_of_a_step(learner: Learner) -> Iterator[tuple[Any, str, str]]:
    """Owner and name of the functions that are timed, and their part."""
    yield online_batcher, "collate_online", "padding the batch"
    yield OnlineBatcher, "next_batch", "choosing the batch"
    yield draft_module, "StepwiseChains", "first draft step, forward"
    yield draft_module, "chain_losses", "later draft steps, forward"
    yield chain_losses, "fused_lk_loss", "LK loss and its gradient"
    yield learner.fabric, "backward", "backward"
    yield learner_module, "clip_gradients", "clipping"
    yield learner.module, "zero_grad", "zeroing gradients"
    for optimizer in learner.optimizers:
        yield optimizer, "step", type(optimizer.optimizer).__name__
    if learner._average is not None:
        yield learner._average, "update_parameters", "averaging"
    yield learner._metrics, "update", "metrics"


def _filled(deployment: Deployment, learner: Learner, traces: list[Trace]) -> tuple[OnlineBatcher, Trial]:
    """A batcher and held-out requests that have taken the traces in; the reservoir holds them too."""
    config = deployment.config
    folder = Path(tempfile.mkdtemp(dir=deployment.folder))
    batcher = make_batcher(config, folder)
    trial = make_trial(config)
    intake = TraceIntake(learner.controller, batcher, trial)
    for trace in traces:
        intake.add(trace)
    for trace in batcher._waiting:
        batcher.reservoir.add(trace)
    return batcher, trial


class Traffic:
    """A ring that gets `rate` requests a second of a clock, the given traces in turn; it keeps the newest."""

    def __init__(self, traces: list[Trace], *, rate: float, capacity_bytes: int, now: Callable[[], float]) -> None:
        self._traces, self._rate, self._capacity_bytes, self._now = traces, rate, capacity_bytes, now
        self._waiting: deque[bytes] = deque()
        self.num_made = self.num_lost = self.lag_bytes = 0
        self.spent_s = 0.0
        """Processor time for making the records, which is not the learner's."""

    def pop(self) -> bytes | None:
        """The next record."""
        self._arrive()
        if not self._waiting:
            return None
        self.lag_bytes -= len(self._waiting[0])
        return self._waiting.popleft()

    def pass_over(self, most: float) -> None:
        """Leave out the oldest records until the others fill at most this part of the ring."""
        self._arrive()
        while self.lag_bytes > most * self._capacity_bytes:
            self._lose_oldest()

    def _arrive(self) -> None:
        """Make what has been asked since the last call."""
        started = time.process_time()
        while self.num_made < self._now() * self._rate:
            trace = self._traces[self.num_made % len(self._traces)]
            self._waiting.append(to_bytes(dataclasses.replace(trace, request_id=f"{self.num_made}-{trace.request_id}")))
            self.lag_bytes += len(self._waiting[-1])
            self.num_made += 1
            while self.lag_bytes > self._capacity_bytes:
                self._lose_oldest()
        self.spent_s += time.process_time() - started

    def _lose_oldest(self) -> None:
        self.lag_bytes -= len(self._waiting.popleft())
        self.num_lost += 1

    @property
    def lag_records(self) -> int:
        """Records that wait."""
        return len(self._waiting)


def time_live(deployment: Deployment, traces: list[Trace], *, seconds: float, rate: float) -> Table:
    """Table of what the learner's loop does with its share of the processors beside traffic."""
    config, learner = deployment.config, deployment.learner()
    slept_s, started = [0.0], time.process_time()

    def cpu_s() -> float:
        return time.process_time() - started - traffic.spent_s

    def now_s() -> float:
        return cpu_s() + slept_s[0]

    def sleep(duration_s: float) -> None:
        slept_s[0] += duration_s

    traffic = Traffic(traces, rate=rate, capacity_bytes=config.trace.capacity_mb * _MIB, now=lambda: now_s())
    folder = Path(tempfile.mkdtemp(dir=deployment.folder))
    loop = OnlineLoop(
        LearnerEnvironment(
            traces=traffic,
            store=DraftStore(folder / "live", keep=2),
            page=LearnerStatusPage.create(folder / "page"),
            server_load=lambda: ServerLoad.SPARE,
            served_draft=deployment.served_draft,
            monotonic_s=now_s,
            sleep=sleep,
        ),
        config=config.learn,
        learner=learner,
        champion=deployment.champion(),
        target_head=deployment.target_head,
        batcher=make_batcher(config, folder),
        trial=make_trial(config),
        budget=Budget(
            idle_share=config.learn.idle_share,
            share=config.learn.compute_share,
            wall_s=now_s,
            cpu_s=cpu_s,
        ),
    )
    parts, live, held = Parts(), [0], [0]
    update, hold = learner.update, loop._try_to_publish

    def counted(batch: Any) -> Any:
        live[0] += int((batch.traces.weight_BT > 0)[batch.live_B].sum())
        return update(batch)

    def trial() -> None:
        held[0] += 1
        hold()

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(learner, "update", counted))
        patches.enter_context(mock.patch.object(loop, "_try_to_publish", trial))
        patches.enter_context(parts.timed(traffic, "_arrive", "making traffic (not counted)"))
        for attribute, name in (
            ("_read_traces", "reading traces"),
            ("_step", "steps"),
            ("_try_to_publish", "trials"),
            ("_save", "saving"),
            ("_report", "status page"),
        ):
            patches.enter_context(parts.timed(loop, attribute, name))
        begun_s = cpu_s()
        while now_s() < seconds:
            with parts.part("idle turns"):
                loop.tick()
        spent_s = cpu_s() - begun_s
    learned = max(1, learner.positions)
    table = Table(
        title=f"{seconds:.0f} s beside {rate:g} requests a second: {traffic.num_made} traces, {loop.records} read, "
        f"{learner.steps} steps, {learner.positions} positions, {live[0]} live; "
        f"{held[0]} trials, {loop.published} published, {loop.refused_by_gate} refused; "
        f"share {spent_s / seconds / os.cpu_count():.1%}"
    )
    for column in ("part", "ms in all", "ms a position", "ms a live position", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    del parts.seconds["making traffic (not counted)"]
    for name, part_s in [*parts.seconds.most_common(), ("all", spent_s)]:
        table.add_row(
            name,
            f"{part_s * 1e3:.0f}",
            f"{part_s / learned * 1e3:.3f}",
            f"{part_s / max(1, live[0]) * 1e3:.3f}",
            f"{part_s / spent_s:.0%}",
        )
    return table


def memory_mb() -> tuple[float, float]:
    """This process's resident memory and its proportional share now, in MiB."""
    memory = psutil.Process().memory_full_info()
    return memory.rss / _MIB, memory.pss / _MIB


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, default=[])
    parser.add_argument("--limit", type=int, default=64, help="prompts of each file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0], help="prompts take them in turn")
    parser.add_argument("--traces", type=Path, help="folder that keeps the traces")
    parser.add_argument("--steps", type=int, default=8, help="timed steps; 0: none")
    parser.add_argument("--live", type=float, default=300.0, help="seconds beside traffic; 0: none")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    args = parser.parse_args()
    config = load_config(None, args.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.traces or Path(scratch) / "traces"
        if args.prompts or not folder.is_dir():
            record(
                config,
                folder,
                args.prompts,
                limit=args.limit,
                max_tokens=args.max_tokens,
                temperatures=args.temperatures,
            )
        traces = list(read_traces(folder))
        deployment = Deployment(config, Path(scratch))
        console = Console(width=120)
        held = [("with target and draft loaded", memory_mb())]
        if args.steps:
            for table in time_steps(deployment, traces, steps=args.steps):
                console.print(table)
            held.append(("after the steps", memory_mb()))
        if args.live:
            console.print(time_live(deployment, traces, seconds=args.live, rate=args.rate))
            held.append(("beside traffic", memory_mb()))
        traces_mb = sum(trace.num_bytes for trace in traces) / _MIB
        for when, (resident, share) in held:
            print(f"{when}: {resident:.0f} MiB resident, {share:.0f} proportional, {traces_mb:.0f} of them the traces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
