"""Batches from a trace log, for pretraining: shards in random order, sequences grouped by length and padded together.

Leaves out the log itself (traces/log.py) and the loss (modules/losses/draft_module.py).
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from torch import Tensor

from aurora_lit.learn.data.collate import collate, group_by_length
from aurora_lit.modules.losses.batch import TraceBatch
from aurora_lit.traces.log import ShardInfo, read_shard
from aurora_lit.traces.record import Trace

_log = logging.getLogger(__name__)
HELD_OUT_EVERY = 40
"""About one in so many prompts, or pieces of text, is kept for validation with all of its sequences."""
_SHORTEST_PIECE = 8
"""Shorter remainders of a cut sequence are dropped, in positions."""


def training_batches(
    folder: Path,
    shards: Sequence[ShardInfo],
    *,
    batch_positions: int,
    max_length: int,
    prompt_share: float,
    seed: int,
) -> Iterator[TraceBatch]:
    """Yield one epoch over the shards, without the held-out sequences.

    batch_positions: positions of a batch, padding included. max_length: longer sequences are cut, in positions.
    prompt_share: share of the answers whose prompt is trained on too; prompts are longer than answers, so all of them
    would outweigh the answers.
    """
    rng = random.Random(seed)
    order = list(shards)
    rng.shuffle(order)
    for shard in order:
        traces, _ = _split(list(read_shard(folder / shard.name)))
        batches = _batches(_cut(traces, max_length), batch_positions)
        rng.shuffle(batches)
        for batch in batches:
            yield collate(batch, with_prompt=[rng.random() < prompt_share for _ in batch])


def held_out_batches(
    folder: Path,
    shards: Sequence[ShardInfo],
    *,
    batch_positions: int,
    max_length: int,
    logsumexp: Callable[[Tensor], Tensor],
) -> Iterator[TraceBatch]:
    """Yield the held-out sequences, one domain a batch; where there is an answer, only its positions have weight.

    Warns of domains that have none: of few prompts, there may be none that is held out.
    logsumexp: maps the target's last hidden states [N, H] to the log-sum-exp of its logits [N].
    """
    by_domain: dict[str, list[Trace]] = {}
    for shard in shards:
        trained, held_out = _split(list(read_shard(folder / shard.name)))
        for trace in trained:
            by_domain.setdefault(trace.domain, [])
        for trace in held_out:
            by_domain.setdefault(trace.domain, []).append(replace(trace, lse_T=logsumexp(trace.last_TH)))
    for domain, traces in sorted(by_domain.items()):
        if not traces:
            _log.warning("no prompt or text of %r is held out, so nothing is reported of it; record more of it", domain)
        for batch in _batches(_cut(traces, max_length), batch_positions):
            yield collate(batch, with_prompt=[False] * len(batch))


def _split(traces: Sequence[Trace]) -> tuple[list[Trace], list[Trace]]:
    """The traces of a shard to train on, and those that are held out.

    A hash of the prompt decides (of text: of all tokens). So the same prompts are held out whatever the order, in every
    stage of a training, and the answers to a prompt that comes several times are on the same side. A shard may hold out
    none.
    """
    hashes = [zlib.crc32(trace.token_ids_T[: trace.answer_start].int().numpy().tobytes()) for trace in traces]
    chosen = {number for number in hashes if number % HELD_OUT_EVERY == 0}
    return (
        list(compress(traces, (number not in chosen for number in hashes))),
        list(compress(traces, (number in chosen for number in hashes))),
    )


def _batches(traces: Sequence[Trace], batch_positions: int) -> list[list[Trace]]:
    lengths = [len(trace.token_ids_T) for trace in traces]
    return [[traces[i] for i in group] for group in group_by_length(lengths, batch_positions)]


def _cut(traces: Sequence[Trace], max_length: int) -> list[Trace]:
    """Split longer sequences into pieces of at most `max_length` positions."""
    pieces = []
    for trace in traces:
        length = len(trace.token_ids_T)
        for start in range(0, length, max_length):
            end = min(start + max_length, length)
            if end - start < _SHORTEST_PIECE:
                continue
            answer_start = trace.answer_start - start
            if trace.answer_start == length:  # labelled text without an answer
                answer_start = end - start
            elif answer_start >= end - start:  # a prompt, cut off before its answer
                answer_start = end - start + 1
            pieces.append(
                Trace(
                    token_ids_T=trace.token_ids_T[start:end],
                    aux_T3H=trace.aux_T3H[start:end],
                    last_TH=trace.last_TH[start:end],
                    lse_T=None if trace.lse_T is None else trace.lse_T[start:end],
                    domain=trace.domain,
                    answer_start=answer_start,
                )
            )
    return pieces
