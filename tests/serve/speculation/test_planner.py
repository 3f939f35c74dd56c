"""SpeculationPlanner and CostTable: draft lengths and trees by listed costs and acceptance rates.

Costs are in seconds; a plain forward pass of the target takes 10 ms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from aurora_lit.request import Output, Request, SamplingParams
from aurora_lit.serve.sequences.sequence import RunningSequence, VerifiedTokens
from aurora_lit.serve.speculation import planner as planner_module
from aurora_lit.serve.speculation.costs import CostTable
from aurora_lit.serve.speculation.planner import SpeculationPlanner, extends_chain

PLAIN_S = 0.010


def a_sequence(rate: float) -> RunningSequence:
    """A sequence with this acceptance rate."""
    request = Request(request_id="a", prompt_ids=(1,), params=SamplingParams(max_tokens=1))
    return RunningSequence(request=request, slot=0, acceptance_rate=rate, prompt_length=1, length=1)


def chain_planner(
    *,
    first_s: float = 0.001,
    next_s: float = 0.001,
    wider_s: float = 0.0005,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    max_draft_tokens: int = 4,
    adaptive: bool = True,
    ragged: bool = False,
) -> SpeculationPlanner:
    """A planner without trees. Seconds: a first proposal, each further one, each further query position."""
    planner = SpeculationPlanner(max_draft_tokens=max_draft_tokens, adaptive=adaptive)
    planner.ragged = ragged
    for size in batch_sizes:
        for query_length in range(1, max_draft_tokens + 2):
            planner.target_cost.update(size, query_length, PLAIN_S + (query_length - 1) * wider_s)
        planner.first_step_cost.update(size, 1, first_s)
        planner.next_step_cost.update(size, 1, next_s)
    return planner


@pytest.mark.parametrize(
    ("costs", "rates", "k"),
    [
        ({}, [0.9], 4),  # a fast draft that is often accepted
        ({}, [0.8, 0.9], 4),
        ({"max_draft_tokens": 8}, [0.95], 8),
        ({"max_draft_tokens": 0}, [0.95], 0),
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
    costs: dict[str, float], rates: list[float], k: int
) -> None:
    assert chain_planner(**costs).choose(rates) == k  # type: ignore[arg-type]


def test_drafts_are_shorter_beside_sequences_that_do_not_speculate() -> None:
    """Costs grow with the batch: the fourth sequence's longer query makes the pass slower for the three plain ones."""
    planner = SpeculationPlanner(max_draft_tokens=4, adaptive=True)
    for size in (1, 2, 4):
        planner.first_step_cost.update(size, 1, 0.001)
        planner.next_step_cost.update(size, 1, 0.001)
        for query_length in range(1, 6):
            planner.target_cost.update(size, query_length, 0.002 + 0.003 * size * query_length)
    alone = planner.choose([0.9])
    assert alone > 0
    assert planner.choose([0.9], num_not_drafting=3) < alone
    assert planner.choose([], num_not_drafting=4) == 0


def test_without_adaptation_the_draft_length_is_fixed() -> None:
    planner = chain_planner(adaptive=False, first_s=1.0)
    assert planner.choose([0.01]) == 4
    assert planner.min_gains_of_chain(4, 1) is None
    assert planner.choose([]) == 0


def test_a_change_must_promise_a_few_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds with 1 and 4 proposals are nearly equal: the length in use stays."""
    monkeypatch.setattr(planner_module, "_RECONSIDER_EVERY", 1)

    def speeds(planner: SpeculationPlanner, rate: float) -> list[float]:
        return [planner._speed(k, [rate], 1) for k in range(5)]

    planner = chain_planner(first_s=0.001, next_s=0.002)
    rates = [0.05 + 0.01 * i for i in range(90)]
    up, down = [], []
    for rate in rates:
        up.append(planner.choose([rate]))
    for rate in reversed(rates):
        down.append(planner.choose([rate]))
    down.reverse()
    assert up == sorted(up)
    assert down == sorted(down)
    assert up[0] == down[0] == 0
    assert up[-1] == down[-1] == 4
    assert all(low <= high for low, high in zip(up, down, strict=True))
    later = [low != high for low, high in zip(up, down, strict=True)]
    assert sum(later) > 8, "with rising rates changes come later than with falling ones"
    flutter = {planner.choose([rates[later.index(True)] + noise]) for noise in (0.005, -0.005) * 20}
    assert len(flutter) == 1
    for rate, chosen in zip(rates, up, strict=True):
        assert max(speeds(planner, rate)) <= speeds(planner, rate)[chosen] * planner_module._MIN_GAIN


def test_while_nothing_is_drafted_drafting_is_considered_only_every_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = tree_planner()
    while planner.choose([0.01]) or planner.choose_tree(0, [0.01])[1]:
        pass
    considered: list[int] = []
    speed = planner._speed
    monkeypatch.setattr(planner, "_speed", lambda k, rates, size: considered.append(k) or speed(k, rates, size))
    for _ in range(4 * planner_module._RECONSIDER_EVERY):
        planner.choose_tree(planner.choose([0.01]), [0.01])
    assert considered.count(0) <= 2 * 4
    num_rounds = next(n for n in range(100) if planner.choose([0.9]))
    assert num_rounds < planner_module._RECONSIDER_EVERY, "a predictable sequence does not wait for long"


def test_after_many_rounds_without_a_draft_one_token_is_drafted() -> None:
    planner = chain_planner()
    chosen = [planner.choose([0.05]) for _ in range(2 * planner_module._PROBE_EVERY)]
    assert [i + 1 for i, k in enumerate(chosen) if k] == [planner_module._PROBE_EVERY, 2 * planner_module._PROBE_EVERY]
    assert set(chosen) == {0, 1}


def test_accepted_probes_bring_speculation_back() -> None:
    planner, sequence = chain_planner(), a_sequence(0.05)
    for _ in range(60 * planner_module._PROBE_EVERY):
        k = planner.choose([sequence.acceptance_rate])
        if k > 1:
            break
        if k:
            planner.observe(sequence, proposed=k, accepted=k)
    else:
        pytest.fail("never came back")
    assert sequence.acceptance_rate > 0.3


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
    min_gains = chain_planner(**costs).min_gains_of_chain(4, 1)  # type: ignore[arg-type]
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

    def extends(values: list[float], num_not_drafting: int = 0) -> bool:
        min_gains = planner.min_gains_of_chain(2, len(values), num_not_drafting=num_not_drafting)
        assert min_gains is not None
        return extends_chain(values, [1.0] * len(values), min_gains[0])

    assert extends([3.0] * 4)
    assert not extends([3.0, 0.0, 0.0, 0.0])
    assert not extends([3.0], num_not_drafting=3)


def test_before_any_measurement_no_further_step_is_promised_to_pay() -> None:
    planner = SpeculationPlanner(max_draft_tokens=4, adaptive=True)
    assert planner.min_gains_of_chain(3, 1) == [math.inf] * 2
    assert planner.min_gains_of_chain(1, 1) == []


def test_acceptance_rates_follow_proposals_up_to_the_first_rejected_one() -> None:
    planner = chain_planner()
    start = planner.mean_rate

    def after(proposed: int, accepted: int) -> float:
        sequence = a_sequence(0.5)
        planner.observe(sequence, proposed=proposed, accepted=accepted)
        return sequence.acceptance_rate

    assert after(0, 0) == 0.5
    accepted, accepted_then_rejected, rejected = after(4, 4), after(4, 1), after(4, 0)
    assert accepted > accepted_then_rejected > rejected
    step = 1 - planner_module._RATE_DECAY
    assert rejected == pytest.approx(0.5 - 0.5 * step), "proposals after a rejected one do not count"
    one = 0.5 + 0.5 * step
    assert accepted_then_rejected == pytest.approx(one - one * step)
    assert planner.mean_rate != start
    for _ in range(500):
        after(4, 4)
    assert 0.95 < planner.mean_rate <= 1.0


def test_in_ragged_rounds_sequences_that_do_not_draft_have_short_queries() -> None:
    costs = {"first_s": 0.0005, "next_s": 0.0005, "wider_s": 0.002}
    assert chain_planner(**costs).choose([0.9], num_not_drafting=7) == 0
    assert chain_planner(**costs, ragged=True).choose([0.9], num_not_drafting=7) > 0
    assert chain_planner(**costs).choose([0.9] * 8) == chain_planner(**costs, ragged=True).choose([0.9] * 8) > 0


def test_a_time_between_two_query_lengths_updates_the_nearer_one() -> None:
    table = CostTable()
    for query_length, seconds in ((1, 0.010), (2, 0.014), (3, 0.018)):
        table.set_initial(4, query_length, seconds)
    assert table(4, 2.25) == pytest.approx(0.015)
    before = table(4, 3)
    for _ in range(200):
        table.update(4, 2.25, 0.030)
    assert table(4, 2.25) == pytest.approx(0.030, rel=0.02)
    assert table(4, 2) < 0.030
    assert table(4, 3) > before, "costs without a measurement are scaled by the drift of the others"


def test_costs_between_measurements_are_interpolated() -> None:
    table = CostTable()
    assert table(1, 1) == 0.0
    table.update(1, 1, 1.0)
    assert table(7, 3) == 1.0
    table.update(4, 1, 4.0)
    assert [table(size, 1) for size in (1, 2, 3, 4, 9)] == pytest.approx([1, 2, 3, 4, 4])


def test_a_cost_changes_slowly_and_an_outlier_changes_it_little() -> None:
    table = CostTable()
    table.update(1, 1, 1.0)
    table.update(1, 1, 50.0)
    assert table(1, 1) <= 1.2
    for _ in range(100):
        table.update(1, 1, 0.5)
    assert table(1, 1) == pytest.approx(0.5, abs=0.01)


def test_costs_that_no_round_has_measured_are_scaled_by_the_drift_of_the_others() -> None:
    table = CostTable()
    for query_length, seconds in ((1, 1.0), (2, 1.2), (4, 2.0)):
        table.set_initial(8, query_length, seconds)
    assert [table(8, query_length) for query_length in (1, 2, 3, 4)] == pytest.approx([1.0, 1.2, 1.6, 2.0])
    for _ in range(100):
        table.update(8, 1, 1.5)
    assert [table(8, query_length) for query_length in (1, 2, 3, 4)] == pytest.approx([1.5, 1.8, 2.4, 3.0], rel=0.02)
    for _ in range(100):
        table.update(8, 2, 1.5)
    assert table(8, 2) == pytest.approx(1.5, rel=0.02), "measured itself"
    table.update(8, 4, 1000.0)
    assert table(8, 4) < 4.0


def test_drafting_stops_as_soon_as_it_costs_time_and_starts_where_it_clearly_saves_time() -> None:
    planner = chain_planner()
    assert planner.choose([0.6]) > 0
    rates = [n / 100 for n in range(60, 0, -1)]
    chosen = [planner.choose([rate]) for rate in rates]
    stopped_at = rates[chosen.index(0)]
    again = [planner.choose([rate]) for rate in sorted(rates)]
    started_at = sorted(rates)[next(i for i, k in enumerate(again) if k)]
    assert started_at > stopped_at, "so that noise does not make it alternate"
    fresh = chain_planner()
    speeds = [fresh._speed(k, [stopped_at + 0.01], 1) for k in range(5)]
    assert speeds[chosen[chosen.index(0) - 1]] >= speeds[0]


def test_a_draft_that_is_slower_than_calibrated_is_noticed() -> None:
    planner = chain_planner()
    assert planner.choose([0.6]) > 0
    for _ in range(200):
        planner.observe_chain(1, 4, 0.2)
    assert planner._draft_seconds(1, 4) == pytest.approx(0.2, rel=0.05)
    assert planner.choose([0.6]) == 0


# -- trees ---------------------------------------------------------------------------------------------------------


def tree_planner(*, wider_s: float = 0.0001, level_s: float = 0.001, adaptive: bool = True) -> SpeculationPlanner:
    """The costs of `chain_planner`, and of trees; the target's time grows as slowly as on matrix tiles."""
    planner = SpeculationPlanner(max_draft_tokens=4, adaptive=adaptive, tree_tokens=15)
    for size in (1, 2, 4, 8):
        for query_length in (1, 2, 3, 4, 5, 8, 16):
            planner.target_cost.update(size, query_length, PLAIN_S + (size * query_length - 1) * wider_s)
        planner.first_step_cost.update(size, 1, 0.001)
        planner.next_step_cost.update(size, 1, 0.001)
        planner.level_cost.update(size, 1, level_s)
    return planner


def test_tree_sizes() -> None:
    assert [planner_module.tree_sizes(n) for n in (0, 2, 7, 15, 20)] == [(), (2,), (3, 7), (3, 7, 15), (3, 7, 15, 20)]
    assert SpeculationPlanner(max_draft_tokens=1, adaptive=True, tree_tokens=15).tree_sizes == ()


@pytest.mark.parametrize(
    ("uncached", "remaining", "drafts"), [(0, 128, True), (500, 128, True), (500, 4, False), (50_000, 128, False)]
)
def test_drafting_must_save_the_time_to_prefill_the_draft_cache(uncached: int, remaining: int, drafts: bool) -> None:
    planner = chain_planner()
    planner.prefill_position_s = 1e-4
    steps = planner.choose([0.9])
    assert planner.should_draft(steps, 0, [0.9], uncached=uncached, remaining=remaining) == drafts
    assert (planner.choose([0.9]) > 0) == drafts, "after a refusal drafting is not considered again at once"


def test_plain_rounds_that_are_nearly_as_fast_are_run_now_and_then() -> None:
    near, far = chain_planner(wider_s=0.003), chain_planner()
    for planner, tried in ((near, 3), (far, 0)):
        rates = [0.6 if planner is near else 0.9]
        choices = [planner.should_draft(planner.choose(rates), 0, rates, remaining=128) for _ in range(48)]
        assert choices.count(False) == tried
        assert all(choices[:15])


def test_a_probe_is_drafted_whatever_it_costs() -> None:
    planner = chain_planner(first_s=1.0)
    planner.prefill_position_s = 1.0
    probes = [
        i
        for i in range(300)
        if planner.choose([0.5]) and planner.probing and planner.should_draft(1, 0, [0.5], uncached=999)
    ]
    assert len(probes) == 2
    assert not chain_planner().probing


def test_prefill_of_the_draft_cache_does_not_count_as_time_of_a_step() -> None:
    planner, other = chain_planner(), chain_planner()
    planner.prefill_position_s = 1e-5
    planner.observe_chain(1, 2, 0.002 + 300 * 1e-5, uncached=300)
    other.observe_chain(1, 2, 0.002)
    assert planner.first_step_cost(1, 1) == pytest.approx(other.first_step_cost(1, 1))


@pytest.mark.parametrize(
    ("costs", "rates", "num_not_drafting", "nodes"),
    [
        ({}, [0.6], 0, 15),  # query positions of the target are nearly free
        ({"wider_s": 0.0006}, [0.6], 0, 3),
        ({"wider_s": 0.003}, [0.6], 0, 0),  # and here each one takes time
        ({"level_s": 0.02}, [0.6], 0, 0),
        ({}, [0.01], 0, 0),
        ({}, [0.6] * 8, 0, 3),  # 32 columns; 64 of them cost more than they give
        ({}, [], 4, 0),
    ],
)
def test_the_tree_with_the_most_tokens_per_second_is_chosen(
    costs: dict[str, float], rates: list[float], num_not_drafting: int, nodes: int
) -> None:
    planner = tree_planner(**costs)  # type: ignore[arg-type]
    steps = planner.choose(rates, num_not_drafting=num_not_drafting)
    levels, found = planner.choose_tree(steps, rates, num_not_drafting=num_not_drafting)
    assert found == nodes
    assert levels == steps if not nodes else 2 <= levels <= 4


def test_without_adaptation_the_tree_is_fixed() -> None:
    planner = tree_planner(adaptive=False, level_s=1.0)
    assert planner.choose_tree(4, [0.01]) == (4, 15)
    assert planner.min_gains_of_tree(4, 1) is None


@pytest.mark.parametrize(
    ("reach", "level_s", "extends"), [(0.8, 0.001, True), (0.1, 0.001, False), (0.8, 0.006, False)]
)
def test_another_level_must_be_probable_to_be_reached(reach: float, level_s: float, extends: bool) -> None:
    planner = tree_planner(level_s=level_s)
    min_gains = planner.min_gains_of_tree(4, 1)
    assert min_gains is not None
    assert len(min_gains) == 3
    assert (reach * planner.tree_rate(15, 0.6) > min_gains[0]) == extends


def test_the_planner_learns_how_much_more_than_their_chains_trees_accept() -> None:
    planner = tree_planner()
    before = planner.tree_rate(15, 0.5)
    hit = VerifiedTokens([1, 2, 3], [0, 2, 5], 15, 4, [9, 9, 9])
    output = Output(request_id="a", token_ids=(1, 2, 3), num_proposed=15, num_accepted=2, chain_in_tree=(3, 0))
    for _ in range(200):
        planner.observe_trees([hit], [output])
    assert planner.tree_rate(15, 0.5) > before + 0.1
    assert planner.tree_rate(7, 0.5) < before
    for _ in range(400):
        nothing = Output(request_id="a", token_ids=(1,), num_proposed=15, chain_in_tree=(3, 0))
        planner.observe_trees([hit._replace(tokens=[1])], [nothing])
    assert planner.tree_rate(15, 0.5) == pytest.approx(0.5, abs=0.02), "no better than a chain"


def test_a_slow_tree_raises_the_costs_of_its_first_step_and_its_levels_by_the_same_factor() -> None:
    planner = tree_planner(level_s=0.002)
    planner.observe_levels(1, 3, 0.0075)
    assert planner.level_cost(1, 1) == pytest.approx(0.0021)
    assert planner.first_step_cost(1, 1) == pytest.approx(0.00105)
    planner.observe_levels(1, 1, 1.0)
    assert planner.level_cost(1, 1) == pytest.approx(0.0021)
