"""Prompt lookup: proposals copied from what the request has said before, at no cost.

Where the last few tokens occurred earlier in prompt or output, what followed them there is proposed (Saxena 2023,
"Prompt Lookup Decoding"; n-gram speculation in vLLM). Of several places the one is taken before which most tokens
agree, as in suffix decoding (Oliaro et al. 2024, arXiv 2411.04975): the more do, the more of the copy is right. Good at
summaries, code and refrains, where the draft is blind to anything but its features. What is left out: how much is
copied, and when that is preferred to the draft (serve/speculation/ngram_planner.py).
"""

from __future__ import annotations

from collections.abc import Iterable

LEAST_MATCH, MOST_MATCH = 2, 12
"""Tokens that must agree; agreement beyond the second number is not looked at."""
_PLACES = 16
"""Latest occurrences of the last tokens that are compared."""


class NgramIndex:
    """All tokens of one request, and where each run of `LEAST_MATCH` of them occurred.

    >>> index = NgramIndex([5, 6, 7, 8, 9, 5, 6, 7])
    >>> index.longest()
    (3, 3)
    >>> index.continuation(3, 4)
    [8, 9, 5, 6]
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._last_at: dict[tuple[int, int], int] = {}
        self._before: list[int] = []
        """For each token, where the two in front of it occurred last before: the place behind them; 0: nowhere."""
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        known = self._tokens
        for token in tokens:
            place = len(known)
            if place >= LEAST_MATCH:
                pair = known[-2], known[-1]
                self._before.append(self._last_at.get(pair, 0))
                self._last_at[pair] = place
            else:
                self._before.append(0)
            known.append(token)

    def longest(self) -> tuple[int, int]:
        """How many of the last tokens agree with those in front of an earlier place, and that place; (0, 0): none."""
        known = self._tokens
        if len(known) <= LEAST_MATCH:
            return 0, 0
        place, best, at = self._last_at.get((known[-2], known[-1]), 0), 0, 0
        for _ in range(_PLACES):
            if not place or best == MOST_MATCH:
                break
            agreed, most = LEAST_MATCH, min(MOST_MATCH, place)
            while agreed < most and known[place - 1 - agreed] == known[-1 - agreed]:
                agreed += 1
            if agreed > best:
                best, at = agreed, place
            place = self._before[place]
        return best, at

    def continuation(self, place: int, count: int) -> list[int]:
        """The `count` tokens from a place on, going round in circles at the end."""
        period = len(self._tokens) - place
        return [self._tokens[place + i % period] for i in range(count)]
