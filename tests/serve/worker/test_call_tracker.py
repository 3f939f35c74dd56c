"""CallTracker: outputs of the engine become deltas of calls; faults stay with the call they belong to."""

import pytest
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.ipc.messages import Call, Failure
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.worker.call_tracker import CallTracker

TOKENIZER = tiny_tokenizer()


def call(call_id, *prompts, **options):
    params = SamplingParams(**{"max_tokens": 20, **options})
    return Call(
        call_id=call_id,
        requests=tuple(
            Request(request_id=f"{call_id}-{i}", prompt_ids=tuple(TOKENIZER.encode(prompt)), params=params)
            for i, prompt in enumerate(prompts)
        ),
    )


def run(table, engine):
    """All rounds until idle: {call id: [content, ...]}."""
    seen = {}
    while engine.has_work:
        for call_id, _, content in table.advance(engine.round()):
            seen.setdefault(call_id, []).append(content)
    return seen


@pytest.fixture
def engine():
    return FakeEngine(FakeOptions(tokens_per_round=3))


@pytest.fixture
def table(engine):
    return CallTracker(engine, TOKENIZER)


def test_one_message_a_call_a_round(table, engine):
    table.add(call("a", "xyz", "uvw"), 0)
    assert [len(content) for _, _, content in table.advance(engine.round())] == [2]


def test_stop_string_over_rounds_ends_the_request_in_the_engine(table, engine):
    table.add(call("a", "abcdefgh", stop=("def",)), 0)
    contents = run(table, engine)["a"]
    deltas = [delta for content in contents for delta in content]
    assert "".join(delta.text for delta in deltas) == "abc"
    assert [token for delta in deltas for token in delta.token_ids] == TOKENIZER.encode("abcdef")
    assert deltas[-1].finish_reason == "stop"
    assert engine.num_running == 0
    assert table.everyone() == []


def test_a_stop_string_of_the_last_token_wins_over_length(table, engine):
    table.add(call("a", "abc", stop=("c",), max_tokens=3), 0)
    (content,) = run(table, engine)["a"]
    assert (content[0].text, content[0].finish_reason) == ("ab", "stop")


def test_held_text_comes_out_at_the_end(table, engine):
    table.add(call("a", "abc", stop=("cX",), max_tokens=3), 0)
    (content,) = run(table, engine)["a"]
    assert (content[0].text, content[0].finish_reason) == ("abc", "length")


def test_a_stop_token_counts_but_does_not_show(table, engine):
    (stop_id,) = TOKENIZER.encode("c")
    table.add(call("a", "abcd", stop_token_ids=(stop_id,)), 0)
    (content,) = run(table, engine)["a"]
    assert (content[0].text, len(content[0].token_ids), content[0].finish_reason) == ("ab", 3, "stop")


def test_an_error_of_one_request_ends_its_call_alone(table, engine):
    table.add(call("bad", "abc", "<|error|>"), 0)
    table.add(call("good", "xyz", max_tokens=4), 1)
    seen = run(table, engine)
    assert isinstance(seen["bad"][-1], Failure)
    assert "as asked" in seen["bad"][-1].message
    assert "".join(delta.text for content in seen["good"] for delta in content) == "xyzx"
    assert table.everyone() == []


def test_drop_frees_every_slot_of_a_call(table, engine):
    table.add(call("a", "abc", "def"), 0)
    table.advance(engine.round())
    table.drop("a")
    table.drop("a")
    assert not engine.has_work
    assert table.everyone() == []


def test_a_refused_request_can_be_dropped_whole(table, engine):
    with pytest.raises(ValueError, match="refuses"):
        table.add(call("a", "abc", "<|refuse|>"), 0)
    table.drop("a")
    assert not engine.has_work
