"""Turns a checked body into a `Call`: chat template, tokens, the model's limits, one request per choice.

Runs in the HTTP process, in a thread, since tokenizing a long prompt takes time. Leaves out the checks that need no
tokenizer (serve/http/schema.py), and that of structured outputs (serve/http/structure_check.py).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError

from aurora_lit.errors import RequestError
from aurora_lit.ipc.messages import Call
from aurora_lit.models.fim import FimMarks
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.request import UNKNOWN_CLIENT, Client, Request, RequestKind, SamplingParams, StructuredOutputsParams
from aurora_lit.serve.http.answer_stream import DEFAULT_OPTIONS, AnswerOptions
from aurora_lit.serve.http.body import NO_TEXT, is_text, shorten
from aurora_lit.serve.http.detokenizer import decode
from aurora_lit.serve.http.fim_prompt import Hole, HolePrompt, lay_out
from aurora_lit.serve.http.fim_schema import FimRequest, InfillRequest
from aurora_lit.serve.http.message_fields import Message, Templated
from aurora_lit.serve.http.prediction import Predicting
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, Sampling
from aurora_lit.serve.http.structure_check import check_structure
from aurora_lit.serve.http.tool_fields import Tool
from aurora_lit.serve.http.tool_use import ToolUse, template_tools, tool_use, turns_of
from aurora_lit.tool_calls.formats import in_first_user_turn

DEFAULT_COMPLETION_TOKENS = 16
"""Default max_tokens of a text completion, as in OpenAI's API; the default of a chat is the rest of the context."""
MAX_LOGPROBS_OF_CALL = 1 << 20
"""Alternatives included: each takes some ten microseconds and 300 bytes when the response is built."""
_TOKENS_OF_OPEN_ANSWER = 2048
"""As so many tokens an answer counts there at most whose request names no max_tokens: few use up a long context."""
_TOKENS_OF_HOLE = 256
"""A prompt with a hole is cut so that an answer whose request names no maximum has as much room, if a quarter of the
context is more."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the loaded model."""

    max_seq_len: int
    vocab_size: int
    longest_token: int
    """Characters of the vocabulary's longest token. A text has at least len(text) / longest_token tokens, unless the
    tokenizer merges white space."""


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the vocabulary's longest token; goes through the whole vocabulary."""
    return max(map(len, tokenizer.get_vocab()))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call, and what its response needs of the prompts."""

    call: Call
    prompt_texts: tuple[str, ...]
    """One per prompt (not per choice); filled only for echo."""
    num_prompt_tokens: int
    """Of all prompts together; a prompt with several choices counts once."""
    kind: RequestKind
    """For the counts of traffic alone; neither engine nor learner knows it."""
    num_choices: int = 1
    """Of each prompt."""
    drop_output: bool = False
    """max_tokens or n_predict is 0: the one token that the engine generates is dropped."""
    options: AnswerOptions = DEFAULT_OPTIONS
    prompt_logprobs: int | None = None
    """Alternatives per token of the prompt, whose log-probabilities the response has; None: it has none."""
    tools: ToolUse | None = None
    """How the answers may call tools; None: they call none."""
    was_cut: bool = False
    """A prompt with a hole has not all that was sent."""


def prepare_chat(
    body: ChatRequest,
    *,
    call_id: str,
    tokenizer: Tokenizer,
    limits: Limits,
    client: Client = UNKNOWN_CLIENT,
    reads_calls: bool = True,
) -> Prepared:
    """Apply the chat template and tokenize. client: see `Request`.

    reads_calls: calls are told from the answers' text; False: they stay in it, in whatever form. Raises RequestError if
    the prompt is too long.
    """
    use = tool_use(body, tokenizer, reads_calls=reads_calls)
    text = render(body.messages, body, tools=body.callable_tools, tokenizer=tokenizer)
    # The template contains the special tokens.
    prompt_ids = _encode(tokenizer, text, limits, param="messages", add_special_tokens=False)
    max_tokens = _check_length(len(prompt_ids), body, limits, default=None, param="messages")
    params = body.sampling_params(
        max_tokens=max(1, max_tokens), vocab_size=limits.vocab_size, logprobs=body.num_logprobs
    )
    check_structure(body, tokenizer, vocab_size=limits.vocab_size)
    if use is not None:
        params = replace(
            params,
            structured_outputs=use.grammar,
            skip_special_tokens=params.skip_special_tokens and not use.shows_special_tokens,
        )
    predicted = _predicted(body, tokenizer, limits, room=limits.max_seq_len - len(prompt_ids))
    call = _call(call_id, [prompt_ids], [params], body, client, predicted)
    return Prepared(
        call=call,
        prompt_texts=(),
        num_prompt_tokens=len(prompt_ids),
        num_choices=body.choices[1],
        drop_output=body.token_limit[1] == 0,
        options=AnswerOptions(
            # A grammar takes an answer with the space that it begins with; other answers begin without one.
            continues_prompt=bool(body.continue_final_message) or body.structure is not None,
            by_token=bool(body.return_token_sources),
            grammar_field=body.structure[0] if body.structure else "tools" if use is not None and use.grammar else "",
            min_indent=body.n_indent or 0,
            most_s=body.most_s,
        ),
        prompt_logprobs=body.prompt_logprobs,
        tools=use,
        kind=_kind(body, "chat"),
    )


def render(messages: Sequence[Message], how: Templated, *, tools: Sequence[Tool] = (), tokenizer: Tokenizer) -> str:
    """A conversation as the model's prompt.

    Raises RequestError if there is no template, if it refuses the conversation, or if calls would have to be continued.
    """
    if tokenizer.chat_template is None:
        raise RequestError("this model has no chat template; use /v1/completions", param="messages")
    if how.continue_final_message and messages[-1].tool_calls:  # the prompt ends before them
        raise RequestError(
            "continue_final_message: the last message has tool_calls, which cannot be continued; leave them out",
            param="continue_final_message",
        )
    turns = turns_of(messages, tools, tokenizer)
    options = {**how.template_options, "tools": template_tools(tools) or None}
    try:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except TemplateError:  # perhaps of a system turn that is there for the tools alone
            if any(message.role in ("system", "developer") for message in messages):
                raise
            return str(tokenizer.apply_chat_template(in_first_user_turn(turns), tokenize=False, **options))
    # Templates also fail on variables of another type, and on deep ones.
    except (TemplateError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"messages: the chat template refuses them: {error}", param="messages") from error


def prepare_completion(
    body: CompletionRequest | FimRequest | InfillRequest,
    *,
    call_id: str,
    tokenizer: Tokenizer,
    limits: Limits,
    marks: FimMarks | None = None,
    client: Client = UNKNOWN_CLIENT,
    default_tokens: int | None = DEFAULT_COMPLETION_TOKENS,
) -> Prepared:
    """Tokenize each prompt, or check its ids; a hole is laid out. client: see `Request`.

    marks: of a model that fills holes. default_tokens: max_tokens of a body that says nothing of it; None: the rest of
    the context.
    Raises RequestError if a prompt is empty or too long, or has a hole that the model cannot fill.
    """
    if not body.prompts:
        raise RequestError("prompt is an empty list; send at least one prompt", param="prompt")
    default_tokens = None if body.n_predict == -1 else default_tokens
    is_free = body.structure is None and body.logprobs is None and not body.ignore_eos
    may_begin = is_free and getattr(tokenizer, "backend_tokenizer", None) is not None
    ids, texts, words, was_cut = list[tuple[int, ...]](), list[str](), list[str](), False
    for prompt in body.prompts:
        if isinstance(prompt, Hole):
            check_text(prompt.prefix, param="prompt")
            laid_out = _lay_out(prompt, marks, body, limits, default_tokens, may_begin=may_begin)
            was_cut |= laid_out.was_cut
            ids.append(laid_out.token_ids)
            words.append(laid_out.begins_with)
            continue
        if not prompt:
            raise RequestError("prompt is empty; send text or token ids", param="prompt")
        if isinstance(prompt, str):
            prompt_ids = _encode(tokenizer, prompt, limits, param="prompt", add_special_tokens=True)
            texts.append(prompt)
        else:
            prompt_ids = tuple(prompt)
            bad = next((token_id for token_id in prompt_ids if token_id >= limits.vocab_size), None)
            if bad is not None:
                raise RequestError(f"prompt: {bad} is no token; use 0 to {limits.vocab_size - 1}", param="prompt")
            skips = body.skip_special_tokens is not False
            texts.append(decode(tokenizer, prompt_ids, skips_special_tokens=skips) if body.echo else "")
        ids.append(prompt_ids)
        words.append("")
    params, fills_hole = [], any(isinstance(prompt, Hole) for prompt in body.prompts)
    for prompt_ids, word in zip(ids, words, strict=True):
        max_tokens = _check_length(len(prompt_ids), body, limits, default=default_tokens, param="prompt")
        options = body.sampling_params(
            max_tokens=max(1, max_tokens),
            vocab_size=limits.vocab_size,
            logprobs=body.logprobs,
            echoed_logprobs=body.logprobs if body.echo else None,
        )
        if marks is not None and marks.marks_hole(prompt_ids):
            fills_hole = True
            options = replace(options, stop_token_ids=(*options.stop_token_ids, *sorted(marks.stops)))
        if word:
            options = replace(options, structured_outputs=StructuredOutputsParams(begins_with=word))
        params.append(options)
    check_structure(body, tokenizer, vocab_size=limits.vocab_size)
    predicted: tuple[int, ...] = ()
    if isinstance(body, CompletionRequest):
        predicted = _predicted(body, tokenizer, limits, room=limits.max_seq_len - max(map(len, ids)))
    return Prepared(
        call=_call(call_id, ids, params, body, client, predicted),
        prompt_texts=tuple(texts) if body.echo else (),
        num_prompt_tokens=sum(map(len, ids)),
        num_choices=body.choices[1],
        drop_output=body.token_limit[1] == 0,
        options=AnswerOptions(
            continues_prompt=True,
            by_token=bool(body.return_token_sources),
            grammar_field=body.structure[0] if body.structure else "",
            min_indent=body.n_indent or 0,
            most_s=body.most_s,
        ),
        prompt_logprobs=body.prompt_logprobs,
        was_cut=was_cut,
        kind=_kind(body, "fim" if fills_hole else "completion"),
    )


def _kind(body: Sampling, kind: RequestKind) -> RequestKind:
    """A request with a prediction is an edit, whatever its route."""
    return "edit" if isinstance(body, Predicting) and body.prediction is not None else kind


def _lay_out(
    hole: Hole,
    marks: FimMarks | None,
    body: Sampling,
    limits: Limits,
    default_tokens: int | None,
    *,
    may_begin: bool,
) -> HolePrompt:
    """A hole's prompt, with room for the answer. may_begin: see `lay_out`.

    Raises RequestError if the model cannot fill holes.
    """
    if marks is None:
        is_field = isinstance(body, CompletionRequest)
        asked = "suffix" if is_field else "this route"
        raise RequestError(
            f"{asked} needs a model with tokens for fill in the middle, such as Qwen2.5-Coder; this one has none",
            param="suffix" if is_field else None,
            code="unsupported_parameter" if is_field else "not_supported",
            status=400 if is_field else 501,
        )
    wanted = body.token_limit[1]
    if wanted is None:
        wanted = min(_TOKENS_OF_HOLE, limits.max_seq_len // 4) if default_tokens is None else default_tokens
    return lay_out(hole, marks, num_tokens=limits.max_seq_len - max(1, wanted), may_begin=may_begin)


def _encode(
    tokenizer: Tokenizer, text: str, limits: Limits, *, param: str, add_special_tokens: bool
) -> tuple[int, ...]:
    check_text(text, param=param)
    # Tokenizing megabytes takes seconds; for a prompt that is too long, its beginning suffices to find out.
    beginning = text[: limits.max_seq_len * limits.longest_token]
    if len(beginning) < len(text):
        _check_room(len(tokenizer.encode(beginning, add_special_tokens=False)), limits, param=param)
    ids = tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    # Some tokenizers have tokens for which their model has no row, such as one for images.
    if (foreign := next((i for i in ids if i >= limits.vocab_size), None)) is not None:
        token = shorten(tokenizer.convert_ids_to_tokens(foreign))
        raise RequestError(f"{param}: this model has no token {token} ({foreign}); leave it out", param=param)
    return ids


def _predicted(
    body: ChatRequest | CompletionRequest, tokenizer: Tokenizer, limits: Limits, *, room: int
) -> tuple[int, ...]:
    """The prediction's tokens. Raises RequestError if no answer could be as long, or if there are several answers."""
    if body.prediction is None:
        return ()
    if isinstance(body, CompletionRequest) and len(body.prompts) > 1:
        raise RequestError("prediction is of one answer, and there are several prompts; send one", param="prediction")
    text = body.prediction.text
    # As with prompts, the beginning of a much too long text suffices.
    ids = _encode(
        tokenizer, text[: (room + 1) * limits.longest_token], limits, param="prediction", add_special_tokens=False
    )
    if len(ids) > room:
        raise RequestError(
            f"prediction has {len(ids)} tokens or more: this model's maximum context length is {limits.max_seq_len} "
            f"tokens, and the prompt leaves {room} for the answer; shorten it",
            param="prediction",
            code="context_length_exceeded",
        )
    return ids


def check_model(name: str | None, *, served: str) -> None:
    """Raise RequestError for any model but the served one; a request without a model, or with "", gets that."""
    if name not in (None, "", served):
        raise RequestError(
            f"model={shorten(name)} does not exist; this server has {served}",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_logprobs(body: Sampling, prepared: Prepared) -> None:
    """Raise RequestError if a response would have more log-probabilities than MAX_LOGPROBS_OF_CALL."""
    num_of_answers = num_of_prompts = 0
    is_open = body.token_limit[1] is None
    for index, request in enumerate(prepared.call.requests):
        params, num_prompt = request.params, len(request.prompt_ids)
        if params.logprobs is not None:
            num_tokens = params.max_tokens or 0
            num_positions = min(num_tokens, _TOKENS_OF_OPEN_ANSWER) if is_open else num_tokens
            num_positions += num_prompt if prepared.prompt_texts else 0
            num_of_answers += num_positions * (params.logprobs + 1)
        # A chat's are sent once.
        if prepared.prompt_logprobs is not None and not (index and isinstance(body, ChatRequest)):
            num_of_prompts += num_prompt * (prepared.prompt_logprobs + 1)
    total = num_of_answers + num_of_prompts
    if total > MAX_LOGPROBS_OF_CALL:
        field = "top_logprobs" if isinstance(body, ChatRequest) and body.top_logprobs else "logprobs"
        field = "prompt_logprobs" if num_of_prompts > num_of_answers else field
        raise RequestError(
            f"{field}: the response may have {total} log-probabilities, of all tokens of all choices and their "
            f"alternatives, and at most {MAX_LOGPROBS_OF_CALL} are sent; ask for fewer alternatives, choices or tokens "
            "(max_tokens)",
            param=field,
        )


def check_text(text: str, *, param: str) -> None:
    """Raise RequestError for half of a surrogate pair, which JSON may hold and no tokenizer reads."""
    if not is_text(text):
        raise RequestError(f"{param}: {NO_TEXT}", param=param)


def _check_room(num_prompt: int, limits: Limits, *, param: str) -> int:
    """Number of tokens left for the answer. Raises RequestError if there are none.

    Clients such as LiteLLM know the error by OpenAI's words: "this model's maximum context length is".
    """
    room = limits.max_seq_len - num_prompt
    if room < 1:
        raise RequestError(
            f"{param}: this model's maximum context length is {limits.max_seq_len} tokens, and a prompt of "
            f"{num_prompt} or more leaves no room for an answer; shorten the prompt or raise engine.max_seq_len",
            param=param,
            code="context_length_exceeded",
        )
    return room


def _check_length(num_prompt: int, body: Sampling, limits: Limits, *, default: int | None, param: str) -> int:
    """Most new tokens. Raises RequestError if prompt and answer together exceed the context."""
    room = _check_room(num_prompt, limits, param=param)
    field, wanted = body.token_limit
    if wanted is not None and wanted > room:
        raise RequestError(
            f"{field}={shorten(wanted)} is too many: this model's maximum context length is {limits.max_seq_len} "
            f"tokens, and the prompt has {num_prompt}; use at most {room}",
            param=field,
            code="context_length_exceeded",
        )
    if wanted is not None:
        return wanted
    return room if default is None else min(default, room)


def _call(
    call_id: str,
    prompts: Sequence[tuple[int, ...]],
    params: Sequence[SamplingParams],
    body: Sampling,
    client: Client,
    prediction_ids: tuple[int, ...],
) -> Call:
    """n requests per prompt. Choice i uses seed + i, so that choices differ but are reproducible.

    Only the first choice of a prompt asks for the prompt's log-probabilities, since a request that does cannot use the
    prefix cache. In a stream every choice does: an echoed prompt comes with a choice's first tokens, and the first
    choice may begin later than others.
    """
    requests: list[Request] = []
    name = uuid.uuid4().hex  # not the call's id, which the client knows: traces on disk have the name
    for prompt_ids, options in zip(prompts, params, strict=True):
        for choice in range(body.choices[1]):
            # Random generators take 63-bit seeds.
            seed = None if options.seed is None else (options.seed + choice) % 2**63
            of_prompt = options.prompt_logprobs if choice == 0 or body.stream else None
            requests.append(
                Request(
                    request_id=f"{name}-{len(requests)}",
                    prompt_ids=prompt_ids,
                    prediction_ids=prediction_ids,
                    params=replace(options, seed=seed, prompt_logprobs=of_prompt),
                    store=body.may_be_stored,
                    domain=body.domain,
                    client=client,
                    cache_salt=body.cache_salt or "",
                    call=name,
                )
            )
    return Call(call_id=call_id, requests=tuple(requests), is_answered_whole=not body.is_watched)
