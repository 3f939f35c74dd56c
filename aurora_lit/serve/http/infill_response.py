"""The response of POST /infill, as llama.cpp's server gives it: one object, an array of several, or events of a stream.

Leaves out what deltas make of a choice, and its timings (serve/http/choices.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aurora_lit.serve.http.answer_stream import TextDelta
from aurora_lit.serve.http.choices import Choice, Entry
from aurora_lit.serve.http.fim_schema import InfillRequest
from aurora_lit.serve.http.responses import Json, ResponseBuilder, encode

_MISSING = object()


class InfillResponse(ResponseBuilder):
    """One answer for each choice; see `ResponseBuilder`."""

    _OBJECT = _CHUNK_OBJECT = ""
    END = ""

    def __init__(self, *arguments: Any, body: InfillRequest, **options: Any) -> None:
        """body: what was asked for."""
        super().__init__(*arguments, **options)
        self._body = body

    def full_json(self) -> str:
        """The answer, or an array if there are several.

        llama.vim looks for `"content":"` in it, so that no space may follow the colon.
        """
        answers = [self._answer(choice, choice.text) for choice in self._choices]
        return encode(answers[0] if len(answers) == 1 else answers)

    def _chunks_of(self, choice: Choice, deltas: Sequence[TextDelta]) -> Iterator[Json]:
        added = choice.add(deltas)
        if added.text:
            yield {**self._head(choice, added.text), "stop": False}
        if choice.finish_reason:
            yield self._answer(choice, "")

    def _head(self, choice: Choice, text: str) -> Json:
        """What an event of a stream and an answer share."""
        return {
            "index": choice.index,
            "content": text,
            "tokens": [],  # as in llama.cpp without return_tokens
            "id_slot": -1 if self._body.id_slot is None else self._body.id_slot,
            "tokens_predicted": choice.num_tokens,
            "tokens_evaluated": choice.num_prompt_tokens,
        }

    def _answer(self, choice: Choice, text: str) -> Json:
        """The fields that were asked for. A path such as timings/prompt_n is the name of its value."""
        ended_by = "word" if choice.stop_string else "eos" if choice.finish_reason == "stop" else "limit"
        answer = {
            **self._head(choice, text),
            "stop": True,
            "model": self._identity["model"],
            "tokens_cached": choice.num_cached,
            "truncated": self._prepared.was_cut,
            "has_new_line": "\n" in choice.text,
            "stop_type": ended_by,
            "stopping_word": choice.stop_string,
            "generation_settings": self._settings(choice),
            "timings": choice.timings(started_s=self._started_s),
        }
        asked = self._body.response_fields
        if not asked:
            return answer
        found = {path: _at(answer, path) for path in asked}
        return {path: value for path, value in found.items() if value is not _MISSING}

    def _settings(self, choice: Choice) -> Json:
        params = self._prepared.call.requests[choice.index].params
        return {
            "n_predict": self._body.token_limit[1],
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": params.seed,
            "stop": params.stop,
            "n_indent": self._body.n_indent or 0,
            "t_max_predict_ms": self._body.t_max_predict_ms or -1,
        }

    def _full_choice(self, choice: Choice, first: Choice) -> Json:
        raise NotImplementedError("full_json writes answers itself")

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> Json:
        raise NotImplementedError("the body has no field that asks for them")


def _at(value: Any, path: str) -> Any:
    for name in path.split("/"):
        value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    return value
