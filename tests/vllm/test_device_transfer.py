"""Rows are copied without making the engine wait, and looked at in order; the ends of copies are made here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.made_vllm import MadeStep, MadeV1Runner, Rows, Traffic, params

from aurora_lit.traces.record import Trace
from aurora_lit.vllm import hooks as hooks_file
from aurora_lit.vllm.capture import Capture
from aurora_lit.vllm.device_transfer import PendingStep, copy_step, own_rows, wanted_spans
from aurora_lit.vllm.hooks import RunnerHooks
from aurora_lit.vllm.runners import V1, Batch


def batch_of(*num_rows: int) -> Batch:
    starts = [sum(num_rows[:i]) for i in range(len(num_rows))]
    rows_Q = torch.arange(sum(num_rows))
    states_QH = rows_Q[:, None].float().expand(-1, 2)
    return Batch(
        request_ids=[str(i) for i in range(len(num_rows))],
        row_starts=starts,
        num_rows=list(num_rows),
        num_drafted=[0] * len(num_rows),
        is_unfinished=[False] * len(num_rows),
        drafts_next=True,
        token_ids_Q=rows_Q.int(),
        position_Q=rows_Q,
        aux_QH=[states_QH, states_QH + 100, states_QH + 200],
        last_QH=states_QH,
    )


def test_neighbouring_requests_are_copied_together_and_what_nobody_wants_is_not() -> None:
    batch = batch_of(4, 3, 2, 5)
    assert wanted_spans(batch, [4, 3, 2, 5]) == [(0, 14)]
    assert wanted_spans(batch, [2, 3, 0, 1]) == [(2, 7), (13, 14)]
    assert wanted_spans(batch, [0, 0, 0, 0]) == []


@pytest.mark.parametrize("wanted", [(4, 3), (2, 1), (0, 3), (0, 0)])
def test_the_last_rows_of_each_request_are_copied(wanted: tuple[int, int]) -> None:
    counts = dict(zip("01", wanted, strict=True))
    batch = own_rows(batch_of(4, 3), lambda request_id, _: counts[request_id])
    step = copy_step(batch, num_sampled_B=torch.tensor([1, 1]), version=3, stream=None).step()
    rows = [*range(4 - wanted[0], 4), *range(7 - wanted[1], 7)]
    assert step.token_ids_Q.tolist() == rows
    assert step.aux_Q3H.tolist() == [[r, r, r + 100, r + 100, r + 200, r + 200] for r in rows]
    assert list(step.num_rows) == list(wanted)
    assert wanted_spans(batch, wanted) == ([(0, len(rows))] if rows else [])


class MadeEvent:
    """The end of a copy, which tests set."""

    def __init__(self) -> None:
        self.is_done = False
        self.was_waited_for = False

    def query(self) -> bool:
        """True when the copy is done."""
        return self.is_done

    def synchronize(self) -> None:
        """Wait for it."""
        self.was_waited_for = self.is_done = True


class Asynchronous:
    """A made engine whose copies are done when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[MadeEvent] = []
        self.traces: list[Trace] = []
        monkeypatch.setattr(hooks_file, "copy_step", self._copy_step)
        self.runner = MadeV1Runner()
        capture = Capture(
            self.traces.append, bytes_per_token=1, limit_bytes=1 << 20, segment_tokens=512, overlap_tokens=8
        )
        self.hooks = RunnerHooks(self.runner, V1, capture, lambda *_: None, lambda: None, lambda _: None)
        self.hooks.install()

    def _copy_step(self, *args: Any, **options: Any) -> PendingStep:
        self.events.append(MadeEvent())
        return replace(copy_step(*args, **options), event=self.events[-1])


def test_a_step_is_looked_at_when_its_copies_are_done_and_ends_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Asynchronous(monkeypatch)
    *steps, end = Traffic(requests={"r1": (4, 3)}, preempt_share=0).steps()
    other: dict[str, Any] = {"rows": [Rows(request_id="r2", position=0, count=4)], "new": [("r2", 4, params())]}
    for step in [*steps, MadeStep(finished=end.finished, **other)]:
        engine.runner.run(step)
    assert engine.traces == []  # the request has ended, but its last step is still being copied
    for event in engine.events:
        event.is_done = True
    engine.runner.run(MadeStep(rows=[Rows(request_id="r2", position=4, count=1)]))
    assert [trace.request_id for trace in engine.traces] == ["r1"]
    assert not any(event.was_waited_for for event in engine.events)
    assert engine.hooks.num_errors == 0


def test_an_empty_step_waits_for_all_copies_since_no_other_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Asynchronous(monkeypatch)
    for step in Traffic(requests={"r1": (4, 3)}, preempt_share=0).steps():
        assert engine.traces == []
        engine.runner.run(step)
    assert step.rows == []
    assert [trace.request_id for trace in engine.traces] == ["r1"]
    assert engine.hooks.num_errors == 0


def test_copies_that_never_end_are_waited_for_before_they_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Asynchronous(monkeypatch)
    *steps, _ = Traffic(requests={"r1": (4, 60)}, preempt_share=0).steps()
    for step in steps:
        engine.runner.run(step)
        assert len(engine.hooks._queue) <= 10
    assert engine.events[0].was_waited_for
    assert not engine.events[-1].was_waited_for
