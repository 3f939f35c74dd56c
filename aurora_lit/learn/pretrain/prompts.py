"""Prompt files: JSON lines with a domain and turns or a raw prompt, or one plain prompt a line.

Pretraining and the benchmarks read them. Leaves out answering prompts (learn/pretrain/generate_answers.py) and the chat
template of HTTP requests (serve/http/tokenize.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aurora_lit.errors import AuroraError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompt file."""

    domain: str
    messages: tuple[str, ...] = ()
    """The user's turns; none of a raw prompt."""
    system: str | None = None
    """The system's turn before the first of them."""
    conversation: tuple[Mapping[str, Any], ...] = ()
    """All turns up to the last that the model has not written, if some are the model's or a tool's; else none."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the model may call, as in OpenAI's API."""
    raw: str | None = None
    """A text that is tokenized as it is, special tokens included, such as a hole to fill in."""
    place: str = field(default="", compare=False)
    """File and line; "" if it is from no file."""

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The turns as a chat template or a request takes them: of the user's turns alone only the first."""
        if self.conversation:
            return [dict(turn) for turn in self.conversation]
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": self.messages[0]}]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file: JSON lines, or one plain prompt a line.

    A line of JSON has `messages`, maybe with `tools`, or a raw `prompt`. Only files named *.jsonl hold JSON. A line
    without a domain gets the file's name as its domain. Raises AuroraError, with file and line, for a malformed line,
    for a line of JSON in a file of another name, and for a file that is not UTF-8 or is named *.json.
    """
    if path.suffix.lower() == ".json":
        raise AuroraError(
            f"{path}: a JSON document is not read; write one JSON object a line into a file named *.jsonl"
        )
    prompts = []
    try:
        # Windows marks files as UTF-8. No character but "\n" ends a line of JSON.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise AuroraError(f"{path}: not UTF-8 ({error}); convert it, for example with iconv") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            if _is_conversation(line):
                raise AuroraError(
                    f"{path}:{number}: holds JSON, but only a file named *.jsonl is read so, others as plain text; "
                    "give it such a name, and each object a line of its own"
                )
            prompts.append(Prompt(domain=path.stem, messages=(line,), place=f"{path}:{number}"))
            continue
        try:
            prompts.append(_prompt_of(json.loads(line), path=path, number=number))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise AuroraError(
                f"{path}:{number}: not a prompt ({error!r}); each line needs "
                '{"domain": "chat", "messages": [{"role": "user", "content": "…"}]}'
            ) from error
    return prompts


def _prompt_of(fields: Any, *, path: Path, number: int) -> Prompt:
    """A line of JSON. Raises KeyError, TypeError, AttributeError, or AuroraError for one without a user's turn."""
    about: dict[str, Any] = {"domain": str(fields.get("domain", path.stem)), "place": f"{path}:{number}"}
    if "prompt" in fields:
        return Prompt(raw=_text_of(fields["prompt"]), **about)
    messages = fields["messages"]
    turns = tuple(_text_of(message["content"]) for message in messages if message["role"] == "user")
    if not turns:
        raise AuroraError(f"{path}:{number}: no user turn in `messages`")
    system = _text_of(messages[0]["content"]) if messages[0]["role"] == "system" else None
    conversation = list(messages) if {"assistant", "tool"} & {message["role"] for message in messages} else []
    while conversation and conversation[-1]["role"] == "assistant":
        conversation.pop()
    tools = tuple(fields.get("tools", ()))
    return Prompt(messages=turns, system=system, conversation=tuple(conversation), tools=tools, **about)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of `prompt.chat` under the chat template, with the assistant's header; of a raw prompt of its text.

    A tokenizer without a template encodes the user's text as it is. Raises AuroraError, with file and line, if the
    template refuses the prompt.
    """
    if prompt.raw is not None:
        return list(tokenizer.encode(prompt.raw, add_special_tokens=False))
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt.messages[0]))
    try:
        tools: Any = [dict(tool) for tool in prompt.tools] or None
        text = tokenizer.apply_chat_template(prompt.chat, tools=tools, tokenize=False, add_generation_prompt=True)
    # Templates also fail on variables of another type, and on deep ones.
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        place = prompt.place or "the prompt"
        raise AuroraError(f"{place}: the chat template refuses it ({error}); change it or leave it out") from error
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def _is_conversation(line: str) -> bool:
    """Whether this line is JSON with `messages`, or a list of such."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    first = fields[0] if isinstance(fields, list) and fields else fields
    return isinstance(first, dict) and "messages" in first


def _text_of(content: Any) -> str:
    """A turn's text; parts, as in OpenAI's API, are joined by line breaks. Raises TypeError or KeyError for others."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(part["type"] == "text" and isinstance(part["text"], str) for part in content):
        return "\n".join(part["text"] for part in content)
    raise TypeError("`content` is neither a text nor a list of text parts")
