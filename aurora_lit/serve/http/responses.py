"""OpenAI's responses: stream chunks, full responses, log-probabilities, usage, speculation metrics.

No I/O and no clock. Leaves out what deltas make of a choice (serve/http/choices.py), and how a chunk becomes a
server-sent event (serve/http/stream_events.py).

    response = ChatResponse(prepared, created=1764000000, model="m", token_decoder=…, max_draft_tokens=4, started_s=…)
    for deltas in rounds:
        chunks = response.chunks(deltas)    # for a stream; a request without stream calls response.add(deltas)
    response.full_json()                    # the response to a request without stream
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from aurora_lit.request import TokenLogprob
from aurora_lit.serve.http.answer_stream import TextDelta
from aurora_lit.serve.http.choices import Choice, Entry, Origin
from aurora_lit.serve.http.detokenizer import TokenDecoder
from aurora_lit.serve.http.stream_events import DONE
from aurora_lit.serve.http.tokenize import Prepared

Json = dict[str, Any]
_ENTRY_DEPTH = 5
"""Levels around a token's log-probabilities: response, choices, choice, logprobs, content."""
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""A value as JSON without spaces."""


class ResponseBuilder(ABC):
    """Builds one response; id, created and model are the same in all its chunks."""

    _OBJECT: ClassVar[str]
    _CHUNK_OBJECT: ClassVar[str]
    END: ClassVar[str] = DONE
    """What follows the last event of a stream."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        created: int,
        model: str,
        token_decoder: TokenDecoder,
        max_draft_tokens: int,
        started_s: float,
        usage_in_every_chunk: bool = False,
    ) -> None:
        """created: seconds since 1970. max_draft_tokens: most tokens that a round can accept.

        started_s: when the request was accepted, by the clock of `TextDelta.arrived_s`.
        """
        self._prepared, self._token_decoder = prepared, token_decoder
        self._max_draft_tokens, self._usage_in_every_chunk = max_draft_tokens, usage_in_every_chunk
        self._started_s = started_s
        requests = prepared.call.requests
        self._wants_logprobs = requests[0].params.logprobs is not None
        self.has_logprobs = self._wants_logprobs or prepared.prompt_logprobs is not None
        """True if the response may be so large that writing it takes seconds."""
        self._choices = [
            Choice(prepared, index, token_decoder=token_decoder, max_draft_tokens=max_draft_tokens)
            for index in range(len(requests))
        ]
        self._identity = {"id": prepared.call.call_id, "created": created, "model": model}

    @property
    def finished(self) -> bool:
        """True if every choice has a finish reason."""
        return None not in self.finish_reasons

    @property
    def finish_reasons(self) -> list[str | None]:
        """One for each choice; None for those that still run."""
        return [choice.finish_reason for choice in self._choices]

    def add(self, deltas: Sequence[TextDelta]) -> None:
        """Add one round's deltas."""
        for delta in deltas:
            self._choices[delta.index].add([delta])

    def chunks(self, deltas: Sequence[TextDelta]) -> list[Json]:
        """Add the deltas of a round, or of several, and return the stream chunks for them, in order of their choices.

        A choice has none while its tokens do not make up a whole character.
        """
        indices = dict.fromkeys(delta.index for delta in deltas)  # each once, in order
        by_choice = ((self._choices[index], [delta for delta in deltas if delta.index == index]) for index in indices)
        return [chunk for choice, own in by_choice for chunk in self._chunks_of(choice, own)]

    def full_json(self) -> str:
        """The response to a request without stream. The objects of one choice at a time are in memory.

        For a thread too: it is written in small parts, since Python runs no other thread while it writes one.
        """
        head = {**self._identity, "object": self._OBJECT}
        choices = (self._full_choice(choice, self._first_of_prompt(choice)) for choice in self._choices)
        rest = {"usage": self.usage(), "metrics": self.metrics(), **self._timings(), **self._more()}
        return "".join(_written({**head, "choices": choices, **rest}, depth=_ENTRY_DEPTH))

    def usage_chunk(self) -> Json:
        """The chunk with usage and without choices that ends a stream with include_usage."""
        return {**self._chunk_head(), "choices": [], "usage": self.usage(), "metrics": self.metrics()}

    def usage(self) -> Json:
        """Token counts so far. Cached tokens are those of each prompt's first choice: others share its prompt."""
        prompt, completion = self._prepared.num_prompt_tokens, sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.num_cached for choice in self._choices[:: self._prepared.num_choices])
            },
            **self._prediction_details(),
        }

    def metrics(self) -> Json:
        """Speculation metrics over all choices, under vLLM's names; the last two are our own."""
        histogram = [sum(counts) for counts in zip(*(choice.histogram for choice in self._choices), strict=True)]
        num_steps = sum(histogram)
        num_accepted = sum(accepted * steps for accepted, steps in enumerate(histogram))
        num_proposed = sum(choice.num_proposed for choice in self._choices)
        return {
            "speculative_decoding": {
                "num_spec_steps": num_steps,
                "num_draft_tokens": num_proposed,
                "num_accepted_draft_tokens": num_accepted,
                "num_accepted_memory_tokens": sum(choice.num_from_memory for choice in self._choices),
                "draft_acceptance_rate": num_accepted / num_proposed if num_proposed else 0.0,
                "mean_acceptance_length": 1 + num_accepted / num_steps if num_steps else 1.0,
                "acceptance_histogram": histogram,
                "num_spec_tokens": self._max_draft_tokens,
                "draft_versions": sorted({version for choice in self._choices for version in choice.draft_versions}),
                "domains": sorted({choice.domain for choice in self._choices if choice.domain}),
            }
        }

    @abstractmethod
    def _chunks_of(self, choice: Choice, deltas: Sequence[TextDelta]) -> Iterator[Json]:
        """Add deltas to their choice; its chunks."""

    @abstractmethod
    def _full_choice(self, choice: Choice, first: Choice) -> Json:
        """A choice of a full response. first: of the same prompt, and has the prompt's log-probabilities."""

    @abstractmethod
    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> Json:
        """`choices[].logprobs`."""

    def _prediction_details(self) -> Json:
        """Of a request with a prediction; it has one choice."""
        prediction = self._choices[0].prediction
        if prediction is None:
            return {}
        counts = {"accepted": prediction.accepted, "rejected": prediction.rejected}
        return {"completion_tokens_details": {f"{kind}_prediction_tokens": n for kind, n in counts.items()}}

    def _more(self) -> Json:
        """What a full response has beside its choices."""
        return {}

    def _timings(self) -> Json:
        """`timings` as in llama.cpp; a response with several choices has none."""
        only = self._choices[0] if len(self._choices) == 1 else None
        return {} if only is None else {"timings": only.timings(started_s=self._started_s)}

    def _first_of_prompt(self, choice: Choice) -> Choice:
        return self._choices[choice.index - choice.index % self._prepared.num_choices]

    def _full_logprobs(self, choice: Choice, first: Choice) -> Json | None:
        return self._logprobs(choice, first.echoed + choice.logprobs) if self._wants_logprobs else None

    def _chunk_head(self) -> Json:
        return {**self._identity, "object": self._CHUNK_OBJECT}

    def _chunk(
        self,
        choice: Choice,
        content: Json,
        logprobs: Sequence[Entry] = (),
        finish_reason: str | None = None,
        sources: Sequence[Origin] = (),
    ) -> Json:
        known = self._logprobs(choice, logprobs) if logprobs else None
        rest = {"logprobs": known, "finish_reason": finish_reason, **self._sources(sources)}
        extra = {"usage": self.usage()} if self._usage_in_every_chunk else {}
        extra |= self._timings() if finish_reason is not None else {}
        return {**self._chunk_head(), "choices": [{"index": choice.index, **content, **rest}], **extra}

    def _sources(self, sources: Sequence[Origin]) -> Json:
        """`token_sources`, if the request asks for it."""
        if not self._prepared.options.by_token:
            return {}
        return {"token_sources": [{"text": text, "source": source.label} for text, source in sources]}

    def _prompt_logprobs(self, choice: Choice) -> Json:
        """`prompt_logprobs` as in vLLM, if the request asks for it."""
        if self._prepared.prompt_logprobs is None:
            return {}
        decoder = self._token_decoder
        return {"prompt_logprobs": [_by_token(known, decoder) for known in choice.prompt_logprobs]}


class ChatResponse(ResponseBuilder):
    """The response of POST /v1/chat/completions."""

    _OBJECT, _CHUNK_OBJECT = "chat.completion", "chat.completion.chunk"

    def _chunks_of(self, choice: Choice, deltas: Sequence[TextDelta]) -> Iterator[Json]:
        """One; one more before its first, and where it ends with a part of a call."""
        if not choice.begun:
            yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}})
        added = choice.add(deltas)
        if not (any(added) or choice.finish_reason):
            return
        content: Json = {"content": added.text} if added.text or (added.logprobs and not added.calls) else {}
        content |= {"tool_calls": added.calls} if added.calls else {}
        # openai's client misses the end of a call that begins in the chunk with the finish reason.
        reason = None if added.calls else choice.stated_reason
        yield self._chunk(choice, {"delta": content}, added.logprobs, reason, added.sources)
        if added.calls and choice.finish_reason:
            yield self._chunk(choice, {"delta": {}}, finish_reason=choice.stated_reason)

    def _full_choice(self, choice: Choice, first: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            message |= {"content": choice.text or None, "tool_calls": choice.tool_calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._full_logprobs(choice, first),
            "finish_reason": choice.stated_reason,
            **self._sources(choice.sources),
        }

    def _more(self) -> Json:
        return self._prompt_logprobs(self._choices[0])

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> Json:
        """A list of objects."""
        decoder = self._token_decoder

        def token_json(token_id: int, logprob: float) -> Json:
            raw = list(decoder.to_bytes(token_id))
            return {"token": decoder.to_text(token_id), "logprob": logprob, "bytes": raw}

        content = [
            {**token_json(token_id, known.logprob), "top_logprobs": [token_json(*top) for top in known.top]}
            for token_id, known in entries
            if known is not None
        ]
        return {"content": content, "refusal": None}


class TextResponse(ResponseBuilder):
    """The response of POST /v1/completions."""

    _OBJECT = _CHUNK_OBJECT = "text_completion"

    def _chunks_of(self, choice: Choice, deltas: Sequence[TextDelta]) -> Iterator[Json]:
        added = choice.add(deltas)
        if any(added) or choice.finish_reason:
            yield self._chunk(choice, {"text": added.text}, added.logprobs, choice.stated_reason, added.sources)

    def _full_choice(self, choice: Choice, first: Choice) -> Json:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._full_logprobs(choice, first),
            "finish_reason": choice.stated_reason,
            **self._sources(choice.sources),
            **self._prompt_logprobs(first),
        }

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> Json:
        """Parallel lists. In a stream the offsets continue from chunk to chunk."""
        decoder = self._token_decoder
        return {
            "tokens": [decoder.to_text(token_id) for token_id, _ in entries],
            "token_logprobs": [None if known is None else known.logprob for _, known in entries],
            "top_logprobs": [None if known is None else _top_by_text(known, decoder) for _, known in entries],
            "text_offset": [choice.offsets.next(token_id) for token_id, _ in entries],
        }


def _written(value: Any, *, depth: int) -> Iterator[str]:
    """`value` as JSON, in the parts that are `depth` levels inside; iterators are written as lists."""
    if depth and isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield f"{',' if number else '{'}{encode(name)}:"
            yield from _written(inner, depth=depth - 1)
        yield "}" if value else "{}"
    elif depth and isinstance(value, (list, Iterator)):
        yield "["
        for number, inner in enumerate(value):
            yield "," if number else ""
            yield from _written(inner, depth=depth - 1)
        yield "]"
    else:
        yield encode(value)


def _by_token(known: TokenLogprob | None, token_decoder: TokenDecoder) -> Json | None:
    """The token and its alternatives by their ids, with their ranks; null for a token outside the alternatives."""
    if known is None:
        return None
    ranked: dict[int, tuple[float, int | None]]
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(known.top, start=1)}
    ranked.setdefault(known.token_id, (known.logprob, None))
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": token_decoder.to_text(token_id)}
        for token_id, (logprob, rank) in ranked.items()
    }


def _top_by_text(known: TokenLogprob, token_decoder: TokenDecoder) -> dict[str, float]:
    """The alternatives and the token itself, by text; of two tokens with the same text the likelier one stays."""
    logprobs: dict[str, float] = {}
    for token_id, logprob in (*known.top, (known.token_id, known.logprob)):
        logprobs.setdefault(token_decoder.to_text(token_id), logprob)
    return logprobs
