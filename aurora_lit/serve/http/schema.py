"""The bodies of POST /v1/chat/completions and /v1/completions: every field and its range.

No field is silently ignored: an unsupported one is refused by name, unless its value means "not used" (NEUTRAL).
Structured outputs, tools and conversations have files of their own (structured_fields.py, tool_fields.py,
message_fields.py, prediction.py), and so have llama.cpp's fields (llama_cpp_fields.py) and the bodies of the routes
that only fill holes (fim_schema.py). Leaves out checks that need a tokenizer or the model's limits
(serve/http/tokenize.py) and the wording of error bodies (serve/http/errors.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, WithJsonSchema, model_validator

from aurora_lit.errors import RequestError
from aurora_lit.request import MAX_DOMAIN_CHARACTERS, SamplingParams
from aurora_lit.serve.http.body import Strict, WholeText, at_most, drop_neutral, shorten
from aurora_lit.serve.http.fim_prompt import Hole
from aurora_lit.serve.http.llama_cpp_fields import MAX_CHOICES, LlamaCpp
from aurora_lit.serve.http.message_fields import Messages, Templated
from aurora_lit.serve.http.prediction import Predicting
from aurora_lit.serve.http.structured_fields import Structured
from aurora_lit.serve.http.tool_fields import ToolChoosing, Tools

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_TOKEN_IDS = 1024
"""Of stop_token_ids, and of logit_bias."""
MAX_STOP_CHARACTERS = 256
MAX_SALT_CHARACTERS = 256
MAX_METADATA = 16
"""Entries, as in OpenAI's API."""
DOMAIN_KEY = "aurora_domain"
"""The key of `metadata` that holds a request's domain label."""
_INT64 = 2**63
T = TypeVar("T")

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "dry_multiplier": (None, 0, 0.0),
    "dynatemp_range": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "grammar": (None, ""),
    "guided_decoding_backend": (None,),
    "guided_whitespace_pattern": (None,),
    "json_schema": (None,),
    "length_penalty": (None, 1, 1.0),
    "lora": (None, []),
    "mirostat": (None, 0),
    "modalities": (None, ["text"]),
    "n_cache_reuse": (None, 0),
    "n_discard": (None, 0),
    "n_keep": (None, 0, -1),
    "n_probs": (None, 0),
    "post_sampling_probs": (None, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "repeat_penalty": (None, 1, 1.0),
    "return_progress": (None, False),
    "return_tokens": (None, False),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "suffix": (None, ""),
    "timings_per_token": (None, False),
    "top_n_sigma": (None, -1, -1.0),
    "typical_p": (None, 1, 1.0),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "xtc_probability": (None, 0, 0.0),
}
"""Fields of other servers that clients send, with the values that have no effect."""

_PARAMS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"),
    *("include_stop_str_in_output", "skip_special_tokens", "ignore_eos", "speculate"),
)
"""Fields that the engine reads as they are. Its defaults are those of OpenAI's API; a model's own are filled in before
(`with_defaults`)."""
Text = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS, min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=_INT64)]
Bias = Annotated[float, Field(ge=-100, le=100)]
# The minimum length is only for /openapi.json: serve/http/tokenize.py refuses empty prompts with a better message.
PromptText = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]
# A list may have millions of members, so validation ends at the first that is wrong.
Prompts = Annotated[list[T], Field(json_schema_extra={"minItems": 1}, fail_fast=True)]


class StreamOptions(Strict):
    """Additional contents of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Structured, LlamaCpp):
    """The fields that all routes share that generate."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None  # logits are divided by it
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_TOKEN_IDS), at_most(MAX_TOKEN_IDS)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] | None = None
    store: bool | None = None
    speculate: bool | None = None
    return_token_sources: bool | None = None
    reasoning_effort: Literal["none"] | None = None
    """In a chat; a text completion has no template that could make a model think."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None

    TOKEN_LIMITS: ClassVar[tuple[str, ...]] = ("max_tokens", "max_completion_tokens", "n_predict")
    """The fields that limit an answer's length."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, body: Any) -> Any:
        drop_neutral(body, {"reasoning_effort": (None, "none")})  # other efforts are refused as those fields are
        return drop_neutral(body, {name: ok for name, ok in NEUTRAL.items() if name not in cls.model_fields})

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only for stream=true; leave it out", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not for stream=true; leave one of them out", param="prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_domain(self) -> Sampling:
        domain = (self.metadata or {}).get(DOMAIN_KEY)
        if domain is not None and not (0 < len(domain) <= MAX_DOMAIN_CHARACTERS and domain.isprintable()):
            raise RequestError(
                f"metadata.{DOMAIN_KEY}={shorten(domain)} is no label; use 1 to {MAX_DOMAIN_CHARACTERS} printable "
                "characters",
                param=f"metadata.{DOMAIN_KEY}",
            )
        return self

    @property
    def _decides_the_end(self) -> str:
        """The field whose grammar decides where an answer ends; "" without one."""
        return "" if self.structure is None else self.structure[0]

    @model_validator(mode="after")
    def _check_end(self) -> Sampling:
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name) and self._decides_the_end:
                raise RequestError(
                    f"{name} cannot be combined with {self._decides_the_end}, whose grammar decides where an answer "
                    "ends; leave it out",
                    param=name,
                )
        return self

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """The same body, in which these parameters have these values if the client gave none, or null.

        Those of samplers that it does not ask for are off.
        """
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=missing | self.switched_off(num_choices=self.choices[1]))

    @property
    def may_be_stored(self) -> bool:
        """True if the draft may learn from the request; only `store: false` forbids it."""
        return _or(self.store, True)

    @property
    def domain(self) -> str:
        """The client's domain label; "" without one, and if nothing may be kept: status and metrics name labels."""
        return (self.metadata or {}).get(DOMAIN_KEY, "") if self.may_be_stored else ""

    @property
    def choices(self) -> tuple[str, int]:
        """The name under which the request gives the number of choices per prompt, and the number."""
        name, number = self._given_as(("n", "n_cmpl"))
        return name, _or(number, 1)

    @property
    def is_watched(self) -> bool:
        """True if something looks at the answers before they end."""
        return bool(self.stream or self.stop or self.n_indent or self.most_s)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The name under which the request gives max_tokens, and its value; None if it does not, or says "no limit"."""
        name, limit = self._given_as(self.TOKEN_LIMITS)
        return name, None if limit == -1 else limit

    def _given_as(self, names: tuple[str, ...]) -> tuple[str, int | None]:
        """Which of the names of one field the request has, and its value; None if it has none.

        Raises RequestError if it has two, and they differ.
        """
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        if len({value for _, value in given}) > 1:
            all_given = " and ".join(f"{name}={value}" for name, value in given)
            raise RequestError(f"{all_given} differ; send one of them", param=given[-1][0])
        return given[-1] if given else (names[0], None)

    def sampling_params(
        self, *, max_tokens: int, vocab_size: int, logprobs: int | None, echoed_logprobs: int | None = None
    ) -> SamplingParams:
        """The engine's sampling parameters; null means their default.

        logprobs, echoed_logprobs: alternatives per token of the answer, and of a prompt that is part of it.
        """
        of_prompt = [number for number in (self.prompt_logprobs, echoed_logprobs) if number is not None]
        for token_id in self.stop_token_ids or ():
            if token_id >= vocab_size:
                raise RequestError(
                    f"stop_token_ids: {token_id} is no token; use 0 to {vocab_size - 1}", param="stop_token_ids"
                )
        if _or(self.min_tokens, 0) > max_tokens:
            raise RequestError(
                f"min_tokens={shorten(self.min_tokens)} is more than the {max_tokens} tokens that may be generated; "
                "lower it or raise max_tokens",
                param="min_tokens",
            )
        given = {name: value for name in _PARAMS if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            top_k=max(0, _or(self.top_k, 0)),
            logit_bias=_token_keys(self.logit_bias or {}, vocab_size),
            seed=None if self.seed == -1 else self.seed,  # as in vLLM and llama.cpp
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=max(of_prompt, default=None),
            structured_outputs=None if self.structure is None else self.structure[1],
        )


class ChatRequest(Sampling, Templated, ToolChoosing, Predicting):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def template_options(self) -> dict[str, Any]:
        """With `reasoning_effort` as vLLM has it: the variables by which templates begin an answer without thinking."""
        without_thinking = {"enable_thinking": False, "reasoning_effort": "none"}
        return {**(without_thinking if self.reasoning_effort else {}), **super().template_options}

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only for logprobs=true; set it", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _check_tools_and_structure(self) -> ChatRequest:
        place = "" if self.structure is None else self.structure[0]
        if self.must_call and place:
            raise RequestError(
                f"tool_choice asks for a call, {place} for something else; send one of them", param="tool_choice"
            )
        if self.callable_tools and place and not place.startswith("response_format"):
            raise RequestError(
                f'{place} cannot be combined with tools; use response_format, or tool_choice="none"',
                param=place.split(".")[0],
            )
        return self

    @property
    def _decides_the_end(self) -> str:
        return super()._decides_the_end or ("tools" if self.needs_grammar else "")

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives per token; None: no log-probabilities."""
        return _or(self.top_logprobs, 0) if self.logprobs else None


class CompletionRequest(Sampling, Predicting):
    """POST /v1/completions."""

    prompt: PromptText | Prompts[PromptText] | Prompts[TokenId] | Prompts[Prompts[TokenId]]
    suffix: WholeText | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_best_of(cls, body: Any) -> Any:
        """Choosing the best n of n answers leaves all of them. Other values are refused with the unsupported fields."""
        if isinstance(body, dict) and type(body.get("best_of")) is int and body["best_of"] == body.get("n"):
            return {name: value for name, value in body.items() if name != "best_of"}
        return body

    @model_validator(mode="after")
    def _check_zero_tokens(self) -> CompletionRequest:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and not self.echo:
                raise RequestError(f"{name}=0 is only for echo=true; use 1 or more", param=name)
        return self

    @model_validator(mode="after")
    def _check_suffix(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise RequestError("suffix cannot be combined with echo=true; leave one of them out", param="suffix")
        if self.suffix and not all(isinstance(prompt, Hole) for prompt in self.prompts):
            raise RequestError("suffix needs a prompt of text; token ids have their marks already", param="suffix")
        return self

    @property
    def prompts(self) -> list[str | list[int] | Hole]:
        """One entry per prompt; with a suffix what goes before and after a hole."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not self.suffix:
            return list(prompt)
        return [Hole(prefix=each, suffix=self.suffix) if isinstance(each, str) else each for each in prompt]


class TokenizeRequest(Templated):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _token_keys(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size):
            raise RequestError(
                f"logit_bias: key {shorten(key)} is no token id; use 0 to {vocab_size - 1}", param="logit_bias"
            )
    return {int(key): value for key, value in bias.items()}
