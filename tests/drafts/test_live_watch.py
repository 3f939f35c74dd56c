"""The trial of a new draft: a bad one is rolled back soon, an equal one never, and a change of traffic is no reason."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from aurora_lit.drafts.live_watch import TRIAL_REQUESTS, LiveWatch, TrafficKind

Draw = Callable[[], tuple[TrafficKind, int, int]]

GREEDY = TrafficKind()

ROUNDS_OF_REQUEST = 12
TRIAL_ROUNDS = TRIAL_REQUESTS * ROUNDS_OF_REQUEST
_names = itertools.count()


def rounds(rng: random.Random, rate: float, *, proposed: tuple[int, ...] = (4,), traffic: TrafficKind = GREEDY) -> Draw:
    """Rounds of a draft whose every proposal is accepted with this probability, given those before it were."""

    def draw() -> tuple[TrafficKind, int, int]:
        count = rng.choice(proposed)
        return traffic, count, num_accepted(rng, rate, count)

    return draw


def num_accepted(rng: random.Random, rate: float, proposed: int) -> int:
    """How many of these proposals are accepted."""
    return next((i for i in range(proposed) if rng.random() >= rate), proposed)


def watched(before: Draw, *, num_before: int = 300) -> LiveWatch:
    watch = LiveWatch()
    observe(watch, before, num_before)
    watch.swapped(trusted=False)
    return watch


def observe(watch: LiveWatch, draw: Draw, number: int) -> tuple[int, str] | None:
    """(rounds it took, verdict); None when nothing was called. Requests of a few rounds follow one another."""
    for count in range(1, number + 1):
        if count % ROUNDS_OF_REQUEST == 1:
            request = str(next(_names))
        traffic, proposed, accepted = draw()
        verdict = watch.observe(
            request=request,
            traffic=traffic,
            proposed=proposed,
            accepted=accepted,
            is_last=count % ROUNDS_OF_REQUEST == 0,
        )
        if verdict is not None:
            return count, verdict
    return None


def test_a_draft_that_accepts_nothing_is_rolled_back_within_ten_requests() -> None:
    rng = random.Random(0)
    for proposed in ((4,), (1,), (1, 2, 3, 4)):
        found = observe(watched(rounds(rng, 0.6, proposed=proposed)), rounds(rng, 0.0, proposed=proposed), 400)
        assert found is not None
        assert found[0] <= 10 * ROUNDS_OF_REQUEST
        assert "fewer of its tokens were right than of the version before" in found[1]


def test_a_clearly_worse_draft_is_rolled_back_within_a_few_hundred_rounds() -> None:
    rng = random.Random(1)
    took = [observe(watched(rounds(rng, 0.7)), rounds(rng, 0.5), 1000) for _ in range(20)]
    assert all(found is not None and found[0] < 600 for found in took), took


def test_an_equal_or_better_draft_is_hardly_ever_rolled_back() -> None:
    rng, called = random.Random(2), 0
    for rate_before, rate in [(0.6, 0.6), (0.3, 0.3), (0.8, 0.8), (0.5, 0.7)] * 20:
        called += observe(watched(rounds(rng, rate_before)), rounds(rng, rate), TRIAL_ROUNDS + 10) is not None
    assert called <= 80 / 75


def requests_that_differ(rng: random.Random, rate: float, *, spread: float = 0.3) -> Draw:
    """Each request's proposals are accepted at a rate of its own, uniform around the mean rate."""

    def draws() -> Iterator[tuple[TrafficKind, int, int]]:
        while True:
            own = rate + rng.uniform(-spread, spread)
            for _ in range(ROUNDS_OF_REQUEST):
                yield GREEDY, 4, num_accepted(rng, own, 4)

    return draws().__next__


def trials(rng: random.Random, number: int, *, rate: float, num_before: int) -> list[tuple[int, str] | None]:
    """What trials of drafts come to, all after drafts whose rate was 0.55."""
    return [
        observe(
            watched(requests_that_differ(rng, 0.55), num_before=num_before),
            requests_that_differ(rng, rate),
            TRIAL_ROUNDS,
        )
        for _ in range(number)
    ]


@pytest.mark.slow
def test_a_few_hard_requests_after_a_swap_are_not_blamed_on_the_draft() -> None:
    """Rounds of one request are alike, so that a dozen of requests says little; a bad draft is called all the same."""
    rng = random.Random(9)
    called = trials(rng, 150, rate=0.55, num_before=720)
    assert called.count(None) >= 149, called
    took = trials(rng, 30, rate=0.3, num_before=720)
    assert all(found is not None and found[0] < 1000 for found in took), took


@pytest.mark.slow
def test_requests_before_the_swap_were_few_and_easy_by_chance() -> None:
    """Their mean is as uncertain as that of the draft on trial."""
    called = trials(random.Random(10), 150, rate=0.55, num_before=72)
    assert called.count(None) >= 148, called


def test_traffic_that_the_last_version_saw_little_of_is_compared_with_versions_before() -> None:
    """Many kinds of traffic share the rounds between two swaps."""
    rng = random.Random(12)
    mails, code = TrafficKind("mails"), TrafficKind("code", temperature=0.7)
    watch = watched(rounds(rng, 0.7, traffic=mails))
    observe(watch, rounds(rng, 0.7, traffic=code), 300)
    observe(watch, rounds(rng, 0.7, traffic=mails), 2 * ROUNDS_OF_REQUEST)
    watch.swapped(trusted=False)
    for traffic in (mails, code):
        watch.swapped(trusted=False)
        found = observe(watch, rounds(rng, 0.1, traffic=traffic), 200)
        assert found is not None, traffic
    watch.swapped(trusted=False)
    assert observe(watch, rounds(rng, 0.7, traffic=mails), TRIAL_ROUNDS) is None


def test_a_trial_does_not_wait_for_traffic_that_stays_away() -> None:
    rng = random.Random(13)
    watch = watched(rounds(rng, 0.7))
    assert observe(watch, rounds(rng, 0.7, traffic=TrafficKind("other")), TRIAL_ROUNDS) is None
    assert observe(watch, rounds(rng, 0.1), 300) is None, "hours later, and of other content"


def test_what_traffic_was_like_many_versions_ago_is_forgotten() -> None:
    """Clients also name kinds of traffic, which would take ever more memory."""
    rng = random.Random(14)
    watch = watched(rounds(rng, 0.7, traffic=TrafficKind("old")))
    for version in range(4):
        observe(watch, rounds(rng, 0.7, traffic=TrafficKind(f"new {version}")), 300)
        assert TrafficKind("old") in watch._before
        watch.swapped(trusted=False)
    observe(watch, rounds(rng, 0.7), 300)
    watch.swapped(trusted=False)
    assert observe(watch, rounds(rng, 0.1, traffic=TrafficKind("old")), 400) is None
    assert {kind.domain for kind in watch._before} == {"", "new 0", "new 1", "new 2", "new 3"}


def test_one_request_alone_is_no_evidence() -> None:
    rng = random.Random(11)
    watch = watched(rounds(rng, 0.7))
    verdicts = [watch.observe(request="long", traffic=GREEDY, proposed=4, accepted=0) for _ in range(500)]
    assert verdicts == [None] * 500
    assert observe(watch, lambda: (GREEDY, 4, 0), 12 * ROUNDS_OF_REQUEST) is not None


def test_proposing_fewer_tokens_is_not_taken_for_accepting_fewer() -> None:
    """Neither that load makes rounds propose 1 instead of 4, nor the other way, which has nothing to compare with."""
    rng = random.Random(3)
    many, few = rounds(rng, 0.7, proposed=(4,)), rounds(rng, 0.7, proposed=(1, 2))
    called = [observe(watched(before), after, 1500) for before, after in [(many, few), (few, many)] * 10]
    assert sum(each is not None for each in called) <= 1, "as by chance"


def test_a_bad_draft_is_rolled_back_even_if_it_proposes_fewer_tokens_than_any_before() -> None:
    rng = random.Random(4)
    found = observe(watched(rounds(rng, 0.6, proposed=(4,))), rounds(rng, 0.0, proposed=(1,)), 400)
    assert found is not None


@pytest.mark.parametrize(
    ("easy", "hard"),
    [
        (TrafficKind("code"), TrafficKind("chat")),
        (TrafficKind(temperature=0.0), TrafficKind(temperature=1.0)),
        (TrafficKind(temperature=0.5), TrafficKind(temperature=1.0)),
        (TrafficKind(has_grammar=False), TrafficKind(has_grammar=True)),
        (TrafficKind(has_options=False), TrafficKind(has_options=True)),
    ],
)
@pytest.mark.parametrize("share_before", [0.8, 1.0])
def test_another_mix_of_traffic_is_not_blamed_on_the_draft(
    easy: TrafficKind, hard: TrafficKind, share_before: float
) -> None:
    """Of domains, temperatures, grammars or options; nor is traffic of a kind that nobody asked for before the swap."""
    rng = random.Random(5)
    code, chat = rounds(rng, 0.8, traffic=easy), rounds(rng, 0.3, traffic=hard)

    def mixed(share: float) -> Draw:
        def draws() -> Iterator[tuple[TrafficKind, int, int]]:
            while True:
                one = code if rng.random() < share else chat
                for _ in range(ROUNDS_OF_REQUEST):
                    yield one()

        return draws().__next__

    for _ in range(10):
        assert observe(watched(mixed(share_before), num_before=600), mixed(0.1), 1500) is None
    found = observe(watched(mixed(share_before), num_before=600), lambda: (easy, 4, 0), 400)
    assert found is not None, "and still a bad draft is called"


def test_a_drop_after_the_trial_is_ignored() -> None:
    rng = random.Random(6)
    watch = watched(rounds(rng, 0.7))
    assert observe(watch, rounds(rng, 0.7), TRIAL_ROUNDS) is None
    assert observe(watch, rounds(rng, 0.1), 2000) is None


def test_a_change_of_traffic_within_a_domain_soon_after_the_swap_is_not_blamed_on_the_draft() -> None:
    """Once a few hundred rounds were as good as those before; a draft that is worse stays on trial."""
    rng = random.Random(7)
    for _ in range(20):
        watch = watched(rounds(rng, 0.6))
        assert observe(watch, rounds(rng, 0.62), 600) is None
        assert observe(watch, rounds(rng, 0.3), 2000) is None
    worse = [observe(watched(rounds(rng, 0.7), num_before=2048), rounds(rng, 0.6), TRIAL_ROUNDS) for _ in range(40)]
    took = [found[0] for found in worse if found is not None]
    assert len(took) >= 38, worse
    assert max(took) > 300, "a version that is not shown to be as good stays on trial"


def test_a_version_restored_by_a_rollback_has_no_trial_and_the_next_is_compared_with_it() -> None:
    rng = random.Random(8)
    watch = watched(rounds(rng, 0.7))
    assert observe(watch, rounds(rng, 0.0), 600) is not None
    watch.swapped(trusted=True)
    assert observe(watch, rounds(rng, 0.1), 500) is None, "traffic changed as well: no second rollback"
    watch = watched(rounds(rng, 0.7))
    found = observe(watch, rounds(rng, 0.5), 2000)
    assert found is not None
    assert found[0] > 40, "long enough to be a measure itself"
    watch.swapped(trusted=True)
    observe(watch, rounds(rng, 0.7), 5)
    watch.swapped(trusted=False)
    assert observe(watch, rounds(rng, 0.5), 2000) is not None, "not measured against the bad one"


def test_a_version_that_replaces_a_bad_one_before_its_rollback_is_not_measured_against_it() -> None:
    rng = random.Random(8)
    watch = watched(rounds(rng, 0.7))
    found = observe(watch, rounds(rng, 0.5), 2000)
    assert found is not None
    assert found[0] > 40, "long enough to be a measure itself"
    watch.swapped(trusted=False)
    assert observe(watch, rounds(rng, 0.5), 2000) is not None
    watch.swapped(trusted=True)
    assert observe(watch, rounds(rng, 0.5), 500) is None
    watch.swapped(trusted=False)
    assert observe(watch, rounds(rng, 0.5), 2000) is None, "one that was served without a verdict is a measure"


def test_without_observations_to_compare_with_nothing_is_rolled_back() -> None:
    rng = random.Random(8)
    watch = LiveWatch()
    assert observe(watch, rounds(rng, 0.0), 500) is None
    assert observe(watched(rounds(rng, 0.7), num_before=20), rounds(rng, 0.0), 500) is None


def by_clients(chance: random.Random, shares: dict[str, float], rates: dict[str, float]) -> Draw:
    """Each request is of a client, drawn by these shares, whose proposals are accepted at its rate."""

    def draws() -> Iterator[tuple[TrafficKind, int, int]]:
        while True:
            (client,) = chance.choices(list(shares), list(shares.values()))
            for _ in range(ROUNDS_OF_REQUEST):
                yield TrafficKind(client=client), 4, num_accepted(chance, rates[client], 4)

    return draws().__next__


HONEST = {"a": 0.6, "b": 0.5, "c": 0.7}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_client_with_easy_text_before_a_swap_and_hard_text_after_it_rolls_nothing_back(share: float) -> None:
    """Of an equal draft one in 17 at most is, whatever the client does."""
    chance, called = random.Random(15), 0
    shares = dict.fromkeys(HONEST, (1 - share) / 3) | {"hostile": share}
    for _ in range(12):
        watch = watched(by_clients(chance, shares, HONEST | {"hostile": 0.95}), num_before=4000)
        called += observe(watch, by_clients(chance, shares, HONEST | {"hostile": 0.0}), TRIAL_ROUNDS) is not None
    assert called <= 2


def test_a_bad_draft_is_rolled_back_though_one_of_several_clients_sends_easy_text_or_none() -> None:
    chance = random.Random(16)
    bad = dict.fromkeys(HONEST, 0.2)
    for shares, quiet in (({"a": 1.0, "b": 1.0, "c": 1.0}, {}), ({"a": 2.0, "b": 1.0}, {"c": 1.0})):
        for _ in range(10):
            watch = watched(by_clients(chance, shares | quiet, HONEST), num_before=1200)
            found = observe(watch, by_clients(chance, shares, bad), TRIAL_ROUNDS)
            assert found is not None
            assert found[0] < 40 * ROUNDS_OF_REQUEST


def test_another_mix_of_clients_is_not_blamed_on_the_draft() -> None:
    """Some clients' text is hard for any draft."""
    chance = random.Random(17)
    rates = {"easy": 0.8, "hard": 0.3}
    for _ in range(10):
        watch = watched(by_clients(chance, {"easy": 0.8, "hard": 0.2}, rates), num_before=1200)
        assert observe(watch, by_clients(chance, {"easy": 0.1, "hard": 0.9}, rates), TRIAL_ROUNDS) is None


def test_many_clients_with_few_requests_are_compared_with_each_other() -> None:
    chance = random.Random(18)
    names = [str(number) for number in range(200)]
    for rate, is_bad in ((0.6, False), (0.2, True)):
        shares = dict.fromkeys(names, 1.0)
        watch = watched(by_clients(chance, shares, dict.fromkeys(names, 0.6)), num_before=100 * ROUNDS_OF_REQUEST)
        found = observe(watch, by_clients(chance, shares, dict.fromkeys(names, rate)), TRIAL_ROUNDS)
        assert (found is not None) is is_bad


def test_a_client_with_many_requests_does_not_have_others_forgotten() -> None:
    """It would be the only one then, and decide alone."""
    chance = random.Random(19)
    watch = LiveWatch()
    observe(watch, by_clients(chance, {"a": 1.0, "b": 1.0}, HONEST), 20 * ROUNDS_OF_REQUEST)
    observe(watch, by_clients(chance, {"hostile": 1.0}, {"hostile": 0.95}), 600 * ROUNDS_OF_REQUEST)
    watch.swapped(trusted=False)
    assert observe(watch, by_clients(chance, {"hostile": 1.0}, {"hostile": 0.0}), TRIAL_ROUNDS) is None


def in_domains(chance: random.Random, clients: dict[str, tuple[str, ...]], rates: dict[str, float]) -> Draw:
    """Each request is of a domain and of one of its clients; proposals are accepted at the domain's rate."""

    def draws() -> Iterator[tuple[TrafficKind, int, int]]:
        while True:
            domain = chance.choice(list(clients))
            traffic = TrafficKind(domain, client=chance.choice(clients[domain]))
            for _ in range(ROUNDS_OF_REQUEST):
                yield traffic, 4, num_accepted(chance, rates[domain], 4)

    return draws().__next__


def test_what_makes_one_domain_worse_is_rolled_back_and_named_or_raises_an_alarm_if_one_client_has_asked() -> None:
    chance = random.Random(20)
    names = ("code", "chat", "mails")
    before, after = dict.fromkeys(names, 0.6), {"code": 0.62, "chat": 0.62, "mails": 0.15}
    for of_mails in (("a", "b", "c"), ("c",)):
        clients = {"code": ("a", "b"), "chat": ("a", "b"), "mails": of_mails}
        watch = watched(in_domains(chance, clients, before), num_before=2400)
        found = observe(watch, in_domains(chance, clients, after), TRIAL_ROUNDS)
        reason = watch.alarm if found is None else found[1]
        assert (found is None) is (len(of_mails) == 1)
        assert "of domain 'mails'" in reason
        assert 0.3 < float(reason.partition("%")[0]) / 100 < 0.7, "of what was right before"
        assert ("not for several clients" in reason) is (found is None)
        watch.swapped(trusted=False)
        assert not watch.alarm


def test_a_client_that_is_alone_has_a_say_from_its_first_requests_on() -> None:
    """There is nobody else to hear."""
    rng = random.Random(21)
    watch = watched(rounds(rng, 0.6), num_before=3 * ROUNDS_OF_REQUEST)
    assert observe(watch, rounds(rng, 0.0), 600) is not None
