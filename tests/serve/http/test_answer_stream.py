"""AnswerStream: the same text and the same tokens, however late the worker learns of a stop string."""

import random
from dataclasses import replace

import pytest
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.errors import RequestError
from aurora_lit.ipc.messages import Call, Delta
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.http.answer_stream import AnswerOptions, AnswerStream
from aurora_lit.serve.worker.call_tracker import CallTracker

TOKENIZER = tiny_tokenizer()


def requests_of(*prompts, **options):
    params = SamplingParams(**{"max_tokens": 20, **options})
    return tuple(
        Request(request_id=str(i), prompt_ids=tuple(TOKENIZER.encode(prompt)), params=params)
        for i, prompt in enumerate(prompts)
    )


def answer(requests, *, delay_rounds=0, tokens_per_round=3):
    """Every choice's deltas with text. The worker learns of stop strings so many rounds after its next one."""
    engine = FakeEngine(FakeOptions(tokens_per_round=tokens_per_round))
    tracker, stream = CallTracker(engine), AnswerStream(TOKENIZER, requests)
    tracker.add(Call(call_id="a", requests=requests))
    seen, cancels, num_rounds = [[] for _ in requests], [], 0
    while engine.has_work:
        for _, update in tracker.advance(engine.round()).updates:
            deltas, stopped = stream.add(update)
            cancels += [(num_rounds + 1 + delay_rounds, index) for index in stopped]
            for delta in deltas:
                seen[delta.index].append(delta)
        num_rounds += 1
        for due, index in cancels:
            if due == num_rounds:
                tracker.cancel_request("a", index)
    assert tracker.active_calls() == []
    return seen


def text(deltas):
    return "".join(delta.text for delta in deltas)


def tokens(deltas):
    return [token_id for delta in deltas for token_id in delta.token_ids]


@pytest.mark.parametrize("delay_rounds", [0, 1, 3])
def test_a_stop_string_over_rounds_ends_a_choice_at_the_token_that_completed_it(delay_rounds):
    (deltas,) = answer(requests_of("abcdefgh", stop=("def",), logprobs=0), delay_rounds=delay_rounds)
    assert text(deltas) == "abc"
    assert tokens(deltas) == TOKENIZER.encode("abcdef")
    assert [known.token_id for delta in deltas for known in delta.logprobs] == TOKENIZER.encode("abcdef")
    assert [delta.finish_reason for delta in deltas] == [None, "stop"]


@pytest.mark.parametrize("delay_rounds", [0, 2, 9])
def test_the_other_choices_go_on(delay_rounds):
    first, second = answer(requests_of("abXcd", "efghi", stop=("X",)), delay_rounds=delay_rounds)
    assert (text(first), len(tokens(first)), first[-1].finish_reason) == ("ab", 3, "stop")
    assert (text(second), len(tokens(second)), second[-1].finish_reason) == ("efghi" * 4, 20, "length")


def test_the_worker_is_told_once_and_only_if_it_does_not_know():
    stream = AnswerStream(TOKENIZER, requests_of("", "", stop=("c",)))
    ids = tuple(TOKENIZER.encode("abc"))
    added = stream.add(
        [Delta(index=0, token_ids=ids), Delta(index=1, token_ids=ids, finish_reason="length")],
    )
    assert [(delta.text, delta.finish_reason) for delta in added.deltas] == [("ab", "stop")] * 2
    assert added.stopped == (0,)
    assert stream.add([Delta(index=0, token_ids=ids, finish_reason="length")]) == ((), ())


def test_a_stop_string_of_the_last_token_wins_over_length():
    ((delta,),) = answer(requests_of("abc", stop=("c",), max_tokens=3))
    assert (delta.text, delta.finish_reason) == ("ab", "stop")


def test_held_text_comes_out_at_the_end():
    ((delta,),) = answer(requests_of("abc", stop=("cX",), max_tokens=3))
    assert (delta.text, delta.finish_reason) == ("abc", "length")


def test_a_stop_token_counts_but_does_not_show():
    (stop_id,) = TOKENIZER.encode("c")
    ((delta,),) = answer(requests_of("abcd", stop_token_ids=(stop_id,)))
    assert (delta.text, len(delta.token_ids), delta.finish_reason) == ("ab", 3, "stop")


def test_the_speculation_of_the_round_that_completes_a_stop_string_counts_and_later_rounds_do_not():
    (deltas,) = answer(requests_of("abcdefgh", stop=("d",)), delay_rounds=5)
    assert [(delta.num_proposed, delta.num_accepted) for delta in deltas] == [(2, 2), (2, 1)], "the answer has one"
    assert deltas[-1].draft_versions == ("fake-000001",)


def test_an_error_of_the_engine_is_raised_unless_the_choice_has_ended_before():
    failed = Delta(index=0, token_ids=(), finish_reason="error", error="as asked")
    with pytest.raises(RuntimeError, match="as asked"):
        AnswerStream(TOKENIZER, requests_of("")).add([failed])
    with pytest.raises(RequestError, match="guided_json cannot be used: as asked") as raised:
        AnswerStream(TOKENIZER, requests_of(""), AnswerOptions(grammar_field="guided_json")).add([failed])
    assert (raised.value.status, raised.value.param) == (400, "guided_json")
    stream = AnswerStream(TOKENIZER, requests_of("", stop=("a",)))
    assert stream.add([Delta(index=0, token_ids=tuple(TOKENIZER.encode("a")))]).stopped == (0,)
    assert stream.add([failed]) == ((), ())


@pytest.mark.parametrize("tokens_per_round", [1, 3])
def test_a_stop_string_wins_over_an_error_of_its_round(tokens_per_round):
    """Where each token comes in a round of its own, the answer has ended before the error."""
    ids = TOKENIZER.encode("abc")
    rounds = [tuple(ids[i : i + tokens_per_round]) for i in range(0, len(ids), tokens_per_round)]
    deltas = [Delta(index=0, token_ids=token_ids) for token_ids in rounds]
    deltas[-1] = replace(deltas[-1], finish_reason="error", error="too complex")
    seen = []
    stream = AnswerStream(TOKENIZER, requests_of("", stop=("b",)), AnswerOptions(grammar_field="guided_json"))
    for delta in deltas:
        seen += stream.add([delta]).deltas
    assert (text(seen), tokens(seen), seen[-1].finish_reason) == ("a", TOKENIZER.encode("ab"), "stop")
    with pytest.raises(RequestError, match="too complex"):
        AnswerStream(TOKENIZER, requests_of("", stop=("X",)), AnswerOptions(grammar_field="guided_json")).add(deltas)


def test_no_more_proposals_are_accepted_than_there_are_tokens_up_to_a_stop_string():
    ids = tuple(TOKENIZER.encode("abcd"))
    for stop, accepted_from in (("b", (3, 3)), ("c", (3, 3, 2)), ("d", (3, 3, 2)), ("X", (3, 3, 2))):
        delta = Delta(index=0, token_ids=ids, num_proposed=5, num_accepted=3, accepted_from=(3, 3, 2))
        ((seen,), _) = AnswerStream(TOKENIZER, requests_of("", stop=(stop,))).add([delta])
        assert (seen.num_proposed, seen.num_accepted) == (5, len(accepted_from))
        assert seen.accepted_from == accepted_from


def test_what_a_client_gets_depends_neither_on_rounds_nor_on_when_the_worker_learns_of_a_stop():
    for seed in range(40):
        check_any_rounds(random.Random(seed))


def check_any_rounds(rng):
    alphabet = ["a", "b", "hello", " world", "é", "今", "🌍"]
    prompts = ["".join(rng.choices(alphabet, k=rng.randrange(1, 9))) for _ in range(3)]
    stop = tuple("".join(rng.choices(alphabet, k=rng.randrange(1, 4))) for _ in range(2))
    requests = requests_of(*prompts, stop=stop, max_tokens=30)
    outcomes = {
        tuple((text(deltas), tuple(tokens(deltas)), deltas[-1].finish_reason) for deltas in seen)
        for seen in (
            answer(requests, delay_rounds=delay_rounds, tokens_per_round=tokens_per_round)
            for delay_rounds in (0, 4)
            for tokens_per_round in (1, 3, 5)
        )
    }
    assert len(outcomes) == 1
    for (shown, ids, finish_reason), prompt in zip(outcomes.pop(), prompts, strict=True):
        assert not any(word in shown for word in stop)
        assert (prompt * 30).startswith(shown)
        assert len(ids) == 30 or finish_reason == "stop"


@pytest.mark.parametrize("delay_rounds", [0, 3])
def test_the_stop_string_stays_where_that_is_asked_for(delay_rounds):
    options = {"stop": ("def",), "include_stop_str_in_output": True}
    (deltas,) = answer(requests_of("abcdefgh", **options), delay_rounds=delay_rounds)
    assert text(deltas) == "abcdef"
    assert deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "ab"),
        ({"include_stop_str_in_output": True}, "ab"),  # the token that ends it is a special one
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "ab<|end|>"),
        ({"skip_special_tokens": False}, "ab"),
    ],
)
def test_the_token_that_ends_an_answer_is_shown_only_as_asked(options, shown):
    (deltas,) = answer(requests_of("ab<|end|>cd", **options))
    assert text(deltas) == shown
    assert deltas[-1].finish_reason == "stop"


def test_special_tokens_inside_an_answer():
    options = {}, {"skip_special_tokens": False}
    shown = [text(answer(requests_of("ab<|end|>cd", ignore_eos=True, **each))[0]) for each in options]
    assert shown[0].startswith("abcd")
    assert shown[1].startswith("ab<|end|>cd")


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, "ab"), (3, "ab"), (5, "abcdxxab"), (10, "abcdxxabcd")])
def test_stop_strings_do_not_count_before_min_tokens(min_tokens, shown):
    """A stop string counts from the token on that completes it."""
    (deltas,) = answer(requests_of("abcdxxabcd", stop=("cd",), min_tokens=min_tokens, max_tokens=10))
    assert text(deltas) == shown


@pytest.mark.parametrize("end", ["", "<|end|>"])
@pytest.mark.parametrize("options", [{}, {"stop": ("ça",)}, {"stop": ("zzz",)}])
@pytest.mark.parametrize("tokens_per_round", [1, 3, 5])
def test_the_text_by_token_is_the_text(options, tokens_per_round, end):
    requests = requests_of(f"hello 今日は 🌍, ça va? {end}", max_tokens=60, **options)
    engine = FakeEngine(FakeOptions(tokens_per_round=tokens_per_round))
    tracker, whole = CallTracker(engine), AnswerStream(TOKENIZER, requests)
    by_token = AnswerStream(TOKENIZER, requests, AnswerOptions(by_token=True))
    tracker.add(Call(call_id="a", requests=requests))
    num_pieces = 0
    while engine.has_work:
        for _, update in tracker.advance(engine.round()).updates:
            expected, deltas = whole.add(update).deltas, by_token.add(update).deltas
            assert [delta.text for delta in deltas] == [delta.text for delta in expected]
            for delta in deltas:
                assert "".join(delta.token_texts) == delta.text
                assert len(delta.token_texts) == len(delta.token_ids)
                num_pieces += len(delta.token_texts)
            assert all(delta.token_texts is None for delta in expected)
    assert num_pieces > 8


INDENTED = [
    # (text, fewest spaces and tabs, what is kept)
    ("a\n    b\nc", 4, "a\n    b"),
    ("a\n    b\n   c", 4, "a\n    b"),
    ("a\n\tb\n\t\tc\nd", 1, "a\n\tb\n\t\tc"),
    ("a\r\n  b\r\nc", 2, "a\r\n  b"),
    ("a\n\n  b", 2, "a"),  # an empty line has no indentation
    ("\n  a\n b", 2, "\n  a"),
    ("a\n  b\n", 2, "a\n  b\n"),  # nobody knows what follows
    ("a\n  b\n ", 2, "a\n  b\n "),
    ("a\nb", 0, "a\nb"),
    ("a\n  b;c\nd", 2, "a\n  b"),  # a stop string comes first
]


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize(("whole", "min_indent", "kept"), INDENTED)
def test_a_line_that_is_indented_less_ends_an_answer(whole, min_indent, kept, size):
    (request,) = requests_of("x", stop=(";",))
    stream = AnswerStream(TOKENIZER, [request], AnswerOptions(min_indent=min_indent))
    ids = TOKENIZER.encode(whole)
    found = ""
    for at in range(0, len(ids), size):
        is_last = at + size >= len(ids)
        (delta,), stopped = stream.add(
            [Delta(index=0, token_ids=tuple(ids[at : at + size]), finish_reason="length" if is_last else None)]
        )
        found += delta.text
        assert kept.startswith(found), "what is cut off is not sent before"
        if delta.finish_reason:
            break
    assert found == kept
    ended_by = ";" if ";" in whole else ""
    assert (delta.finish_reason, delta.stop_string) == ("stop" if ended_by else "length", ended_by)
    assert stopped == (() if is_last else (0,))


def test_time_ends_an_answer_only_after_a_line_break_and_counts_from_the_first_token():
    now = [100.0]
    requests = requests_of("x", "y")
    stream = AnswerStream(TOKENIZER, requests, AnswerOptions(most_s=1.0), clock=lambda: now[0])
    seen = {0: "", 1: ""}

    def add(at_s, *texts):
        now[0] = at_s
        deltas, stopped = stream.add(
            [Delta(index=index, token_ids=tuple(TOKENIZER.encode(text))) for index, text in texts]
        )
        for delta in deltas:
            seen[delta.index] += delta.text
            assert delta.arrived_s == at_s
        return [delta.finish_reason for delta in deltas], stopped

    assert add(200.0, (0, "a")) == ([None], ())
    assert add(200.9, (0, "b\n"), (1, "c\n")) == ([None, None], ())
    assert add(201.5, (0, "d"), (1, "e")) == (["length", None], (0,))
    assert add(202.0, (0, "never"), (1, "f")) == (["length"], (1,))
    assert seen == {0: "ab\nd", 1: "c\nef"}
    stream = AnswerStream(TOKENIZER, requests[:1], AnswerOptions(most_s=1.0), clock=lambda: now[0])
    assert [add(at_s, (0, "a"))[0] for at_s in (0.0, 5.0, 9.0)] == [[None]] * 3
    assert add(9.5, (0, "\n"))[0] == ["length"]
