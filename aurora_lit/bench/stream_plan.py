"""A stream: phases of prompts whose traffic moves from one domain to another; read from YAML, and planned.

    phases:
      - {name: chat, prompts: [chat.jsonl], requests: 400}
      - {name: mixed, prompts: [chat.jsonl, code.jsonl], weights: [3, 1], requests: 400}

A prompt is asked once: a file that comes again goes on where it was. The same stream and seed give the same plan.
What is left out: asking (bench/stream.py), what drafts are worth along it (bench/ablation/run.py).
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
from aurora_lit.learn.pretrain.label_text import encode_prompt, read_prompts
from aurora_lit.request import Request, SamplingParams

MEASURE = "measure"
"""Where the measured prompts' request ids begin."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of traffic."""

    name: str
    prompts: list[str]
    """Prompt files, relative to the stream's folder of prompts; mixed at random."""
    requests: int
    weights: list[float] = field(default_factory=list)
    """How often each file is drawn from; empty: equally often."""
    max_tokens: int = 64
    """Of an answer."""
    sampled_share: float = 0.0
    """Requests at `temperature`, seeded so that their answers do not depend on the draft; the others are greedy."""
    temperature: float = 0.7
    arrivals: str = ""
    """CSV with a column `timestamp_s`: when requests come, from the phase's beginning. "": all at once."""
    arrivals_scale: float = 1.0
    """The times are multiplied by it."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Prompts that teach nothing: every draft is measured on their answers."""

    prompts: list[str]
    requests: int = 24
    """The first so many of each file."""
    max_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Phases in their order."""

    phases: list[Phase]
    measure: Measure
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of the plan."""

    request: Request
    arrives_s: float = 0.0
    """After its phase began."""


def read_stream(path: Path) -> Stream:
    """Raises ConfigError, which names the field, the value and the remedy."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"--stream {path}: cannot be read ({what}); name a YAML file") from error
    stream: Stream = _record(tree, Stream, place=str(path))
    if not stream.phases:
        raise ConfigError(f"{path}: phases=[] is no stream; give at least one phase")
    names = [phase.name for phase in stream.phases]
    for number, phase in enumerate(stream.phases):
        place = f"{path}: phases[{number}]"
        if phase.requests < 1:
            raise ConfigError(f"{place}.requests={phase.requests} asks nothing; use 1 or more")
        if not phase.prompts:
            raise ConfigError(f"{place}.prompts=[] has no file; name at least one")
        if phase.weights and (len(phase.weights) != len(phase.prompts) or min(phase.weights) <= 0):
            raise ConfigError(f"{place}.weights={phase.weights}: use a number above 0 for each of {phase.prompts}")
        if not 0 <= phase.sampled_share <= 1:
            raise ConfigError(f"{place}.sampled_share={phase.sampled_share} is out of range; use 0 to 1")
        if phase.max_tokens < 2:
            raise ConfigError(f"{place}.max_tokens={phase.max_tokens} leaves nothing to draft; use 2 or more")
        if "/" in phase.name or not phase.name:
            raise ConfigError(f"{place}.name={phase.name!r} is no plain name; use one such as {names[0] or 'chat'}")
    return stream


def plan(
    stream: Stream, *, prompts: Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> tuple[list[list[Asked]], list[Asked]]:
    """The requests of each phase, and the measured ones. Prompts without room for an answer are left out.

    prompts: folder that the stream's file names start from. Raises ConfigError when a file has too few prompts.
    """
    rng = random.Random(stream.seed)
    files: dict[str, Iterator[tuple[str, tuple[int, ...]]]] = {}

    def next_of(name: str, *, max_tokens: int, place: str) -> tuple[str, tuple[int, ...]]:
        if name not in files:
            files[name] = _encoded(prompts / name, tokenizer)
        for domain, ids in files[name]:
            if len(ids) + max_tokens <= max_seq_len:
                return domain, ids
        raise ConfigError(f"{place}: {name} has no prompt left that fits; ask fewer requests, or name another file too")

    phases = []
    for number, phase in enumerate(stream.phases):
        arrivals = _arrivals(prompts / phase.arrivals, phase) if phase.arrivals else [0.0] * phase.requests
        asked = []
        for at, arrives_s in enumerate(arrivals):
            name = rng.choices(phase.prompts, phase.weights or None)[0]
            sampled = rng.random() < phase.sampled_share
            domain, ids = next_of(name, max_tokens=phase.max_tokens, place=f"phases[{number}]")
            params = SamplingParams(
                max_tokens=phase.max_tokens,
                temperature=phase.temperature if sampled else 0.0,
                seed=rng.randrange(1 << 31) if sampled else None,
            )
            request = Request(
                request_id=f"{number}-{phase.name}/{at:05d}", prompt_ids=ids, params=params, domain=domain
            )
            asked.append(Asked(request=request, arrives_s=arrives_s))
        phases.append(asked)
    measured = []
    for name in stream.measure.prompts:
        for at in range(stream.measure.requests):
            domain, ids = next_of(name, max_tokens=stream.measure.max_tokens, place="measure")
            params = SamplingParams(max_tokens=stream.measure.max_tokens, temperature=0.0)
            request = Request(request_id=f"{MEASURE}-{name}/{at:05d}", prompt_ids=ids, params=params, domain=domain)
            measured.append(Asked(request=request))
    return phases, measured


def phase_of(request_id: str) -> int:
    """Number of the phase that a recorded request belongs to."""
    return int(request_id.partition("-")[0])


def _encoded(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, tuple[int, ...]]]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such prompt file; mend the stream, or name its folder with --prompts")
    for prompt in read_prompts(path):
        yield prompt.domain, tuple(encode_prompt(tokenizer, prompt))


def _arrivals(path: Path, phase: Phase) -> list[float]:
    """The first so many times of a file, from 0 on."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            times = [float(row["timestamp_s"]) for row in itertools.islice(csv.DictReader(file), phase.requests)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: no arrival times ({error!r}); it needs a column timestamp_s of numbers") from error
    if len(times) < phase.requests:
        raise ConfigError(f"{path}: holds {len(times)} arrivals and the phase {phase.requests} requests; ask fewer")
    return [(time_s - times[0]) * phase.arrivals_scale for time_s in times]


def _record(tree: Any, kind: Any, *, place: str) -> Any:
    """A record of `kind` from parsed YAML; every key known, every value of its type."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}: {tree!r} is no mapping; use the keys {', '.join(typing.get_type_hints(kind))}")
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
            raise ConfigError(f"{place}={value!r} is no list; write [ … ]")
        inner: Sequence[Any] = typing.get_args(kind)
        return [_value(each, inner[0], place=f"{place}[{at}]") for at, each in enumerate(value)]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{place}={value!r} is no {kind.__name__}; mend it")
    return value
