"""Streams: phases of prompts, through which traffic changes from one domain to another; read from YAML and planned.

    phases:
      - {name: chat, prompts: [chat.jsonl], requests: 400}
      - {name: mixed, prompts: [chat.jsonl, code.jsonl], weights: [3, 1], requests: 400}

Each prompt is used once: a file that a later phase names again continues with its next prompt. The same stream and seed
give the same plan.

Leaves out answering the prompts (bench/stream.py).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import random
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from aurora_lit.errors import ConfigError
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.request import Request, SamplingParams

MEASURE = "measure"
"""Prefix of the measured prompts' request ids."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the traffic with the same mix of prompts."""

    name: str
    prompts: list[str]
    """Prompt files, relative to the folder of prompts; mixed at random."""
    requests: int
    weights: list[float] = field(default_factory=list)
    """Relative frequency of each file; empty: equal."""
    max_tokens: int = 64
    """Maximum length of an answer."""
    sampled_share: float = 0.0
    """Share of requests at `temperature`, each with a seed, so that another recording has the same answers; others are
    greedy."""
    temperature: float = 0.7
    arrivals: str = ""
    """CSV file with a column `timestamp_s`: arrival times of the requests. "": all arrive at once."""
    arrivals_scale: float = 1.0
    """Factor for the arrival times."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Prompts on which drafts are measured; they are not learned from."""

    prompts: list[str]
    requests: int = 24
    """How many prompts of each file, from its beginning."""
    max_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Phases, in their order."""

    phases: list[Phase]
    measure: Measure
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """A request and its arrival time."""

    request: Request
    arrives_s: float = 0.0
    """Seconds after the phase began."""


def read_stream(path: Path) -> Stream:
    """Read and validate a stream. Raises ConfigError, which names field, value and remedy."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"--stream {path}: cannot be read ({what}); name a YAML file") from error
    stream: Stream = _record(tree, Stream, place=str(path))
    if not stream.phases:
        raise ConfigError(f"{path}: phases=[] is not a stream; give at least one phase")
    names = [phase.name for phase in stream.phases]
    for number, phase in enumerate(stream.phases):
        place = f"{path}: phases[{number}]"
        if phase.requests < 1:
            raise ConfigError(f"{place}.requests={phase.requests} has no request; use 1 or more")
        if not phase.prompts:
            raise ConfigError(f"{place}.prompts=[] has no file; name at least one")
        if phase.weights and (len(phase.weights) != len(phase.prompts) or min(phase.weights) <= 0):
            raise ConfigError(f"{place}.weights={phase.weights}: use a number above 0 for each of {phase.prompts}")
        if not 0 <= phase.sampled_share <= 1:
            raise ConfigError(f"{place}.sampled_share={phase.sampled_share} is out of range; use 0 to 1")
        if phase.max_tokens < 2:
            raise ConfigError(f"{place}.max_tokens={phase.max_tokens} leaves nothing to draft; use 2 or more")
        if "/" in phase.name or not phase.name:
            raise ConfigError(f"{place}.name={phase.name!r} is not a plain name; use one such as {names[0] or 'chat'}")
    return stream


def plan(
    stream: Stream, *, prompts: Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> tuple[list[list[PlannedRequest]], list[PlannedRequest]]:
    """The requests of each phase, and the measured ones. Prompts that leave no room for an answer are skipped.

    prompts: folder of the stream's prompt files. Raises ConfigError if a file has too few prompts.
    """
    rng = random.Random(stream.seed)
    files: dict[str, Iterator[tuple[str, tuple[int, ...]]]] = {}

    def next_prompt(name: str, *, max_tokens: int, place: str) -> tuple[str, tuple[int, ...]]:
        if name not in files:
            files[name] = _encoded(prompts / name, tokenizer)
        for domain, ids in files[name]:
            if len(ids) + max_tokens <= max_seq_len:
                return domain, ids
        raise ConfigError(f"{place}: {name} has no suitable prompt left; lower requests, or name another file too")

    phases = []
    for number, phase in enumerate(stream.phases):
        arrivals = [0.0] * phase.requests
        if phase.arrivals:
            times = read_arrivals(prompts / phase.arrivals, phase.requests)
            arrivals = [time_s * phase.arrivals_scale for time_s in times]
        planned = []
        for number_in_phase, arrives_s in enumerate(arrivals):
            name = rng.choices(phase.prompts, phase.weights or None)[0]
            sampled = rng.random() < phase.sampled_share
            domain, ids = next_prompt(name, max_tokens=phase.max_tokens, place=f"phases[{number}]")
            params = SamplingParams(
                max_tokens=phase.max_tokens,
                temperature=phase.temperature if sampled else 0.0,
                seed=rng.randrange(1 << 31) if sampled else None,
            )
            request_id = f"{number}-{phase.name}/{number_in_phase:05d}"
            # The seed decides which tokens are drawn, so that the key is of no use, and no plan differs in it.
            request = Request(request_id=request_id, prompt_ids=ids, params=params, domain=domain, noise_key=0)
            planned.append(PlannedRequest(request=request, arrives_s=arrives_s))
        phases.append(planned)
    measured = []
    for name in stream.measure.prompts:
        for number in range(stream.measure.requests):
            domain, ids = next_prompt(name, max_tokens=stream.measure.max_tokens, place="measure")
            params = SamplingParams(max_tokens=stream.measure.max_tokens, temperature=0.0)
            request_id = f"{MEASURE}-{name}/{number:05d}"
            request = Request(request_id=request_id, prompt_ids=ids, params=params, domain=domain, noise_key=0)
            measured.append(PlannedRequest(request=request))
    return phases, measured


def phase_of(request_id: str) -> int:
    """Number of the phase that a request of the traffic belongs to."""
    return int(request_id.partition("-")[0])


def _encoded(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, tuple[int, ...]]]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such prompt file; correct the stream, or use --prompts FOLDER")
    for prompt in read_prompts(path):
        yield prompt.domain, tuple(encode_prompt(tokenizer, prompt))


def read_arrivals(path: Path, requests: int) -> list[float]:
    """The first arrival times of a CSV file with a column `timestamp_s`, in seconds after the first of them.

    Raises ConfigError if there are fewer than `requests`.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            times = [float(row["timestamp_s"]) for row in itertools.islice(csv.DictReader(file), requests)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} has no arrival times ({error!r}); give it a column timestamp_s") from error
    if len(times) < requests:
        raise ConfigError(
            f"{path} has {len(times)} arrivals for {requests} requests; send fewer, or give more arrivals"
        )
    return [time_s - times[0] for time_s in times]


def _record(tree: Any, kind: Any, *, place: str) -> Any:
    """A dataclass of type `kind` from parsed YAML, with every key known and every value of its type."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}: {tree!r} is not a mapping; use the keys {', '.join(typing.get_type_hints(kind))}")
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(f"{place}: {key}={value!r}: there is no such key; use one of {', '.join(hints)}")
        values[str(key)] = _value(value, hints[key], place=f"{place}: {key}")
    missing = [
        each.name
        for each in dataclasses.fields(kind)
        if each.name not in values and each.default is each.default_factory  # both are MISSING
    ]
    if missing:
        raise ConfigError(f"{place}: {missing[0]} is missing; add it")
    return kind(**values)


def _value(value: Any, kind: Any, *, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _record(value, kind, place=place)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{place}={value!r} is not a list; write [ … ]")
        inner: Sequence[Any] = typing.get_args(kind)
        return [_value(item, inner[0], place=f"{place}[{index}]") for index, item in enumerate(value)]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{place}={value!r} is not of type {kind.__name__}; correct it")
    return value
