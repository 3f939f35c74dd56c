"""From deltas to OpenAI's answers: chunks of a stream, whole responses, usage, how speculation went.

Pure: no I/O and no clock. Leaves out how a chunk is framed as a server-sent event (serve/http/routes.py).

    answer = Answer(prepared, kind="chat", created=1764000000, model="m", speller=speller, max_draft_tokens=4)
    for deltas in rounds:
        chunks = answer.chunks(deltas)    # a stream sends these now; a plain request calls answer.take(deltas)
    answer.whole()                        # what a plain request gets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aurora_lit.ipc.messages import Delta
from aurora_lit.serve.http.logprobs import Entry, chat_logprobs, text_logprobs
from aurora_lit.serve.http.tokenize import Prepared
from aurora_lit.serve.sequences.detokenizer import TokenSpeller

Json = dict[str, Any]
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}


@dataclass(kw_only=True)
class _Choice:
    """What one choice has so far."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[Entry] = field(default_factory=list)
    text_offset: int = 0
    """Where the next token with log-probabilities begins, in characters."""
    finish_reason: str | None = None
    begun: bool = False
    """Its first delta has come."""
    histogram: list[int]
    """[j]: rounds in which j draft tokens were accepted."""
    num_proposed: int = 0
    draft_versions: tuple[str, ...] = ()


class Answer:
    """One response being put together; id, created and model are the same in all its parts."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        kind: Literal["chat", "text"],
        created: int,
        model: str,
        speller: TokenSpeller,
        max_draft_tokens: int,
        usage_in_every_chunk: bool = False,
    ) -> None:
        """created: seconds since 1970; max_draft_tokens: most tokens a round can propose."""
        requests = prepared.call.requests
        self._prepared, self._kind, self._speller = prepared, kind, speller
        self._max_draft_tokens, self._usage_in_every_chunk = max_draft_tokens, usage_in_every_chunk
        self._wants_logprobs = requests[0].params.logprobs is not None
        self._choices = [_Choice(histogram=[0] * (max_draft_tokens + 1)) for _ in requests]
        self._choices_a_prompt = len(requests) // max(1, len(prepared.prompt_texts))
        whole, part = _OBJECTS[kind]
        identity = {"id": prepared.call.call_id, "created": created, "model": model}
        self._whole_head, self._chunk_head = {**identity, "object": whole}, {**identity, "object": part}

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def finish_reasons(self) -> list[str | None]:
        """One a choice; None for those that still run."""
        return [choice.finish_reason for choice in self._choices]

    def take(self, deltas: Sequence[Delta]) -> None:
        """Book one round."""
        for delta in deltas:
            self._book(delta)

    def chunks(self, deltas: Sequence[Delta]) -> list[Json]:
        """Book one round; return what a stream sends for it."""
        chunks = []
        for delta in deltas:
            choice = self._choices[delta.index]
            if self._kind == "chat" and not choice.begun:
                chunks.append(self._chunk(delta.index, {"role": "assistant", "content": ""}))
            text, entries = self._book(delta)
            if not (text or entries or choice.finish_reason):
                continue  # tokens that are no whole character yet
            logprobs = self._logprobs(choice, entries) if entries else None
            content: Any = text if self._kind == "text" else {"content": text} if text or entries else {}
            chunks.append(self._chunk(delta.index, content, logprobs, choice.finish_reason))
        return chunks

    def whole(self) -> Json:
        """The response to a request without stream."""
        choices = []
        for index, choice in enumerate(self._choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            choices.append(
                {
                    "index": index,
                    **({"message": message} if self._kind == "chat" else {"text": choice.text}),
                    "logprobs": self._logprobs(choice, choice.logprobs) if self._wants_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
            )
        return {**self._whole_head, "choices": choices, "usage": self.usage(), "metrics": self.metrics()}

    def last_chunk(self) -> Json:
        """The chunk with usage and no choices that ends a stream with include_usage."""
        return {**self._chunk_head, "choices": [], "usage": self.usage(), "metrics": self.metrics()}

    def usage(self) -> Json:
        """Tokens so far."""
        prompt, completion = self._prepared.num_prompt_tokens, sum(choice.num_tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def metrics(self) -> Json:
        """How speculation went, under the names that vLLM uses; over all choices together."""
        histogram = [sum(counts) for counts in zip(*(choice.histogram for choice in self._choices), strict=True)]
        num_steps = sum(histogram)
        num_accepted = sum(accepted * steps for accepted, steps in enumerate(histogram))
        num_proposed = sum(choice.num_proposed for choice in self._choices)
        return {
            "speculative_decoding": {
                "num_spec_steps": num_steps,
                "num_draft_tokens": num_proposed,
                "num_accepted_draft_tokens": num_accepted,
                "draft_acceptance_rate": num_accepted / num_proposed if num_proposed else 0.0,
                "mean_acceptance_length": 1 + num_accepted / num_steps if num_steps else 1.0,
                "acceptance_histogram": histogram,
                "num_spec_tokens": self._max_draft_tokens,
                "draft_versions": sorted({version for choice in self._choices for version in choice.draft_versions}),
            }
        }

    def _book(self, delta: Delta) -> tuple[str, list[Entry]]:
        """Add a delta to its choice; return the new text and log-probabilities, echoed prompt included."""
        choice, dropped = self._choices[delta.index], self._prepared.drop_output
        text, entries = "", list[Entry]()
        if not choice.begun and self._prepared.prompt_texts:
            text = self._prepared.prompt_texts[delta.index // self._choices_a_prompt]
        if delta.prompt_logprobs is not None:
            prompt_ids = self._prepared.call.requests[delta.index].prompt_ids
            entries += zip(prompt_ids, delta.prompt_logprobs, strict=True)
        if not dropped:
            text += delta.text
            entries += [(known.token_id, known) for known in delta.logprobs or ()]
            choice.num_tokens += len(delta.token_ids)
        if delta.num_proposed and not dropped:
            choice.histogram[min(delta.num_accepted, self._max_draft_tokens)] += 1
            choice.num_proposed += delta.num_proposed
        choice.draft_versions = delta.draft_versions
        if delta.finish_reason is not None:
            choice.finish_reason = "length" if dropped else delta.finish_reason
        choice.begun = True
        choice.text += text
        if self._wants_logprobs:
            choice.logprobs += entries
        return text, entries

    def _chunk(self, index: int, content: Any, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        body = {"text": content} if self._kind == "text" else {"delta": content}
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}
        extra = {"usage": self.usage()} if self._usage_in_every_chunk else {}
        return {**self._chunk_head, "choices": [choice], **extra}

    def _logprobs(self, choice: _Choice, entries: Sequence[Entry]) -> Json:
        if self._kind == "chat":
            return chat_logprobs(entries, self._speller)
        # A stream counts on from chunk to chunk; a whole response is written once, from the start.
        shown, choice.text_offset = text_logprobs(entries, self._speller, offset=choice.text_offset)
        return shown
