"""The bodies of POST /infill, as llama.cpp's server has it, and of POST /v1/fim/completions, as Mistral's API has it.

Both are text completions in which a hole is filled, and have the fields of those beside their own, but for what their
answers have no place for. Leaves out the prompt (serve/http/fim_prompt.py) and the answers: /infill's is in
serve/http/infill_response.py, Mistral's is a chat's.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict, WholeText
from aurora_lit.serve.http.fim_prompt import Hole, OtherFile
from aurora_lit.serve.http.schema import Sampling

MAX_OTHER_FILES = 1024
_AROUND_TOKENS = 2048
"""Of an /infill prompt: what is before and after the hole. llama.cpp's server takes as much with its default batch."""
_INT64 = 2**63


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

    TOKEN_LIMITS = ("max_tokens", "n_predict")
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

    TOKEN_LIMITS = ("n_predict",)
    # Its answer has no place for these.
    echo: ClassVar[None] = None
    logprobs: ClassVar[None] = None
    n: ClassVar[None] = None  # type: ignore[misc]
    prompt_logprobs: ClassVar[None] = None  # type: ignore[misc]
    return_token_sources: ClassVar[None] = None  # type: ignore[misc]
    stream_options: ClassVar[None] = None  # type: ignore[misc]

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
