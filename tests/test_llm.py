"""The Python door on a tiny model: the same answers as the engine's, the same errors as the server's."""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft
from support.tiny_server import text_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import aurora_lit
from aurora_lit import llm as llm_module
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError, RequestError
from aurora_lit.grammars.matcher import Grammar, GrammarCompiler
from aurora_lit.llm import LLM
from aurora_lit.models.interface import Target
from aurora_lit.models.tokenizer import tokenizer_json
from aurora_lit.request import Request, SamplingParams, StructuredOutputsParams
from aurora_lit.serve.engine.engine import Engine

PROMPTS = [text_of([3, 9, 12, 4]), text_of([20, 7]), text_of([5] * 9)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
END = VOCAB - 1


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is one character; a chat is its contents between bars."""
    tokenizer = Tokenizer(models.BPE(vocab={text_of([i]): i for i in range(VOCAB)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for turn in messages %}{{ turn['content'] }}!{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


@pytest.fixture
def llm(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    def build(config: Any) -> tuple[Engine, PreTrainedTokenizerFast]:
        return make_engine(target, random_draft(target), max_batch_size=2), a_tokenizer()

    monkeypatch.setattr(llm_module, "build_engine", build)
    with LLM() as llm:
        yield llm


def test_vllms_none_means_no_stop_and_no_bias(llm: LLM, target: Target) -> None:
    nothing: Any = {"stop": None, "stop_token_ids": None, "logit_bias": None}
    (answer,) = llm.generate(PROMPTS[0], replace(GREEDY, **nothing))
    assert answer.outputs[0].token_ids == plain_tokens(target, PROMPTS[0], GREEDY)


def test_a_named_model_takes_neither_digest_nor_draft_of_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[AuroraConfig] = []

    class Asked(Exception):
        pass

    def build(config: AuroraConfig) -> None:
        asked.append(config)
        raise Asked

    monkeypatch.setattr(llm_module, "build_engine", build)
    for how in ({}, {"model": "hf:org/name"}, {"model": "hf:org/name", "overrides": ["draft.checkpoint=mine"]}):
        with pytest.raises(Asked):
            LLM(**how)  # type: ignore[arg-type]
    default, named, with_draft = asked
    assert default.target.sha256 is not None
    assert default.draft.checkpoint is not None
    assert (named.target.source, named.target.sha256, named.draft.checkpoint) == ("hf:org/name", None, None)
    assert with_draft.draft.checkpoint == "mine"


def test_a_closed_one_says_so(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "build_engine", lambda config: (make_engine(target), a_tokenizer()))
    llm = LLM()
    llm.close()
    with pytest.raises(AuroraError, match="was closed"):
        llm.generate("hello")


def a_compiler(target: Target) -> GrammarCompiler:
    """END is what ends an output."""
    state = tokenizer_json(a_tokenizer().backend_tokenizer)
    return GrammarCompiler(lambda: state, vocab_size=target.vocab_size, eos_token_ids=frozenset([END]))


def plain_tokens(target: Target, prompt: str, params: SamplingParams) -> list[int]:
    """What the target alone answers."""
    engine = make_engine(target)
    ids = tuple(a_tokenizer().encode(prompt))
    engine.submit(Request(request_id="a", prompt_ids=ids, params=params))
    found: list[int] = []
    while engine.has_work:
        for output in engine.round():
            found += output.token_ids
    return found


def test_calls_without_parameters_have_the_models_own(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()

    def build(config: Any) -> tuple[Engine, PreTrainedTokenizerFast]:
        """As a first start, which downloads the model."""
        (tmp_path / "generation_config.json").write_text('{"top_k": 1, "temperature": 1.5}')
        return make_engine(target, random_draft(target), max_batch_size=2), a_tokenizer()

    monkeypatch.setattr(llm_module, "build_engine", build)
    with LLM(str(tmp_path)) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(top_k=1, temperature=1.5)
        greedy = plain_tokens(target, PROMPTS[0], replace(GREEDY, max_tokens=16))
        assert llm.generate(PROMPTS[0])[0].outputs[0].token_ids == greedy, "the likeliest token alone is kept"
        free = SamplingParams(max_tokens=16, seed=3)
        assert llm.generate(PROMPTS[0], free)[0].outputs[0].token_ids == plain_tokens(target, PROMPTS[0], free)
        assert plain_tokens(target, PROMPTS[0], free) != greedy, "given parameters are taken whole"


def test_more_prompts_than_slots_get_the_targets_answers_in_their_order(llm: LLM, target: Target) -> None:
    answers = llm.generate(PROMPTS, GREEDY)
    assert [answer.prompt for answer in answers] == PROMPTS
    for answer in answers:
        (output,) = answer.outputs
        assert output.token_ids == plain_tokens(target, answer.prompt or "", GREEDY)
        assert output.text == text_of(output.token_ids)
        assert output.finish_reason == "length"
        assert 1 <= output.accepted_length == len(output.token_ids) / output.num_rounds


def test_calls_from_two_threads_wait_for_each_other(llm: LLM, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes what the engine's rounds give, which is the other's too."""
    engine, first, has_submitted = llm._engine, threading.get_ident(), threading.Event()
    run_round, submit, one_at_a_time = engine.round, engine.submit, threading.Lock()
    others: list[Future[Any]] = []

    def noted(request: Request) -> None:
        submit(request)
        if threading.get_ident() != first:
            has_submitted.set()

    def round_beside_another_call() -> Any:
        if not others:
            others.append(pool.submit(llm.generate, PROMPTS[1], GREEDY))
            has_submitted.wait(0.1)
        with one_at_a_time:
            return run_round()

    monkeypatch.setattr(engine, "submit", noted)
    monkeypatch.setattr(engine, "round", round_beside_another_call)
    with ThreadPoolExecutor(1) as pool:
        answers = [*llm.generate(PROMPTS[0], GREEDY), *others[0].result(10)]
    for answer, prompt in zip(answers, PROMPTS[:2], strict=True):
        (output,) = answer.outputs
        assert (output.token_ids, output.finish_reason) == (plain_tokens(target, prompt, GREEDY), "length")


def test_one_prompt_in_each_of_vllms_forms(llm: LLM, target: Target) -> None:
    ids, text = [3, 9, 12, 4], PROMPTS[0]
    more: Any = {"prompt": text, "prompt_token_ids": None, "multi_modal_data": None}
    expected = plain_tokens(target, text, GREEDY)
    for prompt in (text, ids, {"prompt": text}, more, {"prompt_token_ids": ids}):
        (answer,) = llm.generate(prompt, GREEDY)
        assert (answer.prompt_token_ids, answer.outputs[0].token_ids) == (ids, expected)
        assert answer.prompt == (text if isinstance(prompt, str) or "prompt" in prompt else None)


def test_a_repeated_prompt_is_read_from_the_prefix_cache_unless_its_salt_keeps_it_apart(llm: LLM) -> None:
    prompt = text_of([5, 9, 12] * 14)
    prompts = [prompt, prompt, *({"prompt": prompt, "cache_salt": salt} for salt in ("a", "b", "b"))]
    answers = [llm.generate(each, GREEDY)[0] for each in prompts]
    rest = len(prompt) - 1
    assert [answer.num_cached_tokens for answer in answers] == [0, rest, 0, 0, rest]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids


def test_a_prediction_is_proposed_and_changes_nothing(llm: LLM) -> None:
    chat = [{"role": "user", "content": PROMPTS[0]}]
    for ask, how in (
        (lambda **more: llm.generate({"prompt": PROMPTS[0], **more}, GREEDY), {"cache_salt": "p"}),
        (lambda **more: llm.chat(chat, GREEDY, **more), {}),
    ):
        expected = ask(**how)[0].outputs[0]
        answer = ask(**how, prediction=expected.text)[0].outputs[0]
        assert answer.token_ids == expected.token_ids
    with pytest.raises(RequestError, match="n cannot be combined with prediction"):
        llm.chat(chat, SamplingParams(n=2), prediction="a")


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, temperature=0.0) for count in (1, 5, 3)]
    assert [len(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, params)] == [1, 5, 3]
    assert len(llm.generate(PROMPTS[0])[0].outputs[0].token_ids) == 16, "vLLM's default"
    with pytest.raises(RequestError, match="2 for 3 prompts"):
        llm.generate(PROMPTS, params[:2])


def test_without_a_maximum_an_answer_may_take_the_rest_of_the_context(llm: LLM) -> None:
    unlimited = replace(GREEDY, max_tokens=None)
    chat = [{"role": "user", "content": PROMPTS[0]}]
    for answer in (llm.generate(PROMPTS[0], unlimited)[0], llm.chat(chat, unlimited)[0]):
        assert len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) == llm._engine.max_seq_len


def test_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=5, n=3)
    first, again = (llm.generate(PROMPTS[0], params)[0].outputs for _ in range(2))
    assert [output.index for output in first] == [0, 1, 2]
    texts = [output.text for output in first]
    assert texts == [output.text for output in again]
    assert len(set(texts)) > 1


def test_a_stop_string_ends_an_answer_and_frees_its_slot(llm: LLM, target: Target) -> None:
    """It is one string and not its characters."""
    text = text_of(plain_tokens(target, PROMPTS[0], GREEDY))
    stop, longer = text[4:6], text[3] + text
    given: list[tuple[Any, str, str]] = [(stop, text.split(stop)[0], "stop"), (longer, text, "length")]
    for each, expected, reason in [*given, ((stop,), *given[0][1:])]:  # vLLM takes both
        (answer,) = llm.generate(PROMPTS[0], replace(GREEDY, stop=each))
        assert (answer.outputs[0].text, answer.outputs[0].finish_reason) == (expected, reason)
        assert not llm._engine.has_work


def test_logprobs_are_by_token_with_ranks(llm: LLM) -> None:
    (answer,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=4, temperature=0.0, logprobs=2))
    (output,) = answer.outputs
    assert len(output.logprobs) == 4
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry[token].rank == 1, "greedy"
        assert entry[token].decoded_token == text_of([token])
        assert sorted(each.rank or 0 for each in entry.values()) == [1, 2]
    total = sum(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)
    (plain,) = llm.generate(PROMPTS[0], GREEDY)
    assert plain.outputs[0].logprobs is None


def test_special_tokens_are_named_beside_their_logprobs(llm: LLM) -> None:
    llm._tokenizer.add_special_tokens({"additional_special_tokens": [text_of([7])]})
    (answer,) = llm.generate([[3, 7]], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [entry and entry[7].decoded_token for entry in answer.prompt_logprobs] == [None, text_of([7])]


def test_prompt_logprobs_are_the_targets(llm: LLM, target: Target) -> None:
    (answer,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=2, prompt_logprobs=3))
    first, *rest = answer.prompt_logprobs
    assert first is None
    with torch.no_grad():
        logits_BTV = target.in_torch.model(torch.tensor([answer.prompt_token_ids]), use_cache=False).logits
        expected_TV = logits_BTV[0].log_softmax(-1)
    for place, known in enumerate(rest):
        token = answer.prompt_token_ids[place + 1]
        assert known[token].logprob == pytest.approx(float(expected_TV[place, token]), abs=1e-4)
        order = expected_TV[place].argsort(descending=True).tolist()
        assert {i: entry.rank for i, entry in known.items() if entry.rank} == {order[r]: r + 1 for r in range(3)}
    assert llm.generate(PROMPTS[0], GREEDY)[0].prompt_logprobs is None


def test_structured_outputs_have_vllms_names(llm: LLM, target: Target) -> None:
    """As an object, and as in a body."""
    llm._engine = make_engine(target, random_draft(target), grammars=a_compiler(target), eos_token_ids=frozenset([END]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"regex": "A[BC]{2,5}D"}, "A[BC]{2,5}D"),
        ({"choice": ("ABC", "BCDE")}, "ABC|BCDE"),
        ({"grammar": 'start: "A" x\nx: /[0-9]{3}/'}, "A[0-9]{3}"),
        ({"json": {"enum": [12, 3456]}}, "12|3456"),
        ({"json": '{"enum": [12, 3456]}'}, "12|3456"),
    ]
    for (asked, pattern), form in itertools.product(cases, (StructuredOutputsParams, dict)):
        params = SamplingParams(max_tokens=12, structured_outputs=form(**asked))  # type: ignore[operator]
        for answer in llm.generate([PROMPTS[0]] * 2, [replace(params, temperature=0.0), replace(params, n=4)]):
            assert all(re.fullmatch(pattern, output.text) for output in answer.outputs), asked
            assert {output.finish_reason for output in answer.outputs} == {"stop"}


@pytest.mark.parametrize("steps_before", [0, 2], ids=["at once", "after tokens that are not told yet"])
def test_a_grammar_that_fails_on_the_way_ends_its_answer_alone(
    steps_before: int, llm: LLM, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm._engine = make_engine(target, random_draft(target), grammars=a_compiler(target), eos_token_ids=frozenset([END]))

    advance, steps = Grammar.advance, Counter[int]()

    def failing(self: Grammar, tokens: Sequence[int]) -> None:
        steps[id(self)] += 1
        if steps[id(self)] > steps_before:
            raise RequestError("too complex")
        advance(self, tokens)

    monkeypatch.setattr(Grammar, "advance", failing)
    free = replace(GREEDY, ignore_eos=True)
    regex = StructuredOutputsParams(regex="A[BC]{9}D")
    structured = replace(GREEDY, structured_outputs=regex, n=2, temperature=1.0, speculate=False)
    bad, good = llm.generate(PROMPTS[:2], [structured, free])
    assert [(output.finish_reason, len(output.token_ids)) for output in bad.outputs] == [("error", steps_before)] * 2
    assert good.outputs[0].finish_reason == "length"
    assert good.outputs[0].token_ids == plain_tokens(target, PROMPTS[1], free)
    assert not llm._engine.has_work


def test_a_stop_string_wins_over_a_grammar_that_fails_in_its_round(
    llm: LLM, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm._engine = make_engine(target, random_draft(target), grammars=a_compiler(target), eos_token_ids=frozenset([END]))

    def failing(self: Grammar, tokens: Sequence[int]) -> None:
        raise RequestError("too complex")

    monkeypatch.setattr(Grammar, "advance", failing)
    structured = replace(GREEDY, structured_outputs=StructuredOutputsParams(regex="AB*C"))
    stopped, failed = llm.generate([PROMPTS[0]] * 2, [replace(structured, stop=("A",)), structured])
    assert (stopped.outputs[0].text, stopped.outputs[0].finish_reason) == ("", "stop")
    assert len(stopped.outputs[0].token_ids) == 1
    assert (failed.outputs[0].token_ids, failed.outputs[0].finish_reason) == ([], "error")


def test_a_chat_takes_the_chat_template(llm: LLM, target: Target) -> None:
    chat = [{"role": "user", "content": PROMPTS[0]}]
    one, both = llm.chat(chat, GREEDY), llm.chat([chat, chat], GREEDY)
    assert one[0].prompt == PROMPTS[0] + "!"
    assert one[0].outputs[0].token_ids == plain_tokens(target, PROMPTS[0] + "!", GREEDY)
    assert [answer.outputs[0].text for answer in both] == [one[0].outputs[0].text] * 2


def test_a_chat_may_have_tools_whose_calls_are_in_a_form_that_is_not_read(llm: LLM) -> None:
    """Calls stay in the text."""
    llm._tokenizer.chat_template = "{% if tools %}B{# <function= #}{% endif %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    (answer,) = llm.chat([{"role": "user", "content": "A"}], GREEDY, tools=tools)
    assert answer.prompt == "BA"
    assert answer.outputs[0].finish_reason == "length"


def test_a_chat_may_say_how_the_template_is_filled(llm: LLM) -> None:
    """The names are vLLM's. Its progress bar may be asked for; there is none."""
    llm._tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['content'] }}{{ '' if loop.last and continue_final_message else mark }}"
        "{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    chat, marked = [{"role": "user", "content": "AB"}], {"chat_template_kwargs": {"mark": "!"}}
    how: list[dict[str, Any]] = [
        {"use_tqdm": True},
        {"add_generation_prompt": False, **marked},
        {"add_generation_prompt": False, "continue_final_message": True},
    ]
    assert [llm.chat(chat, GREEDY, **each)[0].prompt for each in how] == ["AB?", "AB!", "AB"]
    with pytest.raises(RequestError, match="add_generation_prompt=false"):
        llm.chat(chat, GREEDY, continue_final_message=True)
    assert len(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([VOCAB], {}, f"prompt: {VOCAB} is no token"),
        ({"prompt": PROMPTS[0], "multi_modal_data": {}}, {}, "multi_modal_data of a prompt is not supported"),
        ({"prompt": PROMPTS[0], "cache_salt": ""}, {}, "cache_salt"),
        ({"prompt": PROMPTS[0], "prediction": 5}, {}, r"prediction\.content"),
        (PROMPTS[0], {"temperature": 5.0}, "temperature=5.0"),
        (PROMPTS[0], {"max_tokens": 10**6}, "max_tokens=1000000 is too many"),
        (PROMPTS[0], {"structured_outputs": StructuredOutputsParams(regex="(")}, r"structured_outputs\.regex cannot"),
        (PROMPTS[0], {"structured_outputs": StructuredOutputsParams()}, "structured_outputs is empty"),
        (PROMPTS[0], {"structured_outputs": StructuredOutputsParams(choice=5)}, "structured_outputs.choice=5"),
        (PROMPTS[0], {"structured_outputs": 5}, "structured_outputs=5"),
        (PROMPTS[0], {"stop": 7}, "stop=7"),
        (PROMPTS[0], {"stop_token_ids": 5}, "stop_token_ids=5"),
        (PROMPTS[0], {"logit_bias": [1]}, r"logit_bias=\[1\]"),
        (PROMPTS[0], {"logit_bias": {5: "x"}}, r"logit_bias\[.5.\]=.x."),
    ],
)
def test_bad_input_is_named_before_anything_runs(llm: LLM, prompt: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([PROMPTS[1], prompt], SamplingParams(**params))
    assert not llm._engine.has_work
    assert len(llm.generate(PROMPTS[1], GREEDY)) == 1


def test_an_interrupted_batch_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._engine
    rounds = iter([engine.round, engine.round])

    def interrupted() -> Any:
        for each in rounds:
            return each()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert not engine.has_work


def test_the_names_are_public() -> None:
    assert aurora_lit.LLM is LLM
    assert aurora_lit.SamplingParams is SamplingParams
    assert aurora_lit.StructuredOutputsParams is StructuredOutputsParams
