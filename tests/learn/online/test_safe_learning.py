"""Safety of learning: looping answers, clients that fill batches, and who a client is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.learner_harness import World
from support.live_traces import serve, some_requests
from support.tiny_models import random_draft, save_model

from aurora_lit.cli import status as live_status
from aurora_lit.ipc.engine_status import STATUS_NAME, StatusBlock
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerBlock
from aurora_lit.learn.data.admission import Admission, repeated_share
from aurora_lit.learn.data.feed import Feed
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.gate import HeldOut
from aurora_lit.models.target import Target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.serve.http.client_names import ClientNames
from aurora_lit.traces.record import Trace


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.load(save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4), precision="fp32")


@pytest.fixture(scope="module")
def traffic(target: Target) -> list[Trace]:
    return serve(target, random_draft(target), some_requests(24, max_tokens=40, temperature=1.0))


# -- loops ---------------------------------------------------------------------------------------------------------


def test_the_share_of_repeated_grams() -> None:
    assert repeated_share(torch.arange(40)) == 0.0
    assert repeated_share(torch.arange(4).repeat(10)) == pytest.approx(1 - 4 / 37)
    assert repeated_share(torch.cat([torch.arange(23), torch.arange(20)])) == pytest.approx(17 / 40)
    assert repeated_share(torch.zeros(18)) == 0.0, "too short to tell"


def with_answer(trace: Trace, answer: torch.Tensor) -> Trace:
    """A trace without rounds whose answer is this."""
    start, length = trace.answer_start, trace.answer_start + len(answer)
    tokens = torch.cat([trace.token_ids_T[:start], answer.int()])
    none = replace(Trace(answer_start=0, token_ids_T=tokens, aux_T3H=trace.aux_T3H, last_TH=trace.last_TH))
    rounds = {name: getattr(none, name) for name in vars(none) if name.endswith(("_R", "_RK", "_NH"))}
    return replace(trace, token_ids_T=tokens, aux_T3H=trace.aux_T3H[:length], last_TH=trace.last_TH[:length], **rounds)


def test_only_the_answer_is_judged_and_the_setting_says_how_strictly(traffic: list[Trace]) -> None:
    trace = traffic[0]
    loop = with_answer(trace, torch.arange(5).repeat(6))
    strict, lax = Admission(max_repeated_share=0.7), Admission(max_repeated_share=1.0)
    assert [strict.admits(loop), lax.admits(loop)] == [False, True]
    assert strict.admits(replace(loop, answer_start=len(loop.token_ids_T) - 12)), "the loop is in the prompt"
    assert (strict.num_looping, lax.num_looping) == (1, 0)


def test_loops_reach_neither_batches_nor_the_gate_and_are_counted(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    world = World(target, tmp_path, max_repeated_share=0.7)
    loops = [
        replace(with_answer(trace, torch.arange(5).repeat(7)), request_id=f"loop {n}")
        for n, trace in enumerate(traffic)
    ]
    assert any(HeldOut.takes(loop.request_id) for loop in loops)
    world.ring.records.extend([*loops, *traffic])
    world.tick_until(lambda: not world.ring.records)
    world.loop.tick()
    page = world.page.read()
    assert (page.looping, page.records) == (len(loops), len(loops) + len(traffic))
    assert len(world.loop.held_out.newest) == sum(HeldOut.takes(trace.request_id) for trace in traffic)
    names = {trace.request_id for _ in range(50) if (trace := world.loop.feed.reservoir.sample())}
    assert names
    assert not any(name.startswith("loop") for name in names)


# -- clients -------------------------------------------------------------------------------------------------------


def a_feed(target: Target, folder: Path, **changes: float) -> Feed:
    fields = {"batch_positions": 256, "replay_share": 0.0, "live_bytes": 1 << 24, "max_client_share": 0.5, **changes}
    folder.mkdir(exist_ok=True)
    reservoir = Reservoir(folder / "r", limit_bytes=1 << 24, seed=0)
    return Feed(TargetHead(target), reservoir, **fields)  # type: ignore[arg-type]


def positions_of(batch: OnlineBatch, who: dict[tuple[int, ...], str]) -> Counter[str]:
    """Positions of the batch by client; a row is known by its tokens."""
    found: Counter[str] = Counter()
    for ids_T in batch.traces.token_ids_BT.tolist():
        name, length = next((name, len(ids)) for ids, name in who.items() if tuple(ids_T[: len(ids)]) == ids)
        found[name] += length
    return found


@pytest.mark.parametrize("replay_share", [0.0, 0.5])
def test_one_client_cannot_fill_more_than_its_share_of_a_batch(
    target: Target, traffic: list[Trace], tmp_path: Path, replay_share: float
) -> None:
    names = ["flood"] * 20 + ["ann", "bob", "", ""]
    traces = [replace(trace, client=name) for trace, name in zip(traffic, names, strict=True)]
    who = {tuple(trace.token_ids_T.tolist()): trace.client for trace in traces}
    feed = a_feed(target, tmp_path, replay_share=replay_share)
    for trace in traces:
        feed.add(trace)
    shares: list[Counter[str]] = []
    while batch := feed.next_batch(oldest_fresh=0):
        shares.append(positions_of(batch, who))
    assert max(share["flood"] for share in shares) > 64, "it has its share"
    assert max(share["flood"] for share in shares) <= 128
    assert {name for share in shares for name in share} == {"flood", "ann", "bob", ""}, "all came to teach"
    assert (feed.num_over_share > 0) == (not replay_share), "half of a batch is replay, so none has to wait"
    free = a_feed(target, tmp_path / "free", replay_share=replay_share, max_client_share=1.0)
    for trace in traces:
        free.add(trace)
    batch = free.next_batch(oldest_fresh=0)
    assert batch is not None
    assert free.num_over_share == 0
    if not replay_share:
        assert positions_of(batch, who)["flood"] > 128, "what the setting prevents"


def test_a_client_that_is_alone_and_those_that_are_not_known_are_not_bounded(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    for name in ("ann", ""):
        feed = a_feed(target, tmp_path / name, batch_positions=256)
        for trace in traffic[:12]:
            feed.add(replace(trace, client=name))
        if not name:
            feed.add(replace(traffic[12], client="ann"))
        batch = feed.next_batch(oldest_fresh=0)
        assert batch is not None
        assert int((batch.traces.weight_BT > 0).sum()) > 150


def test_a_trace_longer_than_its_clients_share_teaches_with_its_end(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    feed = a_feed(target, tmp_path, batch_positions=100, max_client_share=0.2)
    for n, trace in enumerate(traffic[:2]):
        feed.add(replace(trace, client=str(n)))
    batch = feed.next_batch(oldest_fresh=0)
    assert batch is not None
    lengths = [len(trace.token_ids_T) for trace in traffic[:2]]
    assert batch.traces.token_ids_BT.shape == (2, 20)
    assert min(lengths) > 20
    for trace in traffic[:2]:
        assert trace.token_ids_T[-20:].tolist() in batch.traces.token_ids_BT.tolist()


def test_clients_are_told_apart_by_user_then_by_address_and_their_names_say_nothing() -> None:
    names = ClientNames()
    ann = names.of(user="ann@example.org", address="10.0.0.7")
    assert ann == names.of(user="ann@example.org", address="10.0.0.8")
    others = [
        names.of(user="bob", address="10.0.0.7"),
        names.of(user=None, address="10.0.0.7"),
        names.of(user="", address="10.0.0.8"),
        names.of(user="10.0.0.7", address=None),
    ]
    assert len({ann, *others}) == 5
    assert names.of(user=None, address=None) == ""
    assert names.of(user="\ud800", address=None)
    assert ann != ClientNames().of(user="ann@example.org", address=None), "another server, another key"
    assert len(ann) == 16
    assert int(ann, 16) >= 0


# -- what is shown -------------------------------------------------------------------------------------------------


def test_what_was_left_out_is_shown_and_labels_cannot_write_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StatusBlock.create(tmp_path / STATUS_NAME)
    page = LearnerBlock.create(tmp_path / LEARNER_STATUS_NAME)
    page.write(domains="[/bold]sneaky 100% (heat 1.00)", looping=3, over_client_share=2, labels_dropped=1, records=9)
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "[/bold]sneaky 100%" in shown
    assert "3 looping answers, 1 labels, 2 waits of clients over their share" in shown
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=True)
    assert '"looping": 3' in capsys.readouterr().out
