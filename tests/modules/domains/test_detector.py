"""The domain detector on made-up prompts, whose embeddings have a large common offset and very unequal dimensions."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.domain_prompts import KINDS, PromptMaker
from torch import Tensor

from aurora_lit.learn.offline.on_policy import RECORDED_VERSION
from aurora_lit.modules.domains.centroids import UNKNOWN, pool_prompt
from aurora_lit.modules.domains.detector import (
    DomainAssignment,
    DomainDetector,
    Shift,
    acceptance_rate,
    prompt_embedding,
)
from aurora_lit.request import Source
from aurora_lit.traces.record import Trace


def assign_all(
    kinds: Sequence[str], *, detector: DomainDetector | None = None, seed: int = 0, spread: float = 1.0
) -> tuple[list[DomainAssignment], DomainDetector]:
    detector = detector or DomainDetector(max_domains=8, novelty_threshold=0.7)
    prompts = PromptMaker(seed, spread=spread)
    return [detector.assign(prompts.trace(kind)) for kind in kinds], detector


def shuffled(number: int, *, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(kinds) for _ in range(number)]


def purity(assignments: Sequence[DomainAssignment], kinds: Sequence[str]) -> float:
    """Share of requests whose kind is the most frequent of their domain; requests without a domain count as wrong."""
    by_domain: dict[str, Counter[str]] = {}
    for assignment, kind in zip(assignments, kinds, strict=True):
        if assignment.domain != UNKNOWN:
            by_domain.setdefault(assignment.domain, Counter())[kind] += 1
    return sum(max(counts.values()) for counts in by_domain.values()) / len(kinds)


# -- domains -------------------------------------------------------------------------------------------------------


def test_kinds_of_prompts_become_domains() -> None:
    kinds = shuffled(300)
    assignments, detector = assign_all(kinds)
    assert purity(assignments[100:], kinds[100:]) > 0.95
    assert len(detector.domains) <= 6
    assert all(assignment.domain == UNKNOWN for assignment in assignments[:16]), "the statistics must be learned first"


def test_the_embedding_is_a_mean_of_the_prompt_without_its_first_and_last_position_and_the_answer() -> None:
    trace = PromptMaker().trace("code")
    first = prompt_embedding(trace)
    assert first is not None
    torch.testing.assert_close(first, pool_prompt(trace.aux_T3H[:8], 8))
    trace.aux_T3H[0] = 7.0
    trace.aux_T3H[7:] = 7.0
    torch.testing.assert_close(prompt_embedding(trace), first)
    assert prompt_embedding(replace(trace, answer_start=2)) is None
    assert prompt_embedding(replace(trace, first_position=3)) is None, "it may be a later segment"


def test_a_new_kind_founds_a_domain_within_a_few_requests_and_a_single_odd_one_does_not() -> None:
    assignments, detector = assign_all(["code", "chat"] * 60)
    before = set(detector.domains)
    (odd,), _ = assign_all(["prose"], detector=detector, seed=1)
    assert (odd.domain, odd.founded_novelty) == (UNKNOWN, 0.0)
    assignments, _ = assign_all(["sql"] * 6, detector=detector, seed=2)
    founding = [number for number, assignment in enumerate(assignments) if assignment.founded_novelty]
    assert founding == [3]
    assert assignments[3].founded_novelty > 0.6
    assert {assignment.domain for assignment in assignments[3:]} == {*detector.domains} - before


def template_traces(number: int) -> list[Trace]:
    """One template's prompts: the same, except for details of four sorts and a little noise."""
    gen = torch.Generator().manual_seed(5)
    base_E, *detail_4E = torch.randn(5, 96, generator=gen)
    form = PromptMaker().trace("code")
    prompts = (base_E + 0.2 * detail_4E[n % 4] + 0.2 * torch.randn(96, generator=gen) for n in range(number))
    return [replace(form, request_id=f"t{n}", aux_T3H=x_E.expand(24, -1)) for n, x_E in enumerate(prompts)]


@pytest.mark.parametrize("before", [[], ["chat"] * 80, ["chat", "prose"] * 40], ids=["alone", "after one", "after two"])
def test_a_template_is_one_domain(before: list[str]) -> None:
    _, detector = assign_all(before)
    known = set(detector.domains)
    assignments = [detector.assign(trace) for trace in template_traces(200)]
    found = {assignment.domain for assignment in assignments[20:]}
    assert len(found) == 1
    assert found.isdisjoint({UNKNOWN, *known})
    assert sum(assignment.shift is not None for assignment in assignments) == bool(before)


def test_the_novelty_threshold_decides_how_distant_a_new_domain_is() -> None:
    kinds = shuffled(200)
    coarse = assign_all(kinds, detector=DomainDetector(max_domains=16, novelty_threshold=1.6))[1]
    fine = assign_all(kinds, detector=DomainDetector(max_domains=16, novelty_threshold=0.7))[1]
    assert len(coarse.domains) < 4 <= len(fine.domains)


def test_beyond_the_cap_the_closest_domains_are_merged_to_make_room() -> None:
    kinds = [*["code", "chat", "chatty"] * 40, *["sql"] * 40]
    detector, prompts = DomainDetector(max_domains=3, novelty_threshold=0.5), PromptMaker(spread=0.3)
    assignments, names = [], []
    for kind in kinds:
        trace = prompts.trace(kind)
        names.append(trace.request_id)
        assignments.append(detector.assign(trace))
        if len(assignments) > 120 and assignments[-1].founded_novelty:
            assert sum(detector.domains.values()) > 0.7, "the merged keep their share"
    gone = {a.merged[0] for a in assignments if a.merged}
    assert gone, "it is told which went"
    assert gone.isdisjoint(detector.domains)
    later = [detector.assign(replace(prompts.trace("chat"), request_id=each, first_position=9)) for each in names]
    assert gone.isdisjoint(a.domain for a in later), "nor are later segments of their requests of them"
    before = {assignment.domain for assignment in assignments[100:120]}
    after = {assignment.domain for assignment in assignments[130:]}
    assert len(before) == 3
    assert len(detector.domains) == 3
    assert len(after) == 1
    assert after.isdisjoint(before), "the new kind has a domain of its own"
    chats, _ = assign_all(["chat", "chatty"] * 5, detector=detector, spread=0.3, seed=1)
    assert len({assignment.domain for assignment in chats}) == 1
    assert {chats[0].domain} < before


def test_a_request_whose_beginning_was_not_seen_has_its_known_label() -> None:
    detector, prompts = DomainDetector(max_domains=3, novelty_threshold=0.7), PromptMaker()
    detector.assign(prompts.trace("code", label="mine"))
    cached = [replace(prompts.trace("code", label=label), first_position=16) for label in ("mine", "other", "")]
    assert [detector.assign(trace).domain for trace in cached] == ["mine", UNKNOWN, UNKNOWN]


@pytest.mark.parametrize("seen", [32, 90])
def test_the_end_of_a_prompt_is_enough_where_its_beginning_was_not_seen(seen: int) -> None:
    assignments, detector = assign_all(["code", "chat"] * 60)
    code, chat = (assignment.domain for assignment in assignments[-2:])
    prompts = PromptMaker(seed=2)

    def behind_a_cache(kind: str, seen: int, *, later: int = 0) -> Trace:
        trace = prompts.trace(kind)
        end_of_prompt = trace.aux_T3H[1:7].repeat(15, 1)[:seen]
        states = torch.cat([end_of_prompt, trace.aux_T3H[7:]])
        return replace(trace, aux_T3H=states, answer_start=seen, first_position=160, prompt_length=160 + seen - later)

    assert [detector.assign(behind_a_cache(kind, seen)).domain for kind in ("code", "chat")] == [code, chat]
    assert detector.assign(behind_a_cache("code", 31)).domain == UNKNOWN
    assert detector.assign(behind_a_cache("code", seen, later=1)).domain == UNKNOWN, "its beginning is answer already"


def test_a_label_takes_precedence_and_labels_are_capped() -> None:
    detector = DomainDetector(max_domains=5, novelty_threshold=0.7)
    prompts = PromptMaker()
    assert detector.assign(prompts.trace("code", label="mine")).domain == "mine"
    assert [detector.assign(prompts.trace("chat", label="mine")).domain for _ in range(3)] == ["mine"] * 3
    for label in ("b", "c"):
        detector.assign(prompts.trace("prose", label=label))
    for number in range(50):
        found = detector.assign(prompts.trace(("sql", "prose")[number % 2], label=f"flood{number}")).domain
        assert found in {"mine", "b", "c", "auto-1", UNKNOWN}
    assert set(detector.domains) == {"mine", "b", "c", "auto-1"}, "they leave room for what is found"
    assert detector.assign(prompts.trace("code", label="auto-1")).domain != "auto-1", "the prefix is reserved"


def test_labels_of_a_time_without_a_limit_give_way_to_what_is_found() -> None:
    before, prompts = DomainDetector(max_domains=8, novelty_threshold=0.7), PromptMaker()
    for _ in range(6):
        for kind, label in (("code", "a"), ("chat", "b"), ("prose", "c"), ("prose", "d")):
            before.assign(prompts.trace(kind, label=label))
    after = DomainDetector(max_domains=4, novelty_threshold=0.7)
    after.load_state_dict(before.state_dict())
    assignments, _ = assign_all(["sql"] * 8, detector=after, seed=1)
    assert [{*assignment.merged} for assignment in assignments if assignment.merged] == [{"c", "d"}]
    assert {"a", "b", "auto-1"} < set(after.domains)


def test_later_segments_have_their_requests_domain_and_do_not_change_the_detector() -> None:
    _, detector = assign_all(["code", "chat"] * 40)
    first = PromptMaker(5).trace("code")
    assignment = detector.assign(first)
    state = encoded(detector)
    later = detector.assign(replace(first, first_position=500, aux_T3H=first.aux_T3H * 0))
    assert (later.domain, later.shift, later.founded_novelty) == (assignment.domain, None, 0.0)
    assert assignment.domain != UNKNOWN
    assert encoded(detector) == state


# -- shifts --------------------------------------------------------------------------------------------------------


def test_shifts_are_detected_within_a_dozen_requests_and_a_return_has_no_novelty() -> None:
    kinds = [*shuffled(100, kinds=("code", "chat")), *["prose"] * 100, *["sql"] * 100, *["code"] * 100]
    assignments, detector = assign_all(kinds)
    shifts = [(number, assignment.shift) for number, assignment in enumerate(assignments) if assignment.shift]
    assert [number // 100 for number, _ in shifts] == [1, 2, 3]
    assert all(number % 100 <= 12 for number, _ in shifts)
    assert [shift.domain for _, shift in shifts] == [assignments[100 * k + 50].domain for k in (1, 2, 3)]
    assert all(shift.cause == "mix" for _, shift in shifts)
    assert [shift.novelty > 0.6 for _, shift in shifts] == [True, True, False]
    assert detector.num_shifts == 3


def test_traffic_of_one_kind_alone_is_known_when_it_comes_back() -> None:
    assignments, _ = assign_all([*["code"] * 100, *["prose"] * 100, *["code"] * 100])
    first, second = (assignment.shift for assignment in assignments if assignment.shift)
    assert first.novelty > 0.6
    assert second.novelty < 0.3


@pytest.mark.parametrize("seed", [*(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1)), 2])
def test_no_shift_is_detected_in_shuffled_traffic(seed: int) -> None:
    kinds = shuffled(400, seed=seed, kinds=KINDS[: 2 + seed])
    assignments, _ = assign_all(kinds, seed=seed)
    assert [assignment.shift for assignment in assignments if assignment.shift] == []


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_domain_that_is_found_late_is_no_shift(seed: int) -> None:
    kinds = random.Random(seed).choices(KINDS, weights=(60, 30, 6, 3), k=150)
    assignments, _ = assign_all(kinds, spread=1.8)
    assert max(number for number, assignment in enumerate(assignments) if assignment.founded_novelty) > 80
    assert [assignment.shift for assignment in assignments if assignment.shift] == []


def test_a_drop_of_acceptance_is_detected_and_the_drafts_progress_is_not() -> None:
    rng, prompts = random.Random(0), PromptMaker()
    detector = DomainDetector(max_domains=8, novelty_threshold=0.7)

    def shifts(*accepted: float) -> list[Shift]:
        traces = (prompts.trace("code", label="code", accepted=a) for a in accepted)
        return [shift for trace in traces if (shift := detector.assign(trace).shift)]

    def noise() -> float:
        return rng.choice([-0.1, 0.0, 0.1])

    assert shifts(*(0.2 + 0.6 * n / 300 + noise() for n in range(300))) == []
    (shift,) = shifts(*(0.45 + noise() for _ in range(60)))
    assert (shift.cause, shift.domain) == ("acceptance", "code")
    assert 0.2 < shift.novelty < 0.5


def test_the_acceptance_rate_is_the_drafts_own() -> None:
    prompts = PromptMaker()
    assert acceptance_rate(prompts.trace("code")) is None
    assert acceptance_rate(prompts.trace("code", accepted=0.3)) == pytest.approx(0.3)
    replayed = prompts.trace("code", accepted=0.3)
    replayed.round_version_R[:] = RECORDED_VERSION
    assert acceptance_rate(replayed) is None, "the draft of a replayed sampled request is not the one that is served"


def test_the_acceptance_rate_is_that_of_proposals_that_were_verified() -> None:
    """How many follow a rejected one depends on the load."""
    trace = PromptMaker().trace("code", accepted=0.3)

    def rounds(*accepted: int, proposed: int) -> Trace:
        num = len(accepted)
        return replace(
            trace,
            source_R=torch.full((num,), Source.DRAFT),
            round_version_R=torch.zeros(num, dtype=torch.int32),
            num_proposed_R=torch.full((num,), proposed),
            num_accepted_R=torch.tensor(accepted),
        )

    assert acceptance_rate(rounds(1, 0, 1, 1, 0, proposed=1)) == pytest.approx(0.6)
    assert acceptance_rate(rounds(1, 0, 2, 0, proposed=4)) == pytest.approx(3 / 7)
    assert acceptance_rate(rounds(4, 4, proposed=4)) == 1.0


# -- state ---------------------------------------------------------------------------------------------------------


def encoded(detector: DomainDetector) -> bytes:
    """The whole state as it is saved: tensors and plain values only."""
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    return json.dumps(torch.load(io.BytesIO(file.getvalue()), weights_only=True), default=Tensor.tolist).encode()


def test_names_that_are_taken_are_passed_over() -> None:
    detector = DomainDetector(max_domains=8, novelty_threshold=0.7)
    detector.reserve_names(["auto-4", "code", "auto-11", "auto-", "auto-x", ""])
    detector.reserve_names(["auto-2"])
    assign_all(["code", "chat"] * 40, detector=detector)
    assert set(detector.domains) == {"auto-12", "auto-13"}


def test_a_resumed_detector_goes_on_as_if_it_had_not_stopped() -> None:
    kinds = [*shuffled(120, kinds=KINDS[:2]), *["prose"] * 3]
    _, first = assign_all(kinds)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    again = DomainDetector(max_domains=8, novelty_threshold=0.7)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    rest = [*["prose"] * 20, *shuffled(60)]
    assert assign_all(rest, detector=first, seed=3)[0] == assign_all(rest, detector=again, seed=3)[0]
    assert encoded(first) == encoded(again)
