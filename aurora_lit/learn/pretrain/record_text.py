"""Stage one of pretraining: the target processes text, and its states at every position are recorded.

That is several times faster than generating as many positions. Leaves out generating answers
(learn/pretrain/generate_answers.py) and training (learn/pretrain/trainer.py).

Shapes: T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from aurora_lit.learn.pretrain.generate_answers import PromptToAnswer, generate_answers
from aurora_lit.models.interface import Target
from aurora_lit.request import SamplingParams
from aurora_lit.traces.record import Trace

_MIN_PIECE_TOKENS = 16
_GREEDY = SamplingParams(temperature=0.0)


def text_pieces(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, piece_tokens: int, block_chars: int = 1 << 20
) -> Iterator[list[int]]:
    """Cut a text file into pieces of at most `piece_tokens` tokens; bytes that are not UTF-8 are replaced."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(block_chars):
            ids = tokenizer.encode(block, add_special_tokens=False)
            pieces = (ids[start : start + piece_tokens] for start in range(0, len(ids), piece_tokens))
            yield from (list(piece) for piece in pieces if len(piece) >= _MIN_PIECE_TOKENS)


def record_pieces(target: Target, pieces: Sequence[list[int]], *, domain: str) -> list[Trace]:
    """Run the target over token sequences together; returns one trace each, in any order.

    They are read as the engine reads prompts, which is faster than a forward pass in torch.
    """
    prompts = [PromptToAnswer(domain=domain, prompt_ids=tuple(piece), params=_GREEDY) for piece in pieces]
    answered = generate_answers(
        target,
        prompts,
        eos_token_ids=frozenset(),
        max_answer_tokens=2,  # of one token no round is recorded
        max_batch_size=len(pieces),
        max_seq_len=max(map(len, pieces)) + 2,
    )
    return [_without_answer(trace) for trace in answered]


def _without_answer(trace: Trace) -> Trace:
    """The trace of a prompt as text: positions up to the prompt's last one."""
    length = trace.answer_start
    return Trace(
        token_ids_T=trace.token_ids_T[:length],
        aux_T3H=trace.aux_T3H[:length],
        last_TH=trace.last_TH[:length],
        domain=trace.domain,
        answer_start=length,
    )
