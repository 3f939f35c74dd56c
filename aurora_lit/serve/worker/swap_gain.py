"""What the last swap brought, in one line: tokens a round before and after it.

Counted are requests with proposals, from any source, that one draft served from beginning to end: of the version
before the last that ended, of the present one the first, _REQUESTS each. Their traffic may differ, so this is what
users notice and no test of the draft (drafts/live_watch.py, learn/online/trial.py).

    gain = SwapGain()
    gain.swapped("draft-000007")
    gain.observe(outputs)               # of rounds, none of them from before the swap
    gain.line                           # "draft 7: 2.61 → 2.83 tokens a round (64 requests before the swap, 12 after)"
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from aurora_lit.drafts.versions import version_number
from aurora_lit.request import Output

_REQUESTS = 64


@dataclass(slots=True)
class _Served:
    """One request's rounds so far."""

    tokens: int = 0
    rounds: int = 0
    has_proposals: bool = False


class SwapGain:
    """See the file's docstring."""

    def __init__(self) -> None:
        """No swap yet."""
        self.line = ""
        """Empty before the first swap, and until a request has ended after it."""
        self._version = ""
        self._before: tuple[_Served, ...] = ()
        self._latest: deque[_Served] = deque(maxlen=_REQUESTS)
        """The last that ended under the present version."""
        self._running: dict[str, _Served] = {}
        self._is_complete = True
        """True once enough requests have ended since the swap."""

    def swapped(self, version: str) -> str:
        """Another version proposes from now on. Returns the line of the one before, if it is not complete; else ""."""
        unfinished = "" if self._is_complete else self.line
        self._before = tuple(self._latest) or self._before
        self._version, self.line, self._is_complete = version, "", not self._before
        self._latest.clear()
        self._running.clear()
        return unfinished

    def observe(self, outputs: Sequence[Output]) -> bool:
        """Add rounds. A request that has no output in them has ended: clients cancel, at stop strings for example.

        Returns True when the line is complete.
        """
        for output in outputs:
            if output.is_first:
                self._running[output.request_id] = _Served()
            served = self._running.get(output.request_id)
            if served is not None:
                served.tokens += len(output.token_ids)
                served.rounds += 1
                served.has_proposals |= output.num_proposed > 0
        reasons = {output.request_id: output.finish_reason for output in outputs}  # of the last round
        ended = [request_id for request_id in self._running if reasons.get(request_id, "cancelled") is not None]
        self._latest += [served for served in map(self._running.pop, ended) if served.has_proposals]
        if self._is_complete or not ended or not self._latest:
            return False
        self._is_complete = len(self._latest) == _REQUESTS
        self.line = describe(self._version, self._before, self._latest)
        return self._is_complete


def describe(version: str, before: Sequence[_Served], after: Sequence[_Served]) -> str:
    """The line; neither side may be empty."""
    old, new = (sum(each.tokens for each in side) / sum(each.rounds for each in side) for side in (before, after))
    number = version_number(version)
    name = f"draft {number}" if number else "the starting draft"
    return f"{name}: {old:.2f} → {new:.2f} tokens a round ({len(before)} requests before the swap, {len(after)} after)"
