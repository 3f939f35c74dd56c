"""Stage one of pretraining: the target processes text, and its states at every position are recorded.

This costs a tenth of generating as many positions. Leaves out generating answers (learn/pretrain/generate_answers.py)
and training (learn/pretrain/trainer.py).

Shapes: B sequences, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.traces.record import Trace

_MIN_PIECE_TOKENS = 16


def text_pieces(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, piece_tokens: int, block_chars: int = 1 << 20
) -> Iterator[list[int]]:
    """Cut a text file into pieces of at most `piece_tokens` tokens; bytes that are not UTF-8 are replaced."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(block_chars):
            ids = tokenizer.encode(block, add_special_tokens=False)
            pieces = (ids[start : start + piece_tokens] for start in range(0, len(ids), piece_tokens))
            yield from (list(piece) for piece in pieces if len(piece) >= _MIN_PIECE_TOKENS)


@torch.no_grad()
def record_pieces(target: TorchTarget, pieces: Sequence[list[int]], *, domain: str) -> list[Trace]:
    """Run the target over token sequences, right-padded together; returns one trace each."""
    lengths = [len(piece) for piece in pieces]
    ids_BT = torch.zeros(len(pieces), max(lengths), dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids_BT[row, : len(piece)] = torch.tensor(piece)
    aux_BT3H, last_BTH = target.forward_uncached(ids_BT)
    traces = []
    for row, length in enumerate(lengths):
        traces.append(
            Trace(
                token_ids_T=ids_BT[row, :length].to(torch.int32),
                aux_T3H=aux_BT3H[row, :length].to(torch.bfloat16),
                last_TH=last_BTH[row, :length].to(torch.bfloat16),
                domain=domain,
                answer_start=length,
            )
        )
    return traces
