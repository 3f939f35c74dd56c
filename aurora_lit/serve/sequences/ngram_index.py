"""The n-grams of one request: where the last tokens occurred before, and which tokens followed them there.

N-gram lookup (Saxena 2023, "Prompt Lookup Decoding"; n-gram speculation in vLLM) proposes the tokens that followed an
earlier occurrence of the last tokens, in the prompt or the output. Of several occurrences this index takes the one with
the longest match before it, as suffix decoding does (Oliaro et al. 2024, arXiv 2411.04975): the longer the match, the
more of the following tokens are accepted. Lookup is good at summaries, code and repeated passages.

This file is the data structure of one sequence and knows no costs. How many of the tokens are proposed, and whether
they are preferred to the draft's, is decided in serve/speculation/ngram_planner.py.
"""

from __future__ import annotations

from collections.abc import Iterable

MIN_MATCH, MAX_MATCH = 2, 12
"""Least length of a match, in tokens, and the length beyond which matches are not compared."""
_MAX_CANDIDATES = 16
"""Latest occurrences of the last two tokens that are compared."""


class NgramIndex:
    """All tokens of one request, with the positions of each pair of neighbouring tokens.

    >>> index = NgramIndex([5, 6, 7, 8, 9, 5, 6, 7])
    >>> index.find_longest_match()
    (3, 3)
    >>> index.continuation(3, 4)
    [8, 9, 5, 6]
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._last_position: dict[tuple[int, int], int] = {}
        """For each pair of tokens, the position that follows its last occurrence."""
        self._previous: list[int] = []
        """For each position, the previous one that follows the same pair of tokens; 0: there is none."""
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        known = self._tokens
        for token in tokens:
            position = len(known)
            if position >= MIN_MATCH:
                pair = known[-2], known[-1]
                self._previous.append(self._last_position.get(pair, 0))
                self._last_position[pair] = position
            else:
                self._previous.append(0)
            known.append(token)

    def find_longest_match(self) -> tuple[int, int]:
        """Length of the longest match, and the position that follows it; (0, 0): the last tokens are new."""
        known = self._tokens
        if len(known) <= MIN_MATCH:
            return 0, 0
        position, best, at = self._last_position.get((known[-2], known[-1]), 0), 0, 0
        for _ in range(_MAX_CANDIDATES):
            if not position or best == MAX_MATCH:
                break
            length, longest = MIN_MATCH, min(MAX_MATCH, position)
            while length < longest and known[position - 1 - length] == known[-1 - length]:
                length += 1
            if length > best:
                best, at = length, position
            position = self._previous[position]
        return best, at

    def continuation(self, position: int, count: int) -> list[int]:
        """The `count` tokens from `position` on; past the last token they repeat from `position`."""
        period = len(self._tokens) - position
        return [self._tokens[position + i % period] for i in range(count)]
