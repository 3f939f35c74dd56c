"""The draft length by listed costs and acceptance rates. Costs are in seconds; the target's plain pass takes 10 ms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from aurora_lit.request import Output, Request, SamplingParams
from aurora_lit.serve.sequences.sequence import RunningSequence, VerifiedTokens
from aurora_lit.serve.speculation import planner as speculation
from aurora_lit.serve.speculation.costs import CostTable
from aurora_lit.serve.speculation.planner import SpeculationPlanner

PLAIN_S = 0.010


def a_row(rate: float) -> RunningSequence:
    """A running request with this acceptance rate."""
    asked = Request(request_id="a", prompt_ids=(1,), params=SamplingParams(max_tokens=1))
    return RunningSequence(request=asked, slot=0, rate=rate, prompt_length=1, length=1)


def policy(
    *,
    first_s: float = 0.001,
    next_s: float = 0.001,
    wider_s: float = 0.0005,
    rows: Sequence[int] = (1, 2, 4, 8),
    max_draft_tokens: int = 4,
    adaptive: bool = True,
    ragged: bool = False,
) -> SpeculationPlanner:
    """Costs: a first proposal, each further one, and each position more of the target's pass."""
    made = SpeculationPlanner(max_draft_tokens=max_draft_tokens, adaptive=adaptive)
    made.ragged = ragged
    for count in rows:
        for width in range(1, max_draft_tokens + 2):
            made.target_cost.update(count, width, PLAIN_S + (width - 1) * wider_s)
        made.first_step_cost.update(count, 1, first_s)
        made.next_step_cost.update(count, 1, next_s)
    return made


@pytest.mark.parametrize(
    ("costs", "rates", "k"),
    [
        ({}, [0.9], 4),  # a cheap draft that is often right
        ({}, [0.8, 0.9], 4),
        ({"max_draft_tokens": 8}, [0.95], 8),
        ({"max_draft_tokens": 0}, [0.95], 0),
        ({}, [0.05], 0),  # hardly ever right
        ({"next_s": 0.0025}, [0.05, 0.05, 0.05, 0.9], 1),  # one row of four: a little
        ({"wider_s": 0.010}, [0.9], 0),  # a target that pays for every position
        ({"first_s": 0.02}, [0.7], 0),  # a draft as slow as the target
        ({"first_s": 0.003, "next_s": 0.002}, [0.4], 1),
        ({"first_s": 0.001, "next_s": 0.02}, [0.8], 1),  # a dear second step
        ({"wider_s": 0.0}, [0.0], 0),
    ],
)
def test_the_length_with_most_tokens_a_second(costs: dict[str, float], rates: list[float], k: int) -> None:
    assert policy(**costs).choose(rates) == k  # type: ignore[arg-type]


def test_rows_that_do_not_speculate_make_a_draft_less_worth() -> None:
    """Costs that grow with the batch: three plain rows pay for the wider pass of the fourth."""
    made = SpeculationPlanner(max_draft_tokens=4, adaptive=True)
    for rows in (1, 2, 4):
        made.first_step_cost.update(rows, 1, 0.001)
        made.next_step_cost.update(rows, 1, 0.001)
        for width in range(1, 6):
            made.target_cost.update(rows, width, 0.002 + 0.003 * rows * width)
    alone = made.choose([0.9])
    made = made if alone else pytest.fail("should have speculated alone")
    assert made.choose([0.9], num_plain=3) < alone
    assert made.choose([], num_plain=4) == 0


def test_without_adaptation_the_length_is_fixed() -> None:
    made = policy(adaptive=False, first_s=1.0)
    assert made.choose([0.01]) == 4
    assert made.worth_another_step(1, [0.0], [1.0])
    assert made.choose([]) == 0


def test_a_change_must_promise_a_few_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds at 1 and 4 proposals nearly equal: whichever was in use stays."""
    monkeypatch.setattr(speculation, "_LOOK_EVERY", 1)

    def speeds(made: SpeculationPlanner, rate: float) -> list[float]:
        return [made._speed(k, [rate], 1) for k in range(5)]

    made = policy(first_s=0.001, next_s=0.002)
    rates = [0.05 + 0.01 * i for i in range(90)]
    up, down = [], []
    for rate in rates:
        up.append(made.choose([rate]))
    for rate in reversed(rates):
        down.append(made.choose([rate]))
    down.reverse()
    assert up == sorted(up)
    assert down == sorted(down)
    assert up[0] == down[0] == 0
    assert up[-1] == down[-1] == 4
    assert all(low <= high for low, high in zip(up, down, strict=True))
    later = [low != high for low, high in zip(up, down, strict=True)]
    assert sum(later) > 8, "on the way up changes come later than on the way down"
    flutter = {made.choose([rates[later.index(True)] + noise]) for noise in (0.005, -0.005) * 20}
    assert len(flutter) == 1
    for rate, chosen in zip(rates, up, strict=True):
        assert max(speeds(made, rate)) <= speeds(made, rate)[chosen] * speculation._GAIN_TO_CHANGE


def test_while_nothing_is_drafted_that_is_considered_every_few_rounds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_trees()
    while made.choose([0.01]) or made.choose_tree(0, [0.01])[1]:
        pass
    looks: list[int] = []
    speed = made._speed
    monkeypatch.setattr(made, "_speed", lambda k, rates, rows: looks.append(k) or speed(k, rates, rows))
    for _ in range(4 * speculation._LOOK_EVERY):
        made.choose_tree(made.choose([0.01]), [0.01])
    assert looks.count(0) <= 2 * 4
    took = next(n for n in range(100) if made.choose([0.9]))
    assert took < speculation._LOOK_EVERY, "a row that is predictable does not wait for long"


def test_after_many_rounds_without_a_draft_one_token_is_tried() -> None:
    made = policy()
    chosen = [made.choose([0.05]) for _ in range(2 * speculation._PROBE_EVERY)]
    assert [i + 1 for i, k in enumerate(chosen) if k] == [speculation._PROBE_EVERY, 2 * speculation._PROBE_EVERY]
    assert set(chosen) == {0, 1}


def test_probes_that_are_accepted_bring_speculation_back() -> None:
    made, row = policy(), a_row(0.05)
    for _ in range(60 * speculation._PROBE_EVERY):
        k = made.choose([row.rate])
        if k > 1:
            break
        if k:
            made.observe(row, proposed=k, accepted=k)
    else:
        pytest.fail("never came back")
    assert row.rate > 0.3


@pytest.mark.parametrize(
    ("costs", "value", "survival", "worth"),
    [
        ({}, 2.0, 1.0, True),
        ({}, 0.1, 1.0, False),  # the value head expects nothing
        ({}, 2.0, 0.05, False),  # the chain will hardly live that long
        ({"next_s": 0.02}, 2.0, 1.0, False),
        ({"wider_s": 0.02}, 2.0, 1.0, False),
        ({}, -3.0, 1.0, False),
    ],
)
def test_another_step_must_save_more_than_it_costs(
    costs: dict[str, float], value: float, survival: float, worth: bool
) -> None:
    assert policy(**costs).worth_another_step(1, [value], [survival]) == worth  # type: ignore[arg-type]


def test_survival_moves_on_by_the_predicted_rate() -> None:
    """v = a(1 + v') with v' = v gives a = v / (1 + v)."""
    survival = [1.0, 0.5]
    policy().worth_another_step(1, [1.0, 3.0], survival)
    assert survival == pytest.approx([0.5, 0.375])
    policy().worth_another_step(2, [1.0, -1.0], survival)
    assert survival == pytest.approx([0.25, 0.0])


def test_a_full_batch_of_hopeful_rows_pays_where_one_hopeful_row_does_not() -> None:
    made = policy(next_s=0.0015)
    assert made.worth_another_step(1, [3.0] * 4, [1.0] * 4)
    assert not made.worth_another_step(1, [3.0, 0.0, 0.0, 0.0], [1.0] * 4)
    assert not made.worth_another_step(1, [3.0], [1.0], num_plain=3)


def test_rates_follow_hits_up_to_the_first_miss() -> None:
    made = policy()
    start = made.mean_rate

    def after(proposed: int, accepted: int) -> float:
        row = a_row(0.5)
        made.observe(row, proposed=proposed, accepted=accepted)
        return row.rate

    assert after(0, 0) == 0.5
    hit, hit_then_miss, miss = after(4, 4), after(4, 1), after(4, 0)
    assert hit > hit_then_miss > miss
    step = 1 - speculation._RATE_MEMORY
    assert miss == pytest.approx(0.5 - 0.5 * step), "proposals after a miss say nothing"
    one = 0.5 + 0.5 * step
    assert hit_then_miss == pytest.approx(one - one * step)
    assert made.mean_rate != start
    for _ in range(500):
        after(4, 4)
    assert 0.95 < made.mean_rate <= 1.0


def test_rows_that_do_not_draft_have_no_columns_where_each_row_has_its_own() -> None:
    costs = {"first_s": 0.0005, "next_s": 0.0005, "wider_s": 0.002}
    assert policy(**costs).choose([0.9], num_plain=7) == 0
    assert policy(**costs, ragged=True).choose([0.9], num_plain=7) > 0
    assert policy(**costs).choose([0.9] * 8) == policy(**costs, ragged=True).choose([0.9] * 8) > 0


def test_what_lies_between_two_widths_counts_for_the_nearer_one() -> None:
    table = CostTable()
    for width, seconds in ((1, 0.010), (2, 0.014), (3, 0.018)):
        table.begin_with(4, width, seconds)
    assert table(4, 2.25) == pytest.approx(0.015)
    before = table(4, 3)
    for _ in range(200):
        table.update(4, 2.25, 0.030)
    assert table(4, 2.25) == pytest.approx(0.030, rel=0.02)
    assert table(4, 2) < 0.030
    assert table(4, 3) > before, "what was not measured is as much dearer as the rest has turned out"


def test_costs_between_measurements_are_interpolated() -> None:
    table = CostTable()
    assert table(1, 1) == 0.0
    table.update(1, 1, 1.0)
    assert table(7, 3) == 1.0
    table.update(4, 1, 4.0)
    assert [table(rows, 1) for rows in (1, 2, 3, 4, 9)] == pytest.approx([1, 2, 3, 4, 4])


def test_a_cost_follows_slowly_and_an_outlier_hardly() -> None:
    table = CostTable()
    table.update(1, 1, 1.0)
    table.update(1, 1, 50.0)
    assert table(1, 1) <= 1.2
    for _ in range(100):
        table.update(1, 1, 0.5)
    assert table(1, 1) == pytest.approx(0.5, abs=0.01)


def test_what_no_round_has_measured_is_taken_for_as_much_dearer_as_the_rest() -> None:
    table = CostTable()
    for width, seconds in ((1, 1.0), (2, 1.2), (4, 2.0)):
        table.begin_with(8, width, seconds)
    assert [table(8, width) for width in (1, 2, 3, 4)] == pytest.approx([1.0, 1.2, 1.6, 2.0])
    for _ in range(100):
        table.update(8, 1, 1.5)
    assert [table(8, width) for width in (1, 2, 3, 4)] == pytest.approx([1.5, 1.8, 2.4, 3.0], rel=0.02)
    for _ in range(100):
        table.update(8, 2, 1.5)
    assert table(8, 2) == pytest.approx(1.5, rel=0.02), "measured itself"
    table.update(8, 4, 1000.0)
    assert table(8, 4) < 4.0


def test_drafting_is_given_up_as_soon_as_it_costs_time_and_taken_up_where_it_clearly_saves_some() -> None:
    made = policy()
    assert made.choose([0.6]) > 0
    rates = [n / 100 for n in range(60, 0, -1)]
    chosen = [made.choose([rate]) for rate in rates]
    given_up = rates[chosen.index(0)]
    again = [made.choose([rate]) for rate in sorted(rates)]
    taken_up = sorted(rates)[next(i for i, k in enumerate(again) if k)]
    assert taken_up > given_up, "so that noise does not make it flutter"
    fresh = policy()
    speeds = [fresh._speed(k, [given_up + 0.01], 1) for k in range(5)]
    assert speeds[chosen[chosen.index(0) - 1]] >= speeds[0]


def test_a_slower_draft_than_measured_is_noticed() -> None:
    made = policy()
    assert made.choose([0.6]) > 0
    for _ in range(200):
        made.observe_draft(1, 4, 0.2)
    assert made._draft_seconds(1, 4) == pytest.approx(0.2, rel=0.05)
    assert made.choose([0.6]) == 0


# -- trees ---------------------------------------------------------------------------------------------------------


def with_trees(*, wider_s: float = 0.0001, level_s: float = 0.001, adaptive: bool = True) -> SpeculationPlanner:
    """The same costs as `policy`, and a tree's; the target's pass grows as slowly as on matrix tiles."""
    made = SpeculationPlanner(max_draft_tokens=4, adaptive=adaptive, tree_tokens=15)
    for rows in (1, 2, 4, 8):
        for width in (1, 2, 3, 4, 5, 8, 16):
            made.target_cost.update(rows, width, PLAIN_S + (rows * width - 1) * wider_s)
        made.first_step_cost.update(rows, 1, 0.001)
        made.next_step_cost.update(rows, 1, 0.001)
        made.level_cost.update(rows, 1, level_s)
    return made


def test_sizes_of_trees() -> None:
    assert [speculation.tree_sizes(n) for n in (0, 2, 7, 15, 20)] == [(), (2,), (3, 7), (3, 7, 15), (3, 7, 15, 20)]
    assert SpeculationPlanner(max_draft_tokens=1, adaptive=True, tree_tokens=15).tree_sizes == ()


@pytest.mark.parametrize(
    ("behind", "left", "stands"), [(0, 128, True), (500, 128, True), (500, 4, False), (50_000, 128, False)]
)
def test_proposals_must_save_what_catching_up_takes(behind: int, left: int, stands: bool) -> None:
    made = policy()
    made.position_cost = 1e-4
    steps = made.choose([0.9])
    assert made.stands(steps, 0, [0.9], behind=behind, left=left) == stands
    assert (made.choose([0.9]) > 0) == stands, "what is not carried out is not thought of again at once"


def test_plain_rounds_that_come_near_are_tried_now_and_then() -> None:
    near, far = policy(wider_s=0.003), policy()
    for made, tried in ((near, 3), (far, 0)):
        rates = [0.6 if made is near else 0.9]
        choices = [made.stands(made.choose(rates), 0, rates, left=128) for _ in range(48)]
        assert choices.count(False) == tried
        assert all(choices[:15])


def test_a_look_at_the_traffic_is_had_whatever_it_takes() -> None:
    made = policy(first_s=1.0)
    made.position_cost = 1.0
    looks = [i for i in range(300) if made.choose([0.5]) and made.probing and made.stands(1, 0, [0.5], behind=999)]
    assert len(looks) == 2
    assert not policy().probing


def test_catching_up_is_no_cost_of_a_step() -> None:
    made, other = policy(), policy()
    made.position_cost = 1e-5
    made.observe_draft(1, 2, 0.002 + 300 * 1e-5, behind=300)
    other.observe_draft(1, 2, 0.002)
    assert made.first_step_cost(1, 1) == pytest.approx(other.first_step_cost(1, 1))


@pytest.mark.parametrize(
    ("costs", "rates", "num_plain", "nodes"),
    [
        ({}, [0.6], 0, 15),  # rows of the target are nearly free
        ({"wider_s": 0.0006}, [0.6], 0, 3),
        ({"wider_s": 0.003}, [0.6], 0, 0),  # and here each one is paid for
        ({"level_s": 0.02}, [0.6], 0, 0),
        ({}, [0.01], 0, 0),
        ({}, [0.6] * 8, 0, 3),  # 32 columns; 64 of them cost more than they give
        ({}, [], 4, 0),
    ],
)
def test_the_tree_with_most_tokens_a_second(
    costs: dict[str, float], rates: list[float], num_plain: int, nodes: int
) -> None:
    made = with_trees(**costs)  # type: ignore[arg-type]
    steps = made.choose(rates, num_plain=num_plain)
    levels, found = made.choose_tree(steps, rates, num_plain=num_plain)
    assert found == nodes
    assert levels == steps if not nodes else 2 <= levels <= 4


def test_without_adaptation_the_tree_is_fixed() -> None:
    made = with_trees(adaptive=False, level_s=1.0)
    assert made.choose_tree(4, [0.01]) == (4, 15)
    assert made.worth_another_level([0.0], [0.01], nodes=15)


@pytest.mark.parametrize(("reach", "level_s", "worth"), [(0.8, 0.001, True), (0.1, 0.001, False), (0.8, 0.006, False)])
def test_a_level_more_must_be_likely_to_be_reached(reach: float, level_s: float, worth: bool) -> None:
    assert with_trees(level_s=level_s).worth_another_level([reach], [0.6], nodes=15) == worth


def test_what_trees_accept_beyond_their_chain_is_learned() -> None:
    made = with_trees()
    before = made._tree_rate(15, 0.5)
    hit = VerifiedTokens([1, 2, 3], [0, 2, 5], 15, 4, [9, 9, 9])
    output = Output(request_id="a", token_ids=(1, 2, 3), num_proposed=15, num_accepted=2, chain_in_tree=(3, 0))
    for _ in range(200):
        made.observe_trees([hit], [output])
    assert made._tree_rate(15, 0.5) > before + 0.1
    assert made._tree_rate(7, 0.5) < before
    for _ in range(400):
        nothing = Output(request_id="a", token_ids=(1,), num_proposed=15, chain_in_tree=(3, 0))
        made.observe_trees([hit._replace(tokens=[1])], [nothing])
    assert made._tree_rate(15, 0.5) == pytest.approx(0.5, abs=0.02), "no better than a chain"


def test_a_slow_tree_makes_its_first_step_and_its_levels_dearer_alike() -> None:
    made = with_trees(level_s=0.002)
    made.observe_levels(1, 3, 0.0075)
    assert made.level_cost(1, 1) == pytest.approx(0.0021)
    assert made.first_step_cost(1, 1) == pytest.approx(0.00105)
    made.observe_levels(1, 1, 1.0)
    assert made.level_cost(1, 1) == pytest.approx(0.0021)
