"""One choice of a response, as its deltas make it: text, tokens, log-probabilities, tool calls, counts of speculation.

Leaves out how a choice looks in OpenAI's responses (serve/http/responses.py). Log-probabilities are the model's own,
before temperature and penalties; the engine computes them with `token_logprobs` (modules/sampling/distribution.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from aurora_lit.request import Source, TokenLogprob
from aurora_lit.serve.http.answer_stream import TextDelta
from aurora_lit.serve.http.detokenizer import TextOffsets, TokenDecoder
from aurora_lit.serve.http.prediction import RepeatedTokens
from aurora_lit.serve.http.tokenize import Prepared
from aurora_lit.tool_calls.parser import CallBegin, Content, Piece

Json = dict[str, Any]
Origin = tuple[str, Source]
"""A token's text, and where the token came from."""
Entry = tuple[int, TokenLogprob | None]
"""A token and its log-probability; None for the first token of a prompt, which has no condition."""


class Added(NamedTuple):
    """What deltas add to a choice."""

    text: str = ""
    logprobs: Sequence[Entry] = ()
    """An echoed prompt's included, as in the text."""
    sources: Sequence[Origin] = ()
    """If asked for."""
    calls: Sequence[Json] = ()
    """Parts of tool calls, as the chunks of a stream have them."""


class Choice:
    """The state of one choice."""

    def __init__(self, prepared: Prepared, index: int, *, token_decoder: TokenDecoder, max_draft_tokens: int) -> None:
        """index: among the requests of the call. max_draft_tokens: most tokens that a round can accept."""
        self.index = index
        self._prepared, self._request = prepared, prepared.call.requests[index]
        self._echoed_text = prepared.prompt_texts[index // prepared.num_choices] if prepared.prompt_texts else ""
        """The prompt, with which the text begins; "" if it is not asked for."""
        self.text, self.num_tokens = "", 0
        self.logprobs, self.echoed = list[Entry](), list[Entry]()
        """Of the answer; and of the echoed prompt, if its log-probabilities came with this choice."""
        self.prompt_logprobs: Sequence[TokenLogprob | None] = ()
        """Filled only if the response has them."""
        self.offsets = TextOffsets(
            token_decoder,
            echoed=self._echoed_text,
            skips_special_tokens=self._request.params.skip_special_tokens,
        )
        """Where the tokens with log-probabilities begin."""
        self.sources = list[Origin]()
        self.tool_calls = list[Json]()
        self._tool_reader = None if prepared.tools is None else prepared.tools.reader()
        self.begun = False
        """True after its first delta."""
        self.finish_reason: str | None = None
        self.histogram = [0] * (max_draft_tokens + 1)
        """[j]: rounds in which j draft tokens were accepted."""
        self.num_proposed = self.num_from_memory = 0
        """Proposed tokens, and accepted ones that the traffic memory alone proposed."""
        predicted = self._request.prediction_ids
        self.prediction = RepeatedTokens(predicted) if predicted else None
        """None: the request has none."""
        self.draft_versions: tuple[str, ...] = ()
        self.domain = ""
        self.num_cached = 0
        """Prompt tokens that the prefix cache had."""
        self.stop_string = ""
        """The one that has ended it."""
        self._arrivals_s: tuple[float, float] | None = None
        """Of its first and its last tokens."""

    @property
    def stated_reason(self) -> str | None:
        """The finish reason as OpenAI's API states it."""
        is_cut_off = self._tool_reader is not None and self._tool_reader.is_in_call  # by a stop string in the arguments
        has_called = bool(self.tool_calls) and not is_cut_off
        return "tool_calls" if has_called and self.finish_reason == "stop" else self.finish_reason

    @property
    def num_accepted(self) -> int:
        """Accepted proposals, as far as they count in the histogram."""
        return sum(accepted * rounds for accepted, rounds in enumerate(self.histogram))

    @property
    def num_prompt_tokens(self) -> int:
        """Of its prompt, cached ones included."""
        return len(self._request.prompt_ids)

    def timings(self, *, started_s: float) -> Json:
        """Tokens and times of prompt and answer, under llama.cpp's names; the prompt's time includes waiting.

        started_s: when the request was accepted, by the clock of its stream.
        """
        first_s, last_s = self._arrivals_s or (started_s, started_s)
        num_drafted = {"draft_n": self.num_proposed, "draft_n_accepted": self.num_accepted} if self.num_proposed else {}
        return {
            "cache_n": self.num_cached,
            **_speed("prompt", self.num_prompt_tokens - self.num_cached, first_s - started_s),
            **_speed("predicted", self.num_tokens, last_s - first_s),
            **num_drafted,
        }

    def add(self, deltas: Sequence[TextDelta]) -> Added:
        """Add its deltas of a round, or of several."""
        text, logprobs, sources, calls = "", list[Entry](), list[Origin](), list[Json]()
        for delta in deltas:
            if not self.begun:
                text += self._echoed_text
            if delta.prompt_logprobs is not None:
                logprobs += self._add_prompt_logprobs(delta.prompt_logprobs)
            if not self._prepared.drop_output:
                text += delta.text
                logprobs += self._add_tokens(delta)
                if self._prepared.options.by_token and delta.token_texts is not None:
                    owns = (Source.TARGET,) * len(delta.token_texts)
                    sources += zip(delta.token_texts, delta.accepted_from + owns, strict=False)
            self.draft_versions, self.domain = delta.draft_versions, delta.domain
            self.num_cached = delta.num_cached_tokens
            self.stop_string = delta.stop_string
            if delta.token_ids:
                first_s = self._arrivals_s[0] if self._arrivals_s else delta.arrived_s
                self._arrivals_s = (first_s, delta.arrived_s)
            if delta.finish_reason is not None:
                self.finish_reason = "length" if self._prepared.drop_output else delta.finish_reason
            self.begun = True
        if self._tool_reader is not None:
            pieces = self._tool_reader.push(text)
            pieces += self._tool_reader.finish() if self.finish_reason is not None else []
            text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
            calls = self._add_calls(pieces)
        self.text += text
        self.sources += sources
        return Added(text, logprobs, sources, calls)

    def _add_prompt_logprobs(self, found: Sequence[TokenLogprob | None]) -> list[Entry]:
        """Those of the echoed prompt, if they are asked for."""
        params = self._request.params
        if self._prepared.prompt_logprobs is not None:
            self.prompt_logprobs = _with_top(found, self._prepared.prompt_logprobs)
        if not self._prepared.prompt_texts or params.logprobs is None:
            return []
        self.echoed = list(zip(self._request.prompt_ids, _with_top(found, params.logprobs), strict=True))
        return self.echoed

    def _add_tokens(self, delta: TextDelta) -> list[Entry]:
        """Their log-probabilities, if they are asked for."""
        self.num_tokens += len(delta.token_ids)
        if self.prediction is not None:
            self.prediction.add(delta.token_ids)
        if delta.num_proposed:
            self.histogram[min(delta.num_accepted, len(self.histogram) - 1)] += 1
            self.num_proposed += delta.num_proposed
        self.num_from_memory += delta.accepted_from.count(Source.MEMORY)
        entries: list[Entry] = [(known.token_id, known) for known in delta.logprobs or ()]
        self.logprobs += entries
        return entries

    def _add_calls(self, pieces: Sequence[Piece]) -> list[Json]:
        """Parts of tool calls, one for each call."""
        parts = list[Json]()
        for piece in pieces:
            if isinstance(piece, CallBegin):
                assert self._prepared.tools is not None
                call_id = self._prepared.tools.format.new_id()
                call: Json = {"id": call_id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
                self.tool_calls.append(call)
                parts.append({"index": piece.number, **call, "function": dict(call["function"])})
            elif not isinstance(piece, Content):
                self.tool_calls[piece.number]["function"]["arguments"] += piece.text
                if not (parts and parts[-1]["index"] == piece.number):
                    parts.append({"index": piece.number, "function": {"arguments": ""}})
                parts[-1]["function"]["arguments"] += piece.text
        return parts


def _speed(name: str, num_tokens: int, seconds: float) -> Json:
    ms = 1000 * seconds
    return {
        f"{name}_n": num_tokens,
        f"{name}_ms": ms,
        f"{name}_per_token_ms": ms / num_tokens if num_tokens else 0.0,
        f"{name}_per_second": num_tokens / seconds if seconds > 0 else 0.0,
    }


def _with_top(known: Sequence[TokenLogprob | None], num_top: int) -> tuple[TokenLogprob | None, ...]:
    """With no more than so many alternatives."""
    return tuple(
        each if each is None or len(each.top) <= num_top else replace(each, top=each.top[:num_top]) for each in known
    )
