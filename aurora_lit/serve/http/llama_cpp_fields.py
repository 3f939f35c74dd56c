"""The fields of llama.cpp's server, which takes them on every route that generates: its editors send them to any.

Leaves out those of `POST /infill` alone (serve/http/fim_schema.py), and those that are accepted only where they have no
effect (`NEUTRAL` in serve/http/schema.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from aurora_lit.serve.http.body import Strict

MAX_CHOICES = 128
MAX_RESPONSE_FIELDS = 256
_INT32, _INT64 = 2**31, 2**63

Sampler = Literal["infill", "min_p", "penalties", "temperature", "top_k", "top_p", "dry", "top_n_sigma", "typ_p", "xtc"]
"""The last four do nothing, since their parameters are refused."""
_OFF: Mapping[str, Mapping[str, float]] = {
    "penalties": {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k": {"top_k": 0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
}
"""By sampler: its parameters when it is not asked for."""


class LlamaCpp(Strict):
    """A body that may have llama.cpp's fields."""

    n_predict: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    """0: the prompt is read, so that its prefix is known. -1: as many as the context has room for."""
    n_cmpl: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    n_indent: Annotated[int, Field(ge=0, lt=_INT32)] | None = None
    id_slot: Annotated[int, Field(ge=-1, lt=_INT32)] | None = None
    """It has an effect in `POST /infill` alone."""
    samplers: Annotated[list[Sampler], Field(max_length=64, fail_fast=True)] | None = None
    cache_prompt: bool | None = None
    """No effect: answers do not depend on what is known of a prompt."""
    t_max_prompt_ms: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    """No effect, as in llama.cpp."""
    t_max_predict_ms: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    response_fields: Annotated[list[str], Field(max_length=MAX_RESPONSE_FIELDS, fail_fast=True)] | None = None
    """Of the answer of `POST /infill`; those in OpenAI's form are sent whole, as in llama.cpp."""

    @property
    def most_s(self) -> float | None:
        """Seconds after its first token when an answer with a line break ends; None: never."""
        return self.t_max_predict_ms / 1000 if self.t_max_predict_ms and self.t_max_predict_ms > 0 else None

    def switched_off(self, *, num_choices: int) -> dict[str, float]:
        """The parameters of samplers that are not asked for, with the values that have no effect.

        llama.cpp's `infill` sampler drops all tokens but the most certain. Here the most likely one is taken, unless
        several answers are asked for, which would be the same one.
        """
        if self.samplers is None:
            return {}
        off = dict[str, float]()
        for sampler, parameters in _OFF.items():
            off |= {} if sampler in self.samplers else parameters
        if "infill" in self.samplers:
            off.pop("temperature", None)
            off |= {"temperature": 0.0} if num_choices == 1 else {}
        return off
