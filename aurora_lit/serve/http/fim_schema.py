"""The bodies of POST /infill, as llama.cpp's server has it, and of POST /v1/fim/completions, as Mistral's API has it.

Both are text completions in which a hole is filled, and have the fields of those beside their own, but for what their
answers have no place for. Leaves out the prompt (serve/http/fim_prompt.py) and the answers: /infill's is in
serve/http/infill_response.py, Mistral's is a chat's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict, WholeText, drop_neutral
from aurora_lit.serve.http.fim_prompt import Hole, OtherFile
from aurora_lit.serve.http.schema import MAX_CHOICES, Sampling

MAX_OTHER_FILES = 1024
MAX_RESPONSE_FIELDS = 256
_AROUND_TOKENS = 2048
"""Of an /infill prompt: what is before and after the hole. llama.cpp's server takes as much with its default batch."""
_INT32, _INT64 = 2**31, 2**63

NEUTRAL_IN_INFILL: Mapping[str, tuple[Any, ...]] = {
    "dry_multiplier": (None, 0, 0.0),
    "dynatemp_range": (None, 0, 0.0),
    "grammar": (None, ""),
    "json_schema": (None,),
    "lora": (None, []),
    "mirostat": (None, 0),
    "n_cache_reuse": (None, 0),
    "n_discard": (None, 0),
    "n_keep": (None, 0, -1),
    "n_probs": (None, 0),
    "post_sampling_probs": (None, False),
    "repeat_penalty": (None, 1, 1.0),
    "return_progress": (None, False),
    "return_tokens": (None, False),
    "timings_per_token": (None, False),
    "top_n_sigma": (None, -1, -1.0),
    "typical_p": (None, 1, 1.0),
    "xtc_probability": (None, 0, 0.0),
}
"""llama.cpp's fields for what is not done here, with the values that have no effect."""

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


class OtherFileField(Strict):
    """A part of another file."""

    text: WholeText
    filename: WholeText | None = None
    time: Any = None
    """When llama.vim and llama.vscode chose it. It has no effect: they are sent in this order."""


class FimRequest(Sampling):
    """POST /v1/fim/completions."""

    prompt: WholeText
    suffix: WholeText | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    random_seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None

    TOKEN_LIMITS = ("max_tokens",)
    echo: ClassVar[None] = None
    logprobs: ClassVar[None] = None

    @model_validator(mode="after")
    def _check_seeds(self) -> FimRequest:
        if self.seed is not None and self.random_seed not in (None, self.seed):
            raise RequestError("random_seed and seed differ; send one of them", param="random_seed")
        self.seed = self.random_seed if self.seed is None else self.seed
        return self

    @property
    def prompts(self) -> list[Hole]:
        """The hole."""
        return [Hole(prefix=self.prompt, suffix=self.suffix or "")]


class InfillRequest(Sampling):
    """POST /infill."""

    input_prefix: WholeText
    input_suffix: WholeText
    input_extra: Annotated[list[OtherFileField], Field(max_length=MAX_OTHER_FILES, fail_fast=True)] | None = None
    prompt: WholeText | None = None
    """Goes on with the prefix: editors send the cursor's line up to the cursor here."""
    n_predict: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    """0: the prompt is read, so that its prefix is known. -1: as many as the context has room for."""
    n_cmpl: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    n_indent: Annotated[int, Field(ge=0, lt=_INT32)] | None = None
    id_slot: Annotated[int, Field(ge=-1, lt=_INT32)] | None = None
    samplers: Annotated[list[Sampler], Field(max_length=64, fail_fast=True)] | None = None
    cache_prompt: bool | None = None
    """No effect: answers do not depend on what is known of a prompt."""
    t_max_prompt_ms: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    """No effect, as in llama.cpp."""
    t_max_predict_ms: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    response_fields: Annotated[list[str], Field(max_length=MAX_RESPONSE_FIELDS, fail_fast=True)] | None = None

    TOKEN_LIMITS = ("n_predict",)
    # Its answer has no place for these.
    echo: ClassVar[None] = None
    logprobs: ClassVar[None] = None
    n: ClassVar[None] = None  # type: ignore[misc]
    prompt_logprobs: ClassVar[None] = None  # type: ignore[misc]
    return_token_sources: ClassVar[None] = None  # type: ignore[misc]
    stream_options: ClassVar[None] = None  # type: ignore[misc]

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_in_infill(cls, body: Any) -> Any:
        return drop_neutral(body, NEUTRAL_IN_INFILL)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """As for other bodies; then the parameters of samplers that are not asked for are off.

        llama.cpp's `infill` sampler drops all tokens but the most certain. Here the most likely one is taken, unless
        several answers are asked for, which would be the same one.
        """
        body = super().with_defaults(defaults)
        if self.samplers is None:
            return body
        off = dict[str, float | None]()
        for sampler, parameters in _OFF.items():
            off |= {} if sampler in self.samplers else parameters
        if "infill" in self.samplers:
            off["temperature"] = 0.0 if self.num_choices == 1 else body.temperature
        return body.model_copy(update=off)

    @property
    def prompts(self) -> list[Hole]:
        """The hole."""
        others = tuple(OtherFile(other.filename or "tmp", other.text) for other in self.input_extra or ())
        prefix = self.input_prefix + (self.prompt or "")
        return [
            Hole(
                prefix=prefix,
                suffix=self.input_suffix,
                file_name="filename",  # clients do not send it; as in llama.cpp
                others=others,
                most_around=_AROUND_TOKENS,
            )
        ]

    @property
    def num_choices(self) -> int:
        """Number of answers."""
        return 1 if self.n_cmpl is None else self.n_cmpl

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """As for other bodies."""
        name, limit = super().token_limit
        return name, None if limit == -1 else limit

    @property
    def most_s(self) -> float | None:
        """Seconds after its first token when an answer with a line break ends; None: never."""
        return self.t_max_predict_ms / 1000 if self.t_max_predict_ms and self.t_max_predict_ms > 0 else None

    @property
    def is_watched(self) -> bool:
        """True if something looks at the answers before they end."""
        return super().is_watched or bool(self.n_indent) or self.most_s is not None
