"""An output's place in its grammar: the allowed tokens are those by which some text of the language goes on."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits
from support.grammars import END, TOKENS, VOCAB_SIZE, allowed_after, backend, compiler
from tokenizers import AddedToken

from aurora_lit.errors import RequestError
from aurora_lit.grammars import matcher as matcher_module
from aurora_lit.grammars.matcher import Branch, Grammar, GrammarCompiler, Mask
from aurora_lit.models.tokenizer import tokenizer_json
from aurora_lit.request import StructuredOutputsParams

LANGUAGES = {
    "[abc]{1,3}": {"".join(letters) for n in (1, 2, 3) for letters in itertools.product("abc", repeat=n)},
    "[ab]0(1|10)?": {x + "0" + y for x in "ab" for y in ("", "1", "10")},
    'c"0,[ab]{0,3}1': {'c"0,' + "".join(x) + "1" for n in range(4) for x in itertools.product("ab", repeat=n)},
}


def grammar(regex: str, *, end_tokens: frozenset[int] = frozenset([END])) -> Grammar:
    return compiler().compile(StructuredOutputsParams(regex=regex), end_tokens=end_tokens).result()


def tokens_of(mask_W: Mask | None) -> set[int]:
    assert mask_W is not None
    return set(np.unpackbits(mask_W, bitorder="little").nonzero()[0].tolist())


@pytest.mark.parametrize("regex", LANGUAGES)
def test_the_allowed_tokens_are_those_of_the_language_on_every_path(regex: str) -> None:
    start, seen = grammar(regex), 0

    def walk(place: Grammar, output: list[int]) -> None:
        nonlocal seen
        expected = allowed_after(LANGUAGES[regex], output)
        assert tokens_of(place.allowed) == expected, output
        branch = place.branch()
        for token in expected - {END}:
            branch.enter(token)
            assert tokens_of(branch.allowed()) >= allowed_after(LANGUAGES[regex], [*output, token])
            branch.leave()
            assert tokens_of(branch.allowed()) == expected, "a branch comes back to where it was"
            seen += 1
        for token in expected - {END}:
            following = grammar(regex)
            following.advance([*output, token])
            walk(following, [*output, token])

    walk(start, [])
    assert seen > 5


def test_what_must_follow_is_known_with_the_end() -> None:
    place = grammar("[ab]c0,")
    assert place.forced == []
    place.advance([1])
    assert place.forced == [TOKENS.index("c"), TOKENS.index("0"), TOKENS.index(","), END]
    place.advance(place.forced[:-1])
    assert (place.forced, tokens_of(place.allowed)) == ([END], {END})
    assert grammar("[ab]c[01]").forced == []


def test_what_must_follow_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as it is long, and rounds of other requests wait."""
    place, calls = grammar("a(c0){40},"), list[int]()
    of_branch = Branch.forced

    def counted(self: Branch) -> list[int]:
        calls.append(1)
        return of_branch(self)

    monkeypatch.setattr(Branch, "forced", counted)
    follows = list(place.forced)
    assert len(follows) == 83
    for length in (1, 4, 8, 30, 39):
        place.advance(follows[:length])
        del follows[:length]
        assert place.forced == follows
    assert follows == [END]
    assert not calls


def test_all_tokens_that_end_the_output_are_allowed_where_the_grammar_may_end_and_nowhere_else() -> None:
    place = grammar("a0?", end_tokens=frozenset([END, 10]))
    assert tokens_of(place.allowed) == {0}
    place.advance([0])
    assert tokens_of(place.allowed) == {TOKENS.index("0"), END, 10}
    place.advance([3])
    assert (tokens_of(place.allowed), place.forced) == ({END, 10}, [10])


def test_tokens_that_only_the_target_has_are_never_allowed() -> None:
    assert max(tokens_of(grammar(".*").allowed)) == END < VOCAB_SIZE - 1


@pytest.mark.parametrize("asked", [{"regex": "c<0>b"}, {"choice": ("c<0>b",)}, {"grammar": 'start: "c<0>b"'}])
def test_a_text_that_is_written_like_a_special_token_is_a_text(asked: dict[str, Any]) -> None:
    tokenizer = backend()
    tokenizer.add_tokens(["<", ">"])
    tokenizer.add_special_tokens(["<0>"])
    compiler = GrammarCompiler(tokenizer.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    place = compiler.compile(StructuredOutputsParams(**asked), end_tokens=frozenset([END])).result()
    assert tokenizer.encode("c<0>b").ids == [2, 11, 1]
    for token in (2, 9, 3, 10, 1, END):
        assert tokens_of(place.allowed) == {token}
        assert place.forced[:1] == [token]
        place.advance([token])
    named = StructuredOutputsParams(grammar='start: "c" <0> "b"')
    assert compiler.compile(named, end_tokens=frozenset([END])).result().forced == [2, 11, 1, END]


@pytest.mark.parametrize(
    "asked", [{"regex": "(a|<0>)b"}, {"choice": ("ab", "<0>b")}, {"grammar": 'start: ("a" | "<0>") "b"'}]
)
def test_an_added_token_that_is_text_makes_its_text_whatever_brackets_it_has(asked: dict[str, Any]) -> None:
    """As Qwen's `<tool_call>`, which is not marked special."""
    tokenizer = backend()
    tokenizer.add_tokens(["<", AddedToken("<0>", special=False), ">"])
    compiler = GrammarCompiler(tokenizer.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    for tokens in ([10, 1, END], [9, 3, 11, 1, END]):
        place = compiler.compile(StructuredOutputsParams(**asked), end_tokens=frozenset([END])).result()
        assert tokens_of(place.allowed) == {0, 7, 9, 10}
        for token in tokens:
            assert token in tokens_of(place.allowed)
            place.advance([token])
    named = {"grammar": "start: <[10]>"}
    assert compiler.compile(StructuredOutputsParams(**named), end_tokens=frozenset([END])).result().forced == [10, END]


@pytest.mark.parametrize("asked", [{"regex": "[ab]c"}, {"grammar": 'start: "c" <end>'}])
def test_a_token_of_the_tokenizer_that_the_target_lacks_is_left_out(asked: dict[str, Any]) -> None:
    """As Gemma 3 has none for images where it reads text alone."""
    tokenizer = backend()
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image>"])
    state = partial(tokenizer_json, tokenizer, vocab_size=size)
    compiler = GrammarCompiler(state, vocab_size=size, eos_token_ids=frozenset([END]))
    place = compiler.compile(StructuredOutputsParams(**asked), end_tokens=frozenset([END])).result()
    assert tokens_of(place.allowed) == ({0, 1} if "regex" in asked else {2})


def test_a_grammar_that_the_vocabulary_cannot_spell_is_refused() -> None:
    with pytest.raises(RequestError, match="no answer can follow the grammar"):
        grammar("xyz")
    place = grammar("a(x|0)")
    place.advance([0])
    assert tokens_of(place.allowed) == {3}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[StructuredOutputsParams]:
    """What is compiled in the test, in order."""
    made, of_class = list[StructuredOutputsParams](), GrammarCompiler._matcher

    def counted(self: GrammarCompiler, asked: StructuredOutputsParams) -> Any:
        made.append(asked)
        return of_class(self, asked)

    monkeypatch.setattr(GrammarCompiler, "_matcher", counted)
    return made


def test_what_is_asked_for_again_is_compiled_once_and_outputs_stay_apart(
    compiled: list[StructuredOutputsParams],
) -> None:
    of_one = compiler()

    def start(regex: str, end: int = END) -> Grammar:
        return of_one.compile(StructuredOutputsParams(regex=regex), end_tokens=frozenset([end])).result()

    first, second = start("ab?c"), start("ab?c")
    first.advance([TOKENS.index("a")])
    third = start("ab?c")
    assert tokens_of(second.allowed) == tokens_of(third.allowed) != tokens_of(first.allowed)
    assert tokens_of(start("a?", 10).allowed) == {TOKENS.index("a"), END, 10}
    assert tokens_of(start("a?").allowed) == {TOKENS.index("a"), END}, "with its own end"
    assert [asked.regex for asked in compiled] == ["ab?c", "a?"]
    for number in range(12):
        start(f"a{{{number + 1}}}")
    start("ab?c")
    assert [asked.regex for asked in compiled].count("ab?c") == 2, "a few are kept"


def test_a_compiled_grammar_is_used_by_its_owner_alone(compiled: list[StructuredOutputsParams]) -> None:
    """Its time would tell others what was asked for; of several owners the first gets what is compiled."""
    of_one = compiler()
    asked = StructuredOutputsParams(regex="a")
    for owners, number in (
        (["a"], 1),
        (["a"], 1),
        (["b"], 2),
        (["c", "a"], 2),
        (["c", "d"], 3),
        (["d"], 4),
        (["c"], 4),
    ):
        of_one.compile(asked, end_tokens=frozenset([END]), owners=owners).result()
        assert len(compiled) == number, owners


def test_a_compiled_or_quick_grammar_waits_for_no_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_one, go, end = compiler(), threading.Event(), frozenset([END])
    known, slow = StructuredOutputsParams(regex="b"), StructuredOutputsParams(regex="c")
    quick = StructuredOutputsParams(begins_with="a")
    of_one.compile(known, end_tokens=end).result()
    of_class = GrammarCompiler._matcher

    def slowly(self: GrammarCompiler, asked: StructuredOutputsParams) -> Any:
        if asked is slow:
            go.wait(20)
        return of_class(self, asked)

    monkeypatch.setattr(GrammarCompiler, "_matcher", slowly)
    waiting, ready, begun = (of_one.compile(asked, end_tokens=end) for asked in (slow, known, quick))
    ready.result(timeout=15)
    assert tokens_of(begun.result(timeout=15).allowed) >= {TOKENS.index("a")}
    assert not waiting.done()
    go.set()
    assert tokens_of(ready.result().allowed) == {TOKENS.index("b")}
    assert tokens_of(waiting.result().allowed) == {TOKENS.index("c")}


A, B, C = (TOKENS.index(text) for text in "abc")
HARD = "([abc]{0,9}a){1,9}0"
"""What may follow is the harder to find out the more often "a" came."""
MANY_STATES = "[ab]*a[ab]{6}0"
"""The last letters are remembered, so that each output needs other states than another one."""


def limited(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> list[LLMatcher]:
    """Lower llguidance's limits. Returns what is compiled from now on."""
    made = list[LLMatcher]()

    def make(*args: Any, **kwargs: Any) -> LLMatcher:
        made.append(LLMatcher(*args, **{**kwargs, "limits": LLParserLimits(**limits)}))
        return made[-1]

    monkeypatch.setattr(matcher_module, "LLMatcher", make)
    return made


def begin(of_one: GrammarCompiler, regex: str) -> Grammar:
    return of_one.compile(StructuredOutputsParams(regex=regex), end_tokens=frozenset([END])).result()


def letters(number: int) -> list[int]:
    """An output of MANY_STATES without its end."""
    return [number >> bit & 1 for bit in range(8)] * 2


def test_a_limit_that_a_proposal_reaches_cuts_that_proposal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = limited(monkeypatch, step_lexer_fuel=90)
    place, beside, plain = begin(of_one := compiler(), HARD), begin(of_one, HARD), begin(compiler(), HARD)
    num_walks = 0
    for token in [B, C, B, C, C, B]:
        if place.takes_proposals:
            num_walks += 1
            branch = place.branch()
            branch.enter(A)
            branch.enter(A)
            assert branch.allowed() is None
        for each in (place, beside, plain):
            each.advance([token])
        assert tokens_of(place.allowed) == tokens_of(beside.allowed) == tokens_of(plain.allowed)
        assert place.forced == plain.forced
    assert num_walks == 2, "then proposals of this output are left alone, so that rounds do not compile for ever"
    assert beside.takes_proposals
    assert len(made) == 2 + 3, "two for `place`, one for what shared its lexer"


def test_what_is_compiled_again_may_compute_as_much_as_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks on the way spread what the last one needs; without them it would reach the limit by itself."""
    limited(monkeypatch, step_lexer_fuel=110)
    place, plain = begin(compiler(), HARD), begin(compiler(), HARD)
    for token in (B, C):
        plain.advance([token])
        place.advance([token])
    branch = place.branch()
    for _ in range(9):
        branch.enter(A)
        branch.allowed()
    assert branch.allowed() is None
    plain.advance([A])
    place.advance([A])
    assert tokens_of(place.allowed) == tokens_of(plain.allowed)


def test_every_grammar_has_limits_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's own, eight expressions of a client took 0.5 GB."""
    given = list[Any]()
    make = LLMatcher
    monkeypatch.setattr(matcher_module, "LLMatcher", lambda *a, **k: (given.append(k["limits"]), make(*a, **k))[1])
    begin(compiler(), "[ab]*")
    (limits,) = given
    assert (limits.max_lexer_states, limits.step_lexer_fuel) == (20_000, 100_000)


def test_a_limit_that_the_output_itself_reaches_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, step_lexer_fuel=90)
    place = begin(compiler(), HARD)
    with pytest.raises(RequestError, match="no answer can follow the grammar: .*too many expressions"):
        place.advance([A, A])


def test_a_round_waits_for_no_grammar_that_takes_long_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_module, "_LONGEST_AGAIN_S", 0.0)
    made = limited(monkeypatch, step_lexer_fuel=90)
    place, beside, plain = begin(of_one := compiler(), HARD), begin(of_one, HARD), begin(compiler(), HARD)
    assert not place.takes_proposals, "a walk down one may reach a limit"
    with pytest.raises(RequestError, match="no answer can follow the grammar: .*too many expressions"):
        place.advance([A, A])
    for each in (beside, plain):
        each.advance([B])
    assert tokens_of(beside.allowed) == tokens_of(plain.allowed), "it has a lexer of its own"
    assert len(made) == 3, "once for each output"


def test_a_prepared_compiler_makes_no_tokenizer_for_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one of 262,144 tokens holds the interpreter's lock for 3.4 s, as if the process had stopped."""
    made, make = list[int](), matcher_module.LLTokenizer
    monkeypatch.setattr(matcher_module, "LLTokenizer", lambda *args, **how: made.append(1) or make(*args, **how))
    prepared = compiler()
    prepared.prepare()
    assert len(made) == 2
    for asked in (StructuredOutputsParams(regex="a"), StructuredOutputsParams(grammar='start: "a"')):
        prepared.compile(asked, end_tokens=frozenset([END])).result()
    assert len(made) == 2


def test_a_tokenizer_that_cannot_be_read_fails_its_grammar_and_not_the_start() -> None:
    unreadable = GrammarCompiler(lambda: "{", vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    unreadable.prepare()
    with pytest.raises(ValueError):  # noqa: PT011
        unreadable.compile(StructuredOutputsParams(regex="a"), end_tokens=frozenset([END])).result()


def test_the_time_of_the_tokenizer_is_none_of_the_grammars() -> None:
    def slowly() -> str:
        until = time.thread_time() + 0.12
        while time.thread_time() < until:
            pass
        return backend().to_str()

    of_one = GrammarCompiler(slowly, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))
    assert of_one._matcher(StructuredOutputsParams(regex="[ab]c"))[1] < matcher_module._LONGEST_AGAIN_S


def test_a_dead_end_without_an_error_is_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = limited(monkeypatch)
    place = begin(compiler(), "a(0x|1)")
    place.advance([A])
    with pytest.raises(RequestError, match="no token of the vocabulary goes on with the output"):
        place.advance([TOKENS.index("0")])
    assert len(made) == 1


def test_outputs_do_not_reach_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them needs at most 60 states of a lexer, and all share one."""
    made = limited(monkeypatch, max_lexer_states=80)
    of_one = compiler()
    beside = begin(of_one, MANY_STATES)
    beside.advance(letters(7)[:3])
    for number in range(1, 60):
        place = begin(of_one, MANY_STATES)
        for token in letters(number):
            place.advance([token])
        assert {A, B} <= tokens_of(place.allowed)
    beside.advance(letters(7)[3:])
    assert {A, B} <= tokens_of(beside.allowed)
    assert len(made) < 60


def test_what_has_failed_or_begun_many_outputs_is_kept_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lexer would grow for ever."""
    made = limited(monkeypatch, step_lexer_fuel=90)
    of_one = compiler()
    for _ in range(33):
        begin(of_one, HARD)
    assert len(made) == 3
    with pytest.raises(RequestError):
        begin(of_one, HARD).advance([A, A])
    num_tried = len(made)
    assert num_tried > 3
    begin(of_one, HARD)
    begin(of_one, HARD)
    assert len(made) == num_tried + 1
