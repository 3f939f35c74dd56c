"""CallTracker: outputs of the engine become deltas of calls; faults stay with the call they belong to."""

import pytest
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.ipc.messages import Call, Failure
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.worker.call_tracker import CallTracker

TOKENIZER = tiny_tokenizer()


def call(call_id, *prompts, domain="", **options):
    params = SamplingParams(**{"max_tokens": 20, **options})
    return Call(
        call_id=call_id,
        requests=tuple(
            Request(
                request_id=f"{call_id}-{i}", prompt_ids=tuple(TOKENIZER.encode(prompt)), params=params, domain=domain
            )
            for i, prompt in enumerate(prompts)
        ),
    )


def run(tracker, engine):
    """All rounds until idle: {call id: [update, ...]}."""
    seen = {}
    while engine.has_work:
        for call_id, update in tracker.advance(engine.round()).updates:
            seen.setdefault(call_id, []).append(update)
    return seen


@pytest.fixture
def engine():
    return FakeEngine(FakeOptions(tokens_per_round=3))


@pytest.fixture
def tracker(engine):
    return CallTracker(engine, TOKENIZER)


def test_one_message_a_call_a_round(tracker, engine):
    tracker.add(call("a", "xyz", "uvw"))
    assert [len(update) for _, update in tracker.advance(engine.round()).updates] == [2]


def test_stop_string_over_rounds_ends_the_request_in_the_engine(tracker, engine):
    tracker.add(call("a", "abcdefgh", stop=("def",)))
    updates = run(tracker, engine)["a"]
    deltas = [delta for update in updates for delta in update]
    assert "".join(delta.text for delta in deltas) == "abc"
    assert [token for delta in deltas for token in delta.token_ids] == TOKENIZER.encode("abcdef")
    assert deltas[-1].finish_reason == "stop"
    assert engine.num_running == 0
    assert tracker.active_calls() == []


def test_a_stop_string_of_the_last_token_wins_over_length(tracker, engine):
    tracker.add(call("a", "abc", stop=("c",), max_tokens=3))
    (update,) = run(tracker, engine)["a"]
    assert (update[0].text, update[0].finish_reason) == ("ab", "stop")


def test_held_text_comes_out_at_the_end(tracker, engine):
    tracker.add(call("a", "abc", stop=("cX",), max_tokens=3))
    (update,) = run(tracker, engine)["a"]
    assert (update[0].text, update[0].finish_reason) == ("abc", "length")


def test_a_stop_token_counts_but_does_not_show(tracker, engine):
    (stop_id,) = TOKENIZER.encode("c")
    tracker.add(call("a", "abcd", stop_token_ids=(stop_id,)))
    (update,) = run(tracker, engine)["a"]
    assert (update[0].text, len(update[0].token_ids), update[0].finish_reason) == ("ab", 3, "stop")


def test_an_error_of_one_request_ends_its_call_alone(tracker, engine):
    tracker.add(call("bad", "abc", "<|error|>"))
    tracker.add(call("good", "xyz", max_tokens=4))
    seen = run(tracker, engine)
    assert isinstance(seen["bad"][-1], Failure)
    assert "as asked" in seen["bad"][-1].message
    assert "".join(delta.text for update in seen["good"] for delta in update) == "xyzx"
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


def test_outputs_have_their_domain_in_the_round_that_ends_their_request_too(tracker, engine):
    tracker.add(call("a", "abc", max_tokens=3, domain="code"))
    tracker.add(call("b", "abc", max_tokens=3, stop=("b",), domain="chat"))
    tracker.add(call("c", "abc", max_tokens=3))
    progress = tracker.advance(engine.round())
    assert progress.domains == ["code", "chat", ""]
    assert [update[0].finish_reason for _, update in progress.updates] == ["length", "stop", "length"]
    assert tracker.active_calls() == []
