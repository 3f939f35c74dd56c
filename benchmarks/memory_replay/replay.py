"""Replays recorded answers, request by request, and counts what a proposer's proposals would have been worth.

The pass that reads the prompt gives an answer's first token. After that, every round asks for proposals, a chain or a
tree; those on the longest path that equals the recorded answer are accepted, and the target's own token follows. This
is what exact verification by matching does, for greedy and for sampled answers alike: it accepts a proposal if it is
the token that the target draws.

Runs in every environment: imports nothing but the standard library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

ROOT = -1
"""Parent of the proposals that follow the last committed token."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """An answer that exists already."""

    domain: str
    temperature: float
    prompt: list[int]
    answer: list[int]
    """With the end-of-text token, if that ended it."""


class Proposer(Protocol):
    """What proposes tokens for one request after the other.

    Calls for each request: `begin`, then `accept` of the first token, then `propose` and `accept` in turn, `finish`.
    """

    def begin(self, prompt: list[int], *, domain: str, sampled: bool) -> None:
        """A request arrives."""

    def propose(self) -> tuple[Sequence[int], Sequence[int]]:
        """Proposals to follow the last committed token: tokens, and for each the index of its parent or ROOT."""

    def accept(self, tokens: list[int], accepted: int, *, ended: bool) -> None:
        """Tokens were committed, of which the first `accepted` were proposed. `ended`: they end the answer."""

    def finish(self) -> None:
        """The answer has ended; later requests may learn from it."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one request took."""

    domain: str
    tokens: int
    """Of the answer, without the first one."""
    rounds: int
    proposed: int
    accepted: int


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of a time, in µs."""

    median: float
    p99: float

    @staticmethod
    def of(values_us: Sequence[float]) -> Quantiles:
        """Of at least one value."""
        ordered = sorted(values_us)
        return Quantiles(
            median=ordered[len(ordered) // 2], p99=ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        )


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The outcome of a replay."""

    arm: str
    temperature: float
    shared: bool
    """True: one proposer saw all domains, in turn. False: this domain only."""
    tallies: list[Tally]
    look_up: Quantiles
    """A call of `propose`."""
    accept: Quantiles
    """All of an answer's calls of `accept`, divided by its tokens."""
    finish: Quantiles
    """`finish`, divided by the answer's tokens."""
    begin: Quantiles
    """`begin`, divided by the prompt's tokens."""

    @staticmethod
    def from_json(fields: dict[str, object]) -> Replayed:
        """The inverse of `dataclasses.asdict`."""
        times = {name: Quantiles(**fields.pop(name)) for name in ("look_up", "accept", "finish", "begin")}  # type: ignore[arg-type]
        tallies = [Tally(**tally) for tally in fields.pop("tallies")]  # type: ignore[attr-defined]
        return Replayed(**fields, tallies=tallies, **times)  # type: ignore[arg-type]


def accepted_count(tokens: Sequence[int], parents: Sequence[int], expected: Sequence[int]) -> int:
    """Length of the longest path from the root that equals the beginning of `expected`. Siblings differ in their token.

    >>> accepted_count([7, 8, 9, 5], [-1, 0, 0, 2], [7, 9, 5, 4])
    3
    """
    child = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    at = ROOT
    for count, token in enumerate(expected):
        following = child.get((at, token))
        if following is None:
            return count
        at = following
    return len(expected)


@dataclass(kw_only=True)
class _Times:
    look_up_us: list[float] = field(default_factory=list)
    accept_us: list[float] = field(default_factory=list)
    finish_us: list[float] = field(default_factory=list)
    begin_us: list[float] = field(default_factory=list)


def replay_request(proposer: Proposer, recorded: Recorded, times: _Times) -> Tally:
    """Replay one request; its times are appended to `times`."""
    answer, clock = recorded.answer, time.perf_counter_ns
    started = clock()
    proposer.begin(recorded.prompt, domain=recorded.domain, sampled=recorded.temperature > 0)
    times.begin_us.append((clock() - started) / 1e3 / len(recorded.prompt))
    started = clock()
    proposer.accept(answer[:1], 0, ended=len(answer) == 1)
    accept_ns = clock() - started
    done, rounds, proposed, accepted = 1, 0, 0, 0
    while done < len(answer):
        started = clock()
        tokens, parents = proposer.propose()
        times.look_up_us.append((clock() - started) / 1e3)
        count = accepted_count(tokens, parents, answer[done:])
        committed = answer[done : done + count + 1]
        done += len(committed)
        rounds, proposed, accepted = rounds + 1, proposed + len(tokens), accepted + count
        started = clock()
        proposer.accept(committed, count, ended=done == len(answer))
        accept_ns += clock() - started
    started = clock()
    proposer.finish()
    times.finish_us.append((clock() - started) / 1e3 / len(answer))
    times.accept_us.append(accept_ns / 1e3 / len(answer))
    return Tally(domain=recorded.domain, tokens=len(answer) - 1, rounds=rounds, proposed=proposed, accepted=accepted)


def replay(arm: str, proposer: Proposer, requests: Sequence[Recorded], *, shared: bool) -> Replayed:
    """Replay requests of one temperature, in order."""
    times = _Times()
    tallies = [replay_request(proposer, recorded, times) for recorded in requests]
    return Replayed(
        arm=arm,
        temperature=requests[0].temperature,
        shared=shared,
        tallies=tallies,
        look_up=Quantiles.of(times.look_up_us),
        accept=Quantiles.of(times.accept_us),
        finish=Quantiles.of(times.finish_us),
        begin=Quantiles.of(times.begin_us),
    )


def replay_all(
    arms: Mapping[str, Callable[[], Proposer]], files: Sequence[list[Recorded]], *, shared: bool
) -> Iterator[Replayed]:
    """Replay every file with a proposer of its own; `shared`: the files of a temperature in turn, with a common one."""
    groups = files
    if shared:
        temperatures = sorted({requests[0].temperature for requests in files})
        same = [[requests for requests in files if requests[0].temperature == each] for each in temperatures]
        groups = [[r for turn in zip_longest(*group) for r in turn if r is not None] for group in same]
    for requests in groups:
        for arm, make in arms.items():
            yield replay(arm, make(), requests, shared=shared)


def read_answers(path: Path) -> list[Recorded]:
    """Read a file of answers, one JSON object a line."""
    return [Recorded(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write_answers(path: Path, answers: Sequence[Recorded]) -> None:
    """Write a file of answers, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(asdict(each)) + "\n" for each in answers), encoding="utf-8")
    unfinished.replace(path)
