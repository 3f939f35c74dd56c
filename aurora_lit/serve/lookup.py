"""Prompt lookup: proposals copied from what the request has said before, at no cost.

When the last few tokens occurred earlier in prompt or output, what followed them there is proposed (Saxena 2023,
"Prompt Lookup Decoding"; n-gram speculation in vLLM). Good at summaries, code and refrains, where the draft is blind
to anything but its features. What is left out: when to prefer it to the draft (serve/proposing.py).
"""

from __future__ import annotations

from collections.abc import Iterable

MATCH_TOKENS = 3
"""Tokens that must agree; two match too often by chance."""


class NgramIndex:
    """All tokens of one request, and where each run of `MATCH_TOKENS` was followed last.

    >>> index = NgramIndex([5, 6, 7, 8, 9, 5, 6, 7])
    >>> index.continuation(4)
    [8, 9, 5, 6]
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._follower_at: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            if len(self._tokens) >= MATCH_TOKENS:
                self._follower_at[tuple(self._tokens[-MATCH_TOKENS:])] = len(self._tokens)
            self._tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """The next `count` tokens as they came last time, going round in circles at the end; [] without a match."""
        start = self._follower_at.get(tuple(self._tokens[-MATCH_TOKENS:]))
        if start is None:
            return []
        period = len(self._tokens) - start
        return [self._tokens[start + i % period] for i in range(count)]
