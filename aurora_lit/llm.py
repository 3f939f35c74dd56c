"""The Python door: target and draft in this process, for scripts and notebooks.

    from aurora_lit import LLM, SamplingParams

    with LLM() as llm:
        for answer in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0.0)):
            print(answer.outputs[0].text)
        llm.chat([{"role": "user", "content": "Hello!"}])

Names and defaults are vLLM's. Prompts and parameters are read as the bodies of HTTP requests, so both are checked and
understood alike. Leaves out learning: the configured draft serves and stays as it is (`aurora-lit serve` learns).
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import ValidationError

from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError, RequestError
from aurora_lit.models.fim import fim_marks
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.request import SamplingParams, StructuredOutputsParams, TokenLogprob
from aurora_lit.serve.http.answer_stream import AnswerStream, TextDelta
from aurora_lit.serve.http.detokenizer import decode
from aurora_lit.serve.http.errors import explain
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, Sampling
from aurora_lit.serve.http.tokenize import Limits, Prepared, longest_token, prepare_chat, prepare_completion
from aurora_lit.serve.worker.build import build_engine
from aurora_lit.serve.worker.call_tracker import CallTracker

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}, which may have a "cache_salt" too, and a
"prediction": a text that the answer will probably repeat, so that it comes sooner."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation: role and content of each turn, as in the body of a chat request."""
_Body = TypeVar("_Body", bound=Sampling)
_LISTS = ("stop", "stop_token_ids")
"""Parameters that are lists in a body, where a text is one stop string."""


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's log-probability, before temperature."""

    logprob: float
    rank: int | None
    """1: the most likely; None for a chosen token outside the most likely ones that were asked for."""
    decoded_token: str
    """Of special tokens too."""


@dataclass(kw_only=True)
class CompletionOutput:
    """One answer."""

    index: int
    """Which of the prompt's `n` answers."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token the chosen and the most likely ones, by token id; None unless SamplingParams.logprobs is set."""
    cumulative_logprob: float | None = None
    """Of all tokens of the answer."""
    finish_reason: str | None = None
    """"stop" (end of text, stop token or stop string), "length", or "error": its grammar could not be followed, and the
    log says why; what its last round brought is left out."""
    num_rounds: int = 0
    """Passes of the target that this answer took part in."""

    @property
    def accepted_length(self) -> float:
        """Tokens a round: 1 without speculation."""
        return len(self.token_ids) / self.num_rounds if self.num_rounds else 0.0


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None
    """None for a prompt of token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """Of the prompt, not computed because the prefix cache had them."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """As `CompletionOutput.logprobs`, of the prompt's tokens; the first one has none. None unless
    SamplingParams.prompt_logprobs is set."""
    finished: bool = True


class LLM:
    """A target and its draft, loaded once, which answer batches of prompts.

    The thread that makes it should be the one that uses it: another one has CPU threads of its own, which wait for each
    other asleep while the first one's exist, so that rounds take up to twice as long (`compute_alone` in
    kernels/native.py). Calls from several threads wait for each other, and each gets its whole answers; prompts are
    decoded together only if they come in one call.
    """

    def __init__(
        self, model: str | None = None, *, config: str | Path | None = None, overrides: Sequence[str] = ()
    ) -> None:
        """Load the models.

        model: the target, by name or folder; None: the configured one. config: a YAML file of settings, or the name of
        a shipped deployment; None: the default one, of which a `model` takes neither digest nor draft. overrides:
        settings as on the command line, such as "engine.max_batch_size=4" or "draft.checkpoint=FOLDER". Raises
        ConfigError, SourceError or CheckpointError.
        """
        chosen = [] if model is None else [f"target.source={model}"]
        if model is not None and config is None:
            chosen += ["target.sha256=null", "draft.checkpoint=null"]
        settings = load_config(None if config is None else Path(config), [*chosen, *overrides])
        self._engine, self._tokenizer = build_engine(settings)
        self._default_params = SamplingParams(**default_sampling(settings))  # of a target that is there by now
        self._limits = Limits(
            max_seq_len=self._engine.max_seq_len,
            vocab_size=self._engine.vocab_size,
            longest_token=longest_token(self._tokenizer),
        )
        self._fim_marks = fim_marks(self._tokenizer)
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        """Held during a call. Reentrant, so that a signal handler may close what its own thread uses."""

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of calls that give none: the model's own, as its generation config or the settings say."""
        return self._default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> list[RequestOutput]:
        """Continue each prompt as it is, without a chat template; all of them are decoded together.

        sampling_params: for all prompts, or one for each; None: `get_default_sampling_params()`. use_tqdm: vLLM's,
        without effect, since there is no progress bar. Raises RequestError, which names the field, before anything is
        generated. An answer whose grammar turns out later to be too complex ends with finish_reason "error"; the others
        go on.
        """
        each = [prompts] if _is_one(prompts) else list(prompts)
        with self._lock:
            self._check_open()
            return self._run([self._completion(*pair) for pair in self._paired(each, sampling_params)])

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prediction: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together. sampling_params, use_tqdm: as in `generate`.

        add_generation_prompt: the prompt ends with the beginning of an answer. continue_final_message: the answer goes
        on with the last message, which needs add_generation_prompt=False. tools: functions that the model may call, as
        in OpenAI's API; calls are in the answer's text, as the model writes them. chat_template_kwargs: variables of
        the chat template. prediction: a text that each answer will probably repeat, so that it comes sooner.
        """
        each = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        how = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools and [dict(tool) for tool in tools],
            "chat_template_kwargs": chat_template_kwargs and dict(chat_template_kwargs),
            "prediction": _as_field(prediction),
        }
        with self._lock:
            self._check_open()
            return self._run([self._chat(*pair, how) for pair in self._paired(each, sampling_params)])

    def close(self) -> None:
        """Free the models' memory, when running calls have ended; the object is of no use any more."""
        with self._lock:
            for name in ("_engine", "_tokenizer"):
                self.__dict__.pop(name, None)

    def _check_open(self) -> None:
        if not hasattr(self, "_engine"):
            raise AuroraError("this LLM was closed; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _paired(
        self, each: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Any, SamplingParams]]:
        """Every prompt with its parameters. Raises RequestError if their numbers differ."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or self._default_params] * len(each)
        if len(params) != len(each):
            raise RequestError(
                f"sampling_params: {len(params)} for {len(each)} prompts; give one, or one for each prompt",
                param="sampling_params",
            )
        return list(zip(each, params, strict=True))

    def _completion(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, Prepared]:
        asked: Mapping[str, Any] = _keys_of(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
        content = asked.get("prompt_token_ids", asked.get("prompt"))
        content = content if isinstance(content, str) else list(content or ())
        more = {"logprobs": params.logprobs, "cache_salt": asked.get("cache_salt")}
        more["prediction"] = _as_field(asked.get("prediction"))
        body = _body(CompletionRequest, params, prompt=content, **more)
        prepared = prepare_completion(
            body,
            call_id=self._call_id(),
            tokenizer=self._tokenizer,
            limits=self._limits,
            marks=self._fim_marks,
            default_tokens=None,
        )
        return content if isinstance(content, str) else None, prepared

    def _chat(self, messages: Messages, params: SamplingParams, how: Mapping[str, Any]) -> tuple[str | None, Prepared]:
        """how: the other fields of the body."""
        more = {"messages": [dict(turn) for turn in messages], **how}
        if params.logprobs is not None:
            more |= {"logprobs": True, "top_logprobs": params.logprobs}
        body = _body(ChatRequest, params, **more)
        prepared = prepare_chat(
            body, call_id=self._call_id(), tokenizer=self._tokenizer, limits=self._limits, reads_calls=False
        )
        return decode(self._tokenizer, prepared.call.requests[0].prompt_ids, skips_special_tokens=False), prepared

    def _call_id(self) -> str:
        return f"llm-{next(self._numbers)}"

    def _run(self, asked: Sequence[tuple[str | None, Prepared]]) -> list[RequestOutput]:
        """Run rounds until every call has ended. An answer that fails ends alone."""
        calls = {prepared.call.call_id: prepared.call for _, prepared in asked}
        streams = {
            prepared.call.call_id: AnswerStream(self._tokenizer, prepared.call.requests, prepared.options)
            for _, prepared in asked
        }
        answers = {
            call_id: [CompletionOutput(index=index) for index in range(len(call.requests))]
            for call_id, call in calls.items()
        }
        num_cached = dict.fromkeys(calls, 0)
        of_prompt = dict[str, list[dict[int, Logprob] | None]]()
        tracker = CallTracker(self._engine)
        try:
            for call in calls.values():
                tracker.add(call)
            while self._engine.has_work:
                updates = tracker.advance(self._engine.round()).updates
                for call_id, told in [(call_id, delta) for call_id, deltas in updates for delta in deltas]:
                    try:
                        added, stopped = streams[call_id].add([told])
                    except (RequestError, RuntimeError):
                        if told.finish_reason != "error":
                            raise
                        answers[call_id][told.index].finish_reason = "error"
                        continue
                    for delta in added:
                        if delta.index == 0:
                            num_cached[call_id] = delta.num_cached_tokens
                            if delta.prompt_logprobs is not None:
                                known = delta.prompt_logprobs
                                of_prompt[call_id] = [None if each is None else self._logprobs(each) for each in known]
                        self._extend(answers[call_id][delta.index], delta)
                    for index in stopped:
                        tracker.cancel_request(call_id, index)
        finally:
            for call_id in tracker.active_calls():  # after an error or Ctrl-C
                tracker.cancel(call_id)
        return [
            RequestOutput(
                request_id=prepared.call.call_id,
                prompt=text,
                prompt_token_ids=list(prepared.call.requests[0].prompt_ids),
                outputs=answers[prepared.call.call_id],
                num_cached_tokens=num_cached[prepared.call.call_id],
                prompt_logprobs=of_prompt.get(prepared.call.call_id),
            )
            for text, prepared in asked
        ]

    def _extend(self, answer: CompletionOutput, delta: TextDelta) -> None:
        """Add what a round brought."""
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.finish_reason = delta.finish_reason
        answer.num_rounds += 1
        if delta.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + [self._logprobs(each) for each in delta.logprobs]
            before = answer.cumulative_logprob or 0.0
            answer.cumulative_logprob = before + math.fsum(each.logprob for each in delta.logprobs)

    def _logprobs(self, token: TokenLogprob) -> dict[int, Logprob]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, start=1)}
        values = {token.token_id: token.logprob, **dict(token.top)}
        return {
            token_id: Logprob(
                logprob=logprob,
                rank=ranks.get(token_id),
                decoded_token=decode(self._tokenizer, [token_id], skips_special_tokens=False),
            )
            for token_id, logprob in values.items()
        }


def _keys_of(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What a prompt in vLLM's form says; None says nothing. Raises RequestError for a key that is not supported."""
    given = {name: value for name, value in prompt.items() if value is not None}
    for name in given.keys() - {"prompt", "prompt_token_ids", "cache_salt", "prediction"}:
        raise RequestError(
            f"{name} of a prompt is not supported; leave it out", param=name, code="unsupported_parameter"
        )
    return given


def _as_field(prediction: Any) -> dict[str, Any] | None:
    """As a body has it."""
    return None if prediction is None else {"type": "content", "content": prediction}


def _is_one(prompts: Any) -> bool:
    """True for a single prompt: text, a mapping, or token ids."""
    return isinstance(prompts, str | Mapping) or bool(prompts and isinstance(prompts[0], int))


def _body(kind: type[_Body], params: SamplingParams, **more: Any) -> _Body:
    """The body of an HTTP request with these parameters. Raises RequestError for a value that cannot be used."""
    given: dict[str, Any] = {parameter.name: getattr(params, parameter.name) for parameter in fields(params)}
    given |= {name: _listed(given[name]) for name in _LISTS}
    bias, structure = given["logit_bias"], given["structured_outputs"]
    if isinstance(bias, Mapping):
        given["logit_bias"] = {str(token_id): value for token_id, value in bias.items()}
    if isinstance(structure, StructuredOutputsParams):
        structure = {name: value for name, value in asdict(structure).items() if value is not None}
    if isinstance(structure, Mapping):  # the form of a body
        given["structured_outputs"] = {**structure, "choice": _listed(structure.get("choice"))}
    del given["logprobs"]
    try:
        return kind.model_validate({**given, **more})
    except ValidationError as error:
        in_body = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise explain(in_body, content_type="application/json") from error


def _listed(value: Any) -> Any:
    """A tuple or the like as a list. A text stays as it is, and so does what is no list, which the body refuses."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
