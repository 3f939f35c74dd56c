"""Ratios of ours to each peer, with quartiles over the repeats: a table, and JSON with all that was measured.

A *pair* is one visit to a peer: its server and ours, one after the other, under the same loads. Ratios are taken inside
a pair only, so that the machine's drift over minutes is in both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from aurora_lit.bench.prompts import Spread

from .client import Load

RATIOS = ("tokens_per_s", "first_token_s", "token_s", "pause_p50_s", "pause_p99_s")
"""Fields of Load; for the first, more than 1 is in our favour, for the others, less."""
OF_SERVER = ("first_answer_s", "memory_mb")
"""Fields of Visit; less than 1 is in our favour."""
_ALL = (*RATIOS, *OF_SERVER)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What one server's life gave."""

    loads: dict[int, Load]
    """By the number of clients."""
    first_answer_s: float
    """From the server's start to the end of an answer of one token, its model in the page cache."""
    memory_mb: float
    """Of all its processes after all loads, shared pages by halves (PSS)."""

    def values(self, clients: int) -> dict[str, float]:
        """All that is compared."""
        of_load = {key: getattr(self.loads[clients], key) for key in RATIOS}
        return of_load | {key: getattr(self, key) for key in OF_SERVER}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What one visit to a peer gave."""

    repeat: int
    peer: str
    ours: Visit
    theirs: Visit

    def to_json(self) -> dict[str, Any]:
        """As one line of the results."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Pair:
        """What to_json wrote."""
        sides = {
            side: Visit(**fields[side] | {"loads": {int(c): Load(**load) for c, load in fields[side]["loads"].items()}})
            for side in ("ours", "theirs")
        }
        return Pair(repeat=fields["repeat"], peer=fields["peer"], **sides)


def summarise(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One record a peer and number of clients, in the order in which they first came."""
    rows = []
    for peer in dict.fromkeys(pair.peer for pair in pairs):
        mine = [pair for pair in pairs if pair.peer == peer]
        for clients in mine[0].theirs.loads:
            both = [(pair.ours.loads[clients], pair.theirs.loads[clients]) for pair in mine]
            values = [(pair.ours.values(clients), pair.theirs.values(clients)) for pair in mine]
            rows.append(
                {
                    "peer": peer,
                    "clients": clients,
                    "repeats": len(both),
                    "ours": {key: statistics.median(ours[key] for ours, _ in values) for key in _ALL},
                    "theirs": {key: statistics.median(theirs[key] for _, theirs in values) for key in _ALL},
                    "ratios": {
                        key: asdict(Spread.of([ours[key] / theirs[key] for ours, theirs in values])) for key in _ALL
                    },
                    "same_answers": _same_share(both),
                }
            )
    return rows


def _same_share(both: Sequence[tuple[Load, Load]]) -> float:
    """The share of answers whose text is that of ours; other sums in the peer make other answers now and then."""
    same = [mine == their for ours, theirs in both for mine, their in zip(ours.texts, theirs.texts, strict=True)]
    return sum(same) / len(same)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ours over theirs: tokens/s above 1 and times below 1 are in our favour."""
    shown = Table(title="ours / peer: median (quartiles)")
    for column in (
        "peer",
        "clients",
        "peer tokens/s",
        "our tokens/s",
        "tokens/s",
        "first token",
        "per token",
        "pause p50",
        "pause p99",
        "first answer",
        "memory",
        "same answers",
    ):
        shown.add_column(column, justify="left" if column == "peer" else "right")
    for row in rows:
        ratios = [str(Spread(**row["ratios"][key])) for key in _ALL]
        speeds = [f"{row[side]['tokens_per_s']:.1f}" for side in ("theirs", "ours")]
        shown.add_row(row["peer"], str(row["clients"]), *speeds, *ratios, f"{row['same_answers']:.0%}")
    return shown
