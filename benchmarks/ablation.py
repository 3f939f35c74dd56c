"""What the memory, the learner and each part of it contribute, on one recorded stream of changing traffic.

    python -m benchmarks.templated_prompts --out train --requests 1000
    python -m benchmarks.templated_prompts --out test --requests 100 --seed 1
    python -m benchmarks.ablation --phases train/billing.jsonl train/support.jsonl train/billing.jsonl \\
        --requests 260 --measure test/billing.jsonl test/support.jsonl --seeds 0 1 2 --shuffle-phases --out ablation

First the target answers the stream greedily, once, and the traces are kept in OUT/traffic and OUT/measure: so many
requests of each file of --phases, one file after the other (a file that is named again goes on where it stopped), and
the first prompts of each file of --measure. Greedy answers do not depend on the draft, so afterwards each *arm* is run
along them with each seed:

    a block of traffic -> rounds simulated with the served draft -> learn -> trial -> ...
                          after each phase: the served draft on the measured prompts

static        the starting draft, without learning and memory
memory        the same with the traffic memory
learner       the learner with the settings unchanged, without memory
both          the settings unchanged: learner and memory
kl            KL on live tokens only, as in online distillation (Liu et al., arXiv 2310.07177): no domains, no replay,
              no gate, no averaging, and a constant rate of 0.3 learn.learning_rate (none of these lowers it)
lk            the same with the acceptance loss
without-ppo, without-detector, without-replay, without-gate: the learner without that part

All arms copy from earlier in a request where engine.lookup says so; only memory and both copy from earlier requests, of
which they remember all. Of --every requests one is scored and offered to learning, others with each seed, since a
learner with a small budget could not learn from all; the others only inform the domain detector. Labels are hidden from
learner and memory. All arms of a seed see the same requests in the same order; with --shuffle-phases each seed but 0
has its own order of phases. Rounds that could reach beyond an answer's end are left out.

Accepted length is tokens a round, of all rounds. Arms are compared in pairs, on the same requests with the same seeds,
as ratio and difference, with 95 % intervals from a bootstrap that draws seeds and requests: with one seed an interval
does not know how training varies, and with two or three it knows it badly. An arm and seed that is done is not run
again; one that was killed starts anew, and a recording that was killed goes on.

Shapes: N requests, A = 1 + most tokens that a round accepts, R rounds, X resamples.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from aurora_lit.bench.reporting import report_console
from aurora_lit.config import (
    AuroraConfig,
    draft_folder,
    load_config,
    max_proposal_length,
    resolved_memory,
)
from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.durable import is_as_begun, replace_file
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.kernels import native
from aurora_lit.learn.offline.loop import OfflineLoop, blocks, read_traces
from aurora_lit.learn.offline.ngram_paths import CopiedTokens
from aurora_lit.learn.offline.on_policy import RECORDED_VERSION, RoundSimulator
from aurora_lit.learn.online.build import load_head_and_draft
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.learn.training_precision import one_process_fabric
from aurora_lit.machine import use_threads
from aurora_lit.models.loading import weights_digest
from aurora_lit.modules.losses.objective import BaseLoss
from aurora_lit.progress import Progress
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.worker.build import build_engine
from aurora_lit.traces.log import TraceLogWriter, read_index, read_shard
from aurora_lit.traces.record import Trace

_SHARD_POSITIONS = 16_384
_SAMPLES = 1000
_BASES = ("static", "memory", "kl", "lk", "learner")
"""Arms with which the others are compared."""


# -- arms --------------------------------------------------------------------------------------------------------------

_Changes = dict[str, dict[str, Any]]
"""Changed settings by section and key."""
_NO_DETECTOR: _Changes = {"domain": {"detect": False}}
_NO_REPLAY: _Changes = {"learn": {"replay_share": 0.0}}
_LIVE_ONLY = (_NO_DETECTOR, _NO_REPLAY, {"learn": {"ema_decay": 0.0, "ppo": False}})
_LIVE_RATE = 0.3


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of what is compared, as changes of the settings; the file's docstring says what each is."""

    changes: Sequence[_Changes] = ()
    rate_factor: float = 1.0
    """Factor of learn.learning_rate."""
    gated: bool = True
    """True if a draft is published only if it passes the gate."""
    base_loss: BaseLoss = "lk"
    learns: bool = True
    remembers: bool = False

    def settings(self, config: AuroraConfig) -> AuroraConfig:
        """The settings of this arm."""
        learn = {"learning_rate": config.learn.learning_rate * self.rate_factor}
        no_memory: list[_Changes] = [] if self.remembers else [{"memory": {"capacity_mb": 0}}]
        for change in [*self.changes, {"learn": learn}, *no_memory]:
            config = replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in change.items()})
        return config


ARMS = {
    "static": Arm(learns=False),
    "memory": Arm(learns=False, remembers=True),
    "learner": Arm(),
    "both": Arm(remembers=True),
    "kl": Arm(changes=_LIVE_ONLY, base_loss="kl", rate_factor=_LIVE_RATE, gated=False),
    "lk": Arm(changes=_LIVE_ONLY, rate_factor=_LIVE_RATE, gated=False),
    "without-ppo": Arm(changes=[{"learn": {"ppo": False}}]),
    "without-detector": Arm(changes=[_NO_DETECTOR]),
    "without-replay": Arm(changes=[_NO_REPLAY]),
    "without-gate": Arm(gated=False),
}


def check_arms(names: Sequence[str], config: AuroraConfig) -> None:
    """Raise ConfigError for an unknown arm, or one that remembers where there is nothing to remember with."""
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"--arms {name}: there is no such arm; use some of {' '.join(ARMS)}")
        if not ARMS[name].remembers:
            continue
        if native.library() is None:
            raise ConfigError(f"--arms {name}: the traffic memory needs the kernels; aurora-lit doctor says more")
        memory = resolved_memory(config)
        if not (config.engine.speculate and memory.capacity_mb and memory.scope == "domain"):
            needed = "engine.speculate=true, memory.capacity_mb and memory.scope=domain"
            raise ConfigError(f"--arms {name}: a stream without clients could fill no memory; it needs {needed}")


# -- the stream --------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace, tokenizer: Any, max_seq_len: int) -> tuple[list[Request], list[Request]]:
    """The requests of the traffic and the measured ones. Raises ConfigError if a file has too few prompts."""
    files: dict[Path, Iterator[tuple[str, tuple[int, ...]]]] = {}
    params = SamplingParams(max_tokens=options.max_tokens, temperature=0.0)

    def requests(path: Path, count: int, name: str) -> list[Request]:
        if path not in files:
            encoded = ((p.domain, tuple(encode_prompt(tokenizer, p))) for p in read_prompts(path))
            files[path] = (each for each in encoded if len(each[1]) + options.max_tokens <= max_seq_len)
        found = list(islice(files[path], count))
        if len(found) < count:
            raise ConfigError(f"{path} has {len(found)} prompts for {count} requests; ask for fewer, or give more")
        return [
            Request(request_id=f"{name}/{n:05d}", prompt_ids=ids, params=params, domain=domain, noise_key=0)
            for n, (domain, ids) in enumerate(found)
        ]

    phases = [requests(path, options.requests, f"{i}-{path.stem}") for i, path in enumerate(options.phases)]
    measured = [requests(path, options.measure_requests, f"measure-{path.stem}") for path in options.measure]
    return [request for phase in phases for request in phase], [request for part in measured for request in part]


def phase_of(request_id: str) -> int:
    """Number of the phase that a request of the traffic belongs to."""
    return int(request_id.partition("-")[0])


def record(config: AuroraConfig, options: argparse.Namespace) -> None:
    """Answer what has not been recorded yet; a run that was killed has lost at most one shard."""
    traces: list[Trace] = []
    # Copies, since the recorder's traces are views of slots that are reused.
    engine, tokenizer = build_engine(config, sink=lambda trace: traces.append(trace.copy()))
    parts = plan(options, tokenizer, engine.max_seq_len)
    for folder, requests in zip((options.out / "traffic", options.out / "measure"), parts, strict=True):
        log = TraceLogWriter(folder, kind=folder.name, shard_positions=_SHARD_POSITIONS)
        done = {trace.request_id for shard in read_index(folder) for trace in read_shard(folder / shard.name)}
        with Progress(f"recording {folder.name}", len(requests), "requests", done=len(done)) as progress:
            for _, phase in groupby(requests, key=lambda request: request.request_id.partition("/")[0]):
                for request in phase:
                    if request.request_id not in done:
                        engine.submit(request)
                while engine.has_work:
                    for output in engine.round():
                        if output.error is not None:
                            raise AuroraError(f"the engine failed on {output.request_id}: {output.error}")
                        progress.advance(output.finish_reason is not None)
                    for trace in traces:
                        log.append(trace)
                    traces.clear()
        log.close()


def takes(request_id: str, *, seed: int, every: int) -> bool:
    """True if this seed scores the request and learns from it; all segments of a request agree.

    Each of the seeds 0 … `every` − 1 takes other requests, which together are all, and so does each of the next
    `every` seeds, which divide them otherwise.
    """
    # Not the checksum by which requests are held out for the gate: that of a longer text agrees with it in single bits.
    return random.Random(f"{seed // every} {request_id}").randrange(every) == seed % every


def order_of_phases(count: int, *, seed: int, shuffled: bool) -> list[int]:
    """The numbers of the phases in the order in which they come; seed 0 keeps the recorded order."""
    order = list(range(count))
    return random.Random(seed).sample(order, count) if shuffled and seed else order


def traces_of(folder: Path, phase: int) -> Iterator[Trace]:
    """The traces of a phase of the traffic."""
    return (trace for trace in read_traces(folder) if phase_of(trace.request_id) == phase)


# -- running an arm ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Result:
    """One arm with one seed; lists have an entry for each scored request, in the order of the stream."""

    arm: str
    seed: int
    order: list[int]
    """The phases in the order in which they came."""
    requests: list[str] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    """Rounds by accepted tokens [A]."""
    measured: list[dict[str, list[list[int]]]] = field(default_factory=list)
    """Before the stream and after each phase: by domain, the same of each measured request."""
    steps: int = 0
    positions: int = 0
    learner_s: float = 0.0
    """Processor time of steps, trials and domain detection."""
    published: int = 0


def round_counts(trace: Trace, copied: CopiedTokens | None, *, reach: int) -> list[int]:
    """A trace's rounds by accepted tokens [A], A = reach + 1; of draft and copies that counts which accepted more."""
    accepted_R = trace.num_accepted_R.long()
    if copied is not None:
        accepted_R = torch.maximum(accepted_R, torch.tensor(copied.accepted_T)[trace.round_root_R.long()])
    counts: list[int] = torch.bincount(accepted_R, minlength=reach + 1).tolist()
    return counts


class ArmRunner:
    """Runs an arm along the stream.

    >>> runner = ArmRunner(config, options, head_and_draft=load_head_and_draft(config), measured=traces)
    >>> runner.run("lk", 0, on_block=print)
    """

    def __init__(
        self, config: AuroraConfig, options: argparse.Namespace, *, head_and_draft: Any, measured: Sequence[Trace]
    ) -> None:
        """`config`: the settings that arms change. measured: traces of the measured requests."""
        self._config, self._options, self._measured = config, options, _without_labels(measured)
        self._domains = [trace.domain for trace in measured]
        self._target_head, self._starting = head_and_draft
        self._reach = max_proposal_length(config)
        self._fabric = one_process_fabric()

    def run(self, name: str, seed: int, *, on_block: Callable[[int], None]) -> Result:
        """The result of one arm. `on_block` is called with the number of requests of each block."""
        options, arm = self._options, ARMS[name]
        order = order_of_phases(len(options.phases), seed=seed, shuffled=options.shuffle_phases)
        result = Result(arm=name, seed=seed, order=order)
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as scratch:
            replay = OfflineLoop(
                arm.settings(self._config),
                target_head=self._target_head,
                starting=self._starting,
                folder=Path(scratch) / "versions",
                scratch=Path(scratch),
                steps_per_trace=options.steps_per_request * options.every,
                fabric=self._fabric,
                gated=arm.gated,
                base_loss=arm.base_loss,
                seed=seed,
                keep_versions=False,
            )
            replay.simulator.reach = self._reach
            result.measured.append(self._measure(replay))
            for phase in order:
                for block in blocks(traces_of(options.out / "traffic", phase), options.block):
                    self._run_block(replay, block, result, learns=arm.learns)
                    on_block(len(block))
                result.measured.append(self._measure(replay))
            result.steps, result.positions = replay.learner.steps, replay.learner.positions
            result.published = replay.published
        return result

    def _run_block(self, replay: OfflineLoop, block: Sequence[Trace], result: Result, *, learns: bool) -> None:
        """Score a block of traffic and learn from it."""
        block, every = _without_labels(block), self._options.every
        taken = [i for i, trace in enumerate(block) if takes(trace.request_id, seed=result.seed, every=every)]
        copied = None if replay.ngrams is None else replay.ngrams.along(block)
        with self._fabric.autocast():
            rounds = replay.simulate_rounds(
                [block[i] for i in taken], None if copied is None else [copied[i].accepted_T for i in taken]
            )
        simulated = dict(zip(taken, rounds, strict=True))
        for i, own in simulated.items():
            result.requests.append(own.request_id)
            result.counts.append(round_counts(own, None if copied is None else copied[i], reach=self._reach))
        if not learns:
            return
        began = time.process_time()
        for i, trace in enumerate(block):
            if i in simulated:
                replay.learn_from(simulated[i])
            else:  # the recorded rounds are another draft's, so the detector sees none
                recorded_R = torch.full_like(trace.round_version_R, RECORDED_VERSION)
                replay.learner.controller.assign_domain(replace(trace, round_version_R=recorded_R))
        replay.hold_trial()
        result.learner_s += time.process_time() - began

    def _measure(self, replay: OfflineLoop) -> dict[str, list[list[int]]]:
        """The rounds of the served draft on the measured prompts, by domain, with copies of what is remembered now."""
        counts: dict[str, list[list[int]]] = {}
        copied = None if replay.ngrams is None else replay.ngrams.peek(self._measured)
        with self._fabric.autocast():
            own = RoundSimulator(module=replay.simulator.module, reach=self._reach).simulate_rounds(
                self._measured, version=0, copied=None if copied is None else [each.accepted_T for each in copied]
            )
        for i, trace in enumerate(own):
            of_trace = round_counts(trace, None if copied is None else copied[i], reach=self._reach)
            counts.setdefault(self._domains[i], []).append(of_trace)
        return counts


def _without_labels(traces: Sequence[Trace]) -> list[Trace]:
    return [replace(trace, domain="") for trace in traces]


# -- statistics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Requests with the rounds that they had with each seed: a row for each."""

    hist_NA: NDArray[np.float64]
    """Rounds by accepted tokens."""
    seed_N: NDArray[np.int64]
    request_N: NDArray[np.str_]

    @staticmethod
    def of(found: Sequence[tuple[int, str, list[int]]]) -> Rows:
        """Rows of (seed, request, its counts)."""
        seeds, requests, counts = zip(*found, strict=True) if found else ((), (), ())
        hist_NA = np.array(counts, dtype=float).reshape(len(found), -1 if found else 1)
        return Rows(hist_NA=hist_NA, seed_N=np.array(seeds, np.int64), request_N=np.array(requests, np.str_))


def accepted_length(hist_NA: NDArray[np.float64]) -> float:
    """Tokens per round, the target's own token included; 1 without rounds."""
    counts_A = hist_NA.sum(0)
    return 1 + float(counts_A @ np.arange(len(counts_A))) / max(1.0, float(counts_A.sum())) if len(counts_A) else 1.0


def length_ratio(hist_NA: NDArray[np.float64], base_hist_NA: NDArray[np.float64]) -> float:
    """Ratio of two accepted lengths."""
    return accepted_length(hist_NA) / accepted_length(base_hist_NA)


def length_difference(hist_NA: NDArray[np.float64], base_hist_NA: NDArray[np.float64]) -> float:
    """Difference of two accepted lengths, in tokens a round."""
    return accepted_length(hist_NA) - accepted_length(base_hist_NA)


def interval(
    statistic: Callable[..., float], rows: Rows, *others: Rows, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap over seeds and requests (Efron 1979) of a statistic of each Rows' `hist_NA`.

    Seeds and requests are drawn independently of each other, and a row counts as often as both of its were (Owen and
    Eckles, arXiv 1106.2125), so requests that several seeds have in common are drawn for all of them. `others`: the
    same seeds and requests in the same order, as with another arm; they are drawn together, in pairs.
    """
    rng = np.random.default_rng(seed)
    if not len(rows.seed_N):
        value = statistic(*(each.hist_NA for each in (rows, *others)))
        return value, value
    weight_XN = np.ones((_SAMPLES, len(rows.seed_N)))
    for label_N in (rows.seed_N, rows.request_N):
        labels, index_N = np.unique(label_N, return_inverse=True)
        weight_XN *= rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=_SAMPLES)[:, index_N]
    sums = [weight_XN @ each.hist_NA for each in (rows, *others)]
    samples = [statistic(*(sum_XA[x : x + 1] for sum_XA in sums)) for x in range(_SAMPLES)]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -- the report --------------------------------------------------------------------------------------------------------


def traffic_rows(results: Sequence[Result]) -> Rows:
    """The scored requests of all seeds."""
    return Rows.of(
        [
            (each.seed, request, counts)
            for each in results
            for request, counts in zip(each.requests, each.counts, strict=True)
        ]
    )


def measured_rows(results: Sequence[Result], num_phases: int, domain: str | None = None) -> Rows:
    """The measured requests after `num_phases` phases (-1: at the end), with all seeds; domain: only of this one."""
    return Rows.of(
        [
            (each.seed, f"{name} {number}", counts)
            for each in results
            for name, of_domain in each.measured[num_phases].items()
            if domain is None or name == domain
            for number, counts in enumerate(of_domain)
        ]
    )


def compared(results: Sequence[Result], base: Sequence[Result], rows: Callable[..., Rows]) -> dict[str, Any] | None:
    """`rows` of two arms on the seeds that both have, in pairs; None without a common seed."""
    of_base = {result.seed: result for result in base}
    pairs = [(result, of_base[result.seed]) for result in results if result.seed in of_base]
    if not pairs:
        return None
    own, other = (rows([pair[side] for pair in pairs]) for side in (0, 1))
    return {
        "ratio": length_ratio(own.hist_NA, other.hist_NA),
        "interval": interval(length_ratio, own, other),
        "difference": length_difference(own.hist_NA, other.hist_NA),
        "difference_interval": interval(length_difference, own, other),
    }


def summary(rows: Rows) -> dict[str, Any]:
    """Accepted length of some rows."""
    return {"accepted_length": accepted_length(rows.hist_NA), "interval": interval(accepted_length, rows)}


def report_of(results: Sequence[Result], bases: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The report of one arm, with all its seeds."""
    in_order = [result for result in results if result.order == sorted(result.order)]
    at_end = partial(measured_rows, num_phases=-1)
    return {
        "seeds": [each.seed for each in results],
        "orders": [each.order for each in results],
        "traffic": {
            **summary(traffic_rows(results)),
            "over": {name: compared(results, base, traffic_rows) for name, base in bases.items()},
        },
        "measured": {
            "before": summary(measured_rows(results, 0)),
            "after": summary(at_end(results)),
            "over": {name: compared(results, base, at_end) for name, base in bases.items()},
            # Of the seeds that have the recorded order: after n phases another order has seen others.
            "length_after_phase": [
                {domain: accepted_length(measured_rows(in_order, n, domain).hist_NA) for domain in measured}
                for n, measured in enumerate(in_order[0].measured if in_order else ())
            ],
        },
        "cost": {
            name: sum(getattr(each, name) for each in results) / len(results)
            for name in ("steps", "positions", "learner_s", "published")
        },
    }


def save_report(out: Path, phases: Sequence[str]) -> dict[str, Any]:
    """Read the results of all arms in `out`; write report.json there, and print tables."""
    done = {name: results for name in ARMS if (results := list(stored(out, name)))}
    bases = {name: done[name] for name in _BASES if name in done}
    arms = {
        name: report_of(results, {base: each for base, each in bases.items() if base != name})
        for name, results in done.items()
    }
    report = {"phases": list(phases), "arms": arms}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lengths = Table("arm", "seeds", "traffic", "measured before", "after", "steps", "positions", "learner s")
    pairs = Table("arm", "over", "traffic", "tokens a round", "measured after", "tokens a round")
    for name, arm in arms.items():
        parts = (arm["traffic"], arm["measured"]["before"], arm["measured"]["after"])
        cells = [_with_interval(part["accepted_length"], part["interval"]) for part in parts]
        cost = [f"{arm['cost'][each]:.0f}" for each in ("steps", "positions", "learner_s")]
        lengths.add_row(name, str(len(arm["seeds"])), *cells, *cost)
        for base in bases:
            over = [arm[part]["over"].get(base) for part in ("traffic", "measured")]
            if None not in over:
                figures = (("ratio", "interval"), ("difference", "difference_interval"))
                pairs.add_row(name, base, *(_with_interval(each[a], each[b]) for each in over for a, b in figures))
    lengths.title = "accepted length (95 %)"
    pairs.title = "in pairs, on the same requests: ratio and difference of accepted lengths (95 %)"
    for shown in (lengths, pairs):
        report_console().print(shown)
    return report


def _with_interval(value: float, bounds: Sequence[float]) -> str:
    return f"{value:.3f} ({bounds[0]:.3f} to {bounds[1]:.3f})"


def stored(out: Path, arm: str) -> Iterator[Result]:
    """The results of an arm, for all seeds that are done."""
    for path in sorted((out / "arms").glob(f"{arm}-*.json")):
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        if result.arm == arm:
            yield result


# -- the command -------------------------------------------------------------------------------------------------------


def begun_with(config: AuroraConfig, options: argparse.Namespace, draft: Path) -> dict[str, Any]:
    """What all results of a folder have in common: only such ones are comparable."""
    names = ("target", "draft", "engine", "memory", "learn", "domain")
    sections = {name: asdict(getattr(config, name)) for name in names}
    sections["engine"].pop("threads")
    of_run = {name: str(value) for name, value in vars(options).items() if name not in ("arms", "seeds", "out")}
    prompts = {str(path): crc32(path.read_bytes()) for path in (*options.phases, *options.measure)}
    return {"settings": sections, "options": of_run, "weights": weights_digest(draft), "prompts": prompts}


def run(config: AuroraConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Record what is not recorded, run the arms that are not done, and report all results in options.out.

    Raises ConfigError if that folder is of other settings, and AuroraError for a draft that cannot be read.
    """
    draft = draft_folder(config)
    if draft is None:
        raise ConfigError("draft.checkpoint=null: there is no draft to learn from; name a checkpoint folder")
    read_config(draft)  # a draft that cannot be read is an error before the folder says that it is begun with it
    check_arms(options.arms, config)
    options.out.mkdir(parents=True, exist_ok=True)
    if not is_as_begun(options.out / "ablation.json", begun_with(config, options, draft)):
        raise ConfigError(
            f"--out {options.out}: holds arms of other settings, another draft or another stream; name another folder"
        )
    use_threads(config.engine.threads)
    (options.out / "arms").mkdir(exist_ok=True)
    path_of = lambda arm, seed: options.out / "arms" / f"{arm}-{seed}.json"  # noqa: E731
    todo = [(arm, seed) for seed in options.seeds for arm in options.arms if not path_of(arm, seed).exists()]
    if todo:
        record(config, options)
        measured, head_and_draft = list(read_traces(options.out / "measure")), load_head_and_draft(config)
        runner = ArmRunner(config, options, head_and_draft=head_and_draft, measured=measured)
        total = sum(shard.num_sequences for shard in read_index(options.out / "traffic"))
        for arm, seed in todo:
            with Progress(f"{arm}, seed {seed}", total, "traces") as progress:
                result = runner.run(arm, seed, on_block=progress.advance)
            replace_file(path_of(arm, seed), (json.dumps(asdict(result)) + "\n").encode())
    return save_report(options.out, [path.stem for path in options.phases])


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", type=Path, required=True, help="JSONL files of prompts, in their order")
    parser.add_argument("--config", type=Path, help="a preset's name or a YAML file; without it that of SmolLM2")
    parser.add_argument("--requests", type=int, default=400, help="of each phase")
    parser.add_argument("--measure", nargs="+", type=Path, required=True, help="JSONL files, not learned from")
    parser.add_argument("--measure-requests", type=int, default=24, help="prompts of each file")
    parser.add_argument("--max-tokens", type=int, default=56, help="of an answer")
    parser.add_argument("--arms", nargs="+", default=["static", "memory", "learner", "both"], help=" ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--every", type=int, default=4, help="score and learn from one of so many requests")
    parser.add_argument("--steps-per-request", type=float, default=0.05, help="optimiser steps")
    parser.add_argument("--block", type=int, default=32, help="requests between two trials")
    parser.add_argument("--shuffle-phases", action="store_true", help="each seed but 0 has its own order of phases")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="folder for the stream and the results")
    parser.add_argument("overrides", nargs="*", help="key=value, after `--`")
    options = parser.parse_args()
    run(load_config(options.config, options.overrides), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
