"""Batches from a trace log: shards in random order, sequences bucketed by length, right-padded together.

What is left out: the log itself (traces/log.py) and the loss (modules/losses/draft_module.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from aurora_lit.modules.losses.batch import DraftBatch
from aurora_lit.traces.log import ShardInfo, read_shard
from aurora_lit.traces.record import Trace

HELD_OUT_EVERY = 40
"""One sequence in so many of a shard is kept for validation."""


def training_batches(
    folder: Path,
    shards: Sequence[ShardInfo],
    *,
    batch_positions: int,
    max_length: int,
    prompt_share: float,
    seed: int,
) -> Iterator[DraftBatch]:
    """Yield one epoch over the shards, without the held-out sequences.

    `prompt_share`: share of the answers whose prompt is learnt from too; prompts are more text than answers are.
    """
    rng = random.Random(seed)
    order = list(shards)
    rng.shuffle(order)
    for shard in order:
        traces = [t for i, t in enumerate(read_shard(folder / shard.name)) if i % HELD_OUT_EVERY]
        batches = list(_pack(_cut(traces, max_length), batch_positions))
        rng.shuffle(batches)
        for batch in batches:
            yield collate(batch, with_prompt=[rng.random() < prompt_share for _ in batch])


def held_out_batches(
    folder: Path, shards: Sequence[ShardInfo], *, batch_positions: int, max_length: int
) -> Iterator[DraftBatch]:
    """Yield the held-out sequences, one domain a batch, answers alone counting where there are any."""
    by_domain: dict[str, list[Trace]] = {}
    for shard in shards:
        for i, trace in enumerate(read_shard(folder / shard.name)):
            if i % HELD_OUT_EVERY == 0:
                by_domain.setdefault(trace.domain, []).append(trace)
    for _, traces in sorted(by_domain.items()):
        for batch in _pack(_cut(traces, max_length), batch_positions):
            yield collate(batch, with_prompt=[False] * len(batch))


def collate(traces: Sequence[Trace], *, with_prompt: Sequence[bool]) -> DraftBatch:
    """Pad traces together; positions before an answer count only `with_prompt`, those of read text always."""
    weights = []
    for trace, whole in zip(traces, with_prompt, strict=True):
        weight_T = torch.ones(len(trace.token_ids_T))
        if trace.answer_start != len(weight_T) and not whole:
            # The distribution of an answer's first token stands at the position before it.
            weight_T[: max(0, trace.answer_start - 1)] = 0.0
        weights.append(weight_T)
    return DraftBatch(
        token_ids_BT=pad_sequence([t.token_ids_T.long() for t in traces], batch_first=True),
        aux_BT3H=pad_sequence([t.aux_T3H for t in traces], batch_first=True),
        last_BTH=pad_sequence([t.last_TH for t in traces], batch_first=True),
        lse_BT=pad_sequence([_lse(t) for t in traces], batch_first=True),
        weight_BT=pad_sequence(weights, batch_first=True),
        domains=tuple(t.domain for t in traces),
    )


def _lse(trace: Trace) -> torch.Tensor:
    if trace.lse_T is None:
        raise ValueError("trace.lse_T is None; compute it with the target's head first")
    return trace.lse_T


def _cut(traces: Sequence[Trace], max_length: int) -> list[Trace]:
    """Split longer sequences into pieces of at most `max_length` positions; tiny rests are dropped."""
    pieces = []
    for trace in traces:
        length = len(trace.token_ids_T)
        for start in range(0, length, max_length):
            end = min(start + max_length, length)
            if end - start < 8:
                continue
            answer_start = trace.answer_start - start
            if trace.answer_start == length:  # read text
                answer_start = end - start
            elif answer_start >= end - start:  # a prompt, cut off before its answer
                answer_start = end - start + 1
            pieces.append(
                Trace(
                    token_ids_T=trace.token_ids_T[start:end],
                    aux_T3H=trace.aux_T3H[start:end],
                    last_TH=trace.last_TH[start:end],
                    lse_T=_lse(trace)[start:end],
                    domain=trace.domain,
                    answer_start=answer_start,
                )
            )
    return pieces


def _pack(traces: Sequence[Trace], batch_positions: int) -> Iterator[list[Trace]]:
    """Group sequences of like length, so that a batch with its padding holds about `batch_positions`."""
    batch: list[Trace] = []
    for trace in sorted(traces, key=lambda t: len(t.token_ids_T)):
        if batch and len(trace.token_ids_T) * (len(batch) + 1) > batch_positions:
            yield batch
            batch = []
        batch.append(trace)
    if batch:
        yield batch
