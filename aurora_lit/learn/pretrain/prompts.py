"""Prompt files: JSON lines with a domain and turns, or one plain prompt a line.

Pretraining and the benchmarks read them. Leaves out answering prompts (learn/pretrain/generate_answers.py) and the chat
template of HTTP requests (serve/http/tokenize.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from aurora_lit.errors import AuroraError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompt file."""

    domain: str
    messages: tuple[str, ...]
    """The user's turns."""
    system: str | None = None
    """The system's turn before the first of them."""

    @property
    def chat(self) -> list[dict[str, str]]:
        """The system's and the first user turn, as a chat template or a request takes them."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": self.messages[0]}]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file: JSON lines with `messages` and `domain`, or one plain prompt a line.

    Only files named *.jsonl hold JSON. A line without a domain gets the file's name as its domain. Raises AuroraError,
    with file and line, for a malformed line, and for a file that is not UTF-8.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # no other character ends a line of JSON
    except UnicodeDecodeError as error:
        raise AuroraError(f"{path}: not UTF-8 ({error}); convert it, for example with iconv") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(domain=path.stem, messages=(line,)))
            continue
        try:
            fields = json.loads(line)
            turns = tuple(str(message["content"]) for message in fields["messages"] if message["role"] == "user")
            first = fields["messages"][0] if fields["messages"] else {}
            system = str(first["content"]) if first.get("role") == "system" else None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise AuroraError(
                f"{path}:{number}: not a prompt ({error!r}); each line needs "
                '{"domain": "chat", "messages": [{"role": "user", "content": "…"}]}'
            ) from error
        if not turns:
            raise AuroraError(f"{path}:{number}: no user turn in `messages`")
        prompts.append(Prompt(domain=str(fields.get("domain", path.stem)), messages=turns, system=system))
    return prompts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of the system's and the first user turn under the chat template, with the assistant's header.

    A tokenizer without a template encodes the user's text as it is.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt.messages[0]))
    text = tokenizer.apply_chat_template(prompt.chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(str(text), add_special_tokens=False))
