"""The interface that the engine worker needs of an engine, and the parts that one worker consists of.

serve/worker/build.py makes the real parts; tests bring their own engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.request import Output, Request

if TYPE_CHECKING:
    from aurora_lit.modules.domains.centroids import DomainAssigner
    from aurora_lit.serve.engine.prefix_cache import PrefixCache
    from aurora_lit.serve.speculation.sources.memory import TrafficMemory


class EngineInterface(Protocol):
    """The methods of serve/engine/engine.py that the worker calls."""

    eos_token_ids: frozenset[int]
    max_seq_len: int
    vocab_size: int
    draft_version: str
    memory: TrafficMemory | None
    """None: there is none."""
    prefix_cache: PrefixCache | None
    """None: every prompt is computed in full."""
    assigner: DomainAssigner | None

    @property
    def has_work(self) -> bool: ...  # noqa: D102
    @property
    def num_running(self) -> int: ...  # noqa: D102
    @property
    def num_waiting(self) -> int: ...  # noqa: D102
    @property
    def counters(self) -> EngineCounters: ...  # noqa: D102
    def submit(self, request: Request) -> None: ...  # noqa: D102
    def cancel(self, request_id: str) -> None: ...  # noqa: D102
    def round(self) -> list[Output]: ...  # noqa: D102
    def swap_draft(self, draft: Any, *, version: str, recompute: bool = False) -> None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """What an engine worker consists of."""

    engine: EngineInterface
    load_draft: Callable[[Path | None], Any] | None = None
    """Loads a draft for `swap_draft` from a folder, or the starting draft for None; None: this engine has no draft."""
    load_domains: Callable[[Path], DomainAssigner] | None = None
    """Loads the domains that the learner has published from their file; None: this engine assigns none."""
    unrecorded: Callable[[], int] = lambda: 0
    """Number of traces so far that could not be written to trace.record."""
    before_round: Callable[[], None] = lambda: None
    """Runs before every round: takes over what the learner asks for."""
    idle_work: Callable[[], bool] = lambda: False
    """A short piece of work for when no request is there; False if there is none left."""
    close: Callable[[], None] = lambda: None
    """Runs when the worker ends: writes what is pending, stops further ranks."""
