"""The line about a swap: which requests count on both sides, and when it is complete."""

from __future__ import annotations

import pytest

from aurora_lit.request import Output
from aurora_lit.serve.worker import swap_gain
from aurora_lit.serve.worker.swap_gain import SwapGain


def rounds(request_id: str, lengths: list[int], *, first: bool = True, end: str | None = "stop") -> list[Output]:
    """One request's outputs, of so many tokens each; one fewer was accepted."""
    return [
        Output(
            request_id=request_id,
            token_ids=(7,) * length,
            num_proposed=3,
            num_accepted=length - 1,
            is_first=first and number == 0,
            finish_reason=end if number == len(lengths) - 1 else None,
        )
        for number, length in enumerate(lengths)
    ]


def test_the_last_requests_before_are_compared_with_the_first_after_and_the_line_is_told_once() -> None:
    gain = SwapGain()
    gain.swapped("draft-000006")
    assert not gain.observe(rounds("old", [4, 4, 4]))
    assert gain.line == "", "nothing was served before the first version"
    told = [gain.observe(rounds(f"before {number}", [2, 3])) for number in range(64)]
    gain.swapped("draft-000007")
    assert gain.line == ""
    told += [gain.observe(rounds("after 0", [3, 3, 4]))]
    assert gain.line == "draft 7: 2.50 → 3.33 tokens a round (64 requests before the swap, 1 after)"
    told += [gain.observe(rounds(f"after {number}", [3])) for number in range(1, 64)]
    assert told == [False] * 127 + [True]
    line = "draft 7: 2.50 → 3.02 tokens a round (64 requests before the swap, 64 after)"
    assert gain.line == line
    assert not gain.observe(rounds("later", [1]))
    assert gain.line == line
    assert gain.swapped("draft-000008") == "", "it was told"


def test_requests_under_way_at_the_swap_and_those_without_proposals_count_on_neither_side() -> None:
    gain = SwapGain()
    plain = [Output(request_id="plain", token_ids=(7,), is_first=True, finish_reason="length")]
    gain.observe([*rounds("before", [2]), *rounds("across", [4], end=None), *plain])
    gain.swapped("draft-000001")
    gain.observe([*rounds("across", [4, 4], first=False), *plain])
    assert gain.line == ""
    gain.observe(rounds("after", [3]))
    assert gain.line == "draft 1: 2.00 → 3.00 tokens a round (1 requests before the swap, 1 after)"


def test_a_request_that_its_client_cancels_counts_with_what_it_was_given() -> None:
    gain = SwapGain()
    gain.observe(rounds("before", [2]))
    gain.swapped("draft-000001")
    gain.observe([*rounds("stops", [3], end=None), *rounds("other", [2], end=None)])
    gain.observe(rounds("other", [2], first=False, end=None))
    assert gain.line == "draft 1: 2.00 → 3.00 tokens a round (1 requests before the swap, 1 after)"
    gain.observe([])
    assert gain.line == "draft 1: 2.00 → 2.33 tokens a round (1 requests before the swap, 2 after)"


def test_a_swap_before_enough_requests_tells_the_line_as_it_is_and_one_without_any_keeps_what_was_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swap_gain, "_REQUESTS", 2)
    gain = SwapGain()
    gain.observe(rounds("before", [2]))
    assert gain.swapped("draft-000001") == ""
    assert gain.swapped("draft-000002") == "", "no request ended under the first"
    gain.observe(rounds("after", [4]))
    line = "draft 2: 2.00 → 4.00 tokens a round (1 requests before the swap, 1 after)"
    assert gain.swapped("starting") == line
    gain.observe(rounds("back", [2]))
    assert gain.line == "the starting draft: 4.00 → 2.00 tokens a round (1 requests before the swap, 1 after)"
