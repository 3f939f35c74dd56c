"""`prediction` of a request: a text that the answer will probably repeat, and how much of it an answer has repeated.

N-gram lookup proposes it (serve/speculation/sources/ngram.py), so it decides how fast an answer comes and never what
it says. Leaves out its tokens (serve/http/tokenize.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Self

from pydantic import model_validator

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict
from aurora_lit.serve.http.message_fields import TextParts

_AHEAD = 128
"""Most tokens of a prediction that an answer leaves out in one place and is still followed, as in the look-up."""


class Prediction(Strict):
    """The field, as in OpenAI's API."""

    type: Literal["content"]
    content: str | TextParts

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Predicting(Strict):
    """A body that may have a prediction. As in OpenAI's API it cannot be combined with some fields."""

    prediction: Prediction | None = None

    @model_validator(mode="after")
    def _check_prediction(self) -> Self:
        if self.prediction is None:
            return self
        of_body = {name: getattr(self, name, None) for name in type(self).model_fields}
        for name, is_combined in (
            ("n", (of_body["n"] or 1) > 1),
            ("n_cmpl", (of_body["n_cmpl"] or 1) > 1),
            ("logprobs", of_body["logprobs"] is not None and of_body["logprobs"] is not False),
            ("presence_penalty", (of_body["presence_penalty"] or 0) > 0),
            ("frequency_penalty", (of_body["frequency_penalty"] or 0) > 0),
            ("tools", bool(of_body.get("tools"))),
            ("suffix", bool(of_body.get("suffix"))),
        ):
            if is_combined:
                raise RequestError(f"{name} cannot be combined with prediction; leave one of them out", param=name)
        return self


class RepeatedTokens:
    """Counts the tokens of a prediction that appear in an answer, in their order: OpenAI's accepted prediction tokens.

    The answer is followed through the prediction. After a difference it is found again where two tokens in a row agree,
    of which the first counts too, at most `_AHEAD` tokens further on. Each token of the prediction counts once, whoever
    proposed it: so the number is the same without speculation. With what is not repeated, OpenAI's rejected tokens, it
    adds up to the prediction's length.
    """

    def __init__(self, prediction_ids: Sequence[int]) -> None:
        self._ids = prediction_ids
        self._next, self._last = 0, -1
        """The first token of the prediction that may still be repeated; and the answer's last token."""
        self.accepted = 0

    @property
    def rejected(self) -> int:
        """So far."""
        return len(self._ids) - self.accepted

    def add(self, token_ids: Iterable[int]) -> None:
        """Add tokens of the answer."""
        for token in token_ids:
            at = self._place_of(token)
            if at is not None:
                begins_again = at > self._next
                self.accepted += 1 + begins_again
                self._next = at + 1
            self._last = token

    def _place_of(self, token: int) -> int | None:
        ids, begin = self._ids, self._next
        if begin < len(ids) and ids[begin] == token:
            return begin
        for at in range(begin + 1, min(len(ids), begin + _AHEAD)):
            if ids[at] == token and ids[at - 1] == self._last:
                return at
        return None
