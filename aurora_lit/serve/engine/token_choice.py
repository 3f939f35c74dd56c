"""The target's own token at every column of a round's decoding rows, each by its request's options.

Rows with penalties, a bias, top-k, top-p, min-p, a grammar or log-probabilities, or that may not end yet, get logits;
the tokens of all others are chosen inside the head's product. Both come from one pass over the head.

Left out: the choice itself (modules/sampling/choice.py), and which proposals it accepts
(serve/engine/round_plan.py).

Shapes: N columns of the decoding rows, T of one row, D of all whose logits are needed, S slots, L capacity of a slot, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.kernels.sampler import DenseRows
from aurora_lit.models.interface import Target
from aurora_lit.modules.sampling.choice import choose_dense
from aurora_lit.modules.sampling.tree import depths
from aurora_lit.serve.engine.round_plan import DecodingRow


class _Column(NamedTuple):
    """A query position of a decoding row."""

    row: DecodingRow
    column: int


def draws_of(rows: Sequence[DecodingRow]) -> ColumnDraws | None:
    """How the tokens of all columns are drawn; None: greedily."""
    return None if all(row.sequence.temperature == 0 for row in rows) else _all_draws(rows)


def _all_draws(rows: Sequence[DecodingRow]) -> ColumnDraws:
    temperatures: list[float] = []
    keys: list[int] = []
    positions: list[int] = []
    for row in rows:
        sequence, columns = row.sequence, 1 + len(row.proposal.tokens)
        temperatures += [sequence.temperature] * columns
        keys += [sequence.noise_key] * columns
        first = sequence.length - sequence.prompt_length
        positions += [first + depth for depth in _depths(row)]
    return ColumnDraws(temperatures, keys, positions)


def choose_tokens(
    target: Target, rows: list[DecodingRow], last_NH: torch.Tensor, *, tokens_SL: torch.Tensor
) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The target's own token at every column, row after row; and the logits of rows that ask for log-probabilities.

    `last_NH`: the last hidden states of these columns; `tokens_SL`: committed tokens by slot. The logits, by index of
    the row, are as the model computed them, one line for each of its columns.
    """
    if all(row.sequence.temperature == 0 and not row.sequence.needs_logits for row in rows):
        return target.greedy_tokens(last_NH).tolist(), {}
    columns = [_Column(row, column) for row in rows for column in range(1 + len(row.proposal.tokens))]
    draws, device = _all_draws(rows), last_NH.device
    temperature_N, key_N, position_N = (torch.tensor(each, device=device) for each in draws)
    dense = [n for n, column in enumerate(columns) if column.row.sequence.needs_logits]
    dense_N = None
    if dense:
        dense_N = torch.full((len(columns),), -1, dtype=torch.int64, device=device)
        dense_N[dense] = torch.arange(len(dense), device=device)
    token_N, logits_DV = target.choose(
        last_NH, temperature_N=temperature_N, key_N=key_N, position_N=position_N, dense_N=dense_N
    )
    tokens, logits = token_N.tolist(), {}
    if dense:
        at = 0
        for index, row in enumerate(rows):
            if row.sequence.needs_logits:
                end = at + 1 + len(row.proposal.tokens)
                if row.sequence.params.logprobs is not None:
                    logits[index] = logits_DV[at:end].clone()  # before options change them
                if row.allowed is not None:
                    _forbid_others(logits_DV[at:end], row.allowed)
                at = end
        for line, n in enumerate(dense):
            sequence = columns[n].row.sequence
            if draws.positions[n] < sequence.params.min_tokens:
                logits_DV[line, list(sequence.end_tokens)] = float("-inf")
        token_D = choose_dense(
            logits_DV,
            DenseRows(
                params=[columns[n].row.sequence.params for n in dense],
                contexts=[_context(columns[n], tokens_SL) for n in dense],
                prompt_lengths=[columns[n].row.sequence.prompt_length for n in dense],
                temperature_D=temperature_N[dense],
                key_D=key_N[dense],
                position_D=position_N[dense],
            ),
        )
        for n, token in zip(dense, token_D.tolist(), strict=True):
            tokens[n] = token
    return tokens, logits


def _forbid_others(logits_TV: torch.Tensor, allowed: NDArray[np.uint8]) -> None:
    """Give the tokens without a bit in `allowed` no probability, in place."""
    bits_TV = np.unpackbits(allowed, axis=1, count=logits_TV.shape[1], bitorder="little")
    logits_TV.masked_fill_(torch.from_numpy(bits_TV).to(logits_TV.device) == 0, float("-inf"))


def _context(column: _Column, tokens_SL: torch.Tensor) -> torch.Tensor:
    """The tokens that penalties count at a column: those committed, and the proposals on the path to it."""
    sequence, proposal = column.row.sequence, column.row.proposal
    committed_L = tokens_SL[sequence.slot, : sequence.length]
    if not column.column:
        return committed_L
    path, at = [], column.column
    while at > 0:
        path.append(proposal.tokens[at - 1])
        at = at - 1 if proposal.parents is None else proposal.parents[at - 1]
    return torch.cat([committed_L, torch.tensor(path[::-1], device=committed_L.device)])


def _depths(row: DecodingRow) -> list[int]:
    """The depth of every column."""
    proposal = row.proposal
    return list(range(1 + len(proposal.tokens))) if proposal.parents is None else depths(proposal.parents)
