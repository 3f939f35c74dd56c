"""CallTracker: outputs of the engine become deltas of calls; what ends or is cancelled leaves nothing."""

import functools
import itertools
from dataclasses import replace

import pytest
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.drafts.live_watch import TrafficKind
from aurora_lit.ipc.messages import Call
from aurora_lit.request import Request, SamplingParams, StructuredOutputsParams
from aurora_lit.serve.worker.call_tracker import CallTracker

TOKENIZER = tiny_tokenizer()


def call(call_id, *prompts, domain="", whole=False, **options):
    params = SamplingParams(**{"max_tokens": 20, **options})
    return Call(
        call_id=call_id,
        is_answered_whole=whole,
        requests=tuple(
            Request(
                request_id=f"{call_id}-{i}", prompt_ids=tuple(TOKENIZER.encode(prompt)), params=params, domain=domain
            )
            for i, prompt in enumerate(prompts)
        ),
    )


def run(tracker, engine):
    """All rounds until idle: {(call id, index): [delta, ...]}."""
    seen = {}
    while engine.has_work:
        for call_id, deltas in tracker.advance(engine.round()).updates:
            for delta in deltas:
                seen.setdefault((call_id, delta.index), []).append(delta)
    return seen


def tokens(deltas):
    return [token_id for delta in deltas for token_id in delta.token_ids]


def ticking(step_s):
    """A clock that goes on by a step each time that it is asked."""
    return functools.partial(next, itertools.count(0.0, step_s))


@pytest.fixture
def engine():
    return FakeEngine(FakeOptions(tokens_per_round=3))


@pytest.fixture
def tracker(engine):
    return CallTracker(engine, clock=ticking(1.0))


def test_one_message_a_call_a_round(tracker, engine):
    tracker.add(call("a", "xyz", "uvw"))
    assert [len(update) for _, update in tracker.advance(engine.round()).updates] == [2]


def test_what_nobody_looks_at_is_held_longer_than_what_somebody_does(engine):
    tracker = CallTracker(engine, clock=ticking(0.004))
    tracker.add(call("a", "abc", "def", whole=True, max_tokens=93))
    tracker.add(call("b", "xyz", max_tokens=30))
    messages = []
    while engine.has_work:
        messages.append({call_id: len(deltas) for call_id, deltas in tracker.advance(engine.round()).updates})
    assert [(n, message["a"]) for n, message in enumerate(messages) if "a" in message] == [(0, 2), (25, 50), (30, 10)]
    assert [message["b"] for message in messages if "b" in message] == [1] * 10


def test_a_choice_that_ends_is_passed_on_at_once_with_all_before_it(engine):
    tracker = CallTracker(engine, clock=ticking(0.0))
    tracker.add(call("a", "abc", "abcdef", whole=True, max_tokens=9))
    tracker.add(call("b", "abc", whole=True, max_tokens=30))
    messages = []
    while engine.has_work:
        messages.append({call_id: len(deltas) for call_id, deltas in tracker.advance(engine.round()).updates})
    assert [(n, message) for n, message in enumerate(messages) if message] == [
        (0, {"a": 2, "b": 1}),
        (2, {"a": 4}),
        (9, {"b": 9}),
    ]


def test_deltas_that_were_held_are_those_of_each_round(tracker, engine):
    tracker.add(call("a", "abc", max_tokens=30))
    at_once = run(tracker, engine)
    held = CallTracker(engine, clock=ticking(0.004))
    held.add(call("a", "abc", whole=True, max_tokens=30))
    assert run(held, engine) == at_once
    assert len(at_once["a", 0]) == 10


def test_tokens_go_on_as_the_engine_made_them_whatever_the_stop_strings(tracker, engine):
    tracker.add(call("a", "abcd", max_tokens=8, stop=("b",)))
    deltas = run(tracker, engine)["a", 0]
    assert tokens(deltas) == TOKENIZER.encode("abcdabcd")
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    assert tracker.active_calls() == []


def test_cancelling_one_request_frees_its_slot_and_the_others_of_its_call_go_on(tracker, engine):
    tracker.add(call("a", "abc", "def", max_tokens=9))
    tracker.advance(engine.round())
    tracker.cancel_request("a", 0)
    assert engine.num_running == 1
    tracker.cancel_request("a", 0)
    tracker.cancel_request("a", 7)
    tracker.cancel_request("unknown", 0)
    seen = run(tracker, engine)
    assert seen.keys() == {("a", 1)}
    assert tokens(seen["a", 1]) == TOKENIZER.encode("defdef")
    assert tracker.active_calls() == []


def test_requests_that_may_not_be_stored_are_counted(tracker):
    plain, opted_out = call("a", "abc"), call("b", "abc", "def")
    requests = tuple(replace(request, store=False) for request in opted_out.requests)
    tracker.add(plain)
    tracker.add(Call(call_id="b", requests=requests))
    assert tracker.num_opted_out == 2


def test_a_call_ends_when_its_last_request_is_cancelled(tracker, engine):
    tracker.add(call("a", "abc", "def", max_tokens=2))
    tracker.cancel_request("a", 1)
    tracker.cancel_request("a", 0)
    assert not engine.has_work
    assert tracker.active_calls() == []


def test_an_error_of_one_request_ends_that_request_alone(tracker, engine):
    tracker.add(call("bad", "abc", "<|error|>", max_tokens=4))
    tracker.add(call("good", "xyz", max_tokens=4))
    seen = run(tracker, engine)
    (failed,) = seen["bad", 1]
    assert (failed.finish_reason, failed.error) == ("error", "as asked")
    assert tokens(seen["bad", 0]) == TOKENIZER.encode("abca")
    assert tokens(seen["good", 0]) == TOKENIZER.encode("xyzx")
    assert tracker.active_calls() == []


def test_cancel_frees_every_slot_of_a_call(tracker, engine):
    tracker.add(call("a", "abc", "def"))
    tracker.advance(engine.round())
    tracker.cancel("a")
    tracker.cancel("a")
    assert not engine.has_work
    assert tracker.active_calls() == []


def test_a_refused_request_can_be_cancelled_whole(tracker, engine):
    with pytest.raises(ValueError, match="refuses"):
        tracker.add(call("a", "abc", "<|refuse|>"))
    tracker.cancel("a")
    assert not engine.has_work
    assert tracker.active_calls() == []


def test_outputs_have_their_kind_in_the_round_that_ends_their_request_too(tracker, engine):
    tracker.add(call("a", "abc", max_tokens=3, domain="code"))
    tracker.add(call("b", "abc", "<|error|>", max_tokens=3, domain="chat"))
    tracker.add(call("c", "abc", max_tokens=3))
    progress = tracker.advance(engine.round())
    assert [kind.domain for kind in progress.kinds] == ["code", "chat", "chat", ""]
    assert [[delta.finish_reason for delta in update] for _, update in progress.updates] == [
        ["length"],
        ["length", "error"],
        ["length"],
    ]
    assert tracker.active_calls() == []


def test_a_trial_tells_requests_apart_by_served_domain_temperature_options_and_grammar(tracker, engine):
    choice = StructuredOutputsParams(choice=("a", "b"))
    tracker.add(call("a", "abc", temperature=0.0, domain="code"))
    tracker.add(call("b", "abc", temperature=0.71))
    tracker.add(call("c", "abc", structured_outputs=choice))
    tracker.add(call("d", "abc", temperature=0.0, presence_penalty=1.0))
    tracker.add(call("e", "abc", top_p=0.9, structured_outputs=choice))
    tracker.add(call("f", "abc", temperature=0.0, top_p=0.9))
    tracker.add(call("gone", "abc"))
    outputs = [replace(output, domain=output.domain or "auto-1") for output in engine.round()]
    tracker.cancel("gone")
    assert tracker.advance(outputs).kinds == [
        TrafficKind("code", temperature=0.0),
        TrafficKind("auto-1", temperature=0.7),
        TrafficKind("auto-1", temperature=1.0, has_grammar=True),
        TrafficKind("auto-1", temperature=0.0, has_options=True),
        TrafficKind("auto-1", temperature=1.0, has_grammar=True, has_options=True),
        TrafficKind("auto-1", temperature=0.0),
        None,
    ]
