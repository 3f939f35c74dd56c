"""Copies along recorded answers are those of a live engine with a memory, and no answer helps itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import make_engine, run
from support.trace_examples import keep_in, numbered_trace

from aurora_lit.kernels import native
from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import NUM_CELLS, Copies, SuffixMemory
from aurora_lit.learn.offline import ngram_paths
from aurora_lit.learn.offline.ngram_paths import NgramPaths
from aurora_lit.learn.offline.scoring import RoundTotals, RoundWalk, with_copied
from aurora_lit.models.interface import Target
from aurora_lit.modules.sampling.tree import accepted_path
from aurora_lit.request import Request, Source
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation.weigh import LEAST_SURVIVAL, with_copies
from aurora_lit.traces.record import Trace

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no memory without kernels")
MOST = 6
"""Copied tokens of a round."""
MEMORY: dict[str, Any] = {"memory_scope": "domain"}


def copy_paths(**changes: Any) -> NgramPaths:
    fields: dict[str, Any] = {"most": MOST, "segment_tokens": 512, "memory": SuffixMemory(1 << 20), **changes}
    return NgramPaths(**fields)


def copied_rounds(paths: NgramPaths, traces: Sequence[Trace]) -> list[RoundTotals]:
    """The rounds of each trace if only copies are proposed; each is remembered after its score."""
    walk, found = RoundWalk(reach=MOST), []
    for trace in traces:
        copied_T = paths.copied(trace).accepted_T
        found.append(walk.walk(trace, torch.zeros(1, len(trace.token_ids_T)), copied_T))
        paths.remember(trace)
    return found


def live_rounds(trace: Trace) -> RoundTotals:
    """The live engine's rounds that a replay knows too; of an accepted branch a trace shows only where it ended."""
    T = len(trace.token_ids_T)
    root_R = torch.cat([trace.round_root_R, torch.tensor([T])])
    emitted_R = root_R.diff()[root_R[:-1] <= T - 1 - MOST]
    return RoundTotals(count=float(len(emitted_R)), tokens=float(emitted_R.sum()))


def one_after_the_other(times: int, **params: Any) -> list[Request]:
    """A few prompts, asked again and again, with two first tokens in turn."""
    asked = some_requests(5, max_tokens=50, **params)
    return [
        replace(r, request_id=f"{n}-{r.request_id}", prompt_ids=(n % 2, *r.prompt_ids))
        for n in range(times)
        for r in asked
    ]


@pytest.mark.parametrize("own", [True, False])
def test_rounds_are_those_of_a_live_engine_with_a_memory(
    target: Target, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setattr(CopyReliability, "observe", lambda *_, **__: None)
    settings: dict[str, Any] = {"max_batch_size": 1, "copied_tokens": MOST, "lookup": own, **MEMORY}
    insert = SuffixMemory.insert
    with monkeypatch.context() as patch:
        # A request's last token is in no trace.
        patch.setattr(SuffixMemory, "insert", lambda self, tokens, **place: insert(self, tokens[:-1], **place))
        live = serve(target, None, one_after_the_other(4), **settings)
    found = copied_rounds(copy_paths(own=own, least=LEAST_SURVIVAL), live)
    assert found == [live_rounds(trace) for trace in live]
    first, *_, last = (sum(found[5 * n : 5 * n + 5], RoundTotals()).accepted_length for n in range(4))
    assert last > first + 0.5, "or the memory holds nothing of use"


def test_with_rates_that_follow_the_stream_the_accepted_length_is_a_live_engines(target: Target) -> None:
    settings: dict[str, Any] = {"max_batch_size": 1, "copied_tokens": MOST, **MEMORY}
    live = serve(target, None, one_after_the_other(6), **settings)
    paths = copy_paths(least=LEAST_SURVIVAL)
    found = sum(copied_rounds(paths, live), RoundTotals())
    assert found.accepted_length == pytest.approx(sum(map(live_rounds, live), RoundTotals()).accepted_length, rel=0.03)
    assert paths.reliability.trials_RC[paths.reliability.table(sampled=False)].sum() > 100


def test_segments_give_the_rounds_of_the_whole(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CopyReliability, "observe", lambda *_, **__: None)

    def recorded(**sizes: int) -> list[Trace]:
        traces: list[Trace] = []
        recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size, **sizes)
        run(make_engine(target, observer=recorder, max_batch_size=1), one_after_the_other(3))
        return traces

    whole, pieces = recorded(), recorded(segment_tokens=9, overlap_tokens=20)
    assert len(pieces) > 3 * len(whole)
    expected = dict(zip((t.request_id for t in whole), copied_rounds(copy_paths(), whole), strict=True))
    found: dict[str, RoundTotals] = {}
    for piece, rounds in zip(pieces, copied_rounds(copy_paths(segment_tokens=9), pieces), strict=True):
        found[piece.request_id] = found.get(piece.request_id, RoundTotals()) + rounds
    assert found == expected


def test_an_answer_never_helps_itself_and_helps_the_next_once_it_was_scored() -> None:
    paths = copy_paths(own=False, segment_tokens=30)
    first, second, end = (
        replace(numbered_trace(length, answer_start=start), request_id="a")
        for length, start in ((40, 10), (70, 40), (80, 70))
    )

    def other(name: str) -> list[int]:
        return paths.copied(replace(numbered_trace(70, answer_start=10), request_id=name)).accepted_T

    for segment, new in ((first, 30), (second, 30)):
        assert len(segment.token_ids_T) - segment.answer_start == new
        assert not any(paths.copied(segment).accepted_T)
        paths.remember(segment)
        assert not any(other(f"while {new} are open")), "a segment may follow"
    assert not any(paths.copied(end).accepted_T)
    assert not any(other("not yet remembered"))
    paths.remember(end)
    copied_T = other("b")
    assert copied_T[20] == MOST
    assert not any(copied_T[:9])


def test_a_peek_sees_what_is_remembered_and_leaves_nothing_behind() -> None:
    paths = copy_paths(own=False)
    first, second = (replace(numbered_trace(60, answer_start=10), request_id=name) for name in "ab")
    assert not any(paths.peek([first, second])[1].accepted_T), "nothing is remembered"
    assert not any(paths.along([first])[0].accepted_T)
    rates_RC = paths.reliability.rate_RC.clone()
    before = paths.peek([second])
    assert max(before[0].accepted_T) == max(before[0].proposed_T) == MOST
    assert all(n <= m for n, m in zip(before[0].accepted_T, before[0].proposed_T, strict=True))
    assert paths.peek([second]) == before
    assert torch.equal(paths.reliability.rate_RC, rates_RC)
    assert paths.along([second]) == before, "a peek shows what would be copied now"


def test_of_requests_whose_last_segment_never_comes_the_newest_are_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_paths, "_MAX_OPEN_REQUESTS", 2)
    paths = copy_paths(own=False, segment_tokens=50)  # as many as each answer has, so that none is the last segment
    traces = [replace(numbered_trace(60, answer_start=10), request_id=name) for name in "abc"]
    for trace in traces[:2]:
        paths.copied(trace)
        paths.remember(trace)
    assert not any(paths.peek([traces[2]])[0].accepted_T), "both are open"
    paths.copied(traces[2])
    paths.remember(traces[2])
    assert any(paths.peek([replace(traces[2], request_id="d")])[0].accepted_T), "the oldest was remembered as it is"


def test_clients_share_nothing_if_the_scope_says_so() -> None:
    paths = copy_paths(own=False, by_client=True)
    for name, client, sees in (("1", "x", False), ("2", "y", False), ("3", "x", True), ("4", "", False)):
        trace = replace(numbered_trace(60, answer_start=10), request_id=name, client=client)
        assert any(paths.copied(trace).accepted_T) == sees
        paths.remember(trace)


@pytest.mark.parametrize(
    ("own", "other", "comes_first"),
    [
        ({"domain": "code"}, {"domain": "chat"}, True),
        ({"served_domain": "auto-1"}, {"served_domain": "auto-2"}, True),
        ({"domain": "auto-1"}, {"domain": "auto-2"}, False),  # not a client's to say
    ],
)
def test_answers_of_the_domain_that_a_request_was_served_as_come_first(
    own: dict[str, str], other: dict[str, str], comes_first: bool
) -> None:
    paths = copy_paths(own=False, least=0.5)

    def answered(name: str, end: int, **domain: str) -> Trace:
        token_ids_T = torch.cat([torch.arange(20), end + torch.arange(20)]).int()
        return replace(numbered_trace(40, answer_start=20), token_ids_T=token_ids_T, request_id=name, **domain)

    paths.along([answered(f"often {n}", 100, **other) for n in range(4)] + [answered("once", 200, **own)])
    assert (paths.copied(answered("next", 200, **own)).accepted_T[19] == MOST) == comes_first


def test_copies_and_chain_accept_what_the_tree_that_the_server_makes_of_them_accepts() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        recorded = [rng.randrange(2) for _ in range(9)]
        nodes: list[tuple[int, int]] = []
        for _ in range(rng.randrange(9)):
            node = (rng.randrange(len(nodes) + 1), rng.randrange(2))
            if node not in nodes:
                nodes.append(node)
        parents, tokens = [parent for parent, _ in nodes], [token for _, token in nodes]
        cells = [rng.randrange(NUM_CELLS) for _ in nodes]
        chain = [rng.randrange(2) for _ in range(4)]
        copied = len(_accepted(tokens, parents, recorded))
        steps = with_copied([float(a == b) for a, b in zip(chain, recorded, strict=False)], copied)
        merged = with_copies(
            Proposal(tokens=chain, source=Source.DRAFT, num_drafted=4),
            Copies(tokens, parents, [1.0] * len(nodes), cells),
            reliability=CopyReliability(),
            sampled=False,
            least=0.0,
            most=100,
        )
        accepted = next((i for i, each in enumerate([*steps, 0.0]) if not each))
        drafted = len(_accepted(chain, None, recorded))
        assert accepted == max(copied, drafted) == len(_accepted(merged.tokens, merged.parents, recorded))


def test_probabilities_beyond_the_copies_are_the_drafts_own() -> None:
    accept_K = [0.9, 0.5, 0.8, 0.25]
    for copied in range(7):
        steps = with_copied(accept_K, copied)
        assert len(steps) == max(4, copied)
        for j in range(1, len(steps) + 1):
            assert prod(steps[:j]) == pytest.approx(1.0 if j <= copied else prod(accept_K[:j]))


def _accepted(tokens: list[int], parents: list[int] | None, recorded: list[int]) -> list[int]:
    """The accepted columns, where the target's tokens along the accepted path are the recorded ones."""
    depth = [0]
    for column in range(1, len(tokens) + 1):
        depth.append(depth[column - 1 if parents is None else parents[column - 1]] + 1)
    return accepted_path(tokens, parents, [recorded[d] if d < len(recorded) else -1 for d in depth])
