"""Traces of a made engine contain what it computed, whatever it does with its requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.made_vllm import (
    WRONG,
    MadeRunner,
    MadeStep,
    MadeV1Runner,
    MadeV2Runner,
    Rows,
    Traffic,
    params,
    scheduler_output,
    token,
)

from aurora_lit.drafts.live_watch import TrafficKind
from aurora_lit.traces.record import Trace, check
from aurora_lit.vllm.capture import PROMPT_TOKENS, Capture, RoundOutcome, Step
from aurora_lit.vllm.hooks import RunnerHooks
from aurora_lit.vllm.runners import V1, V2, new_requests

KINDS = pytest.mark.parametrize("made", [MadeV1Runner, MadeV2Runner])


class Recorded:
    """A made engine with hooks, and what they gave."""

    def __init__(
        self,
        runner: MadeRunner,
        *,
        limit_bytes: int = 1 << 30,
        segment_tokens: int = 512,
        overlap_tokens: int = 8,
        **broken: Any,
    ) -> None:
        self.traces: list[Trace] = []
        self.outcomes: list[RoundOutcome] = []
        self.failures: list[tuple[str, bool]] = []
        """What was told, and whether nothing more is recorded."""
        self.runner = runner
        self.capture = Capture(
            self.traces.append,
            bytes_per_token=32,
            limit_bytes=limit_bytes,
            segment_tokens=segment_tokens,
            overlap_tokens=overlap_tokens,
        )
        reader = replace(V1 if isinstance(runner, MadeV1Runner) else V2, **broken)
        self.hooks = RunnerHooks(runner, reader, self.capture, self._observe, lambda: None, self._fail)
        self.hooks.install()

    def _fail(self, message: str, *, is_off: bool) -> None:
        self.failures.append((message, is_off))

    def _observe(self, step: Step, outcomes: list[RoundOutcome]) -> None:
        self.outcomes += outcomes

    def run(self, steps: list[MadeStep]) -> list[Trace]:
        """All steps, of which each must give what it gives without hooks."""
        for step in steps:
            assert self.runner.run(step) == ("output" if step.rows else "nothing to compute")
        assert self.hooks.num_errors == 0
        for trace in self.traces:
            check(trace)
        return self.traces


def one_request(*rows: Rows, prompt: int, **changes: Any) -> list[MadeStep]:
    """The steps of a request r, one for each of its rows, and its end."""
    first, *others = (MadeStep(rows=[each]) for each in rows)
    return [
        MadeStep(rows=first.rows, new=[("r", prompt, params(**changes))]),
        *others,
        MadeStep(rows=[], finished=["r"]),
    ]


def answer(start: int, *rounds: tuple[int, int]) -> list[Rows]:
    """Rounds (drafted, accepted) of request r, the first from position `start` on."""
    made = []
    for drafted, accepted in rounds:
        made.append(Rows(request_id="r", position=start, count=1 + drafted, drafted=drafted, accepted=accepted))
        start += 1 + accepted
    return made


def right_rows(trace: Trace, request_id: str) -> bool:
    """True if tokens and states are those of the request's positions."""
    positions = range(trace.first_position, trace.first_position + len(trace.token_ids_T))
    tokens = torch.tensor([token(request_id, p) for p in positions], dtype=torch.int32)
    last_TH = torch.zeros(len(tokens), 4)
    last_TH[:, 0], last_TH[:, 1] = tokens.float(), torch.tensor(list(positions)).float()
    aux_T3H = torch.cat([last_TH.bfloat16() + i for i in range(3)], -1)
    return (
        torch.equal(trace.token_ids_T, tokens)
        and torch.equal(trace.last_TH, last_TH.bfloat16())
        and torch.equal(trace.aux_T3H, aux_T3H)
    )


@KINDS
@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_is_recorded_once_and_exactly(made: type[MadeRunner], seed: int) -> None:
    requests = {f"r{i}": (1 + 11 * i % 60, 2 + 37 * i % 120) for i in range(1, 12)}
    recorded = Recorded(made(), segment_tokens=40, overlap_tokens=8 * (seed % 2))
    steps = Traffic(requests=requests, seed=seed).steps()
    recorded.run(steps)
    for request_id, (prompt, length) in requests.items():
        traces = [trace for trace in recorded.traces if trace.request_id == request_id]
        new: list[int] = []
        for trace in traces:
            assert right_rows(trace, request_id)
            assert trace.prompt_length == prompt
            first, end = trace.first_position, trace.first_position + len(trace.token_ids_T)
            new += range(first + trace.answer_start, end)
        assert new == list(range(prompt, prompt + length - 1))  # the last token is not computed, or not of use
    rounds = sum(int((trace.num_proposed_R > 0).sum()) for trace in recorded.traces)
    drafted = sum(rows.drafted > 0 for step in steps for rows in step.rows)
    assert rounds == drafted == len(recorded.outcomes)
    assert sum(each.accepted for each in recorded.outcomes) == sum(r.accepted for s in steps for r in s.rows)


@KINDS
def test_a_round_has_its_proposals(made: type[MadeRunner]) -> None:
    recorded = Recorded(made())
    recorded.hooks.version = 7
    prompt = Rows(request_id="r", position=0, count=5)
    (trace,) = recorded.run(one_request(prompt, *answer(5, (3, 1), (3, 3), (0, 0)), prompt=5))
    assert trace.round_root_R.tolist() == [5, 7, 11]
    assert trace.num_proposed_R.tolist() == [3, 3, 0]
    assert trace.num_accepted_R.tolist() == [1, 3, 0]
    assert trace.round_version_R.tolist() == [7, 7, -1]
    assert trace.proposal_RK[0].tolist() == [token("r", 6), token("r", 7) + WRONG, token("r", 8) + WRONG]


@KINDS
def test_the_version_of_a_round_is_that_which_proposed_not_that_which_came_since(made: type[MadeRunner]) -> None:
    recorded = Recorded(made())
    steps = one_request(Rows(request_id="r", position=0, count=2), *answer(2, (3, 0), (3, 0)), prompt=2)
    recorded.hooks.version = 1
    recorded.runner.run(steps[0])
    recorded.hooks.version = 2
    for step in steps[1:]:
        recorded.runner.run(step)
    assert recorded.traces[0].round_version_R.tolist() == [1, 2]


def test_zeros_that_stand_for_proposals_where_no_draft_ran_are_none() -> None:
    runner = MadeV1Runner(fits=False)
    recorded = Recorded(runner)
    (trace,) = recorded.run(one_request(Rows(request_id="r", position=0, count=2), *answer(2, (3, 0)), prompt=2))
    assert trace.num_proposed_R.tolist() == [0]
    assert not recorded.outcomes


@KINDS
def test_an_end_of_text_token_and_what_was_computed_after_it_are_cut_off(made: type[MadeRunner]) -> None:
    rounds = answer(4, (3, 3), (3, 3))
    stop = token("r", 9)
    steps = one_request(Rows(request_id="r", position=0, count=4), *rounds, prompt=4, all_stop_token_ids={stop})
    (trace,) = Recorded(made()).run(steps)
    assert trace.first_position + len(trace.token_ids_T) == 9
    assert trace.num_proposed_R.tolist() == [3, 1]  # the second round's first proposal is the end itself
    assert trace.num_accepted_R.tolist() == [3, 1]


@KINDS
def test_with_ignore_eos_only_stop_tokens_end(made: type[MadeRunner]) -> None:
    steps = one_request(
        Rows(request_id="r", position=0, count=4),
        *answer(4, (3, 3), (3, 3)),
        prompt=4,
        all_stop_token_ids={token("r", 6), token("r", 9)},
        stop_token_ids=[token("r", 9)],
        ignore_eos=True,
    )
    (trace,) = Recorded(made()).run(steps)
    assert trace.first_position + len(trace.token_ids_T) == 9


@KINDS
def test_a_request_that_ran_a_step_too_far_ends_at_max_tokens(made: type[MadeRunner]) -> None:
    steps = one_request(Rows(request_id="r", position=0, count=4), *answer(4, (3, 3), (3, 3)), prompt=4, max_tokens=6)
    (trace,) = Recorded(made()).run(steps)
    assert trace.first_position + len(trace.token_ids_T) == 4 + 6 - 1


@KINDS
def test_an_aborted_request_leaves_what_it_had(made: type[MadeRunner]) -> None:
    (trace,) = Recorded(made()).run(
        one_request(Rows(request_id="r", position=0, count=4), *answer(4, (3, 2)), prompt=4)
    )
    assert len(trace.token_ids_T) == 4 + 3
    read_only = Recorded(made()).run(one_request(Rows(request_id="r", position=0, count=2, unfinished=True), prompt=4))
    assert read_only == []


@KINDS
def test_a_request_that_opted_out_leaves_nothing_but_counts(made: type[MadeRunner]) -> None:
    recorded = Recorded(made())
    steps = one_request(
        Rows(request_id="r", position=0, count=4),
        *answer(4, (3, 2)),
        prompt=4,
        extra_args={"aurora_lit_store": 0, "aurora_lit_domain": "code"},
    )
    assert recorded.run(steps) == []
    assert recorded.capture.num_opted_out == 1
    assert [(each.traffic.domain, each.proposed, each.accepted) for each in recorded.outcomes] == [("code", 3, 2)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_request", object()), ("mm_features", [object()]), ("prompt_embeds", torch.zeros(2, 4))],
)
def test_what_is_not_plain_text_of_the_target_is_not_recorded(name: str, value: Any) -> None:
    """A prompt may mix embeddings with tokens, so that both are there."""
    step = MadeStep(rows=[Rows(request_id="r", position=0, count=4)], new=[("r", 4, params())])
    output = scheduler_output(step)
    assert [info.recordable for info, _ in new_requests(output)] == [True]
    setattr(output.scheduled_new_reqs[0], name, value)
    assert [info.recordable for info, _ in new_requests(output)] == [False]


def test_of_a_target_with_mrope_a_row_has_the_position_that_it_has_in_its_request() -> None:
    """V1's `_get_positions` gives three of them then."""
    traces = Recorded(MadeV1Runner(uses_mrope=True)).run(Traffic(requests={"r1": (10, 40), "r2": (20, 30)}).steps())
    assert sorted(trace.request_id for trace in traces) == ["r1", "r2"]
    assert all(right_rows(trace, trace.request_id) for trace in traces)


def test_a_label_is_the_traces_domain() -> None:
    steps = one_request(
        Rows(request_id="r", position=0, count=4),
        *answer(4, (0, 0)),
        prompt=4,
        temperature=0.5,
        extra_args={"aurora_lit_domain": "code"},
    )
    (trace,) = Recorded(MadeV1Runner()).run(steps)
    assert (trace.domain, trace.verify, trace.temperature) == ("code", "sampled", 0.5)


def test_a_trial_tells_requests_apart_by_label_temperature_options_and_structured_output() -> None:
    recorded = Recorded(MadeV1Runner())
    rows = [Rows(request_id="r", position=0, count=4), *answer(4, (3, 2))]
    asked = {"aurora_lit_domain": "code"}
    recorded.run(one_request(*rows, prompt=4))
    recorded.run(one_request(*rows, prompt=4, temperature=0.71, structured_outputs=object(), extra_args=asked))
    for changed in ({"logit_bias": {3: 1.0}}, {"temperature": 1.0, "top_k": 4}, {"top_k": 4}):
        recorded.run(one_request(*rows, prompt=4, **changed))
    kinds = [each.traffic for each in recorded.outcomes]
    assert kinds == [
        TrafficKind(),
        TrafficKind("code", temperature=0.7, has_grammar=True),
        TrafficKind(has_options=True),
        TrafficKind(temperature=1.0, has_options=True),
        TrafficKind(),
    ]


def test_of_a_long_prompt_the_end_is_kept() -> None:
    length = PROMPT_TOKENS + 500
    chunks = [Rows(request_id="r", position=0, count=300, unfinished=True)]
    chunks += [Rows(request_id="r", position=300, count=length - 300)]
    recorded = Recorded(MadeV1Runner())
    (trace,) = recorded.run(one_request(*chunks, *answer(length, (0, 0)), prompt=length))
    assert (trace.first_position, trace.answer_start) == (500, PROMPT_TOKENS)
    assert right_rows(trace, "r")


def test_requests_beyond_the_memory_that_traces_may_hold_are_served_and_counted() -> None:
    recorded = Recorded(MadeV1Runner(), limit_bytes=32 * (4 + 100 + 8))
    both = [("r", 4, params(max_tokens=100)), ("s", 4, params(max_tokens=100))]
    rows = [Rows(request_id=name, position=0, count=4) for name in "rs"]
    later = [Rows(request_id=name, position=4, count=1) for name in "rs"]
    recorded.run([MadeStep(rows=rows, new=both), MadeStep(rows=later), MadeStep(rows=[], finished=["r", "s"])])
    assert [trace.request_id for trace in recorded.traces] == ["r"]
    assert recorded.capture.num_unrecorded == 1
    again = one_request(Rows(request_id="r", position=0, count=4), *answer(4, (0, 0)), prompt=4, max_tokens=100)
    assert len(recorded.run(again)) == 2  # the memory is free again


def test_requests_that_began_before_capture_are_left_alone() -> None:
    recorded = Recorded(MadeV1Runner())
    assert recorded.run([MadeStep(rows=answer(5, (3, 1))), MadeStep(rows=[], finished=["r"])]) == []


@KINDS
@pytest.mark.parametrize("broken", ["read_batch", "read_num_sampled", "capture"])
def test_an_exception_in_a_wrap_is_counted_and_turns_capture_off_but_reaches_nobody(
    made: type[MadeRunner], broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("injected")

    if broken == "capture":
        monkeypatch.setattr(Capture, "add", fail)
    recorded = Recorded(made(), **({} if broken == "capture" else {broken: fail}))
    for step in Traffic(requests={"r1": (20, 60)}).steps():
        assert recorded.runner.run(step) == ("output" if step.rows else "nothing to compute")
    assert recorded.hooks.num_errors == 3
    assert not recorded.hooks.is_on
    assert "no more traces are made until the next start" in caplog.text
    assert [is_off for _, is_off in recorded.failures] == [False, False, True]
    assert [message.partition(" times")[0] for message, _ in recorded.failures] == [
        f"making traces failed ({number} of 3" for number in (1, 2, 3)
    ]
    assert recorded.failures[-1][0].endswith("no more traces are made until the next start): ValueError: injected")
    assert recorded.capture.num_running == 0  # though its end was not seen


@KINDS
def test_requests_after_an_exception_are_recorded_and_have_all_the_memory(made: type[MadeRunner]) -> None:
    failures = [ValueError("injected")]

    def fail_once(runner: Any) -> Any:
        if failures:
            raise failures.pop()
        return (V1 if made is MadeV1Runner else V2).read_batch(runner)

    recorded = Recorded(made(), limit_bytes=1500, read_batch=fail_once)  # room for one request
    for name in ("lost", "kept"):
        for step in Traffic(requests={name: (20, 16)}).steps():
            recorded.runner.run(step)
    assert recorded.hooks.num_errors == 1
    assert [trace.request_id for trace in recorded.traces] == ["kept"]
