"""Turns deltas into OpenAI's responses: stream chunks, full responses, log-probabilities, usage, speculation metrics.

No I/O and no clock. Leaves out how a chunk becomes a server-sent event (serve/http/stream_events.py).
Log-probabilities are the model's own, before temperature and penalties; the engine computes them with `token_logprobs`
(modules/sampling/distribution.py).

    response = ResponseBuilder(prepared, kind="chat", created=1764000000, model="m", token_decoder=decoder,
                               max_draft_tokens=4)
    for deltas in rounds:
        chunks = response.chunks(deltas)    # for a stream; a request without stream calls response.add(deltas)
    response.full()                         # the response to a request without stream; full_json() writes it
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from aurora_lit.request import TOKEN_SOURCES, TokenLogprob
from aurora_lit.serve.http.answer_stream import TextDelta
from aurora_lit.serve.http.detokenizer import TextOffsets, TokenDecoder
from aurora_lit.serve.http.tokenize import Prepared
from aurora_lit.tool_calls.parser import CallBegin, Content, Piece, ToolCallReader

Json = dict[str, Any]
Source = tuple[str, int]
"""A token's text, and the index of its source in TOKEN_SOURCES."""
Entry = tuple[int, TokenLogprob | None]
"""A token and its log-probability; None for the first token of a prompt, which has no condition."""
_MEMORY = TOKEN_SOURCES.index("memory")
_ENTRY_DEPTH = 5
"""Levels around a token's log-probabilities: response, choices, choice, logprobs, content."""
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}


@dataclass(kw_only=True)
class _Choice:
    """The state of one choice."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[Entry] = field(default_factory=list)
    """Of the answer."""
    echoed: list[Entry] = field(default_factory=list)
    """The same of the echoed prompt, if its log-probabilities came with this choice."""
    sources: list[Source] = field(default_factory=list)
    offsets: TextOffsets
    """Where the tokens with log-probabilities begin."""
    finish_reason: str | None = None
    begun: bool = False
    """True after its first delta."""
    histogram: list[int]
    """[j]: rounds in which j draft tokens were accepted."""
    num_proposed: int = 0
    num_from_memory: int = 0
    """Accepted tokens that the traffic memory alone proposed."""
    draft_versions: tuple[str, ...] = ()
    domain: str = ""
    num_cached: int = 0
    """Prompt tokens that the prefix cache had."""
    tool_reader: ToolCallReader | None = None
    tool_calls: list[Json] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Filled only if the response has them."""

    @property
    def stated_reason(self) -> str | None:
        """The finish reason as OpenAI's API states it."""
        is_cut_off = self.tool_reader is not None and self.tool_reader.is_in_call  # by a stop string in the arguments
        has_called = bool(self.tool_calls) and not is_cut_off
        return "tool_calls" if has_called and self.finish_reason == "stop" else self.finish_reason


class _Added(NamedTuple):
    """What deltas add to a choice."""

    text: str
    logprobs: list[Entry]
    """An echoed prompt's included, as in the text."""
    sources: list[Source]
    """If asked for."""
    calls: list[Json]
    """Parts of tool calls, as the chunks of a stream have them."""


class ResponseBuilder:
    """Builds one response; id, created and model are the same in all its chunks."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        kind: Literal["chat", "text"],
        created: int,
        model: str,
        token_decoder: TokenDecoder,
        max_draft_tokens: int,
        usage_in_every_chunk: bool = False,
    ) -> None:
        """created: seconds since 1970. max_draft_tokens: most tokens that a round can accept."""
        requests = prepared.call.requests
        self._prepared, self._kind, self._token_decoder = prepared, kind, token_decoder
        self._max_draft_tokens, self._usage_in_every_chunk = max_draft_tokens, usage_in_every_chunk
        self._wants_logprobs = requests[0].params.logprobs is not None
        self._wants_sources = prepared.options.by_token
        self.has_logprobs = self._wants_logprobs or prepared.prompt_logprobs is not None
        """True if the response may be so large that writing it takes seconds."""
        tools = prepared.tools
        self._choices = [
            _Choice(
                histogram=[0] * (max_draft_tokens + 1),
                tool_reader=None if tools is None else tools.reader(),
                offsets=TextOffsets(
                    token_decoder,
                    echoed=self._echoed(index),
                    skips_special_tokens=request.params.skip_special_tokens,
                ),
            )
            for index, request in enumerate(requests)
        ]
        full, chunk = _OBJECTS[kind]
        identity = {"id": prepared.call.call_id, "created": created, "model": model}
        self._full_head, self._chunk_head = {**identity, "object": full}, {**identity, "object": chunk}

    @property
    def finished(self) -> bool:
        """True if every choice has a finish reason."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def finish_reasons(self) -> list[str | None]:
        """One for each choice; None for those that still run."""
        return [choice.finish_reason for choice in self._choices]

    def add(self, deltas: Sequence[TextDelta]) -> None:
        """Add one round's deltas."""
        for delta in deltas:
            self._add(delta)

    def chunks(self, deltas: Sequence[TextDelta]) -> list[Json]:
        """Add the deltas of a round, or of several, and return the stream chunks for them.

        One for each choice; one more before its first, and where it ends with a part of a call.
        """
        chunks = []
        for index in dict.fromkeys(delta.index for delta in deltas):  # each once, in order
            choice = self._choices[index]
            if self._kind == "chat" and not choice.begun:
                chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
            added = _Added("", [], [], [])
            for delta in deltas:
                if delta.index == index:
                    added = _joined(added, self._add(delta))
            if not (any(added) or choice.finish_reason):
                continue  # the tokens so far do not make up a whole character
            logprobs = self._logprobs(choice, added.logprobs) if added.logprobs else None
            content: Any = added.text
            if self._kind == "chat":
                content = {"content": added.text} if added.text or (added.logprobs and not added.calls) else {}
                content |= {"tool_calls": added.calls} if added.calls else {}
            # openai's client misses the end of a call that begins in the chunk with the finish reason.
            reason = None if added.calls else choice.stated_reason
            chunks.append(self._chunk(index, content, logprobs, reason, added.sources))
            if added.calls and choice.finish_reason:
                chunks.append(self._chunk(index, {}, finish_reason=choice.stated_reason))
        return chunks

    def full(self) -> Json:
        """The response to a request without stream."""
        return self._full(list(self._full_choices()))

    def full_json(self) -> str:
        """The same as JSON, of which the objects of one choice at a time are in memory.

        For a thread: it is written in small parts, since Python runs no other thread while it writes one.
        """
        return "".join(_written(self._full(self._full_choices()), depth=_ENTRY_DEPTH))

    def _full_choices(self) -> Iterator[Json]:
        for index, choice in enumerate(self._choices):
            first = self._choices[index - index % self._prepared.num_choices]  # has the prompt's log-probabilities
            entries = first.echoed + choice.logprobs
            message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.tool_calls:
                message |= {"content": choice.text or None, "tool_calls": choice.tool_calls}
            yield {
                "index": index,
                **({"message": message} if self._kind == "chat" else {"text": choice.text}),
                "logprobs": self._logprobs(choice, entries) if self._wants_logprobs else None,
                "finish_reason": choice.stated_reason,
                **self._sources(choice.sources),
                **(self._prompt_logprobs(first) if self._kind == "text" else {}),
            }

    def _full(self, choices: Iterable[Json]) -> Json:
        more = self._prompt_logprobs(self._choices[0]) if self._kind == "chat" else {}
        return {**self._full_head, "choices": choices, "usage": self.usage(), "metrics": self.metrics(), **more}

    def usage_chunk(self) -> Json:
        """The chunk with usage and without choices that ends a stream with include_usage."""
        return {**self._chunk_head, "choices": [], "usage": self.usage(), "metrics": self.metrics()}

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

    def _echoed(self, index: int) -> str:
        """The prompt that the text of a choice begins with; "" if it is not asked for."""
        texts = self._prepared.prompt_texts
        return texts[index // self._prepared.num_choices] if texts else ""

    def _add(self, delta: TextDelta) -> _Added:
        """Add a delta to its choice."""
        choice, drop_output = self._choices[delta.index], self._prepared.drop_output
        text, echoed, entries, sources = "", list[Entry](), list[Entry](), list[Source]()
        if not choice.begun:
            text = self._echoed(delta.index)
        if delta.prompt_logprobs is not None:
            request = self._prepared.call.requests[delta.index]
            if self._prepared.prompt_logprobs is not None:
                choice.prompt_logprobs = _with_top(delta.prompt_logprobs, self._prepared.prompt_logprobs)
            if self._prepared.prompt_texts and request.params.logprobs is not None:
                known = _with_top(delta.prompt_logprobs, request.params.logprobs)
                echoed += zip(request.prompt_ids, known, strict=True)
        if not drop_output:
            text += delta.text
            entries += [(known.token_id, known) for known in delta.logprobs or ()]
            choice.num_tokens += len(delta.token_ids)
            if delta.token_texts is not None:
                owns = (0,) * len(delta.token_texts)
                sources = list(zip(delta.token_texts, delta.accepted_from + owns, strict=False))
        if delta.num_proposed and not drop_output:
            choice.histogram[min(delta.num_accepted, self._max_draft_tokens)] += 1
            choice.num_proposed += delta.num_proposed
            choice.num_from_memory += delta.accepted_from.count(_MEMORY)
        choice.draft_versions, choice.domain = delta.draft_versions, delta.domain
        choice.num_cached = delta.num_cached_tokens
        if delta.finish_reason is not None:
            choice.finish_reason = "length" if drop_output else delta.finish_reason
        choice.begun = True
        calls = list[Json]()
        if choice.tool_reader is not None:
            pieces = choice.tool_reader.push(text)
            pieces += choice.tool_reader.finish() if delta.finish_reason is not None else []
            text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
            calls = self._add_calls(choice, pieces)
        choice.text += text
        if self._wants_logprobs:
            choice.echoed += echoed
            choice.logprobs += entries
        choice.sources += sources
        return _Added(text, echoed + entries, sources, calls)

    def _add_calls(self, choice: _Choice, pieces: Sequence[Piece]) -> list[Json]:
        """Add parts of tool calls to their choice. Returns them as the chunks of a stream have them."""
        parts = list[Json]()
        for piece in pieces:
            if isinstance(piece, CallBegin):
                assert self._prepared.tools is not None
                call_id = self._prepared.tools.format.new_id()
                call: Json = {"id": call_id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
                choice.tool_calls.append(call)
                parts.append({"index": piece.number, **call, "function": dict(call["function"])})
            elif not isinstance(piece, Content):
                choice.tool_calls[piece.number]["function"]["arguments"] += piece.text
                parts.append({"index": piece.number, "function": {"arguments": piece.text}})
        return parts

    def _chunk(
        self,
        index: int,
        content: Any,
        logprobs: Json | None = None,
        finish_reason: str | None = None,
        sources: Sequence[Source] = (),
    ) -> Json:
        body = {"text": content} if self._kind == "text" else {"delta": content}
        more = self._sources(sources)
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason, **more}
        extra = {"usage": self.usage()} if self._usage_in_every_chunk else {}
        return {**self._chunk_head, "choices": [choice], **extra}

    def _sources(self, sources: Sequence[Source]) -> Json:
        """`token_sources`, if the request asks for it."""
        if not self._wants_sources:
            return {}
        return {"token_sources": [{"text": text, "source": TOKEN_SOURCES[source]} for text, source in sources]}

    def _prompt_logprobs(self, choice: _Choice) -> Json:
        """`prompt_logprobs` as in vLLM, if the request asks for it."""
        if self._prepared.prompt_logprobs is None:
            return {}
        decoder = self._token_decoder
        return {"prompt_logprobs": [_by_token(known, decoder) for known in choice.prompt_logprobs]}

    def _logprobs(self, choice: _Choice, entries: Sequence[Entry]) -> Json:
        if self._kind == "chat":
            return _chat_logprobs(entries, self._token_decoder)
        # In a stream the offsets continue from chunk to chunk; a full response is written once, from the start.
        return _text_logprobs(entries, self._token_decoder, choice.offsets)


def _written(value: Any, *, depth: int) -> Iterator[str]:
    """`value` as JSON, in the parts that are `depth` levels inside; iterators are written as lists."""
    if depth and isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_encoder.encode(name)}:"
            yield from _written(inner, depth=depth - 1)
        yield "}" if value else "{}"
    elif depth and isinstance(value, (list, Iterator)):
        yield "["
        for number, inner in enumerate(value):
            yield "," if number else ""
            yield from _written(inner, depth=depth - 1)
        yield "]"
    else:
        yield _encoder.encode(value)


def _joined(first: _Added, second: _Added) -> _Added:
    """Both together; parts of one tool call become one part."""
    calls = list(first.calls)
    for part in second.calls:
        if calls and calls[-1]["index"] == part["index"]:
            arguments = calls[-1]["function"]["arguments"] + part["function"]["arguments"]
            calls[-1] = {**calls[-1], "function": {**calls[-1]["function"], "arguments": arguments}}
        else:
            calls.append(part)
    return _Added(first.text + second.text, first.logprobs + second.logprobs, first.sources + second.sources, calls)


def _with_top(known: Sequence[TokenLogprob | None], num_top: int) -> tuple[TokenLogprob | None, ...]:
    """With no more than so many alternatives."""
    return tuple(
        each if each is None or len(each.top) <= num_top else replace(each, top=each.top[:num_top]) for each in known
    )


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


def _chat_logprobs(entries: Sequence[Entry], token_decoder: TokenDecoder) -> Json:
    """`choices[].logprobs` of a chat completion: a list of objects."""

    def token_json(token_id: int, logprob: float) -> Json:
        return {
            "token": token_decoder.to_text(token_id),
            "logprob": logprob,
            "bytes": list(token_decoder.to_bytes(token_id)),
        }

    return {
        "content": [
            {**token_json(token_id, known.logprob), "top_logprobs": [token_json(*top) for top in known.top]}
            for token_id, known in entries
            if known is not None
        ],
        "refusal": None,
    }


def _text_logprobs(entries: Sequence[Entry], token_decoder: TokenDecoder, offsets: TextOffsets) -> Json:
    """`choices[].logprobs` of a text completion: parallel lists."""
    return {
        "tokens": [token_decoder.to_text(token_id) for token_id, _ in entries],
        "token_logprobs": [None if known is None else known.logprob for _, known in entries],
        "top_logprobs": [None if known is None else _top_by_text(known, token_decoder) for _, known in entries],
        "text_offset": [offsets.next(token_id) for token_id, _ in entries],
    }


def _top_by_text(known: TokenLogprob, token_decoder: TokenDecoder) -> dict[str, float]:
    """The alternatives and the token itself, by text; of two tokens with the same text the likelier one stays."""
    logprobs: dict[str, float] = {}
    for token_id, logprob in (*known.top, (known.token_id, known.logprob)):
        logprobs.setdefault(token_decoder.to_text(token_id), logprob)
    return logprobs
