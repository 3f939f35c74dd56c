"""The evidence for a challenger: how often equal and worse drafts pass in many trials, and how soon a better one does.

Drafts are replaced by what the gate sees of them: a mean difference and a request's noise, both in tokens a round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_lit.drafts.evidence import Evidence
from aurora_lit.learn.online import trial as trial_module
from aurora_lit.learn.online.learner import PATIENCE_TRIALS
from aurora_lit.learn.online.scores import HeldOutRequest
from aurora_lit.learn.online.trial import Trial

NOISE = 0.25
CHAMPION = 2.0
"""Tokens a round."""


class Trials:
    """Trials of challengers with a given lead, each with new requests, until one passes or learning restarts."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, requests: int = 12, noise: float = NOISE, heat: float = 0.0
    ) -> None:
        self.heat = heat
        self._random, self._requests, self._num_requests, self._noise = random.Random(0), requests, 0, noise
        self._noises: dict[str, float] = {}
        self.trial = Trial(seed=0)
        monkeypatch.setattr(trial_module, "score_requests", self._score)

    def _score(
        self, module: Any, requests: Sequence[HeldOutRequest], **_: Any
    ) -> Iterator[tuple[HeldOutRequest, float]]:
        for request in requests:
            noise = self._noises.setdefault(request.request_id, self._random.gauss(0.0, self._noise))
            yield request, CHAMPION + (0.0 if module is None else module + noise)

    def hold(self, lead: float) -> trial_module.GateDecision:
        """One trial."""
        for _ in range(self._requests):
            self._num_requests += 1
            trace: Any = SimpleNamespace(
                request_id=str(self._num_requests), domain=f"{self._num_requests % 3}", client="", num_bytes=0
            )
            self.trial.add(trace)
        self.trial.release(32)
        drafts: Any = {"champion": None, "challenger": lead}
        decision = self.trial.hold(batch_positions=1024, heat=self.heat, **drafts)
        assert decision is not None
        return decision

    def lineage(self, lead: Callable[[], float]) -> tuple[int, float | None]:
        """Number of trials that were held, and the lead of the one that passed; None if learning restarts."""
        self.trial.clear_champion_scores()
        refusals = trials = 0
        while refusals < PATIENCE_TRIALS:
            trials, this = trials + 1, lead()
            decision = self.hold(this)
            if decision.passed:
                return trials, this
            refusals += decision.refused
        return trials, None


def test_equal_drafts_pass_in_a_quarter_of_lineages_at_most_however_often_they_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = Trials(monkeypatch)
    lineages = [trials.lineage(lambda: 0.0) for _ in range(160)]
    assert sum(count for count, _ in lineages) > 800, "or they are hardly tried"
    assert 0.05 < sum(passed is not None for _, passed in lineages) / 160 < 0.25


def test_evidence_without_end_passes_equal_drafts_with_its_probability_at_most() -> None:
    chance = random.Random(0)
    passed = 0
    for _ in range(300):
        evidence = Evidence()
        for _ in range(500):
            evidence.add([chance.gauss(0.0, NOISE)])
            if evidence.value >= 4:
                passed += 1
                break
    assert 0.15 < passed / 300 < 0.28


def test_evidence_stays_finite_where_what_passes_cannot_be_published() -> None:
    """A full disk: the champion stays, so the evidence is not cleared, and every further trial adds to it."""
    evidence = Evidence()
    evidence.add([0.3] * 3000)
    assert 1e20 < evidence.value < 1e30
    evidence.add([-0.3] * 300)
    assert evidence.value < 1


def test_a_draft_that_is_five_per_cent_better_passes_within_a_few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(6, NOISE, 6, 0.6), (12, NOISE, 4, 0.7), (30, NOISE, 1, 0.4), (30, NOISE, 3, 0.7), (12, 0.1, 1, 0.7)]
    for requests, noise, within, least in cases:
        trials = Trials(monkeypatch, requests=requests, noise=noise)
        lineages = [trials.lineage(lambda: 0.05 * CHAMPION) for _ in range(120)]
        soon = sum(passed is not None and count <= within for count, passed in lineages)
        assert soon / 120 > least, (requests, noise, within, soon / 120)


@pytest.mark.slow
def test_the_more_is_left_to_learn_the_sooner_a_better_draft_passes_and_a_worse_one_still_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def passed_at_once(lead: float, heat: float) -> float:
        trials = Trials(monkeypatch, heat=heat)
        found = []
        for _ in range(150):
            trials.trial.clear_champion_scores()
            found.append(trials.hold(lead).passed)
        return sum(found) / 150

    better = [passed_at_once(0.05 * CHAMPION, heat) for heat in (0.0, 0.5, 1.0)]
    assert better[0] + 0.1 < better[1] < better[2], better
    assert better[2] > 0.65
    assert passed_at_once(0.0, 0.5) < 0.3
    assert passed_at_once(0.0, 1.0) < 0.55, "it must be ahead"
    assert passed_at_once(-0.1 * CHAMPION, 1.0) < 0.02


@pytest.mark.slow
def test_what_steady_traffic_has_cost_does_not_delay_drafts_for_new_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of equal drafts at heat 0, a shift after some of them, then better ones, or equal ones, at heat 1 or 0."""

    def passed_after_a_shift(lead: float, heat: float, *, within: int, most_before: int = 11) -> float:
        trials, found = Trials(monkeypatch, noise=0.2), 0
        for number in range(420):
            trials.heat = 0.0
            trials.trial.clear_champion_scores()
            for _ in range(number % (most_before + 1)):
                if trials.hold(0.0).passed:
                    trials.trial.clear_champion_scores()
            trials.trial.evidence.forget_losses()
            trials.heat = heat
            found += any(trials.hold(lead).passed for _ in range(within))
        return found / 420

    at_once = passed_after_a_shift(0.05 * CHAMPION, 1.0, within=1, most_before=0)
    assert at_once > 0.75
    assert passed_after_a_shift(0.05 * CHAMPION, 1.0, within=1) > at_once - 0.05
    assert passed_after_a_shift(0.0, 1.0, within=1) < 0.55, "it must be ahead"
    assert passed_after_a_shift(0.0, 0.0, within=12) < 0.3


@pytest.mark.slow
def test_worse_drafts_do_not_creep_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the served draft loses in a hundred trials of drafts that are all worse than the one that serves."""
    for worse_by in (0.005, 0.01, 0.03):
        trials = Trials(monkeypatch)
        lineages = [trials.lineage(lambda worse=worse_by: -worse * CHAMPION) for _ in range(130)]  # type: ignore[misc]
        held = sum(count for count, _ in lineages)
        lost = worse_by * sum(passed is not None for _, passed in lineages) / held * 100
        assert lost < 0.02, (worse_by, lost)


@pytest.mark.slow
def test_a_draft_that_takes_random_steps_gets_better_through_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, chance = Trials(monkeypatch), random.Random(1)
    leads = [lead for _ in range(150) if (lead := trials.lineage(lambda: chance.gauss(-0.05, 0.1))[1]) is not None]
    assert len(leads) > 10
    assert sum(leads) / len(leads) > 0.0
