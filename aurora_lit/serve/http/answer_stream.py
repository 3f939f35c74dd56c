"""The engine worker's deltas to text: one call's choices, each cut where a stop string is completed.

The worker does not look for stop strings, so it goes on with a choice until it is told that one was completed. What it
sends in the meantime is dropped here: the client gets what it would get if the worker had stopped at once. The same
holds of indentation and of time, by which a client may end what is filled into a hole. Leaves out
how tokens become text (serve/http/detokenizer.py), and the message to the worker (serve/http/worker_client.py).

    answer = AnswerStream(tokenizer, call.requests)
    deltas, stopped = answer.add(deltas_of_a_round)
    # deltas: the same with text; stopped: choices that were ended here, for the worker to cancel
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from aurora_lit.errors import RequestError
from aurora_lit.ipc.messages import Delta
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.request import Request
from aurora_lit.serve.http.detokenizer import TextStream


class AnswerOptions(NamedTuple):
    """What a call's text depends on beside its requests."""

    continues_prompt: bool = False
    """The text goes on with the prompt's: a space that it begins with is part of it."""
    by_token: bool = False
    """Deltas have `token_texts`."""
    grammar_field: str = ""
    """Of the body: where the answers' grammar comes from; "" without one."""
    min_indent: int = 0
    """An answer ends before a line, after its first, that has fewer spaces and tabs at its beginning."""
    most_s: float | None = None
    """An answer with a line break ends so long after its first token."""


DEFAULT_OPTIONS = AnswerOptions()


@dataclass(frozen=True, kw_only=True)
class TextDelta(Delta):
    """A delta with its text. Tokens, log-probabilities and accepted proposals go up to what completed a stop string."""

    text: str
    """Whole characters that later tokens cannot change; may be empty although there are new tokens."""
    token_texts: tuple[str, ...] | None = None
    """`text` by the token that completed each character; None: not asked for."""
    stop_string: str = ""
    """The one that has ended the choice."""
    arrived_s: float = 0.0
    """By the clock of the stream."""


class Addition(NamedTuple):
    """What one round's deltas add to an answer."""

    deltas: tuple[TextDelta, ...]
    """Of the choices that have not ended before."""
    stopped: tuple[int, ...]
    """Indices of the choices that were ended here, and that the worker still works on."""


class AnswerStream:
    """The choices of one call, from their first delta to their last; see the file's example."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        options: AnswerOptions = DEFAULT_OPTIONS,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """requests: those of the call, in its order. clock: seconds."""
        self._options, self._clock = options, clock
        self._first_s = dict[int, float]()
        """By choice: when its first token arrived."""
        self._with_line_break = set[int]()
        self._texts = [
            TextStream(
                tokenizer,
                follows=request.prompt_ids if options.continues_prompt else (),
                stop=params.stop,
                min_tokens=params.min_tokens,
                keeps_stop=params.include_stop_str_in_output,
                skips_special_tokens=params.skip_special_tokens,
                min_indent=options.min_indent,
                begins_with="" if params.structured_outputs is None else params.structured_outputs.begins_with or "",
            )
            for request, params in ((request, request.params) for request in requests)
        ]
        self._keeps_stop = [request.params.include_stop_str_in_output for request in requests]
        self._may_stop = [bool(request.params.stop) or options.min_indent > 0 for request in requests]
        self._unfinished = set(range(len(requests)))

    def add(self, deltas: Sequence[Delta]) -> Addition:
        """Add one round's deltas.

        Raises RequestError if a choice failed because its grammar could not be followed, RuntimeError if one without a
        grammar failed. One that was ended here first has not failed.
        """
        added, stopped = [], []
        now_s = self._clock()
        for delta in deltas:
            if delta.index not in self._unfinished:  # it was ended here, and the worker did not know yet
                continue
            texts, num_tokens, finish_reason = self._decode(delta)
            if finish_reason is None and self._is_late(delta, texts, now_s):
                texts, finish_reason = _with_rest(texts, self._texts[delta.index]), "length"
            if finish_reason == "error":  # and no stop string came before, in the same round
                field = self._options.grammar_field
                if not field:
                    raise RuntimeError(delta.error or "the engine gave no reason")
                raise RequestError(f"{field} cannot be used: {delta.error}", param=field, code="invalid_value")
            if finish_reason is not None:
                self._unfinished.remove(delta.index)
                if delta.finish_reason is None:
                    stopped.append(delta.index)
            added.append(
                TextDelta(
                    index=delta.index,
                    text="".join(texts),
                    token_texts=tuple(texts) if self._options.by_token else None,
                    token_ids=delta.token_ids[:num_tokens],
                    logprobs=None if delta.logprobs is None else delta.logprobs[:num_tokens],
                    prompt_logprobs=delta.prompt_logprobs,
                    num_proposed=delta.num_proposed,
                    num_accepted=min(delta.num_accepted, num_tokens),
                    accepted_from=delta.accepted_from[:num_tokens],
                    finish_reason=finish_reason,
                    draft_versions=delta.draft_versions,
                    domain=delta.domain,
                    num_cached_tokens=delta.num_cached_tokens,
                    stop_string=self._texts[delta.index].stop_string,
                    arrived_s=now_s,
                )
            )
        return Addition(tuple(added), tuple(stopped))

    def _is_late(self, delta: Delta, texts: Sequence[str], now_s: float) -> bool:
        """True if the choice has used up its time, and a line is complete."""
        if self._options.most_s is None or not delta.token_ids:
            return False
        first_s = self._first_s.setdefault(delta.index, now_s)
        if any("\n" in text for text in texts):
            self._with_line_break.add(delta.index)
        return delta.index in self._with_line_break and now_s - first_s > self._options.most_s

    def _decode(self, delta: Delta) -> tuple[list[str], int, str | None]:
        """New text, number of tokens that count, and finish reason: the engine's, "stop" at a stop string, or "length".

        The text is in one piece, or by token if it is asked for, or if a stop string is looked for.
        """
        stream, token_ids = self._texts[delta.index], delta.token_ids
        # The token that ended the answer counts as a token, but is no part of the text unless that is asked for.
        hides_last = delta.finish_reason == "stop" and not self._keeps_stop[delta.index]
        visible = token_ids[:-1] if hides_last else token_ids
        if not (self._may_stop[delta.index] or self._options.by_token):
            texts = [stream.push(visible)]
        else:
            texts = []
            for position, token_id in enumerate(visible):  # one at a time, to find the one that completes a stop string
                texts.append(stream.push((token_id,)))
                if stream.stopped:
                    return texts, position + 1, "stop" if stream.stop_string else "length"
            texts += [""] * (len(token_ids) - len(visible))
        if delta.finish_reason is not None:
            texts = _with_rest(texts, stream)
        return texts, len(token_ids), delta.finish_reason


def by_token(deltas: Sequence[TextDelta]) -> list[TextDelta]:
    """The same in one delta a token, as far as the text by token is known; the first of a round's has its counts."""
    pieces = list[TextDelta]()
    for delta in deltas:
        texts, last = delta.token_texts or (), len(delta.token_ids) - 1
        if len(texts) != last + 1 or last < 1:
            pieces.append(delta)
            continue
        pieces += [
            replace(
                delta,
                text=texts[at],
                token_texts=texts[at : at + 1],
                token_ids=delta.token_ids[at : at + 1],
                logprobs=None if delta.logprobs is None else delta.logprobs[at : at + 1],
                prompt_logprobs=delta.prompt_logprobs if at == 0 else None,
                num_proposed=delta.num_proposed if at == 0 else 0,
                num_accepted=delta.num_accepted if at == 0 else 0,
                accepted_from=delta.accepted_from[at : at + 1],
                finish_reason=delta.finish_reason if at == last else None,
            )
            for at in range(last + 1)
        ]
    return pieces


def _with_rest(texts: Sequence[str], stream: TextStream) -> list[str]:
    """The texts of a stream's last tokens, with what was held back."""
    return [*texts[:-1], "".join(texts[-1:]) + stream.finish()]
