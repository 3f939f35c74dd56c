"""What a server runs on: functions for each of its processes. Each imports what it needs when it is called.

So the main process and the HTTP process, which never call those of the engine, contain neither torch nor transformers.
Tests bring a backend of their own. Leaves out the processes (server.py, engine_process.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError, ConfigError, SourceError
from aurora_lit.ipc.process_lifetime import die_with_parent, imports_are_safe
from aurora_lit.logs import log_to_stderr
from aurora_lit.models.source import cache_root, cached, find_target
from aurora_lit.models.tokenizer import Tokenizer, is_kept, load_tokenizer
from aurora_lit.serve.learner_child import learner_command

if TYPE_CHECKING:
    from aurora_lit.serve.ranks import Shard
    from aurora_lit.serve.worker.parts import WorkerParts

START_METHOD = "spawn"
"""How processes that compute are started: in a new interpreter, so that they inherit nothing."""
_CHILD_END_S = 5.0
"""Longest wait for the end of a process whose work is done."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a server runs on. Importable functions, since they are sent to spawned processes."""

    prepare: Callable[[AuroraConfig], object]
    """Runs first, in the main process: fetches what is missing, so that errors show before processes start."""
    build_worker: Callable[[AuroraConfig, Path], WorkerParts]
    """Runs in the engine worker, with the run folder."""
    load_tokenizer: Callable[[AuroraConfig], Tokenizer]
    """Runs for the HTTP process."""
    load_shard: Callable[[AuroraConfig, Path, int], Shard] | None = None
    """Runs in the processes of ranks 1, 2, … of a sharded target, with the run folder and the rank."""
    learner_command: Callable[[Path], list[str]] = learner_command
    """The command line of the server's own learner, for a run folder."""


def real_backend() -> Backend:
    """The backend of `aurora-lit serve`."""
    return Backend(
        prepare=prepare, build_worker=build_worker, load_tokenizer=load_served_tokenizer, load_shard=load_shard
    )


def prepare(config: AuroraConfig) -> None:
    """Fetch, convert and check what is missing or cannot be known, in a process of its own, since that needs torch.

    Raises SourceError or ConfigError.
    """
    cache = cache_root()
    folder = cached(config.target.source, cache_dir=cache, sha256=config.target.sha256)
    is_plain = config.engine.strategy == "single" and config.engine.device != "cuda"
    if is_plain and folder is not None and is_kept(folder, cache_dir=cache):
        return
    context = multiprocessing.get_context(START_METHOD)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_prepare_in_child, args=(config, sending, os.getpid()))  # type: ignore[attr-defined]
    with imports_are_safe():
        process.start()
    sending.close()
    try:
        outcome = receiving.recv_bytes().decode()
    except EOFError:
        process.join()
        outcome = f"AuroraError: the target could not be prepared: its process ended with exit code {process.exitcode}"
    else:
        process.join(_CHILD_END_S)  # killed at once, it would leave a semaphore behind, which Python complains about
    finally:
        process.kill()  # also if this process was interrupted
        process.join()
    if outcome:
        kind, _, message = outcome.partition(": ")
        raise {"SourceError": SourceError, "ConfigError": ConfigError}.get(kind, AuroraError)(message)


def _prepare_in_child(config: AuroraConfig, outcome: Connection, server_pid: int) -> None:
    die_with_parent(server_pid)
    log_to_stderr()
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to the whole group
        signal.signal(number, signal.SIG_IGN)  # the main process ends this one
    from aurora_lit.serve.worker.load_models import prepare as prepare_here

    try:
        prepare_here(config)
    except AuroraError as error:
        outcome.send_bytes(f"{type(error).__name__}: {error}".encode())
    else:
        outcome.send_bytes(b"")


def load_served_tokenizer(config: AuroraConfig) -> Tokenizer:
    """The target's tokenizer; without transformers if `prepare` could keep it."""
    return load_tokenizer(find_target(config), cache_dir=cache_root())


def build_worker(config: AuroraConfig, run_folder: Path) -> WorkerParts:
    """The engine; see serve/worker/build.py."""
    from aurora_lit.serve.worker import build

    return build.build_worker(config, run_folder)


def load_shard(config: AuroraConfig, run_folder: Path, rank: int) -> Shard:
    """One rank's shard of the target; see serve/worker/load_models.py."""
    from aurora_lit.serve.worker import load_models

    return load_models.load_shard(config, run_folder, rank)
