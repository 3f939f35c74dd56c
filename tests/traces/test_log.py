"""Traces on disk, whatever crashes, and the batches that are made of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.trace_examples import same_trace, trace_with_rounds

from aurora_lit.learn.data.batches import HELD_OUT_EVERY, collate, held_out_batches, training_batches
from aurora_lit.traces import log as trace_log
from aurora_lit.traces.log import INDEX_NAME, TraceLogWriter, read_index, read_shard
from aurora_lit.traces.record import Trace, check


def a_trace(length: int, *, first: int = 0, domain: str = "chat", answer_start: int | None = None) -> Trace:
    """Every value tells its position, exactly also in bf16."""
    position_T = torch.arange(first, first + length)
    return Trace(
        token_ids_T=position_T.int(),
        aux_T3H=position_T[:, None].expand(-1, 6).bfloat16(),
        last_TH=-position_T[:, None].expand(-1, 2).bfloat16(),
        lse_T=position_T / 3,
        domain=domain,
        answer_start=length if answer_start is None else answer_start,
    )


def same(left: Trace, right: Trace) -> bool:
    tensors = ("token_ids_T", "aux_T3H", "last_TH", "lse_T")
    return (left.domain, left.answer_start) == (right.domain, right.answer_start) and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in tensors
    )


def write(folder: Path, traces: Sequence[Trace], *, kind: str = "text", shard_positions: int = 10_000) -> None:
    writer = TraceLogWriter(folder, kind=kind, shard_positions=shard_positions)
    for trace in traces:
        writer.append(trace)
    writer.flush()


def read(folder: Path) -> list[Trace]:
    return [trace for shard in read_index(folder) for trace in read_shard(folder / shard.name)]


# -- the log -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_in_shards_of_the_size_asked_for(tmp_path: Path) -> None:
    texts = [a_trace(9, first=i, domain=f"d{i}") for i in range(5)]
    write(tmp_path, texts, shard_positions=20)
    write(tmp_path, [a_trace(8, answer_start=3)], kind="answer")
    assert [(s.name, s.num_positions, s.num_sequences, s.kind) for s in read_index(tmp_path)] == [
        ("text-00000.safetensors", 27, 3, "text"),
        ("text-00001.safetensors", 18, 2, "text"),
        ("answer-00002.safetensors", 8, 1, "answer"),
    ]
    wanted = [*texts, a_trace(8, answer_start=3)]
    assert all(same(a, b) for a, b in zip(read(tmp_path), wanted, strict=True))
    assert TraceLogWriter(tmp_path, kind="text").num_positions == 45


@pytest.mark.parametrize("fault", ["save_file", "replace", "fsync"])
def test_a_crash_while_writing_a_shard_leaves_a_readable_log(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [a_trace(9)])

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_log if fault == "save_file" else os, fault, crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [a_trace(9, first=50)])
    monkeypatch.undo()
    assert [same(trace, a_trace(9)) for trace in read(tmp_path)] == [True]
    write(tmp_path, [a_trace(9, first=70)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [0, 70]


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_an_index_line_cut_short_costs_that_shard_only(cut: int, tmp_path: Path) -> None:
    for first in (0, 10, 20):
        write(tmp_path, [a_trace(9, first=first)])
    index = tmp_path / INDEX_NAME
    text = index.read_text()
    last_line = len(text.splitlines()[-1]) + 1
    index.write_text(text[: -min(cut, last_line - 3)])
    kept = [0, 10, 20] if cut == 1 else [0, 10]
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == kept
    for first in (30, 40):
        write(tmp_path, [a_trace(9, first=first)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [*kept, 30, 40]


def test_a_shard_that_was_deleted_does_not_make_another_be_overwritten(tmp_path: Path) -> None:
    for first in (0, 10):
        write(tmp_path, [a_trace(9, first=first)])
    (tmp_path / read_index(tmp_path)[0].name).unlink()
    write(tmp_path, [a_trace(9, first=20)])
    assert [int(trace.token_ids_T[0]) for trace in read(tmp_path)] == [10, 20]


def test_live_traces_come_back_with_their_rounds(tmp_path: Path) -> None:
    live = [
        trace_with_rounds([(1, 4, 1), (3, 3, 3), (7, 0, 0), (8, 1, 0)], request_id="a"),
        trace_with_rounds([], verify="greedy", temperature=0.0, domain=""),
        trace_with_rounds([(2, 2, 0), (5, 2, 2)], lse_T=torch.arange(12) / 3, first_position=70),
        trace_with_rounds([(2, 0, 0)]),
    ]
    write(tmp_path, live, kind="live")
    got = read(tmp_path)
    assert all(same_trace(a, b) for a, b in zip(got, live, strict=True))
    for trace in got:
        check(trace)


def test_a_bounded_log_deletes_its_oldest_shards(tmp_path: Path) -> None:
    writer = TraceLogWriter(tmp_path, kind="live", max_bytes=40_000)
    (tmp_path / "live-00099.safetensors").write_bytes(bytes(30_000))  # a crash left it out of the index
    for first in range(60):
        writer.append(trace_with_rounds([(1, 3, 1)], first_position=first))
        writer.flush()
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert size <= 40_000
    kept = [trace.first_position for trace in read(tmp_path)]
    assert kept == list(range(60 - len(kept), 60))
    assert size > 30_000
    assert len((tmp_path / INDEX_NAME).read_text().splitlines()) == len(kept)
    writer.append(trace_with_rounds([], length=20_000, token_ids_T=torch.zeros(20_000, dtype=torch.int32)))
    with pytest.raises(OSError, match="larger"):
        writer.flush()
    assert [trace.first_position for trace in read(tmp_path)] == kept


# -- batches -------------------------------------------------------------------------------------------------------


def test_weights_of_text_answers_and_padding() -> None:
    text, answered = a_trace(5, domain="text"), a_trace(8, answer_start=4)
    batch = collate([text, answered], with_prompt=[False, False])
    assert batch.weight_BT.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert batch.domains == ("text", "chat")
    assert batch.token_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], list(range(8))]
    assert collate([answered], with_prompt=[True]).weight_BT.tolist() == [[1] * 8]


@pytest.mark.parametrize(
    ("answer_start", "weights"),
    [
        (20, [[0] * 8, [0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]),
        (5, [[0, 0, 0, 0, 1, 1, 1, 1], [1] * 8, [1] * 8]),
        (24, [[1] * 8] * 3),  # read text
    ],
)
def test_a_long_sequence_is_cut_and_its_prompt_stays_a_prompt(
    answer_start: int, weights: list[list[int]], tmp_path: Path
) -> None:
    filler = a_trace(8, domain="other")
    write(tmp_path, [a_trace(24, answer_start=answer_start), *[filler] * 3])
    pieces = [
        (ids.tolist(), weight.tolist())
        for batch in held_out_batches(tmp_path, read_index(tmp_path), batch_positions=100, max_length=8)
        for ids, weight in zip(batch.token_ids_BT, batch.weight_BT, strict=True)
    ]
    assert pieces == [(list(range(s, s + 8)), weights[s // 8]) for s in (0, 8, 16)]


def test_each_sequence_is_either_held_out_or_in_every_epoch_once(tmp_path: Path) -> None:
    count = 2 * HELD_OUT_EVERY + 5
    write(tmp_path, [a_trace(8 + i % 7, first=20 * i, domain=f"d{i % 2}") for i in range(count)], shard_positions=500)
    shards = read_index(tmp_path)
    assert len(shards) > 1

    def firsts(batches: object) -> list[int]:
        return [int(ids[0]) // 20 for batch in batches for ids in batch.token_ids_BT]  # type: ignore[attr-defined]

    def epoch(seed: int) -> list[int]:
        return firsts(
            training_batches(tmp_path, shards, batch_positions=60, max_length=100, prompt_share=0.0, seed=seed)
        )

    held_out = firsts(held_out_batches(tmp_path, shards, batch_positions=60, max_length=100))
    assert sorted([*epoch(0), *held_out]) == list(range(count))
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    for batch in held_out_batches(tmp_path, shards, batch_positions=60, max_length=100):
        assert len(set(batch.domains)) == 1


def test_batches_hold_about_the_positions_asked_for_padding_included(tmp_path: Path) -> None:
    write(tmp_path, [a_trace(8 + 3 * (i % 20)) for i in range(100)])
    batches = list(
        training_batches(tmp_path, read_index(tmp_path), batch_positions=130, max_length=70, prompt_share=1.0, seed=0)
    )
    sizes = [batch.token_ids_BT.numel() for batch in batches]
    assert max(sizes) <= 130
    assert sum(sizes) < 1.3 * sum(int((batch.weight_BT > 0).sum()) for batch in batches)
    assert sum(sizes) / len(sizes) > 70


def test_a_share_of_the_prompts_is_learnt_from(tmp_path: Path) -> None:
    write(tmp_path, [a_trace(20, answer_start=10) for _ in range(300)])
    batches = training_batches(
        tmp_path, read_index(tmp_path), batch_positions=200, max_length=64, prompt_share=0.3, seed=0
    )
    whole = [bool(weight[0]) for batch in batches for weight in batch.weight_BT]
    assert 0.2 < sum(whole) / len(whole) < 0.4
