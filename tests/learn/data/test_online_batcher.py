"""Which traces a batch takes: live and replayed ones, the most informative first, a bounded share a client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import random_draft

from aurora_lit.learn.data import reservoir
from aurora_lit.learn.data.online_batcher import MAX_PASSES, OnlineBatcher, informativeness
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import crop, first_trained_position
from aurora_lit.models.interface import Target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.traces.record import Trace, from_bytes

MakeBatcher = Callable[..., OnlineBatcher]


@pytest.fixture
def make(tmp_path: Path) -> MakeBatcher:
    def make(folder: Path = tmp_path, **changes: Any) -> OnlineBatcher:
        fields: dict[str, Any] = {"batch_positions": 128, "replay_share": 0.5, "live_bytes": 1 << 24, **changes}
        return OnlineBatcher(Reservoir(folder / "r", limit_bytes=1 << 24, seed=0), **fields)

    return make


@pytest.fixture
def limited(make: MakeBatcher, tmp_path: Path) -> MakeBatcher:
    """No replay, and at most half of a batch for one client."""

    def limited(name: str = "limited", **changes: Any) -> OnlineBatcher:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return make(folder, **{"batch_positions": 256, "replay_share": 0.0, "max_client_share": 0.5, **changes})

    return limited


def taken(batcher: OnlineBatcher) -> OnlineBatch:
    """The next batch; there is one."""
    batch = batcher.next_batch()
    assert batch is not None
    return batch


def test_batches_mix_live_and_remembered_and_stay_within_their_size(make: MakeBatcher, served: list[Trace]) -> None:
    batcher = make()
    assert batcher.next_batch() is None
    for trace in served:
        batcher.add(trace)
    batches = []
    while batch := batcher.next_batch():
        batches.append(batch)
    for batch in batches:
        trained = int((batch.traces.weight_BT > 0).sum())
        before = int((batch.traces.weight_BT > 0).int().argmax(1).sum())
        assert before > 0
        assert trained + before // 4 <= 128, "what is not trained on counts a quarter"
    assert sum(int(batch.live_B.sum()) for batch in batches) == len(served), "each is live once"
    assert any(batch.live_B.any() and not batch.live_B.all() for batch in batches)
    assert batcher.positions_out == pytest.approx(MAX_PASSES * batcher.positions_in, abs=128)
    assert len(batcher.reservoir) == len(served)
    assert [batch.at_rest for batch in batches] == [not batch.live_B.any() for batch in batches]
    assert batches[-1].at_rest


def test_all_of_a_long_answer_is_learned_and_replayed_beside_shorter_ones(
    make: MakeBatcher, served: list[Trace]
) -> None:
    """A batch has no room for all of it beside live traces."""
    longest = max(served, key=lambda trace: len(trace.token_ids_T))
    trained = len(longest.token_ids_T) - first_trained_position(longest)
    batcher = make(batch_positions=2 * trained, replay_share=0.3)
    batcher.add(replace(longest, domain="past"))
    assert batcher.positions_in == trained
    learned = list[int]()
    while any(trace.domain == "past" for trace in batcher._waiting):
        batch = taken(batcher)
        learned.append(int((batch.traces.weight_BT > 0)[batch.live_B].sum()))
    assert sum(learned) == trained
    replayed = 0
    for number, trace in enumerate(served * 3):
        batcher.add(replace(trace, request_id=str(number)))
        batch = taken(batcher)
        replayed += sum(domain == "past" for domain in batch.traces.domains)
    assert replayed > 5


def test_a_small_share_of_replay_makes_no_small_pieces(make: MakeBatcher, served: list[Trace]) -> None:
    longest = max(served, key=lambda trace: len(trace.token_ids_T))
    size = 4 * len(longest.token_ids_T)
    batcher = make(batch_positions=size, replay_share=0.05)
    batcher.add(longest)
    assert len(batcher._waiting) == 1, "a quarter of a batch stays whole"


def test_the_most_informative_come_first_and_the_oldest_make_room(
    make: MakeBatcher, served: list[Trace], tmp_path: Path
) -> None:
    batcher = make(replay_share=0.0, batch_positions=60)
    for trace in served:
        batcher.add(trace)
    batch = taken(batcher)
    best = max(map(informativeness, served))
    ids_T = batch.traces.token_ids_BT[0]
    first = next(t for t in served if torch.equal(t.token_ids_T.long(), ids_T[: len(t.token_ids_T)]))
    assert informativeness(first) == best
    small = make(tmp_path / "..", live_bytes=served[-1].num_bytes + 10)
    small.reservoir.add(served[0])
    for trace in served:
        small.add(trace)
    assert len(small.reservoir) == len(served), "all but the newest went to the reservoir"


def test_of_traces_that_no_batch_takes_only_some_are_remembered(make: MakeBatcher, served: list[Trace]) -> None:
    """64 at first, and two for each that a batch takes; those that are forgotten are no reason to replay others."""
    trace = served[0]
    batcher = make(replay_share=0.0, live_bytes=trace.num_bytes)
    for number in range(200):
        batcher.add(replace(trace, request_id=str(number)))
    assert len(batcher.reservoir) == 64
    positions = batcher.positions_in / (64 + 1)
    assert positions == len(trace.token_ids_T) - first_trained_position(trace)
    assert taken(batcher)
    for number in range(200, 300):
        batcher.add(replace(trace, request_id=str(number)))
    assert len(batcher.reservoir) == 64 + 1 + 2
    assert batcher.positions_in == positions * (64 + 1 + 2 + 1)


def test_only_what_is_still_held_is_replayed_while_nothing_arrives(
    target_head: TargetHead, served: list[Trace], tmp_path: Path
) -> None:
    """And a learner that is started again replays what it finds beside new traffic alone."""
    limit_bytes = 5 * served[0].num_bytes

    def started() -> OnlineBatcher:
        remembered = Reservoir(tmp_path / "r", limit_bytes=limit_bytes, seed=0)
        return OnlineBatcher(remembered, batch_positions=64, replay_share=0.5, live_bytes=1 << 24)

    batcher = started()
    for number, trace in enumerate(served * 5):
        batcher.add(replace(trace, request_id=str(number)))
        assert taken(batcher)
    assert batcher.num_waiting == 0
    replayed = 0
    while batch := batcher.next_batch():
        replayed += int((batch.traces.weight_BT > 0).sum())
    held = batcher.reservoir.positions
    assert held < sum(map(trained_positions, served))
    assert held < replayed < MAX_PASSES * held + 64
    batcher = started()
    assert batcher.reservoir.positions == held
    assert batcher.next_batch() is None
    batcher.add(served[0])
    assert taken(batcher)


def test_a_few_new_positions_wait_for_more_once_all_has_been_learned(make: MakeBatcher, served: list[Trace]) -> None:
    """Of a batch's live part of 64; while there is something to replay, they are learned beside it. Who wants a batch
    all the same, as a replay of recorded traffic does, gets it."""
    batcher = make()
    probes = [crop(replace(served[0], request_id=str(number)), 10) for number in range(8)]
    batcher.add(probes[0])
    assert not batcher.holds_back()
    assert taken(batcher)
    batcher.positions_out = 10_000
    assert not batcher.holds_back(), "nothing waits"
    for probe in probes[1:7]:
        batcher.add(probe)
        assert batcher.holds_back()
    batcher.add(probes[7])
    assert not batcher.holds_back()
    batch = taken(batcher)
    assert (int(batch.live_B.sum()), batcher.num_waiting) == (6, 1)
    assert batcher.holds_back()
    assert taken(batcher)


def test_without_replay_a_few_positions_wait_for_more(make: MakeBatcher, served: list[Trace]) -> None:
    batcher = make(replay_share=0.0)
    batcher.add(crop(served[0], 10))
    assert batcher.holds_back(), "nothing else could be learned beside them"


def trained_positions(trace: Trace) -> int:
    return len(trace.token_ids_T) - first_trained_position(trace)


@pytest.fixture(scope="module")
def traffic(target: Target) -> list[Trace]:
    return serve(target, random_draft(target), some_requests(24, max_tokens=40, temperature=1.0))


def positions_of(batch: OnlineBatch, who: dict[tuple[int, ...], str]) -> Counter[str]:
    """Positions of the batch by client; a row is known by its tokens."""
    found: Counter[str] = Counter()
    for ids_T in batch.traces.token_ids_BT.tolist():
        name, length = next((name, len(ids)) for ids, name in who.items() if tuple(ids_T[: len(ids)]) == ids)
        found[name] += length
    return found


@pytest.mark.parametrize("replay_share", [0.0, 0.5])
def test_one_client_cannot_fill_more_than_its_share_of_a_batch(
    limited: MakeBatcher, traffic: list[Trace], replay_share: float
) -> None:
    names = ["flood"] * 20 + ["ann", "bob", "", ""]
    traces = [replace(trace, client=name) for trace, name in zip(traffic, names, strict=True)]
    who = {tuple(trace.token_ids_T.tolist()): trace.client for trace in traces}
    batcher = limited(replay_share=replay_share)
    for trace in traces:
        batcher.add(trace)
    shares: list[Counter[str]] = []
    while batch := batcher.next_batch():
        shares.append(positions_of(batch, who))
    assert max(share["flood"] for share in shares) > 64, "it has its share"
    assert max(share["flood"] for share in shares) <= 128
    assert {name for share in shares for name in share} == {"flood", "ann", "bob", ""}, "all clients are in batches"
    assert batcher.num_over_share > 0
    free = limited("free", replay_share=replay_share, max_client_share=1.0)
    for trace in traces[:21]:
        free.add(trace)
    batch = taken(free)
    assert free.num_over_share == 0
    if not replay_share:
        assert positions_of(batch, who)["flood"] > 128, "what the setting prevents"


def test_what_a_busy_client_has_asked_before_is_replayed_beside_others(
    limited: MakeBatcher, traffic: list[Trace]
) -> None:
    """Its live traces alone would use up its share."""
    batcher = limited(replay_share=0.3)
    for n, trace in enumerate(traffic):
        batcher.add(replace(trace, client="busy" if n else "ann"))
    replayed = []
    while batcher.num_waiting:
        batch = taken(batcher)
        replayed.append(int((batch.traces.weight_BT > 0)[~batch.live_B].sum()))
    assert len(replayed) > 4
    assert min(replayed[1:]) > 0, "there was nothing before the first batch"


def test_one_request_of_another_client_does_not_limit_the_first_for_long(
    limited: MakeBatcher, traffic: list[Trace]
) -> None:
    batcher = limited()
    batcher.add(replace(traffic[0], client="ann"))
    for n, trace in enumerate(traffic * 2):
        batcher.add(replace(trace, client="busy", request_id=str(n)))
    sizes = []
    for _ in range(2):
        batch = taken(batcher)
        sizes.append(int((batch.traces.weight_BT > 0).sum()))
    assert sizes[0] <= 128 + 41, "ann has one trace, and waits"
    assert sizes[1] > 200


def test_a_single_client_and_unknown_clients_are_not_limited(limited: MakeBatcher, traffic: list[Trace]) -> None:
    for name in ("ann", ""):
        batcher = limited(name, batch_positions=256)
        for trace in traffic[:12]:
            batcher.add(replace(trace, client=name))
        if not name:
            batcher.add(replace(traffic[12], client="ann"))
        batch = taken(batcher)
        assert int((batch.traces.weight_BT > 0).sum()) > 150


def test_a_trace_longer_than_its_clients_share_comes_in_pieces(limited: MakeBatcher, traffic: list[Trace]) -> None:
    """But for that of the first client: until there is a second one its share is all, so it is cropped to its end."""
    batcher = limited(batch_positions=100, max_client_share=0.2)
    trained = [len(trace.token_ids_T) - first_trained_position(trace) for trace in traffic[:5]]
    assert min(trained[1:]) > 20
    for n, trace in enumerate(traffic[:5]):
        batcher.add(replace(trace, client=str(n % 2)))
    learned = 0
    while batcher._waiting:
        batch = taken(batcher)
        learned += int((batch.traces.weight_BT > 0)[batch.live_B].sum())
        assert int((batch.traces.weight_BT > 0).sum()) <= 40, "two clients"
    assert learned == min(20, trained[0]) + sum(trained[1:])


def test_a_share_smaller_than_any_piece_does_not_stop_learning(limited: MakeBatcher, traffic: list[Trace]) -> None:
    batcher = limited(batch_positions=64, max_client_share=0.05)
    for n, trace in enumerate(traffic[:6]):
        batcher.add(replace(trace, client=str(n % 2)))
    assert taken(batcher)


def test_what_is_cut_off_a_trace_does_not_stay_in_memory(make: MakeBatcher, served: list[Trace]) -> None:
    batcher = make(batch_positions=16)
    for trace in served:
        batcher.add(trace)
    held = sum(trace.aux_T3H.untyped_storage().nbytes() for trace in batcher._waiting)
    assert held == sum(trace.aux_T3H.nbytes for trace in batcher._waiting)
    assert len(batcher._waiting) > len(served)


def test_few_remembered_traces_are_read_for_a_batch(
    make: MakeBatcher, served: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make()
    for trace in served:
        batcher.add(trace)
    while batcher.num_waiting:
        assert taken(batcher)
    read: list[int] = []
    monkeypatch.setattr(reservoir, "from_bytes", lambda data: read.append(1) or from_bytes(data))
    rows = 0
    while batch := batcher.next_batch():
        rows += len(batch.live_B)
    assert rows > 10
    assert len(read) < 2 * rows


def test_noise_of_one_client_is_not_preferred(limited: MakeBatcher, traffic: list[Trace]) -> None:
    """Nearly all of it is rejected, so that by that alone it would be the most informative."""
    noise = [replace(trace, client="noise", num_accepted_R=torch.zeros_like(trace.num_accepted_R)) for trace in traffic]
    honest = [replace(each, client="ab"[n % 2], num_accepted_R=each.num_proposed_R) for n, each in enumerate(traffic)]
    assert informativeness(noise[0]) == 0.75
    who = {tuple(trace.token_ids_T.tolist()): trace.client for trace in [*noise[:12], *honest[12:]]}
    batcher = limited()
    for trace in [*noise[:12], *honest[12:]]:
        batcher.add(trace)
    share = positions_of(taken(batcher), who)
    assert share["noise"] < 0.4 * share.total(), "a third"


def test_a_client_with_many_traces_does_not_displace_those_of_others(make: MakeBatcher, served: list[Trace]) -> None:
    batcher = make(live_bytes=8 * served[0].num_bytes)
    for number, client in enumerate(["a", "b", *["flood"] * 30]):
        batcher.add(replace(served[0], request_id=str(number), client=client))
    assert {"a", "b"} <= {trace.client for trace in batcher._waiting}
