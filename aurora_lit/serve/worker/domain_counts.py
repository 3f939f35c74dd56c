"""Counts what was generated and accepted, by the domain that requests were served as.

Domains are few at any time, but clients may send any number of labels, and the learner's domains come and go. So the
first MAX_LABELS labels have a row each, and the MAX_DOMAINS domains without a label that had requests last. Further
labels are counted together as OTHER_DOMAINS; a domain that loses its row begins at 0 if it comes back. Leaves out where
the rows are written (ipc/engine_status.py).

    counts = DomainCounts()
    counts.add(outputs)                 # of some rounds
    counts.names, counts.numbers
"""

from __future__ import annotations

from collections.abc import Sequence

from aurora_lit.ipc.engine_status import MAX_LABELS, OTHER_DOMAINS, UNKNOWN_DOMAIN, TrafficTotals
from aurora_lit.modules.domains.centroids import AUTO_PREFIX, UNKNOWN
from aurora_lit.request import Output
from aurora_lit.settings import MAX_DOMAINS


class DomainCounts:
    """See the file's docstring."""

    def __init__(self) -> None:
        """No rows yet."""
        self._row_of: dict[str, list[int]] = {}
        """By name, the fields of TrafficTotals."""
        self._num_labels = self._num_rounds = 0
        self._last_round: dict[str, int] = {}
        """Of each row without a label: the round that counted in it last."""

    @property
    def names(self) -> list[str]:
        """The name of each row."""
        return list(self._row_of)

    @property
    def numbers(self) -> list[int]:
        """The rows, one after the other."""
        return [number for row in self._row_of.values() for number in row]

    def add(self, outputs: Sequence[Output]) -> None:
        """Count the outputs of a round or of several."""
        self._num_rounds += 1
        for output in outputs:
            name = UNKNOWN_DOMAIN if output.domain == UNKNOWN else output.domain
            row = self._row_of.get(name) or self._new_row(name)
            row[0] += output.is_first  # not at the end, which a stop string or the client may decide elsewhere
            row[1] += len(output.token_ids)
            row[2] += output.num_proposed > 0
            row[3] += output.num_proposed
            row[4] += output.num_accepted
            if name in self._last_round:
                self._last_round[name] = self._num_rounds

    def _new_row(self, name: str) -> list[int]:
        """A row for a new name; where there is no room, that of the others."""
        if name.startswith(AUTO_PREFIX):
            if len(self._last_round) == MAX_DOMAINS:
                self._remove_oldest()
            self._last_round[name] = self._num_rounds
        elif name not in (UNKNOWN_DOMAIN, OTHER_DOMAINS):
            if self._num_labels == MAX_LABELS:
                return self._others()
            self._num_labels += 1
        row = self._row_of[name] = [0] * len(TrafficTotals._fields)
        return row

    def _remove_oldest(self) -> None:
        """Remove the row without a label that was counted in longest ago. The others' does not leap by its numbers."""
        oldest = min(self._last_round, key=self._last_round.__getitem__)
        del self._last_round[oldest], self._row_of[oldest]

    def _others(self) -> list[int]:
        return self._row_of.setdefault(OTHER_DOMAINS, [0] * len(TrafficTotals._fields))
