"""The domain detector on made-up prompts: clusters under large common offsets and very unequal dimensions."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.domain_prompts import _KINDS, Prompts
from torch import Tensor

from aurora_lit.modules.domains.detector import UNKNOWN, DomainDetector, Placement, Shift, acceptance_rate, embed
from aurora_lit.modules.domains.shifts import AcceptanceWatch, MixWatch, Watch


def place_all(
    kinds: Sequence[str], *, detector: DomainDetector | None = None, seed: int = 0, spread: float = 1.0
) -> tuple[list[Placement], DomainDetector]:
    detector = detector or DomainDetector(max_domains=8, novelty=0.7)
    prompts = Prompts(seed, spread=spread)
    return [detector.place(prompts.trace(kind)) for kind in kinds], detector


def shuffled(number: int, *, seed: int = 0, kinds: Sequence[str] = _KINDS) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(kinds) for _ in range(number)]


def purity(placements: Sequence[Placement], kinds: Sequence[str]) -> float:
    """Share of requests whose kind is the commonest of their domain; unknown ones count as wrong."""
    by_domain: dict[str, Counter[str]] = {}
    for placement, kind in zip(placements, kinds, strict=True):
        if placement.domain != UNKNOWN:
            by_domain.setdefault(placement.domain, Counter())[kind] += 1
    return sum(max(counts.values()) for counts in by_domain.values()) / len(kinds)


# -- domains -------------------------------------------------------------------------------------------------------


def test_kinds_of_prompts_become_domains() -> None:
    kinds = shuffled(300)
    placements, detector = place_all(kinds)
    assert purity(placements[100:], kinds[100:]) > 0.95
    assert len(detector.domains) <= 6
    assert all(placement.domain == UNKNOWN for placement in placements[:16]), "what is usual must be learned first"


def test_the_embedding_is_the_prompts_mean_without_the_first_position_and_the_answer() -> None:
    trace = Prompts().trace("code")
    first = embed(trace)
    assert first is not None
    torch.testing.assert_close(first, trace.aux_T3H[1:8].float().mean(0))
    trace.aux_T3H[0] = 7.0
    trace.aux_T3H[8:] = 7.0
    torch.testing.assert_close(embed(trace), first)
    assert embed(replace(trace, answer_start=1)) is None
    assert embed(replace(trace, first_position=3)) is None


def test_a_new_kind_founds_a_domain_within_a_few_requests_and_a_single_odd_one_does_not() -> None:
    placements, detector = place_all(["code", "chat"] * 60)
    before = set(detector.domains)
    (odd,), _ = place_all(["prose"], detector=detector, seed=1)
    assert (odd.domain, odd.founded) == (UNKNOWN, 0.0)
    assert odd.distance > 0.7
    placements, _ = place_all(["sql"] * 6, detector=detector, seed=2)
    founding = [number for number, placement in enumerate(placements) if placement.founded]
    assert founding == [3]
    assert placements[3].founded > 0.6
    assert {placement.domain for placement in placements[3:]} == {*detector.domains} - before


def test_the_novelty_setting_says_how_far_from_all_others_is_new() -> None:
    kinds = shuffled(200)
    coarse = place_all(kinds, detector=DomainDetector(max_domains=16, novelty=1.6))[1]
    fine = place_all(kinds, detector=DomainDetector(max_domains=16, novelty=0.7))[1]
    assert len(coarse.domains) < 4 <= len(fine.domains)


def test_beyond_the_cap_the_closest_domains_are_merged_to_make_room() -> None:
    kinds = [*["code", "chat", "chatty"] * 40, *["sql"] * 40]
    detector, prompts = DomainDetector(max_domains=3, novelty=0.5), Prompts(spread=0.3)
    placements = []
    for kind in kinds:
        placements.append(detector.place(prompts.trace(kind)))
        if len(placements) > 120 and placements[-1].founded:
            assert sum(detector.domains.values()) > 0.7, "the merged keep their share"
    before = {placement.domain for placement in placements[100:120]}
    after = {placement.domain for placement in placements[130:]}
    assert len(before) == 3
    assert len(detector.domains) == 3
    assert len(after) == 1
    assert after.isdisjoint(before), "the new kind has a domain of its own"
    chats, _ = place_all(["chat", "chatty"] * 5, detector=detector, spread=0.3, seed=1)
    assert len({placement.domain for placement in chats}) == 1
    assert {chats[0].domain} < before


def test_a_label_wins_and_labels_are_capped() -> None:
    detector = DomainDetector(max_domains=3, novelty=0.7)
    prompts = Prompts()
    assert detector.place(prompts.trace("code", label="mine")).domain == "mine"
    assert [detector.place(prompts.trace("chat", label="mine")).domain for _ in range(3)] == ["mine"] * 3
    for label in ("b", "c"):
        detector.place(prompts.trace("prose", label=label))
    for number in range(50):
        assert detector.place(prompts.trace("sql", label=f"flood{number}")).domain in {"mine", "b", "c", UNKNOWN}
    assert set(detector.domains) == {"mine", "b", "c"}
    assert detector.place(prompts.trace("code", label="auto-1")).domain != "auto-1", "that name is ours"


def test_later_segments_share_their_requests_domain_and_teach_nothing() -> None:
    _, detector = place_all(["code", "chat"] * 40)
    first = Prompts(5).trace("code")
    placement = detector.place(first)
    state = encoded(detector)
    later = detector.place(replace(first, first_position=500, aux_T3H=first.aux_T3H * 0))
    assert (later.domain, later.shift, later.founded) == (placement.domain, None, 0.0)
    assert placement.domain != UNKNOWN
    assert encoded(detector) == state


# -- shifts --------------------------------------------------------------------------------------------------------


def test_phases_are_told_within_a_dozen_requests_and_a_return_is_nothing_new() -> None:
    kinds = [*shuffled(100, kinds=("code", "chat")), *["prose"] * 100, *["sql"] * 100, *["code"] * 100]
    placements, detector = place_all(kinds)
    shifts = [(number, placement.shift) for number, placement in enumerate(placements) if placement.shift]
    assert [number // 100 for number, _ in shifts] == [1, 2, 3]
    assert all(number % 100 <= 12 for number, _ in shifts)
    assert [shift.domain for _, shift in shifts] == [placements[100 * k + 50].domain for k in (1, 2, 3)]
    assert all(shift.cause == "mix" for _, shift in shifts)
    assert [shift.novelty > 0.6 for _, shift in shifts] == [True, True, False]
    assert detector.num_shifts == 3


def test_traffic_of_one_kind_alone_is_known_when_it_comes_back() -> None:
    placements, _ = place_all([*["code"] * 100, *["prose"] * 100, *["code"] * 100])
    first, second = (placement.shift for placement in placements if placement.shift)
    assert first.novelty > 0.6
    assert second.novelty < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_no_shift_is_called_in_shuffled_traffic(seed: int) -> None:
    kinds = shuffled(400, seed=seed, kinds=_KINDS[: 2 + seed])
    placements, _ = place_all(kinds, seed=seed)
    assert [placement.shift for placement in placements if placement.shift] == []


def test_a_drop_of_acceptance_is_told_and_the_drafts_progress_is_not() -> None:
    rng, prompts = random.Random(0), Prompts()
    detector = DomainDetector(max_domains=8, novelty=0.7)

    def shifts(*accepted: float, explored: bool = False) -> list[Shift]:
        traces = (prompts.trace("code", label="code", accepted=a, explored=explored) for a in accepted)
        return [shift for trace in traces if (shift := detector.place(trace).shift)]

    def noise() -> float:
        return rng.choice([-0.1, 0.0, 0.1])

    assert shifts(*(0.2 + 0.6 * n / 300 + noise() for n in range(300))) == []
    assert shifts(*([0.1] * 40), explored=True) == [], "exploring rounds accept less by design"
    (shift,) = shifts(*(0.45 + noise() for _ in range(60)))
    assert (shift.cause, shift.domain) == ("acceptance", "code")
    assert 0.2 < shift.novelty < 0.5


def test_the_acceptance_rate_is_the_drafts_own() -> None:
    prompts = Prompts()
    assert acceptance_rate(prompts.trace("code")) is None
    assert acceptance_rate(prompts.trace("code", accepted=0.3)) == pytest.approx(0.3)
    assert acceptance_rate(prompts.trace("code", accepted=0.3, explored=True)) is None


def test_the_mix_watch_tells_who_came_and_is_blind_to_order() -> None:
    watch = MixWatch()
    calm = [watch.observe(("a", "b")[n % 2], num_domains=3) for n in range(200)]
    calm += [watch.observe(("a", "b")[n // 3 % 2], num_domains=3) for n in range(200)]
    assert calm == [None] * 400
    assert [came for _ in range(40) if (came := watch.observe("b", num_domains=3))] == ["b"]


# -- state ---------------------------------------------------------------------------------------------------------


def encoded(detector: DomainDetector) -> bytes:
    """All its state as it goes to disk: tensors and plain values only."""
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    return json.dumps(torch.load(io.BytesIO(file.getvalue()), weights_only=True), default=Tensor.tolist).encode()


def test_a_resumed_detector_goes_on_as_if_it_had_not_stopped() -> None:
    kinds = [*shuffled(120, kinds=_KINDS[:2]), *["prose"] * 3]
    _, first = place_all(kinds)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    again = DomainDetector(max_domains=8, novelty=0.7)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    rest = [*["prose"] * 20, *shuffled(60)]
    assert place_all(rest, detector=first, seed=3)[0] == place_all(rest, detector=again, seed=3)[0]
    assert encoded(first) == encoded(again)


def test_state_stays_small_however_long_traffic_runs() -> None:
    watch, acceptance = Watch(mode="up", tolerance=0.3, threshold=6.0), AcceptanceWatch()
    for n in range(2000):
        watch.observe(n % 2)
        acceptance.observe(n % 2)
    assert max(len(watch.told), len(acceptance.state_dict()["told"])) <= 512


def test_a_watch_is_restored_from_what_it_was_told() -> None:
    first = Watch(mode="up", tolerance=0.1, threshold=3.0)
    rng = random.Random(1)
    for _ in range(700):
        first.observe(rng.random())
    again = Watch(mode="up", tolerance=0.1, threshold=3.0)
    again.restore(first.told)
    rest = [rng.random() + (n > 50) for n in range(100)]
    told = [first.observe(value) for value in rest]
    assert told == [again.observe(value) for value in rest]
    assert any(told)
