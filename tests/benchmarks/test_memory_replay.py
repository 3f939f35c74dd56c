"""Replays of recorded answers: what is accepted, counted, and shown to a proposer in which order."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.progress import Progress

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native
from benchmarks.memory_replay import answers as answers_module
from benchmarks.memory_replay.answers import make_answers
from benchmarks.memory_replay.proposers import MAX_NODES, Copying
from benchmarks.memory_replay.replay import (
    Proposer,
    Recorded,
    Replayed,
    accepted_count,
    read_answers,
    replay,
    replay_all,
    write_answers,
)
from benchmarks.memory_replay.report import cost_table, learning_curve, token_table, tokens_a_round


def recorded(prompt: list[int], answer: list[int], *, domain: str = "d", temperature: float = 0.0) -> Recorded:
    return Recorded(domain=domain, temperature=temperature, prompt=prompt, answer=answer)


class Oracle:
    """Proposes the next tokens of a known answer, in a tree with wrong tokens; writes down what it is told."""

    def __init__(self, answer: Sequence[int], right: int) -> None:
        self.answer, self.right, self.done = list(answer), right, 0
        self.log: list[tuple[str, list[int], int, bool]] = []

    def begin(self, prompt: list[int], *, domain: str, sampled: bool) -> None:
        self.done = 0
        self.log.append((f"begin {domain}", list(prompt), 0, False))

    def propose(self) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        parents: list[int] = []
        at = -1
        for token in self.answer[self.done : self.done + self.right]:
            tokens += [-token, token]
            parents += [at, at]
            at = len(tokens) - 1
        return [*tokens, -1], [*parents, at]

    def accept(self, tokens: list[int], accepted: int, *, ended: bool) -> None:
        self.done += len(tokens)
        self.log.append(("accept", list(tokens), accepted, ended))

    def finish(self) -> None:
        self.log.append(("finish", [], 0, False))


@pytest.mark.parametrize(
    ("tokens", "parents", "expected", "count"),
    [
        ([], [], [1, 2], 0),
        ([1, 2, 3], [-1, 0, 1], [1, 2, 4], 2),
        ([1, 2, 3], [-1, 0, 1], [1, 2], 2),
        ([5, 1, 2, 9, 2], [-1, -1, 0, 2, 1], [1, 2, 9], 2),  # the 9 is in the wrong branch
        ([9, 1, 2], [1, -1, 1], [1, 9], 2),  # parents may follow their children
        ([2], [-1], [1, 2], 0),
    ],
)
def test_the_longest_path_that_equals_the_answer_is_accepted(
    tokens: list[int], parents: list[int], expected: list[int], count: int
) -> None:
    assert accepted_count(tokens, parents, expected) == count


def test_rounds_follow_the_first_token_and_give_one_token_more_than_was_accepted() -> None:
    answer = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    oracle = Oracle(answer, right=2)
    replayed = replay("oracle", oracle, [recorded([50, 51], answer, domain="x")], shared=False)
    assert oracle.log == [
        ("begin x", [50, 51], 0, False),
        ("accept", [1], 0, False),
        ("accept", [2, 3, 4], 2, False),
        ("accept", [5, 6, 7], 2, False),
        ("accept", [8, 9], 2, True),  # the answer ends before the target's own token
        ("finish", [], 0, False),
    ]
    (tally,) = replayed.tallies
    assert (tally.tokens, tally.rounds, tally.proposed, tally.accepted) == (8, 3, 15, 6)
    assert tokens_a_round(replayed.tallies) == pytest.approx(8 / 3)


def test_without_proposals_every_round_gives_one_token() -> None:
    answer = list(range(10))
    replayed = replay("none", Oracle([], 0), [recorded([50], answer)] * 3, shared=False)
    assert [tokens_a_round([tally]) for tally in replayed.tallies] == [1.0] * 3


needs_kernels = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")


def some_tokens(count: int, *, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(40_000) for _ in range(count)]


@needs_kernels
def test_copies_are_proposed_only_while_they_are_probable() -> None:
    lookup, known = Copying(own=True, remembers=False), some_tokens(40, seed=0)
    lookup.begin(known, domain="", sampled=False)
    lookup.accept(known[:12], 0, ended=False)
    tokens, parents = lookup.propose()
    assert tokens == known[12 : 12 + len(tokens)]
    assert 4 < len(tokens) <= MAX_NODES
    assert parents == list(range(-1, len(tokens) - 1))
    for _ in range(300):  # such copies are always wrong, so they are given up
        tokens, _ = lookup.propose()
        lookup.accept([], 0, ended=False)
    assert tokens == []


@needs_kernels
def test_what_is_copied_from_is_what_the_arm_says() -> None:
    passage, other = some_tokens(100, seed=1), some_tokens(100, seed=2)
    requests = [
        recorded(passage, passage),
        recorded(some_tokens(100, seed=3), other),
        recorded(some_tokens(100, seed=4), other),
    ]

    def lengths(proposer: Proposer) -> list[float]:
        replayed = replay("", proposer, requests, shared=False)
        return [tokens_a_round([tally]) for tally in replayed.tallies]

    copied, plain = pytest.approx(12, abs=4), 1.0
    assert lengths(Copying(own=True, remembers=False)) == [copied, plain, plain]
    assert lengths(Copying(own=False, remembers=True)) == [plain, plain, copied]
    assert lengths(Copying(own=True, remembers=True)) == [copied, plain, copied]


@needs_kernels
def test_the_memory_prefers_the_own_domain_only_where_domains_are_known() -> None:
    begin, one, other = some_tokens(4, seed=5), some_tokens(60, seed=6), some_tokens(60, seed=7)
    turns = [("a", begin + one), ("b", begin + other), ("b", begin + other)]
    requests = [recorded(some_tokens(50, seed=8 + i), answer, domain=d) for i, (d, answer) in enumerate(turns)]

    def first_proposal_is_right(*, knows_domains: bool) -> bool:
        copying = Copying(own=False, remembers=True, knows_domains=knows_domains)
        replay("", copying, requests, shared=True)
        copying.begin(some_tokens(50, seed=20), domain="a", sampled=False)
        copying.accept(begin, 0, ended=False)
        return copying.propose()[0][0] == one[0]

    assert first_proposal_is_right(knows_domains=True)
    assert not first_proposal_is_right(knows_domains=False)  # the other answer was given twice


def test_files_have_proposers_of_their_own_unless_they_share_one() -> None:
    first = [recorded([1], [1, 2], domain="a"), recorded([2], [1, 2], domain="a")]
    second = [recorded([3], [1, 2], domain="b")]
    warm = [recorded([4], [1, 2], domain="a", temperature=1.0)]
    made: list[Oracle] = []

    def make() -> Proposer:
        made.append(Oracle([], 0))
        return made[-1]

    def prompts() -> list[list[int]]:
        return [[seen[0] for what, seen, _, _ in oracle.log if what.startswith("begin")] for oracle in made]

    alone = list(replay_all({"o": make}, [first, second, warm], shared=False))
    assert prompts() == [[1, 2], [3], [4]]
    made.clear()
    shared = list(replay_all({"o": make}, [first, second, warm], shared=True))
    assert prompts() == [[1, 3, 2], [4]]
    assert [replayed.temperature for replayed in alone] == [0.0, 0.0, 1.0]
    assert [replayed.temperature for replayed in shared] == [0.0, 1.0]


def test_answers_and_replays_survive_their_files(tmp_path: Path) -> None:
    answers = [recorded([1, 2], [3, 4, 5]), recorded([6], [7, 8])]
    write_answers(tmp_path / "new" / "d-0.jsonl", answers)
    assert read_answers(tmp_path / "new" / "d-0.jsonl") == answers
    replayed = replay("none", Oracle([], 0), answers, shared=True)
    assert Replayed.from_json(json.loads(json.dumps(asdict(replayed)))) == replayed


def test_answers_of_another_target_or_length_are_not_kept_beside_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = [tmp_path / "d.jsonl"], tmp_path / "out"
    prompts[0].write_text("one\n")
    monkeypatch.setattr(answers_module, "load_prompts", lambda *_, **__: [])
    monkeypatch.setattr(answers_module, "build_engine", lambda config: (SimpleNamespace(has_work=False), None))
    config, other = (load_config(None, [f"target.precision={precision}"]) for precision in ("fp32", "bf16"))
    fields: dict[str, Any] = {"requests": 9, "max_tokens": 8, "seed": 0, "progress": Progress()}

    def make(config: AuroraConfig, *, temperature: float = 0.0, **changes: Any) -> list[Path]:
        return make_answers(config, prompts, out, temperature=temperature, **{**fields, **changes})

    write_answers(out / "d-0.jsonl", [recorded([1], [2])])
    with pytest.raises(ConfigError, match="holds answers of another target"):  # nobody knows of which
        make(config)
    (out / "d-0.jsonl").unlink()
    assert make_answers(config, [], out, temperature=0.0, **fields) == []
    assert make(config) == [out / "d-0.jsonl"]
    assert make(config, temperature=1.0) == [out / "d-1.jsonl"]
    for each, changes in ((other, {}), (config, {"max_tokens": 16}), (config, {"requests": 10})):
        with pytest.raises(ConfigError, match="--out .*out: holds answers of another target, or of other --requests"):
            make(each, **changes)
    prompts[0].write_text("another\n")
    with pytest.raises(ConfigError, match="--out .*out: d-0.jsonl answers other prompts than .*d.jsonl holds"):
        make(config)
    (out / "d-0.jsonl").unlink()
    assert make(config) == make(config) == [out / "d-0.jsonl"]


def test_a_learning_curve_keeps_the_order_of_the_requests() -> None:
    answers = [recorded([1], [1, 2, 3, 4, 5])] * 4
    slow = replay("slow", Oracle([], 0), answers[:2], shared=False)
    fast = replay("fast", Oracle([1, 2, 3, 4, 5], 4), answers[2:], shared=False)
    assert learning_curve([*slow.tallies, *fast.tallies], 2) == [1.0, 4.0]
    assert token_table([slow], {"d": 0.0}).row_count == 3
    assert cost_table([slow, fast]).row_count == 2
