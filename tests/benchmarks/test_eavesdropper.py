"""The attack of benchmarks/eavesdropper.py finds what is there, and nothing where there is nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from support.fake_server import FakeServer

from benchmarks.eavesdropper import VIEWS, Seen, listen, share_recognised

NUM_PROMPTS, REPEATS = 10, 6


def streams(*, own_sizes: bool, own_times: bool) -> tuple[list[Seen], list[int]]:
    """Streams of 30 messages. Each prompt has its own pattern of sizes or times, of which a fifth changes."""
    rng = random.Random(0)

    def pattern() -> list[int]:
        return [rng.randrange(1, 5) for _ in range(30)]

    def changed(values: list[int]) -> list[int]:
        return [rng.randrange(1, 5) if rng.random() < 0.2 else value for value in values]

    sizes, times = [[pattern() for _ in range(NUM_PROMPTS)] for _ in range(2)]
    seen, prompts = [], []
    for number in range(NUM_PROMPTS):
        for _ in range(REPEATS):
            size = changed(sizes[number]) if own_sizes else pattern()
            gap = changed(times[number]) if own_times else pattern()
            seen.append(Seen([200 + 4 * value for value in size], [0.01 * value for value in gap]))
            prompts.append(number)
    return seen, prompts


@pytest.mark.parametrize(("own_sizes", "own_times"), [(True, False), (False, True), (False, False)])
def test_patterns_are_found_in_the_view_that_has_them(own_sizes: bool, own_times: bool) -> None:
    seen, prompts = streams(own_sizes=own_sizes, own_times=own_times)
    found = {view: share_recognised(seen, prompts, view) for view in VIEWS}
    assert found["sizes"] > 0.95 if own_sizes else found["sizes"] < 0.3
    assert found["times"] > 0.95 if own_times else found["times"] < 0.3
    assert found["both"] > 0.95 if own_sizes or own_times else found["both"] < 0.3


def test_equal_streams_tell_nothing() -> None:
    seen = [Seen([256] * 5, [0.1] * 5)] * 40
    assert share_recognised(seen, [number % 20 for number in range(40)], "both") <= 0.1


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer(server={"stream_padding": 128}, options={"round_s": 0.02}) as running:
        yield running


@pytest.mark.parametrize("padded", [False, True])
def test_messages_are_seen_one_by_one(server: FakeServer, padded: bool) -> None:
    """Ten rounds of three tokens; the last message has [DONE] too."""
    seen = listen(server.port, "hello world abcdefg", padded=padded, max_tokens=30, temperature=0.3, seed=0)
    assert len(seen.sizes_bytes) == len(seen.gaps_s) == 10
    assert sum(seen.gaps_s) > 10 * 0.02 * 0.9
    around = len("data: \n\n")
    if padded:
        assert {(size - around) % 128 for size in seen.sizes_bytes[1:-1]} == {0}
    else:
        assert len(set(seen.sizes_bytes[1:-1])) > 1
