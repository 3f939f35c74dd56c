"""Stage one of pretraining: the target reads text and labels every position with its own distribution.

Reading costs a tenth of answering for as many positions. What is left out: answering (learn/pretrain/generate_answers.py) and
learning (pretrain.py). Shapes: B sequences, T positions, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from aurora_lit.errors import AuroraError
from aurora_lit.models.target import Target
from aurora_lit.traces.record import Trace


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompt file."""

    domain: str
    messages: tuple[str, ...]
    """The user's turns."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file: JSON lines with `messages` (user turns) and `domain`, or else one plain prompt a line."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(domain=path.stem, messages=(line,)))
            continue
        try:
            row = json.loads(line)
            turns = tuple(str(message["content"]) for message in row["messages"] if message["role"] == "user")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AuroraError(
                f"{path}:{number}: not a prompt ({error!r}); each line needs "
                '{"domain": "chat", "messages": [{"role": "user", "content": "…"}]}'
            ) from error
        if not turns:
            raise AuroraError(f"{path}:{number}: no user turn in `messages`")
        prompts.append(Prompt(domain=str(row.get("domain", path.stem)), messages=turns))
    return prompts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of the prompt's first user turn under the chat template, ready to be answered."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt.messages[0]))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.messages[0]}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def text_pieces(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, piece_tokens: int, block_chars: int = 1 << 20
) -> Iterator[list[int]]:
    """Cut a text file into pieces of at most `piece_tokens` tokens; undecodable bytes are replaced."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(block_chars):
            ids = tokenizer.encode(block, add_special_tokens=False)
            pieces = (ids[start : start + piece_tokens] for start in range(0, len(ids), piece_tokens))
            yield from (list(piece) for piece in pieces if len(piece) >= 16)


@torch.no_grad()
def read_batch(target: Target, pieces: Sequence[list[int]], *, domain: str) -> list[Trace]:
    """Run the target over token sequences (right-padded together) and return one trace each."""
    lengths = [len(piece) for piece in pieces]
    ids_BT = torch.zeros(len(pieces), max(lengths), dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids_BT[row, : len(piece)] = torch.tensor(piece)
    aux_BT3H, last_BTH = target.read(ids_BT)
    traces = []
    for row, length in enumerate(lengths):
        last_TH = last_BTH[row, :length]
        traces.append(
            Trace(
                token_ids_T=ids_BT[row, :length].to(torch.int32),
                aux_T3H=aux_BT3H[row, :length].to(torch.bfloat16),
                last_TH=last_TH.to(torch.bfloat16),
                lse_T=target.logsumexp(last_TH),
                domain=domain,
                answer_start=length,
            )
        )
    return traces
