"""Batches from a trace log: weights, cutting, held-out sequences, sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.trace_examples import numbered_trace, write_log

from aurora_lit.learn.data import log_batches
from aurora_lit.learn.data.collate import collate
from aurora_lit.learn.data.log_batches import HELD_OUT_EVERY, held_out_batches, training_batches
from aurora_lit.modules.losses.batch import TraceBatch
from aurora_lit.traces.log import read_index


def first_state(last_XH: torch.Tensor) -> torch.Tensor:
    """In place of what the target's head would say."""
    return last_XH[..., 0].float()


def test_weights_of_text_answers_and_padding() -> None:
    text, answered = numbered_trace(5, domain="text"), numbered_trace(8, answer_start=4)
    batch = collate([text, answered], with_prompt=[False, False])
    assert batch.weight_BT.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert batch.domains == ("text", "chat")
    assert batch.token_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], list(range(8))]
    asked = numbered_trace(8, first=1, answer_start=4)
    assert collate([asked], with_prompt=[True]).weight_BT.tolist() == [[1] * 8]
    served = dataclasses.replace(asked, last_TH=asked.last_TH.clone())
    served.last_TH[:3] = 0  # a server computes no such states: as targets they would be a uniform distribution
    assert collate([served], with_prompt=[True]).weight_BT.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("answer_start", "weights"),
    [
        (20, [[0] * 8, [0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]),
        (5, [[0, 0, 0, 0, 1, 1, 1, 1], [1] * 8, [1] * 8]),
        (24, [[1] * 8] * 3),  # read text
    ],
)
def test_a_long_sequence_is_cut_and_its_prompt_stays_a_prompt(
    answer_start: int, weights: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_batches, "HELD_OUT_EVERY", 1)
    write_log(tmp_path, [numbered_trace(24, answer_start=answer_start)])
    pieces = [
        (ids.tolist(), weight.tolist())
        for batch in held_out_batches(
            tmp_path, read_index(tmp_path), batch_positions=100, max_length=8, logsumexp=first_state
        )
        for ids, weight in zip(batch.token_ids_BT, batch.weight_BT, strict=True)
    ]
    assert pieces == [(list(range(s, s + 8)), weights[s // 8]) for s in (0, 8, 16)]


def test_each_sequence_is_either_held_out_or_in_every_epoch_once(tmp_path: Path) -> None:
    count = 2 * HELD_OUT_EVERY + 5
    write_log(
        tmp_path,
        [numbered_trace(8 + i % 7, first=20 * i, domain=f"d{i % 2}") for i in range(count)],
        shard_positions=500,
    )
    shards = read_index(tmp_path)
    assert len(shards) > 1

    def firsts(batches: object) -> list[int]:
        return [int(ids[0]) // 20 for batch in batches for ids in batch.token_ids_BT]  # type: ignore[attr-defined]

    def epoch(seed: int) -> list[int]:
        return firsts(
            training_batches(tmp_path, shards, batch_positions=60, max_length=100, prompt_share=0.0, seed=seed)
        )

    labelled = {"batch_positions": 60, "max_length": 100, "logsumexp": first_state}
    held_out = firsts(held_out_batches(tmp_path, shards, **labelled))
    assert sorted([*epoch(0), *held_out]) == list(range(count))
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    for batch in held_out_batches(tmp_path, shards, **labelled):
        assert len(set(batch.domains)) == 1
        assert torch.equal(batch.lse_BT, first_state(batch.last_BTH))


def test_answers_to_a_held_out_prompt_are_never_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts of logs come again, in other shards and in later or short stages, and sampled answers differ."""
    prompts = range(3 * HELD_OUT_EVERY)
    answers = [numbered_trace(20, first=20 * i, answer_start=10) for i in [*prompts, *prompts[::-1], *prompts[5:]]]
    for number, answer in enumerate(answers):
        answer.token_ids_T[10:] = number
    write_log(tmp_path / "first", answers, shard_positions=4_000)
    write_log(tmp_path / "later", answers[len(prompts) : 2 * len(prompts)])

    def asked(batches: Iterator[TraceBatch]) -> set[int]:
        return {int(ids[0]) // 20 for batch in batches for ids in batch.token_ids_BT}

    def split(folder: Path) -> tuple[set[int], set[int]]:
        options = {"batch_positions": 60, "max_length": 100}
        shards = read_index(folder)
        trained = asked(training_batches(folder, shards, prompt_share=0.0, seed=0, **options))
        return trained, asked(held_out_batches(folder, shards, logsumexp=first_state, **options))

    trained, held_out = split(tmp_path / "first")
    assert trained | held_out == set(prompts)
    assert not trained & held_out
    assert 0 < len(held_out) < len(trained) / 10
    assert split(tmp_path / "later") == (trained, held_out)
    short = [answers[i] for i in sorted(trained)[:5]]
    write_log(tmp_path / "short", short)
    assert split(tmp_path / "short") == (set(sorted(trained)[:5]), set())
    assert "no prompt or text of 'chat' is held out" in caplog.text


def test_batches_hold_about_the_positions_asked_for_padding_included(tmp_path: Path) -> None:
    write_log(tmp_path, [numbered_trace(8 + 3 * (i % 20), first=i) for i in range(100)])
    batches = list(
        training_batches(tmp_path, read_index(tmp_path), batch_positions=130, max_length=70, prompt_share=1.0, seed=0)
    )
    sizes = [batch.token_ids_BT.numel() for batch in batches]
    assert max(sizes) <= 130
    assert sum(sizes) < 1.3 * sum(int((batch.weight_BT > 0).sum()) for batch in batches)
    assert sum(sizes) / len(sizes) > 70


def test_a_share_of_the_prompts_is_learnt_from(tmp_path: Path) -> None:
    write_log(tmp_path, [numbered_trace(20, first=20 * i, answer_start=10) for i in range(300)])
    batches = training_batches(
        tmp_path, read_index(tmp_path), batch_positions=200, max_length=64, prompt_share=0.3, seed=0
    )
    whole = [bool(weight[1]) for batch in batches for weight in batch.weight_BT]
    assert 0.2 < sum(whole) / len(whole) < 0.4
