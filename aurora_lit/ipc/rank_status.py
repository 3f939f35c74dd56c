"""A page for each process that holds a part of the target and does not run the engine (ranks 1, 2, …).

The server creates the pages in its run folder, each rank writes its own, and the server and HTTP routes read them.
Rank 0's page is ipc/engine_status.py. Leaves out who ends the server when a rank falls silent (serve/ranks.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aurora_lit.ipc.page import Page, text

_PREFIX = "rank-"


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One consistent reading of the page."""

    heartbeat_ns: int
    """time.monotonic_ns() of its last sign of life; 0 before the first."""
    pid: int
    """0 before it came up."""
    orders: int
    """What rank 0 has had it do so far."""
    num_versions: int
    """Drafts that rank 0 has announced; an order that counts otherwise is refused."""
    draft_version: str = text(256)
    """The draft that proposes."""
    error: str = text(1024)
    """Why it gave up; empty while it has not."""


class RankBlock(Page[RankStatus]):
    """The page of one rank."""

    kind = RankStatus


def rank_path(run_folder: Path, rank: int) -> Path:
    """Where a rank's page lies."""
    return run_folder / f"{_PREFIX}{rank}.status"


def read_ranks(run_folder: Path) -> dict[int, RankStatus]:
    """All pages of a server by rank; none where the target is whole."""
    paths = run_folder.glob(f"{_PREFIX}*.status")
    numbers = sorted(int(path.stem.removeprefix(_PREFIX)) for path in paths)
    return {rank: RankBlock.open(rank_path(run_folder, rank)).read() for rank in numbers}
