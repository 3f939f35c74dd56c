"""SpeculationFloor in simulated environments: what it loses where speculation loses, and what it keeps where it wins.

A plain round takes 10 ms and gives each sequence a token. A speculating round gives as many as are drawn, and takes the
time that makes speculation a given factor faster on average. All times vary by a few per cent.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.round_plan import ProposedRound
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.floor import (
    FIRST_PATIENCE,
    MOST_CREDIT,
    MOST_PATIENCE,
    RoundKind,
    SpeculationFloor,
    most_debt,
)

PLAIN_S = 0.010
GREEDY = RoundKind(8, sampled=False)


def observe(
    floor: SpeculationFloor,
    kind: RoundKind,
    *,
    seconds: float,
    tokens: int,
    speculated: bool,
    drafted: bool = False,
    proposing_s: float = 0.0,
    looking_s: float = 0.0,
    catch_up_s: float = 0.0,
) -> None:
    drafting_s = 1e-3 if drafted else 0.0
    times = ProposedRound(all_s=proposing_s, looking_s=looking_s, drafting_s=drafting_s, catching_up_s=catch_up_s)
    floor.observe(kind, seconds=seconds, tokens=tokens, proposed=speculated, proposing=times)


@dataclass(kw_only=True)
class Environment:
    """Rounds of one kind, in which there is always something to propose."""

    speedup: float
    kind: RoundKind = GREEDY
    noise: float = 0.03
    """Standard deviation of a round's time."""
    slowdown: float = 1.0
    """How much longer all rounds take now, since other work is on the machine."""
    rate: float = 0.5
    """At which each of two proposals is accepted."""
    rng: random.Random = field(default_factory=lambda: random.Random(3))

    def play(self, floor: SpeculationFloor, rounds: int) -> list[tuple[bool, float, int]]:
        """Whether each round speculated, its seconds, and its tokens."""
        return [self._round(floor) for _ in range(rounds)]

    def _round(self, floor: SpeculationFloor) -> tuple[bool, float, int]:
        speculated = floor.allows(self.kind).copies
        tokens, seconds = self.kind.batch_size, PLAIN_S
        if speculated:
            for _ in range(self.kind.batch_size):
                first = self.rng.random() < self.rate
                tokens += first + (first and self.rng.random() < self.rate)
            seconds *= (1 + self.rate + self.rate**2) / self.speedup
        seconds *= self.slowdown * max(0.5, self.rng.gauss(1, self.noise))
        observe(floor, self.kind, seconds=seconds, tokens=tokens, speculated=speculated)
        return speculated, seconds, tokens


def relative_speed(rounds: list[tuple[bool, float, int]], kind: RoundKind = GREEDY) -> float:
    """Tokens per second, divided by those of plain decoding."""
    return sum(tokens for _, _, tokens in rounds) / sum(s for _, s, _ in rounds) * PLAIN_S / kind.batch_size


@pytest.mark.parametrize("kind", [GREEDY, RoundKind(1, sampled=False), RoundKind(1, sampled=True)])
def test_speculation_that_costs_a_tenth_costs_at_most_two_per_cent_of_all_time(kind: RoundKind) -> None:
    rounds = Environment(speedup=1 / 1.1, kind=kind).play(SpeculationFloor(), 5000)
    assert relative_speed(rounds, kind) > 1 / 1.02
    assert 0 < sum(speculated for speculated, _, _ in rounds) < 500


def test_speculation_that_takes_five_times_as_long_is_given_up_just_as_well() -> None:
    rounds = Environment(speedup=0.2).play(SpeculationFloor(), 5000)
    assert sum(s for _, s, _ in rounds) < 1.05 * 5000 * PLAIN_S
    assert sum(speculated for speculated, _, _ in rounds) < 24


def test_where_speculation_gains_a_fifth_it_keeps_nearly_all_of_it() -> None:
    floor = SpeculationFloor()
    rounds = Environment(speedup=1.2).play(floor, 5000)
    assert relative_speed(rounds) > 1.17
    assert floor.num_rests == 0


@pytest.mark.parametrize(("speedup", "kept"), [(1.2, 1.19), (1.1, 1.085), (1.05, 1.03)])
def test_a_single_sequence_whose_luck_varies_keeps_nearly_all_of_it(speedup: float, kept: float) -> None:
    """A round gives 1 to 3 tokens, so two dozen of them are often slower than plain ones though the mean is faster."""
    kind = RoundKind(1, sampled=True)
    rounds = Environment(speedup=speedup, kind=kind).play(SpeculationFloor(), 20_000)
    assert relative_speed(rounds, kind) > kept


@pytest.mark.parametrize(("prompt", "answer_rounds", "repaid"), [(4, 100, True), (14, 300, True), (4, 10, False)])
def test_what_a_draft_reads_at_once_is_charged_over_the_rounds_that_it_serves(
    prompt: int, answer_rounds: int, repaid: bool
) -> None:
    """Each round gains a tenth. In long answers that repays the plain rounds that a prompt takes, in short ones not."""
    kind, floor = RoundKind(1, sampled=True), SpeculationFloor()
    drafted, rounds = 0, 20_000
    for number in range(rounds):
        allowed = floor.allows(kind).drafts
        catch_up_s = prompt * PLAIN_S if allowed and number % answer_rounds == 0 else 0.0
        seconds = PLAIN_S * (1.5 / 1.1 if allowed else 1.0) + catch_up_s
        tokens = 1 + (allowed and number % 2)
        how = {"speculated": allowed, "drafted": allowed, "catch_up_s": catch_up_s}
        observe(floor, kind, seconds=seconds, tokens=tokens, **how)  # type: ignore[arg-type]
        drafted += allowed
    assert drafted / rounds > 0.95 if repaid else drafted / rounds < 0.1
    assert floor.num_rests == 0 or not repaid


@pytest.mark.parametrize("lost_rounds", [10, 300, 2900, 3000, 5111])
def test_a_change_from_losing_to_winning_is_found_after_the_longest_rest(lost_rounds: int) -> None:
    """At any place in a debt or in a rest."""
    floor, before, after = SpeculationFloor(), Environment(speedup=0.8), Environment(speedup=1.5)
    before.play(floor, lost_rounds)
    after.play(floor, MOST_PATIENCE + 8)
    assert relative_speed(after.play(floor, 1000)) > 1.45


def test_a_change_from_winning_to_losing_costs_the_credit_and_a_debt() -> None:
    floor = SpeculationFloor()
    Environment(speedup=1.3).play(floor, 1000)
    rounds = Environment(speedup=0.8).play(floor, 120)
    assert not rounds[-1][0]
    lost = sum(s for _, s, _ in rounds) / PLAIN_S - sum(tokens for _, _, tokens in rounds) / GREEDY.batch_size
    least, most = (MOST_CREDIT + most_debt(GREEDY.batch_size, rounds) for rounds in (0, 60))
    assert least <= lost < most + 2, "its last round, and the noise of plain ones"


def test_kinds_do_not_mix() -> None:
    """Greedy speculation wins and sampled speculation of the same batch size loses; each is treated by its own."""
    floor = SpeculationFloor()
    environments = [
        Environment(speedup=1.3, kind=RoundKind(4, sampled=False)),
        Environment(speedup=0.8, kind=RoundKind(4, sampled=True)),
        Environment(speedup=1.3, kind=RoundKind(5, sampled=True)),
    ]
    rounds: list[list[tuple[bool, float, int]]] = [[], [], []]
    for _ in range(300):
        for of_kind, environment in zip(rounds, environments, strict=True):
            of_kind += environment.play(floor, 10)
    shares = [sum(speculated for speculated, _, _ in of_kind) / len(of_kind) for of_kind in rounds]
    assert shares[0] > 0.98
    assert shares[1] < 0.1
    assert shares[2] > 0.98
    alone = SpeculationFloor()
    again = Environment(speedup=1.3, kind=RoundKind(4, sampled=False)).play(alone, 3000)
    assert [each[0] for each in again] == [each[0] for each in rounds[0]], "what the other kinds do changes nothing"


@pytest.mark.parametrize("preempted", ["speculating", "plain", "first plain"])
def test_a_preempted_round_does_not_turn_a_winning_floor_off(preempted: str) -> None:
    """One of a hundred times the time, then again every three hundred rounds."""
    floor, environment, speculated = SpeculationFloor(), Environment(speedup=1.3), []
    due = preempted == "first plain"
    for number in range(6000):
        due = due or (number > 100 and number % 300 == 0)
        allowed = floor.allows(GREEDY).copies
        if due and allowed == (preempted == "speculating"):
            due, tokens = False, 8 * (1 + allowed)
            observe(floor, GREEDY, seconds=100 * PLAIN_S, tokens=tokens, speculated=allowed)
        else:
            allowed, _, _ = environment.play(floor, 1)[0]
        speculated.append(allowed)
    assert sum(speculated) / len(speculated) > 0.95
    assert floor.num_rests <= 1


def test_plain_rounds_are_timed_without_asking_for_them_where_nothing_is_proposed() -> None:
    """Rounds in which nothing is worth proposing are plain ones, and make no others necessary."""
    floor = SpeculationFloor()
    for _ in range(3):
        assert floor.allows(GREEDY).copies
        observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False)
    assert all(speculated for speculated, _, _ in Environment(speedup=1.3).play(floor, 24))


def test_another_draft_is_tried_at_once() -> None:
    floor = SpeculationFloor()
    Environment(speedup=0.5).play(floor, 3000)
    while floor.allows(GREEDY).copies:
        Environment(speedup=0.5).play(floor, 1)
    floor.forgive()
    assert floor.allows(GREEDY).copies
    rounds = Environment(speedup=1.3).play(floor, 1000)
    assert sum(speculated for speculated, _, _ in rounds) > 900


def test_another_draft_does_not_inherit_a_debt() -> None:
    floor = SpeculationFloor()
    for _ in range(3):
        observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False)
    for number in range(14):  # each loses 0.4 of the 3 that end speculation
        if number == 7:
            floor.forgive()
        assert floor.allows(GREEDY).copies
        observe(floor, GREEDY, seconds=1.4 * PLAIN_S, tokens=8, speculated=True)


def test_kinds_with_about_as_many_sequences_are_judged_together() -> None:
    """While requests come and go, few rounds are of exactly the same kind; each kind's plain rounds have their time."""
    floor, sizes = SpeculationFloor(), (5, 6, 7, 8)
    for size in sizes:
        for _ in range(3):
            observe(floor, RoundKind(size, sampled=False), seconds=0.001 * size, tokens=size, speculated=False)
    for number in range(7):
        size = sizes[number % 4]
        assert floor.allows(RoundKind(size, sampled=False)).copies
        observe(floor, RoundKind(size, sampled=False), seconds=0.0015 * size, tokens=size, speculated=True)
    assert not any(floor.allows(RoundKind(size, sampled=False)).copies for size in sizes)
    assert floor.allows(RoundKind(4, sampled=False)).copies
    assert floor.allows(RoundKind(8, sampled=True)).copies


def test_a_draft_that_loses_does_not_end_copies() -> None:
    floor = SpeculationFloor()
    for _ in range(2):
        observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False)
    copied = 0
    for _ in range(3000):
        if floor.allows(GREEDY).drafts:
            observe(floor, GREEDY, seconds=2 * PLAIN_S, tokens=9, speculated=True, drafted=True)
        elif floor.allows(GREEDY).copies:
            copied += 1
            observe(floor, GREEDY, seconds=1.1 * PLAIN_S, tokens=16, speculated=True)
        else:
            observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False)
    assert copied > 2700
    assert floor.num_rests < 12


def test_looking_for_copies_that_never_come_is_given_up_though_each_time_costs_little() -> None:
    kind, floor, rng = RoundKind(1, sampled=True), SpeculationFloor(), random.Random(3)
    looked = seconds = 0.0
    for _ in range(20_000):
        proposing_s = 0.02 * PLAIN_S if floor.allows(kind).copies else 0.0
        looked += proposing_s > 0
        took = PLAIN_S * max(0.5, rng.gauss(1, 0.1)) + proposing_s
        seconds += took
        observe(floor, kind, seconds=took, tokens=1, speculated=False, proposing_s=proposing_s, looking_s=proposing_s)
    assert 0 < looked < 5000
    assert floor.num_rests > 0
    assert floor.allows(kind).drafts, "the draft has an account of its own"


@pytest.mark.parametrize("looks", [False, True])
def test_deciding_again_and_again_not_to_draft_is_given_up_too(looks: bool) -> None:
    """Each account pays what it took: looking for copies, or deciding about drafts."""
    kind, floor = RoundKind(8, sampled=True), SpeculationFloor()
    decided, late = 0, 4000
    for number in range(20_000):
        copies, drafts = floor.allows(kind)
        looking_s = 0.02 * PLAIN_S if looks and copies else 0.0
        deciding_s = 0.02 * PLAIN_S if drafts else 0.0
        decided += drafts and number >= late
        took_s = PLAIN_S + looking_s + deciding_s
        how = {"proposing_s": looking_s + deciding_s, "looking_s": looking_s}
        observe(floor, kind, seconds=took_s, tokens=8, speculated=False, **how)  # type: ignore[arg-type]
    assert 0 < decided < 0.2 * (20_000 - late)
    assert looks or floor.allows(kind).copies, "copies have an account of their own"


def test_plain_rounds_are_timed_without_what_looking_for_copies_took() -> None:
    """Else that would be part of what plain decoding costs, and speculation look better than it is."""
    kind, gains = RoundKind(1, sampled=False), []
    for proposing_s in (0.0, 0.5 * PLAIN_S):
        floor = SpeculationFloor()
        for _ in range(5):
            how = {"tokens": 1, "speculated": False, "proposing_s": proposing_s}
            observe(floor, kind, seconds=PLAIN_S + proposing_s, **how)  # type: ignore[arg-type]
        gains.append(floor._plain[kind].seconds)
    assert gains == pytest.approx([PLAIN_S, PLAIN_S])


@pytest.mark.parametrize("speedup", [0.8, 1.0, 1.3])
def test_what_is_compared_with_plain_rounds_is_the_speed_that_there_is(speedup: float) -> None:
    floor = SpeculationFloor()
    rounds = Environment(speedup=speedup).play(floor, 4000)
    floor.observe_unasked(GREEDY, seconds=PLAIN_S)  # with which the last rounds are compared
    assert floor.compared_plain_s / floor.compared_s == pytest.approx(relative_speed(rounds), rel=0.02)
    assert floor.compared_s == pytest.approx(sum(seconds for _, seconds, _ in rounds), rel=0.02)


@pytest.mark.parametrize("rounds_each", [400, 1500])
@pytest.mark.parametrize("speedup", [1.0, 1.06])
def test_where_a_machine_is_slower_at_times_the_speed_that_there_is_is_shown(rounds_each: int, speedup: float) -> None:
    """By a slow plain round speculation seems to win, so that it is the last one for longer than a fast one."""
    kind = RoundKind(1, sampled=True)
    floor, environment, took_s, plain_s = SpeculationFloor(), Environment(speedup=speedup, kind=kind), 0.0, 0.0
    for _ in range(30_000 // rounds_each):
        environment.slowdown = environment.rng.choice([1.0, 1.0, 1.3, 1.6])
        for _, seconds, tokens in environment.play(floor, rounds_each):
            took_s += seconds
            plain_s += tokens * environment.slowdown * PLAIN_S
    assert floor.compared_plain_s / floor.compared_s == pytest.approx(plain_s / took_s, rel=0.02)


def test_requests_of_which_a_round_takes_longer_do_not_pay_for_others() -> None:
    """A hundred rounds with top-p, in which speculation gains, and a hundred without, in which it loses, in turn."""
    plain, top_p = RoundKind(1, sampled=True), RoundKind(1, sampled=True, needs_logits=True)
    floor = SpeculationFloor()
    losing, winning = Environment(speedup=0.94, kind=plain), Environment(speedup=1.1, kind=top_p)
    rounds = [(losing.play(floor, 100), winning.play(floor, 100)) for _ in range(100)]
    lost, won = ([each for turn in of_kind for each in turn] for of_kind in zip(*rounds, strict=True))
    assert relative_speed(lost, plain) > 0.98
    assert relative_speed(won, top_p) > 1.085


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"logprobs": 1}, {"repetition_penalty": 1.1}])
def test_rounds_with_a_sequence_that_needs_logits_are_a_kind_of_their_own(options: dict[str, float]) -> None:
    def kind(*params: dict[str, float]) -> RoundKind:
        sequences = [
            RunningSequence(
                request=Request(request_id="a", prompt_ids=(1,), params=SamplingParams(max_tokens=8, **each)),  # type: ignore[arg-type]
                slot=0,
                prompt_length=1,
                length=1,
            )
            for each in params
        ]
        return RoundKind.of(sequences, threads=2)

    assert kind({}, {}) == RoundKind(2, sampled=True, threads=2)
    assert kind({}, options) == RoundKind(2, sampled=True, threads=2, needs_logits=True)
    assert kind({}, options).group != kind({}, {}).group


def test_nothing_is_compared_before_a_plain_round_was_timed() -> None:
    floor = SpeculationFloor()
    observe(floor, GREEDY, seconds=1.0, tokens=12, speculated=True)
    assert floor.compared_s == 0.0


def test_a_preempted_round_does_not_decide_the_comparison() -> None:
    floor = SpeculationFloor()
    observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False)
    observe(floor, GREEDY, seconds=5.0, tokens=16, speculated=True)
    observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False)
    assert floor.compared_s == pytest.approx(6 * PLAIN_S)
    assert floor.compared_plain_s == pytest.approx(4 * PLAIN_S)


def test_looking_for_copies_in_vain_is_time_that_plain_decoding_would_not_have_taken() -> None:
    floor = SpeculationFloor()
    observe(floor, GREEDY, seconds=PLAIN_S, tokens=8, speculated=False, proposing_s=PLAIN_S / 10)
    assert floor.compared_plain_s == pytest.approx(0.9 * floor.compared_s)


def test_a_stall_while_proposing_is_no_loss_either() -> None:
    """A process that is paused while it looks for copies, or decides not to draft."""
    floor, environment = SpeculationFloor(), Environment(speedup=1.3)
    environment.play(floor, 400)
    for stall_s in (20 * PLAIN_S, 60.0):
        before = floor.compared_plain_s
        observe(
            floor, GREEDY, seconds=PLAIN_S + stall_s, tokens=8, speculated=False, proposing_s=stall_s, looking_s=stall_s
        )
        assert floor.compared_plain_s >= before, "a counter"
        assert floor.num_rests == 0
        environment.play(floor, 40)
    first = SpeculationFloor()
    observe(first, GREEDY, seconds=60.0, tokens=8, speculated=False, proposing_s=59.0, looking_s=59.0)
    assert first.compared_plain_s >= 0
    assert first.num_rests == 0


def test_rests_end_in_rounds_but_in_none_of_requests_without_speculation() -> None:
    floor = SpeculationFloor()
    Environment(speedup=0.7).play(floor, 300)
    assert floor.num_rests
    while floor.allows(GREEDY).copies:
        observe(floor, GREEDY, seconds=3 * PLAIN_S, tokens=8, speculated=True)
    waited = 0
    while not floor.allows(GREEDY).copies:
        for _ in range(100 if waited == 0 else 0):
            floor.observe_unasked(GREEDY, seconds=PLAIN_S)
        assert waited or not floor.allows(GREEDY).copies
        floor.pass_untimed(GREEDY)
        waited += 1
    assert FIRST_PATIENCE / 2 < waited <= MOST_PATIENCE


def test_a_plain_round_that_is_due_may_be_one_of_requests_without_speculation() -> None:
    floor, environment = SpeculationFloor(), Environment(speedup=1.3)
    while floor.allows(GREEDY).copies:
        environment.play(floor, 1)
    floor.observe_unasked(GREEDY, seconds=PLAIN_S)
    assert floor.allows(GREEDY).copies


def test_rounds_with_fewer_threads_have_a_balance_of_their_own() -> None:
    """Where a thread is given up, a further column can cost more than it brings."""
    floor, fewer = SpeculationFloor(), GREEDY._replace(threads=1)
    rounds = Environment(speedup=0.8, kind=fewer).play(floor, 3000)
    assert relative_speed(rounds) > 1 / 1.03
    assert floor.num_rests
    assert floor.allows(GREEDY).copies
