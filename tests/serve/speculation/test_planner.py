"""SpeculationPlanner: draft lengths by listed costs and acceptance rates.

Costs are in seconds; a plain forward pass of the target takes 10 ms.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import pytest

from aurora_lit.request import Request, SamplingParams, Source
from aurora_lit.serve.engine.round_plan import Proposal, WeighedChain
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation import planner as planner_module
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.planner import (
    SpeculationLimits,
    SpeculationPlanner,
    extends_chain,
    speed_of,
)

PLAIN_S = 0.010


@pytest.fixture(autouse=True)
def _decides_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each call of `decide` is a decision."""
    monkeypatch.setattr(planner_module, "_DECIDE_EVERY", 1)


def a_sequence(**params: float) -> RunningSequence:
    """A sequence of which nothing was verified."""
    request = Request(request_id="a", prompt_ids=(1,), params=SamplingParams(max_tokens=1, **params))  # type: ignore[arg-type]
    return RunningSequence(request=request, slot=0, prompt_length=1, length=1)


def chain_costs(
    *,
    first_s: float = 0.001,
    next_s: float = 0.001,
    wider_s: float = 0.0005,
    ragged: bool = False,
    longest: int = 8,
) -> Costs:
    """Seconds: a first proposal, each further one, each further query position."""
    costs = Costs(ragged=ragged)
    for size in (1, 2, 4, 8):
        for query_length in range(1, longest + 2):
            costs.target.update(size, query_length, PLAIN_S + (query_length - 1) * wider_s)
        for levels in range(1, longest + 1):
            costs.chain.update(size, levels, first_s + (levels - 1) * next_s)
    return costs


def chain_planner(*, draft_tokens: int = 4, adaptive: bool = True, **costs: float) -> SpeculationPlanner:
    limits = SpeculationLimits(draft_tokens=draft_tokens, copied_tokens=0, adaptive=adaptive)
    return SpeculationPlanner(limits, chain_costs(**costs))  # type: ignore[arg-type]


def decide(planner: SpeculationPlanner, rates: Sequence[float], num_plain: int = 0) -> int:
    """How long the chains are beside `num_plain` sequences that do not speculate."""
    return planner.decide(rates, batch_size=len(rates) + num_plain).length


@pytest.mark.parametrize(
    ("costs", "rates", "length"),
    [
        ({}, [0.9], 4),  # a fast draft that is often accepted
        ({}, [0.8, 0.9], 4),
        ({"draft_tokens": 8}, [0.95], 8),
        ({"draft_tokens": 0}, [0.95], 0),
        ({}, [0.05], 0),  # hardly ever accepted
        ({"next_s": 0.0025}, [0.05, 0.05, 0.05, 0.9], 1),  # one sequence of four: few proposals
        ({"wider_s": 0.010}, [0.9], 0),  # a target whose time grows with every position
        ({"first_s": 0.02}, [0.7], 0),  # a draft as slow as the target
        ({"first_s": 0.003, "next_s": 0.002}, [0.4], 1),
        ({"first_s": 0.001, "next_s": 0.02}, [0.8], 1),  # a slow second step
        ({"wider_s": 0.0}, [0.0], 0),
    ],
)
def test_the_length_with_the_most_tokens_per_second_is_chosen(
    costs: dict[str, float], rates: list[float], length: int
) -> None:
    assert decide(chain_planner(**costs), rates) == length  # type: ignore[arg-type]


def test_drafts_are_shorter_beside_sequences_that_do_not_speculate() -> None:
    """Costs grow with the batch: the fourth sequence's longer query makes the pass slower for the three plain ones."""
    planner = SpeculationPlanner(SpeculationLimits(draft_tokens=4, copied_tokens=0), Costs(ragged=False))
    for size in (1, 2, 4):
        for levels in range(1, 5):
            planner.costs.chain.update(size, levels, 0.001 * levels)
        for query_length in range(1, 6):
            planner.costs.target.update(size, query_length, 0.002 + 0.003 * size * query_length)
    alone = decide(planner, [0.9])
    assert 0 <= decide(planner, [0.9], num_plain=3) < alone
    assert decide(planner, [], num_plain=4) == 0


def test_without_adaptation_the_draft_length_is_fixed() -> None:
    planner = chain_planner(adaptive=False, first_s=1.0)
    assert decide(planner, [0.01]) == 4
    assert planner.min_gains(4, 1, batch_size=1, speed=100.0) is None
    assert decide(planner, []) == 0


def speeds(planner: SpeculationPlanner, rate: float) -> list[float]:
    """Tokens per second of one sequence, by length of its chain."""
    return [speed_of(length, [rate], batch_size=1, costs=planner.costs) for length in range(5)]


def test_a_change_must_promise_a_few_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds with 1 and 4 proposals are nearly equal: the length in use stays."""
    monkeypatch.setattr(planner_module, "_RECONSIDER_EVERY", 1)
    monkeypatch.setattr(planner_module, "_TRY_EVERY", 1 << 30)
    planner = chain_planner(first_s=0.001, next_s=0.002)
    rates = [0.05 + 0.01 * i for i in range(90)]
    up = [decide(planner, [rate]) for rate in rates]
    down = [decide(planner, [rate]) for rate in reversed(rates)][::-1]
    assert up == sorted(up)
    assert down == sorted(down)
    assert up[0] == down[0] == 0
    assert up[-1] == down[-1] == 4
    assert all(low <= high for low, high in zip(up, down, strict=True))
    later = [low != high for low, high in zip(up, down, strict=True)]
    assert sum(later) > 8, "with rising rates changes come later than with falling ones"
    flutter = {decide(planner, [rates[later.index(True)] + noise]) for noise in (0.005, -0.005) * 20}
    assert len(flutter) == 1
    for rate, chosen in zip(rates, up, strict=True):
        assert max(speeds(planner, rate)) <= speeds(planner, rate)[chosen] * planner_module._MIN_GAIN


def test_while_nothing_is_drafted_drafting_is_considered_only_every_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = chain_planner()
    while decide(planner, [0.01]):
        pass
    considered: list[int] = []
    original = planner_module.choose_length

    def counted(speeds: Sequence[float], *, last: int) -> int:
        considered.append(last)
        return original(speeds, last=last)

    monkeypatch.setattr(planner_module, "choose_length", counted)
    for _ in range(4 * planner_module._RECONSIDER_EVERY):
        decide(planner, [0.01])
    assert len(considered) == 4
    num_rounds = next(n for n in range(100) if decide(planner, [0.9]))
    assert num_rounds < planner_module._RECONSIDER_EVERY, "a predictable sequence does not wait for long"


def test_after_many_rounds_without_a_draft_one_token_is_drafted() -> None:
    planner, every = chain_planner(), planner_module._PROBE_EVERY
    probes = []
    for number in range(1, 2 * every + 1):
        decision = planner.decide([0.05], batch_size=1)
        assert decision.length == int(decision.is_probe)
        if decision.is_probe and planner.affords_probe(1, uncached=2):
            probes.append(number)
    assert probes == [every, 2 * every]


def test_a_probe_waits_until_reading_the_prompt_is_a_small_share_of_the_time() -> None:
    planner, every = chain_planner(), planner_module._PROBE_EVERY
    planner.costs.prefill_position_s = PLAIN_S / 50
    uncached = 2 + 100  # two plain rounds
    waited = next(
        number
        for number in range(1, 100 * every)
        if planner.decide([0.05], batch_size=1).is_probe and planner.affords_probe(1, uncached=uncached)
    )
    assert waited > every
    assert waited == pytest.approx(2 / planner_module._PROBE_SHARE, rel=0.05)
    for _ in range(every):
        decision = planner.decide([0.05], batch_size=1)
    assert decision.is_probe
    assert not planner.affords_probe(1, uncached=uncached)
    assert planner.affords_probe(1, uncached=2), "a prompt that was read already"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepted_probes_bring_speculation_back(temperature: float) -> None:
    planner, sequence = chain_planner(), a_sequence(temperature=temperature)
    for _ in range(300):
        observe(planner, sequence, proposed=1, accepted=0)
    assert decide(planner, [planner.rate_of(sequence)]) == 0
    for _ in range(60 * planner_module._PROBE_EVERY):
        length = decide(planner, [planner.rate_of(sequence)])
        if length > 1:
            break
        if length:
            observe(planner, sequence, proposed=length, accepted=length)
    else:
        pytest.fail("never came back")
    assert planner.rate_of(sequence) > 0.3


def test_probes_of_new_requests_are_believed_sooner_than_as_many_of_all_proposals() -> None:
    """Each is one proposal in 128 rounds: eight clients waited for minutes until twenty of them changed anything."""
    planner = chain_planner()
    for _ in range(3000):
        observe(planner, a_sequence(temperature=0.0), proposed=1, accepted=0)
    before = planner.mean_rate(sampled=False)
    observe(planner, a_sequence(temperature=0.0), proposed=1, accepted=1)
    assert planner.mean_rate(sampled=False) - before == pytest.approx(0.002, rel=0.01), "it drafts: all count"
    assert decide(planner, [before]) == 0
    for _ in range(20):
        observe(planner, a_sequence(temperature=0.0), proposed=1, accepted=1)
    assert planner.mean_rate(sampled=False) > 0.35
    assert decide(planner, [planner.mean_rate(sampled=False)] * 2) == 0, "between two decisions"
    for _ in range(planner_module._RECONSIDER_EVERY):
        length = decide(planner, [planner.mean_rate(sampled=False)] * 2)
    assert length > 0


@pytest.mark.parametrize(
    ("costs", "value", "survival", "extends"),
    [
        ({}, 2.0, 1.0, True),
        ({}, 0.1, 1.0, False),  # the value head expects nothing
        ({}, 2.0, 0.05, False),  # the chain is probably rejected before
        ({"next_s": 0.02}, 2.0, 1.0, False),
        ({"wider_s": 0.02}, 2.0, 1.0, False),
        ({}, -3.0, 1.0, False),
    ],
)
def test_another_draft_step_must_save_more_time_than_it_takes(
    costs: dict[str, float], value: float, survival: float, extends: bool
) -> None:
    how = {"batch_size": 1, "speed": 1 / PLAIN_S}
    min_gains = chain_planner(**costs).min_gains(4, 1, **how)  # type: ignore[arg-type]
    assert min_gains is not None
    assert len(min_gains) == 3
    assert extends_chain([value], [survival], min_gains[0]) == extends


def test_survival_is_multiplied_by_the_predicted_rate() -> None:
    """v = a(1 + v') with v' = v gives a = v / (1 + v)."""
    survival = [1.0, 0.5]
    extends_chain([1.0, 3.0], survival, 0.0)
    assert survival == pytest.approx([0.5, 0.375])
    extends_chain([1.0, -1.0], survival, 0.0)
    assert survival == pytest.approx([0.25, 0.0])


def test_a_step_pays_for_a_full_batch_of_predictable_sequences_but_not_for_one() -> None:
    planner = chain_planner(next_s=0.0015)

    def extends(values: list[float], num_plain: int = 0) -> bool:
        batch_size = len(values) + num_plain
        speed = batch_size / PLAIN_S
        min_gains = planner.min_gains(2, len(values), batch_size=batch_size, speed=speed)
        assert min_gains is not None
        return extends_chain(values, [1.0] * len(values), min_gains[0])

    assert extends([3.0] * 4)
    assert not extends([3.0, 0.0, 0.0, 0.0])
    assert not extends([3.0], num_plain=3)


def test_before_any_measurement_nothing_is_drafted() -> None:
    planner = SpeculationPlanner(SpeculationLimits(draft_tokens=4, copied_tokens=0), Costs(ragged=True))
    assert planner.decide([0.9], batch_size=1).length == 0
    assert planner.min_gains(1, 1, batch_size=1, speed=100.0) == []


def test_a_decision_says_how_fast_it_will_be_and_holds_for_some_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then, or until other sequences ask."""
    monkeypatch.setattr(planner_module, "_DECIDE_EVERY", 4)
    planner = chain_planner()
    first = planner.decide([0.9], batch_size=1)
    assert first.speed == pytest.approx(max(speeds(planner, 0.9)))
    again = copy.deepcopy(planner)
    assert [planner.decide([0.01], batch_size=1).length for _ in range(4)] == [first.length] * 3 + [0]
    assert again.decide([0.01] * 2, batch_size=2).length == 0


def observe(
    planner: SpeculationPlanner,
    sequence: RunningSequence,
    *,
    proposed: int,
    accepted: int,
    explored: bool = False,
    finished: bool = False,
) -> None:
    """Report a chain of which some tokens were accepted."""
    explored_at = 1.0 if explored else None
    proposal = Proposal(tokens=[1] * proposed, source=Source.DRAFT, num_drafted=proposed, explored_at=explored_at)
    planner.observe(sequence, proposal, path=range(accepted + 1), finished=finished)


def test_acceptance_rates_follow_proposals_up_to_the_first_rejected_one() -> None:
    planner = chain_planner()
    sequence = a_sequence(temperature=0.0)
    record = sequence.verified_drafts

    def after(proposed: int, accepted: int, **how: bool) -> tuple[float, float]:
        record.accepted = record.proposed = 0.0
        observe(planner, sequence, proposed=proposed, accepted=accepted, **how)
        return record.accepted, record.proposed

    assert after(0, 0) == after(4, 4, explored=True) == (0, 0)
    assert planner.rate_of(sequence) == planner.mean_rate(sampled=False) == 0.5, "before anything was verified"
    decay = planner_module._RECORD_DECAY
    assert after(4, 2, finished=True) == after(2, 2), "the end of a request may leave the others unverified"
    assert after(4, 0) == (0, 1), "proposals after a rejected one do not count"
    assert after(2, 2) == pytest.approx((1 + decay, 1 + decay))
    assert after(4, 1) == pytest.approx((decay, 1 + decay)), "later proposals count for more"
    for _ in range(1000):
        after(4, 4)
    assert 0.95 < planner.mean_rate(sampled=False) <= 1.0
    assert planner.mean_rate(sampled=True) == 0.5, "sampled sequences are accepted at a rate of their own"


def test_few_proposals_of_a_sequence_say_less_than_all_that_were_verified_before() -> None:
    planner = chain_planner()
    for _ in range(500):
        observe(planner, a_sequence(temperature=0.0), proposed=1, accepted=0)
    mean = planner.mean_rate(sampled=False)
    assert mean < 0.1
    lucky = a_sequence(temperature=0.0)
    observe(planner, lucky, proposed=3, accepted=3)
    assert mean < planner.rate_of(lucky) < 0.35
    for _ in range(40):
        observe(planner, lucky, proposed=3, accepted=3)
    assert planner.rate_of(lucky) > 0.6, "but many say more"


def test_one_request_says_little_of_a_draft_and_a_few_say_enough() -> None:
    """A rate of 0.35 is about where drafting for one sequence stops to pay at temperature 1."""
    planner = chain_planner()
    rates = []
    for _ in range(5):
        for accepted in (1, 1, *[0] * 14):
            observe(planner, a_sequence(temperature=0.0), proposed=1, accepted=accepted)
        rates.append(planner.mean_rate(sampled=False))
    assert rates[0] > 0.35
    assert rates[-1] < 0.26


def test_in_ragged_rounds_sequences_that_do_not_draft_have_short_queries() -> None:
    costs = {"first_s": 0.0005, "next_s": 0.0005, "wider_s": 0.002}
    assert decide(chain_planner(**costs), [0.9], num_plain=7) == 0  # type: ignore[arg-type]
    assert decide(chain_planner(**costs, ragged=True), [0.9], num_plain=7) > 0  # type: ignore[arg-type]
    padded, ragged = (decide(chain_planner(**costs, ragged=each), [0.9] * 8) for each in (False, True))  # type: ignore[arg-type]
    assert padded == ragged > 0


def test_drafting_stops_as_soon_as_it_costs_time_and_starts_where_it_clearly_saves_time() -> None:
    planner = chain_planner()
    assert decide(planner, [0.6]) > 0
    rates = [n / 100 for n in range(60, 0, -1)]
    chosen = [decide(planner, [rate]) for rate in rates]
    stopped_at = rates[chosen.index(0)]
    again = [decide(planner, [rate]) for rate in sorted(rates)]
    started_at = sorted(rates)[next(i for i, length in enumerate(again) if length)]
    assert started_at > stopped_at, "so that noise does not make it alternate"
    just_before = speeds(chain_planner(), stopped_at + 0.01)
    assert just_before[chosen[chosen.index(0) - 1]] >= just_before[0]


def test_a_draft_that_is_slower_than_calibrated_is_noticed() -> None:
    planner = chain_planner()
    assert decide(planner, [0.6]) > 0
    for _ in range(400):
        planner.observe_draft(1, decide(planner, [0.6]), 0.2)
    assert planner.costs.draft_s(1, 4) > 0.008
    assert planner.affords_probe(1, uncached=0)
    assert decide(planner, [0.6]) == 0


@pytest.mark.parametrize(("tries_every", "found"), [(64, True), (1 << 30, False)])
def test_a_length_that_was_measured_as_too_slow_at_the_start_is_found_later(
    tries_every: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_module, "_TRY_EVERY", tries_every)
    planner = chain_planner()
    assert decide(planner, [0.8]) == 4
    for length in range(2, 5):
        planner.costs.chain.set_initial(1, length, 0.003 * length)
    drafted = []
    for _ in range(6000):
        drafted.append(decide(planner, [0.8]))
        planner.observe_draft(1, drafted[-1], 0.001 * drafted[-1])
    chosen = Counter(drafted[-640:]).most_common(1)[0][0]
    assert chosen == (4 if found else 1)
    assert drafted[-640:].count(chosen) >= 630, "few rounds try others"


def test_times_that_are_no_measurements_change_no_costs() -> None:
    planner = chain_planner()
    planner.updates_costs = False
    before = planner.costs.round_s(1, []), planner.costs.draft_s(1, 4)
    planner.observe_round(1, [], 9.0)
    planner.observe_draft(1, 4, 9.0)
    assert (planner.costs.round_s(1, []), planner.costs.draft_s(1, 4)) == before


@pytest.mark.parametrize(
    ("uncached", "remaining", "drafts"), [(0, 128, True), (500, 128, True), (500, 4, False), (50_000, 128, False)]
)
def test_drafting_must_save_the_time_to_prefill_the_draft_cache(uncached: int, remaining: int, drafts: bool) -> None:
    planner = chain_planner()
    planner.costs.prefill_position_s = 1e-4
    how = {"batch_size": 1, "uncached": uncached, "remaining": remaining}
    assert planner.pays_for_catching_up(decide(planner, [0.9]), [0.9], **how) == drafts  # type: ignore[arg-type]
    assert (decide(planner, [0.9]) > 0) == drafts, "after a refusal drafting is not considered again at once"


def test_another_draft_is_tried_although_the_last_one_was_given_up() -> None:
    planner, sequence = chain_planner(), a_sequence(temperature=0.0)
    for _ in range(100):
        observe(planner, sequence, proposed=4, accepted=0)
    assert decide(planner, [planner.rate_of(sequence)]) == 0
    planner.reset_for_new_draft([sequence])
    assert planner.rate_of(sequence) == planner.mean_rate(sampled=False) == 0.5
    assert decide(planner, [planner.rate_of(sequence)]) > 0


# -- weighing ------------------------------------------------------------------------------------------------------


def test_what_is_weighed_costs_what_rounds_and_levels_do() -> None:
    """Columns of all sequences together, up to twice the levels of each; and levels after the first."""
    limits = SpeculationLimits(draft_tokens=4, copied_tokens=0, sibling_tokens=3)
    planner = SpeculationPlanner(limits, chain_costs(next_s=0.002, wider_s=0.0005, ragged=True))
    sequences = [a_sequence(), a_sequence(temperature=1.0)]
    for _ in range(3):
        sequences[1].verified_drafts.add(True, decay=0.9)
    found = planner.weighing(sequences, batch_size=2, speed=250.0)
    assert found.prices.columns_s[:] == pytest.approx([0.0005 * n / 2 for n in range(17)])
    assert found.prices.levels_s[:] == pytest.approx([0.002] * 3)
    assert found.speed == 250.0
    assert found.level_rates == [planner.rate_of(sequence) for sequence in sequences]
    assert found.level_rates[0] < found.level_rates[1]
    assert found.prices.acceptance_KC is planner.reliability.acceptance_KC


def test_of_a_weighed_chain_no_more_is_known_than_the_sequence_got() -> None:
    limits = SpeculationLimits(draft_tokens=4, copied_tokens=0, sibling_tokens=3)
    planner, sequence = SpeculationPlanner(limits, chain_costs(ragged=True)), a_sequence(temperature=0.0)
    proposal = Proposal(tokens=[5, 6], num_drafted=2, weighed=WeighedChain([5, 6, 7, 8], [0.9, 0.9, 0.1, 0.1]))
    before_KC = planner.reliability.acceptance_KC.clone()
    planner.observe(sequence, proposal, path=[0, 1, 2], tokens=[5, 6], finished=True)
    assert sequence.verified_drafts.proposed == pytest.approx(2, abs=0.2)
    assert (planner.reliability.acceptance_KC != before_KC).nonzero().tolist() == [[0, 14]]
    planner.observe(sequence, proposal, path=[0, 1, 2], tokens=[5, 6, 7], finished=False)
    assert planner.reliability.acceptance_KC[0, 1] > before_KC[0, 1], "it was right, though not proposed"


def test_what_columns_cost_is_asked_again_after_sixteen_rounds() -> None:
    limits = SpeculationLimits(draft_tokens=2, copied_tokens=0, sibling_tokens=1)
    planner, asked = SpeculationPlanner(limits, chain_costs(ragged=True)), []
    for number in range(40):
        planner.costs.target.set_initial(1, 2, PLAIN_S + 0.001 * number)
        decide(planner, [0.9])
        asked.append(round(planner.weighing([a_sequence()], batch_size=1, speed=1.0).prices.columns_s[1], 4))
    assert asked[:2] == [0.0, 0.0]
    assert len(set(asked[14:31])) == 2
    assert asked[35] > asked[20] > 0


def test_a_slow_prefill_is_forgotten_where_no_prompt_is_read_any_more() -> None:
    """It may be held for so slow that none is, so that nothing would ever say otherwise."""
    planner = chain_planner()
    costs = planner.costs
    costs.prefill_position_s = 1e-5
    for _ in range(40):
        planner.observe_draft(1, 1, costs.draft_s(1, 1) + 500 * 8e-5, uncached=502)
    assert costs.catch_up_s(1, uncached=502) > 500 * 7e-5
    for _ in range(10_000):
        planner.observe_round(1, [], PLAIN_S)
    assert costs.catch_up_s(1, uncached=502) == pytest.approx(500 * 1e-5, rel=0.1)
