"""Ratios of our server to each peer's, with quartiles over the repeats: a table, and JSON with all measurements.

A *pair* is one run of a peer's server and one of ours, one after the other, under the same loads. Ratios are computed
within a pair only, so that both sides are affected alike by the machine's drift over minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from aurora_lit.bench.reporting import Spread

from .client import Load

RATIOS = ("tokens_per_s", "first_token_s", "token_s", "pause_p50_s", "pause_p99_s")
"""Fields of Load. For the first, a ratio above 1 is in our favour; for the others, below 1."""
OF_SERVER = ("first_answer_s", "memory_mb")
"""Fields of ServerRun; a ratio below 1 is in our favour."""
_ALL = (*RATIOS, *OF_SERVER)


@dataclass(frozen=True, kw_only=True)
class ServerRun:
    """The measurements of one run of a server."""

    loads: dict[int, Load]
    """By the number of clients."""
    first_answer_s: float
    """From the server's start to the end of an answer of one token; its model is in the page cache."""
    memory_mb: float
    """Of all its processes after all loads, in MB; shared pages are divided among their users (PSS)."""

    def values(self, clients: int) -> dict[str, float]:
        """All compared quantities, by name."""
        of_load = {key: getattr(self.loads[clients], key) for key in RATIOS}
        return of_load | {key: getattr(self, key) for key in OF_SERVER}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One run of our server and one of a peer's."""

    repeat: int
    peer: str
    ours: ServerRun
    theirs: ServerRun

    def to_json(self) -> dict[str, Any]:
        """For one line of the results."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Pair:
        """Read what to_json wrote."""
        sides = {
            side: ServerRun(
                **fields[side] | {"loads": {int(c): Load(**load) for c, load in fields[side]["loads"].items()}}
            )
            for side in ("ours", "theirs")
        }
        return Pair(repeat=fields["repeat"], peer=fields["peer"], **sides)


def summarise(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One record for each peer and number of clients, in the order of the pairs."""
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
    """The share of answers with the same text as ours; the peers sum in another order, so some texts differ."""
    same = [mine == their for ours, theirs in both for mine, their in zip(ours.texts, theirs.texts, strict=True)]
    return sum(same) / len(same)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A table of ours / theirs: tokens/s above 1 and times below 1 are in our favour."""
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
