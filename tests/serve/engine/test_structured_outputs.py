"""Outputs with a grammar: under speculation those of plain decoding, and their law is the target's, masked."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher, LLParserLimits
from scipy.stats import chi2
from support.grammars import END, VOCAB_SIZE, backend, compiler, law, text_of
from support.tiny_models import Answer, make_engine, random_draft, request, run, save_model, trained_draft

from aurora_lit.errors import RequestError
from aurora_lit.grammars import matcher
from aurora_lit.grammars.matcher import Grammar, GrammarCompiler
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, Source, StructuredOutputsParams
from aurora_lit.serve.engine.engine import Engine

PROMPT = [1, 3, 0]
REGEX = "[ab]{1,2}0,0(1|[bc]{2})"
LANGUAGE = {
    "".join(letters) + "0,0" + tail
    for n in (1, 2)
    for letters in itertools.product("ab", repeat=n)
    for tail in ("1", "bb", "bc", "cb", "cc")
}
WAYS: dict[str, dict[str, Any]] = {
    "chains": {},
    "branches": {"branches": True},
    "weighed": {"branches": True, "adaptive": True},
    "copies": {"copied_tokens": 15},
    "all": {"branches": True, "copied_tokens": 15},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-p and a bias": {"temperature": 0.8, "top_p": 0.9, "logit_bias": {1: 0.7, END: -1.0}},
    "penalties": {"temperature": 1.3, "presence_penalty": 0.5, "repetition_penalty": 1.3},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    target: Target
    draft: Eagle3Draft

    def engine(self, *, drafts: bool = True, grammars: GrammarCompiler | None = None, **changes: Any) -> Engine:
        fields = {"eos_token_ids": frozenset([END]), "max_seq_len": 40, "max_batch_size": 64, **changes}
        return make_engine(self.target, self.draft if drafts else None, grammars=grammars or compiler(), **fields)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder: Path = save_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCAB_SIZE, num_hidden_layers=4)
    target = load_target(folder, precision="fp32")
    plain = Case(target=target, draft=random_draft(target))
    texts = [PROMPT + answer.token_ids for answer in run(plain.engine(drafts=False), requests(200)).values()]
    texts = [list(text) for text in sorted(set(map(tuple, texts)))]
    longest = max(map(len, texts))
    padded = torch.tensor([text + [END] * (longest - len(text)) for text in texts])
    return Case(target=target, draft=trained_draft(target, padded, steps=16))


def requests(count: int, *, regex: str | None = REGEX, **params: Any) -> list[Request]:
    """Of different keys."""
    asked = None if regex is None else StructuredOutputsParams(regex=regex)
    fields = {"temperature": 1.0, "max_tokens": 12, "structured_outputs": asked, **params}
    return [replace(request(f"{regex}{key}", PROMPT, **fields), noise_key=key) for key in range(count)]


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


@pytest.fixture(scope="module")
def plain_answers(case: Case) -> Callable[[str], tuple[list[Request], dict[str, Answer]]]:
    """Requests with these options, with and without a grammar, and what plain decoding answers."""

    @functools.cache
    def of(options: str) -> tuple[list[Request], dict[str, Answer]]:
        asked = requests(40, **OPTIONS[options]) + requests(10, **OPTIONS[options], regex=None)
        return asked, run(case.engine(drafts=False), asked)

    return of


def test_an_output_that_must_begin_with_a_text_is_free_after_it(case: Case) -> None:
    """It goes on as plain decoding does from there."""
    beginning = StructuredOutputsParams(begins_with="ab")
    [any_request] = requests(1, temperature=0.0, structured_outputs=beginning, regex=None)
    asked = [replace(any_request, request_id=str(n), prompt_ids=(1, n % 8, n // 8)) for n in range(64)]
    answers = tokens(run(case.engine(**WAYS["all"]), asked))
    assert len({text_of(answer) for answer in answers.values()}) > 5
    free, goes_on, rest = replace(any_request.params, structured_outputs=None), [], {}
    for each in asked:
        answer = answers[each.request_id]
        assert text_of(answer).startswith("ab")
        begun = next(n for n in range(len(answer)) if text_of(answer[:n]).startswith("ab"))
        prompt_ids = (*each.prompt_ids, *answer[:begun])
        goes_on.append(replace(each, prompt_ids=prompt_ids, params=replace(free, max_tokens=12 - begun)))
        rest[each.request_id] = answer[begun:]
    assert tokens(run(case.engine(drafts=False), goes_on)) == rest


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [pytest.param(o, marks=pytest.mark.slow) if o == "temperature 1" else o for o in OPTIONS]
)
def test_outputs_are_those_of_plain_decoding_and_of_the_grammar(
    case: Case, plain_answers: Callable[[str], tuple[list[Request], dict[str, Answer]]], way: str, options: str
) -> None:
    asked, plain = plain_answers(options)
    engine = case.engine(**WAYS[way])
    answers = run(engine, asked, arrivals=[i // 3 for i in range(len(asked))])
    assert tokens(answers) == tokens(plain)
    assert engine.counters.accepted > (0 if way == "weighed" else 100)  # that one measures whether it pays
    for r in asked[:40]:
        answer = answers[r.request_id]
        assert text_of(answer.token_ids) in LANGUAGE
        assert (answer.token_ids[-1], answer.finish_reason) == (END, "stop")
    assert any(text_of(answers[r.request_id].token_ids) not in LANGUAGE for r in asked[40:])


@pytest.mark.parametrize(
    "options",
    [
        options if options == "penalties" else pytest.param(options, marks=pytest.mark.slow)
        for options in OPTIONS
        if options != "greedy"
    ],
)
def test_outputs_have_the_masked_law(case: Case, options: str) -> None:
    """Chi-square of whole outputs of 1500 keys against every output's enumerated probability, in plain decoding."""
    count = 1500
    asked = requests(count, **OPTIONS[options])
    seen = Counter(tuple(answer.token_ids) for answer in run(case.engine(drafts=False), asked).values())
    expected = {
        output: count * p
        for output, p in law(case.target, PROMPT, LANGUAGE, replace(asked[0].params, structured_outputs=None)).items()
    }
    assert set(seen) <= set(expected)
    assert sum(expected.values()) == pytest.approx(count)
    common = {output: n for output, n in expected.items() if n >= 5}
    assert len(common) > 5
    statistic = sum((seen[output] - n) ** 2 / n for output, n in common.items())
    rest, expected_rest = (sum(each.values()) - sum(each[o] for o in common) for each in (seen, expected))
    statistic += (rest - expected_rest) ** 2 / max(expected_rest, 1.0)
    assert chi2.sf(statistic, len(common)) > 1e-4


def test_no_proposal_that_the_grammar_forbids_reaches_the_target(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, columns, forced = case.engine(branches=True), 0, 0
    judge = engine._judge

    def judged(plan: Any, last_NH: torch.Tensor) -> Any:
        nonlocal columns, forced
        for row in plan.decoding:
            forced += row.proposal.source is Source.GRAMMAR
            parents = row.proposal.parents or range(len(row.proposal.tokens))
            for token, parent in zip(row.proposal.tokens, parents, strict=True):
                assert row.allowed[parent][token >> 3] >> (token & 7) & 1
                columns += 1
        return judge(plan, last_NH)

    monkeypatch.setattr(engine, "_judge", judged)
    run(engine, requests(30))
    assert columns > 100
    assert forced > 30, "0,0 is"


def test_what_is_cut_counts_as_rejected_for_the_draft(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, drafted = case.engine(), Counter[bool]()
    observe = engine.proposer.draft.rates.observe

    def observed(sequence: Any, proposal: Any, *, path: Any, **outcome: Any) -> None:
        drafted[len(proposal.tokens) == 4] += 1
        assert all(0 <= column <= len(proposal.tokens) for column in path)
        observe(sequence, proposal, path=path, **outcome)

    monkeypatch.setattr(engine.proposer.draft.rates, "observe", observed)
    run(engine, requests(30))
    assert drafted[True] > 30
    assert not drafted[False], "all of what was drafted"


def test_forced_tokens_come_in_one_round_with_the_end(case: Case) -> None:
    engine = case.engine(copied_tokens=15)
    (answer,) = run(engine, requests(1, regex="[ab]0,0,0,1")).values()
    assert len(answer.rounds) == 2, "the letter, then the rest"
    assert answer.finish_reason == "stop"
    (unspeculated,) = run(engine, requests(1, regex="[ab]0,0,0,1", speculate=False)).values()
    assert len(unspeculated.rounds) == len(unspeculated.token_ids) == 9
    assert unspeculated.token_ids == answer.token_ids


def test_max_tokens_cuts(case: Case) -> None:
    for answer in run(case.engine(branches=True), requests(10, regex="[ab]0,0,0,1", max_tokens=5)).values():
        assert text_of(answer.token_ids)[1:] == "0,0,"
        assert answer.finish_reason == "length"


def test_a_stop_token_ends_where_the_grammar_may_end(case: Case) -> None:
    """Beside the end of text; where it is allowed by the grammar itself it ends the output too."""
    extra = VOCAB_SIZE - 1
    asked = requests(60, regex="[ab]+", stop_token_ids=(extra,), max_tokens=30, logit_bias={extra: 2.0})
    answers = run(case.engine(branches=True), asked).values()
    assert {answer.token_ids[-1] for answer in answers} == {END, extra}
    assert all(set(text_of(answer.token_ids)) <= {"a", "b"} for answer in answers)


def test_log_probabilities_are_the_models(case: Case) -> None:
    """As with all options, so that those of an output with a grammar do not sum to one over what it allows."""
    (answer,) = run(case.engine(), requests(1, temperature=0.0, logprobs=VOCAB_SIZE)).values()
    (free,) = run(case.engine(), requests(1, temperature=0.0, logprobs=VOCAB_SIZE, regex=None)).values()
    total = sum(2.718281828**logprob for _, logprob in answer.logprobs[0].top)
    assert total == pytest.approx(1.0, abs=1e-4)
    assert dict(answer.logprobs[0].top) == pytest.approx(dict(free.logprobs[0].top), abs=1e-4)


class CompilerAtOnce(GrammarCompiler):
    """Compiles before it answers, so that its request starts in the first round, however busy the machine is."""

    def compile(self, asked: StructuredOutputsParams, **how: Any) -> Future[Grammar]:
        future = super().compile(asked, **how)
        future.exception()  # waits
        return future


def test_rows_without_a_grammar_need_no_logits_beside_one_that_has(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = CompilerAtOnce(backend().to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    engine, dense = case.engine(grammars=grammars), list[tuple[int, int]]()
    choose = case.target.choose

    def counted(last_NH: torch.Tensor, **draws: torch.Tensor) -> Any:
        needed = draws["dense_N"]
        dense.append((len(last_NH), 0 if needed is None else int((needed >= 0).sum())))
        return choose(last_NH, **draws)

    monkeypatch.setattr(case.target, "choose", counted)
    run(engine, requests(1, regex="[ab]{6}", max_tokens=6) + requests(3, regex=None, ignore_eos=True, max_tokens=20))
    assert any(0 < some < all_ for all_, some in dense)
    after = dense[7:]  # the one with the grammar has ended; then a native pass chooses all tokens itself
    assert not after if case.target.decoder is not None else not any(some for _, some in after)


class SlowCompiler(GrammarCompiler):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self._compiler, self.go = compiler(), threading.Event()
        self.asked: list[Future[Grammar]] = []

    def compile(self, asked: StructuredOutputsParams, **how: Any) -> Future[Grammar]:
        self._compiler._thread.submit(self.go.wait)
        self.asked.append(self._compiler.compile(asked, **how))
        return self.asked[-1]


def test_other_requests_go_on_while_a_grammar_is_compiled(case: Case) -> None:
    grammars = SlowCompiler()
    engine = case.engine(grammars=grammars)
    (slow,), (other,) = requests(1), requests(1, regex=None, max_tokens=20)
    engine.submit(slow)
    engine.submit(other)
    outputs = []
    while not any(output.finish_reason for output in outputs):
        outputs += engine.round()
    assert {output.request_id for output in outputs} == {other.request_id}
    assert engine.round() == []
    assert (engine.has_work, engine.num_waiting, engine.num_running) == (True, 1, 0)
    grammars.go.set()
    while engine.has_work:
        outputs += engine.round()
    assert outputs[-1].request_id == slow.request_id
    assert outputs[-1].finish_reason == "stop"


def test_a_request_that_waits_for_its_grammar_can_be_cancelled(case: Case) -> None:
    grammars = SlowCompiler()
    engine = case.engine(grammars=grammars)
    (slow,) = requests(1)
    engine.submit(slow)
    engine.cancel(slow.request_id)
    assert grammars.asked[0].cancelled(), "others do not wait for it"
    grammars.go.set()
    assert not engine.has_work
    assert engine.round() == []


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(case: Case) -> None:
    engine = case.engine()
    bad, good = requests(1, regex="(")[0], requests(1)[0]
    answers = run(engine, [bad, good])
    assert answers[good.request_id].finish_reason == "stop"
    assert answers[bad.request_id].finish_reason == "error"
    assert "invalid regex" in (answers[bad.request_id].rounds[0].error or "")


def test_a_grammar_that_cannot_be_compiled_is_refused_while_no_slot_is_free(case: Case) -> None:
    grammars = CompilerAtOnce(backend().to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    engine = case.engine(grammars=grammars, max_batch_size=1)
    other, good, bad = *requests(1, regex=None, ignore_eos=True, max_tokens=20), *requests(1), *requests(1, regex="(")
    engine.submit(other)
    engine.round()
    engine.submit(good)
    engine.submit(bad)
    failed = [output for output in engine.round() if output.finish_reason == "error"]
    assert [output.request_id for output in failed] == [bad.request_id]
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    while engine.has_work:
        last = engine.round()
    assert [(output.request_id, output.finish_reason) for output in last] == [(good.request_id, "stop")]


class Panic(BaseException):
    """As llguidance's own are: no `Exception`."""


@pytest.mark.parametrize("fault", [RecursionError("too deep"), Panic("at the disco")])
def test_whatever_fails_while_a_grammar_is_compiled_ends_its_request_alone(
    case: Case, fault: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of_class = GrammarCompiler._matcher

    def failing(self: GrammarCompiler, asked: StructuredOutputsParams) -> LLMatcher:
        if asked.regex == "a":
            raise fault
        return of_class(self, asked)

    monkeypatch.setattr(GrammarCompiler, "_matcher", failing)
    bad, good = requests(1, regex="a")[0], replace(requests(1)[0], request_id="good")
    answers = run(case.engine(), [bad, good])
    assert answers["good"].finish_reason == "stop"
    assert answers[bad.request_id].finish_reason == "error"
    said = answers[bad.request_id].rounds[0].error or ""
    assert said == f"its grammar could not be compiled: {type(fault).__name__}: {fault}"
    assert f"the grammar of request {bad.request_id} could not be compiled" in caplog.text


def test_a_limit_that_llguidance_reaches_ends_its_request_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine()
    advance: Callable[[Grammar, list[int]], None] = Grammar.advance
    (bad, good) = requests(2)
    failing: list[Grammar] = []

    def failing_once(self: Grammar, tokens: list[int]) -> None:
        if not failing:
            failing.append(self)
        if self is failing[0]:
            raise RequestError("too complex")
        advance(self, tokens)

    monkeypatch.setattr(Grammar, "advance", failing_once)
    answers = run(engine, [bad, good])
    assert answers[bad.request_id].finish_reason == "error"
    assert answers[bad.request_id].rounds[-1].error == "too complex"
    assert text_of(answers[good.request_id].token_ids) in LANGUAGE
    assert engine.num_running == 0


def test_a_limit_that_outputs_and_proposals_reach_together_changes_no_output(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(40, regex="[ab]*a[ab]{6}0")
    plain = run(case.engine(drafts=False), asked)
    limits = LLParserLimits(max_lexer_states=70)  # one output needs up to 50 of 128
    monkeypatch.setattr(matcher, "LLMatcher", functools.partial(LLMatcher, limits=limits))
    answers = run(case.engine(**WAYS["all"], max_batch_size=8), asked)
    assert tokens(answers) == tokens(plain)
    assert {answer.finish_reason for answer in answers.values()} <= {"stop", "length"}


def test_nothing_is_proposed_where_the_grammar_takes_no_proposals(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut of it would count as rejected, for all other requests too."""
    asked = requests(4, regex="[ab]{6}0,0,0")
    plain = run(case.engine(drafts=False), asked)
    monkeypatch.setattr(matcher, "_MOST_RENEWED", 0)
    engine, made = case.engine(copied_tokens=15, adaptive=True), list[list[int]]()
    propose = engine.proposer.propose

    def noted(*args: Any, **kwargs: Any) -> Any:
        proposed = propose(*args, **kwargs)
        made.extend(proposal.tokens for proposal in proposed.proposals)
        assert proposed.looking_s == proposed.drafting_s == 0.0
        return proposed

    monkeypatch.setattr(engine.proposer, "propose", noted)
    answers = run(engine, asked)
    assert tokens(answers) == tokens(plain)
    assert len(made) > 20
    assert not any(made)


def test_the_round_in_which_a_grammar_stops_taking_proposals_is_no_plain_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was proposed for, and its grammar has been compiled again."""
    grammars = CompilerAtOnce(backend().to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    engine, wanted = case.engine(grammars=grammars, adaptive=True), list[bool]()
    assert engine.floor is not None
    monkeypatch.setattr(engine.floor, "observe", lambda *_, **__: wanted.append(True))
    monkeypatch.setattr(engine.floor, "observe_unasked", lambda *_, **__: wanted.append(False))
    advance: Callable[[Grammar, list[int]], None] = Grammar.advance

    def advance_and_stop(self: Grammar, tokens: list[int]) -> None:
        advance(self, tokens)
        monkeypatch.setattr(matcher, "_MOST_RENEWED", 0)

    monkeypatch.setattr(Grammar, "advance", advance_and_stop)
    run(engine, requests(1, regex="[abc]{12}", max_tokens=10))
    assert wanted[0]
    assert len(wanted) > 2
    assert not any(wanted[1:])


@pytest.mark.parametrize("how", ["no tokenizer", "no end", "ignored end"])
def test_what_cannot_be_served_is_refused(case: Case, how: str) -> None:
    engine = case.engine(eos_token_ids=frozenset([END] if how != "no end" else []))
    if how == "no tokenizer":
        engine = make_engine(case.target, eos_token_ids=frozenset([END]))
    with pytest.raises(RequestError, match="cannot be used") as caught:
        engine.submit(requests(1, ignore_eos=how == "ignored end", stop_token_ids=(3,))[0])
    assert caught.value.param == "structured_outputs"
    assert not engine.has_work
