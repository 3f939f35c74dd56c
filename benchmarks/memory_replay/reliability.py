"""Are copies as reliable as they say? Their promised probability of being accepted (survival) against the outcome."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from aurora_lit.kernels.suffix_index import KINDS, kind_of
from aurora_lit.serve.speculation.copy_planner import LEAST_SURVIVAL

from .proposers import Copying
from .replay import Recorded, replay

_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class _Recording(Copying):
    """Also keeps each proposed node's kind, survival and outcome."""

    def __init__(self) -> None:
        super().__init__(own=True, remembers=True, least=LEAST_SURVIVAL, knows_domains=True)
        self.nodes: list[tuple[str, float, bool]] = []

    def accept(self, tokens: list[int], accepted: int, *, ended: bool) -> None:
        if not ended:
            found, path = self.found, self.path_of(tokens[:accepted])
            self.nodes += [
                (kind_of(cell), survival, column in path)
                for column, (cell, survival) in enumerate(zip(found.cells, found.survivals, strict=True), start=1)
            ]
        super().accept(tokens, accepted, ended=ended)


def reliability_table(files: Sequence[list[Recorded]]) -> Table:
    """Of all proposed copies, by survival and kind: how many there were, and the share that was accepted."""
    counts: defaultdict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for requests in files:
        recording = _Recording()
        replay("both", recording, requests, shared=False)
        for kind, survival, accepted in recording.nodes:
            row = counts[kind, next(i for i, bound in enumerate(_BOUNDS[1:]) if survival <= bound)]
            row[0], row[1], row[2] = row[0] + 1, row[1] + survival, row[2] + accepted
    table = Table(
        "survival", *(f"{kind}: promised / accepted (copies)" for kind in KINDS), title="reliability of copies"
    )
    for place, (low, high) in enumerate(zip(_BOUNDS, _BOUNDS[1:], strict=False)):
        cells = []
        for kind in KINDS:
            number, promised, accepted = counts[kind, place]
            cells.append(f"{promised / number:.2f} / {accepted / number:.2f} ({number:,})" if number else "–")
        table.add_row(f"{low:g}–{high:g}", *cells)
    return table
