"""Follows the published drafts beside vLLM's API server: validates a new one, and has all ranks swap it in.

Runs as a task of the API server's event loop; validation runs in a thread. A version that cannot be served is refused
with a reason before the engine hears of it. One that accepts less in its trial (live_status.py judges, and writes it on
the status page), or that a rank cannot load, is retired, and all ranks go back to the version before. If there are
several API servers of the same engines, one follows. While vLLM sleeps, swaps wait: the weights have no memory then,
and writing to them would end the engine.

    follower = DraftFollower(deployment, engine_client)
    await follower.run()                    # until it is cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.drafts.hot_reload import HotReloader, ReadyDraft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.vllm.deployment import Deployment

LOOK_EVERY_S = 0.1
_STALE_S = 10.0
"""An engine whose heartbeat is older has ended, or makes no traces."""
_RETRY_S = 1.0
_LOCK_NAME = "follower.lock"
_log = logging.getLogger("vllm.aurora_lit")


class EngineClient(Protocol):
    """What is used of vLLM's class of this name (vllm/engine/protocol.py)."""

    vllm_config: Any

    async def collective_rpc(self, method: str, timeout: float | None, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        """Call a method of every rank's worker."""

    async def is_sleeping(self) -> bool:
        """True while any part of the engine's memory is released, or its scheduler is paused."""


class DraftFollower:
    """See the file's example."""

    def __init__(self, deployment: Deployment, engine: EngineClient) -> None:
        """engine: how the ranks are reached."""
        self._deployment, self._engine = deployment, engine
        self._engines = _engines_of(engine)
        self._starting = read_config(deployment.starting_draft)
        store = DraftStore(deployment.versions)
        self._reloader = HotReloader(store, self._validated)
        self._served: str | None = None
        self._last_good = deployment.starting_draft
        """Folder of the last draft that all ranks have loaded."""
        self._pages: dict[Path, EngineStatusPage] = {}
        self._seen_rollbacks: dict[Path, int] = {}
        self._noted_refusals = 0

    async def run(self) -> None:
        """Start capture, then keep the served draft equal to the current version."""
        suffix = "" if self._engines is None else f"-{self._engines.start}"
        for attempt in itertools.count():
            with _lock(self._deployment.run_folder / f"{_LOCK_NAME}{suffix}") as is_held:
                if is_held:
                    await self._follow()
                    return
            if attempt == 0:
                _log.warning(
                    "aurora-lit: another API server of this run folder swaps the drafts; if it is of another vLLM, no "
                    "draft is swapped in this one: give it its own `aurora-lit vllm --attach`, with a checkpoint.run "
                    "of its own"
                )
            await asyncio.sleep(_RETRY_S)

    async def _follow(self) -> None:
        arguments = (str(self._deployment.run_folder),)
        reason = _error(await self._engine.collective_rpc("aurora_lit_start", None, arguments))
        if reason is not None:
            _log.warning("aurora-lit: no traces are made and no drafts are swapped: %s; serving is unaffected", reason)
            return
        self._seen_rollbacks = {path: page.peek("rollbacks") for path, page in self._status_pages()}
        first = await asyncio.to_thread(self._reloader.first)
        if first is not None:
            await self._until_awake()
            await self._swap(first)
        self._reloader.start(on_change=lambda: None)
        _log.warning("aurora-lit: traces are made, and drafts of %s are served", self._deployment.versions)
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                if self._reloader.is_ready:
                    await self._until_awake()
                    ready = self._reloader.poll()  # the newest, after a long sleep
                    assert ready is not None
                    await self._swap(ready)
                self._roll_back_if_worse()
                await self._note_refusals()
        finally:
            await asyncio.shield(asyncio.to_thread(self._reloader.close))

    async def _until_awake(self) -> None:
        """Wait while vLLM sleeps."""
        while True:
            try:
                if not await self._engine.is_sleeping():
                    return
            except RuntimeError:  # one of several engines sleeps and another does not, so some go or wake up
                pass
            await asyncio.sleep(LOOK_EVERY_S)

    async def _swap(self, ready: ReadyDraft) -> None:
        before, version = self._name(self._served), self._name(ready.version)
        followed = [path for path, page in self._status_pages() if page.read().draft_version == before]
        arguments = (str(ready.draft), version, ready.trusted, str(self._last_good))
        results = await self._engine.collective_rpc("aurora_lit_swap", None, arguments)
        reason = _error(results) or self._left_behind(version, followed)
        self._served = ready.version
        if reason is not None:
            _log.warning("aurora-lit: draft %s could not be loaded: %s", version, reason)
            if ready.version is not None:
                self._reloader.roll_back(bad=ready.version, reason=f"vLLM could not load it: {reason}")
        else:
            self._last_good = ready.draft
            slowest_s = max(result["seconds"] for result in results)
            _log.warning("aurora-lit: draft %s is served (swapped in %.0f ms)", version, 1e3 * slowest_s)

    def _roll_back_if_worse(self) -> None:
        for path, page in self._status_pages():
            rollbacks = page.peek("rollbacks")
            if rollbacks > self._seen_rollbacks.get(path, 0):
                now = page.read()
                if now.rolled_back_version == self._served:
                    self._reloader.roll_back(bad=self._served, reason=now.rolled_back_reason)
            self._seen_rollbacks[path] = rollbacks

    def _name(self, version: str | None) -> str:
        return version or self._deployment.starting_draft.name

    def _left_behind(self, version: str, followed: list[Path]) -> str | None:
        """Which data-parallel engine that had followed so far does not serve a version.

        A call returns the answers of the first engine only. One that did not follow, since it has no recorder or is of
        another start, says nothing about a version.
        """
        for path in followed:
            now = self._pages[path].read()
            if now.heartbeat_age_s < _STALE_S and now.draft_version != version:
                return f"the engine of {path.name} still serves {now.draft_version}; its log says why"
        return None

    def _status_pages(self) -> Iterator[tuple[Path, EngineStatusPage]]:
        """Of each engine that is reached."""
        paths = self._deployment.run_folder.glob(f"{STATUS_NAME}*")
        if self._engines is not None:
            reached = {self._deployment.status_path(engine) for engine in self._engines}
            paths = (path for path in paths if path in reached)
        for path in paths:
            yield path, self._pages.get(path) or self._pages.setdefault(path, EngineStatusPage.open(path))

    async def _note_refusals(self) -> None:
        refused, number = self._reloader.refused, self._reloader.num_refused
        if refused is not None and number != self._noted_refusals:
            self._noted_refusals = number
            note = {"refusals": number, "refused_version": refused.version, "refused_reason": refused.reason}
            await self._engine.collective_rpc("aurora_lit_note", None, (note,))

    def _validated(self, folder: Path | None) -> Path:
        """The folder of a draft that this engine can load. Raises CheckpointError with the reason if it cannot."""
        if folder is None:
            return self._deployment.starting_draft
        self._deployment.check_shape(folder)
        load_draft(folder, self._starting)
        return folder


def _engines_of(engine: EngineClient) -> range | None:
    """The data-parallel engines that a client reaches; None: all.

    With an external or hybrid load balancer these are its server's own (vllm/v1/engine/core_client.py, MPClient).
    """
    parallel = engine.vllm_config.parallel_config
    if not parallel.local_engines_only:
        return None
    first = parallel.data_parallel_index
    return range(first, first + parallel.data_parallel_size_local)


def _error(results: list[dict[str, Any]]) -> str | None:
    return next((str(result["error"]) for result in results if result["error"] is not None), None)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """True while this process holds the lock; the kernel frees it when the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


async def follow(deployment: Deployment, engine: EngineClient) -> None:
    """Run a follower; an error ends it with one line, never the server."""
    try:
        await DraftFollower(deployment, engine).run()
    except AuroraError as error:
        _log.warning("aurora-lit is off: %s; serving is unaffected", error)
    except Exception:
        _log.exception("aurora-lit is off; serving is unaffected")
