"""Log-probabilities in the two shapes of OpenAI's API: a list of objects (chat), parallel lists (text completion).

Leaves out where they come from: they are the model's own, before temperature and penalties (modules/sampling/verification.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aurora_lit.request import TokenLogprob
from aurora_lit.serve.sequences.detokenizer import TokenSpeller

Entry = tuple[int, TokenLogprob | None]
"""A token and what is known of it; None for the first token of a prompt, which nothing precedes."""


def chat_logprobs(entries: Sequence[Entry], speller: TokenSpeller) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def spelled(token_id: int, logprob: float) -> dict[str, Any]:
        raw = speller.spell(token_id)
        return {"token": speller.show(token_id), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {**spelled(token_id, known.logprob), "top_logprobs": [spelled(*alternative) for alternative in known.top]}
            for token_id, known in entries
            if known is not None
        ],
        "refusal": None,
    }


def text_logprobs(entries: Sequence[Entry], speller: TokenSpeller, *, offset: int) -> tuple[dict[str, Any], int]:
    """`choices[].logprobs` of a text completion, and the offset (in characters) at which the next token begins."""
    tokens, offsets = [], []
    for token_id, _ in entries:
        tokens.append(speller.show(token_id))
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": [None if known is None else known.logprob for _, known in entries],
        "top_logprobs": [None if known is None else _by_token(known, speller) for _, known in entries],
        "text_offset": offsets,
    }, offset


def _by_token(known: TokenLogprob, speller: TokenSpeller) -> dict[str, float]:
    """The alternatives and the token itself; of two tokens that look the same the likelier stays."""
    shown: dict[str, float] = {}
    for token_id, logprob in (*known.top, (known.token_id, known.logprob)):
        shown.setdefault(speller.show(token_id), logprob)
    return shown
