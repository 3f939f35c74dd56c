"""The server's processes: starts them, watches them, and ends them in order.

    main (this file)
        ├── engine worker, spawned first   serve/engine_process.py, serve/worker/loop.py
        ├── engine.devices - 1 more        serve/ranks.py; hold shards of the target and end with the worker
        ├── HTTP: uvicorn, forked          serve/api.py, serve/http/spec.py; once the engine is ready
        └── learner, with learn.enabled    serve/learner_child.py; once /ready answers; the others continue without it

While the engine loads, this process imports what the HTTP process will need, and neither torch nor transformers.

SIGTERM, Ctrl-C or a closed terminal: no new connections; running requests get server.drain_s seconds; then everything
ends. If the worker dies, /health answers 503, its clients get an error, and after WORKER_GRACE_S the whole server ends
with an error. If the HTTP process dies, the server ends at once. Restarting it is left to a service manager. However
the main process ends, its children end with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import http.client
import logging
import os
import resource
import signal
import socket
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from aurora_lit.config import AuroraConfig, draft_folder, model_name, shows_page, to_yaml, versions_folder
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, RankStatusPage, WorkerState, rank_path
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.messages import WorkerChannel
from aurora_lit.ipc.process_lifetime import (
    ENDING,
    forbid_core_dumps,
    handle_ending,
    tie_forked_children_to_parent,
)
from aurora_lit.ipc.run_folder import CONFIG_NAME, run_folder
from aurora_lit.models.source import with_fixed_target
from aurora_lit.serve.backend import Backend, real_backend
from aurora_lit.serve.engine_process import start_engine_processes
from aurora_lit.serve.learner_child import LearnerChild
from aurora_lit.serve.ranks import RankWatch

if TYPE_CHECKING:
    from aurora_lit.serve.api import AuroraServer  # imports LitServe, which waits until the worker is started

WORKER_GRACE_S = 1.0
"""How long a server without a worker still answers /health and its clients."""
_OPEN_FILES = 65_535
"""Open files at most, as vLLM and SGLang allow: one for each connection."""
_WRITE_S = 5.0
"""How long an engine process may take to end after the HTTP process has ended."""
_log = logging.getLogger(__name__)


def serve(config: AuroraConfig, *, backend: Backend | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises AuroraError if the server cannot start or the engine worker dies."""
    backend = real_backend() if backend is None else backend
    _allow_open_files()
    forbid_core_dumps()
    check_address(config.server.host, config.server.port)
    if config.server.host != "127.0.0.1" and config.server.api_key is None:
        _log.warning("server.host=%s is open to everyone; set server.api_key, or 127.0.0.1", config.server.host)
    if (most := config.server.max_queue) < (slots := config.engine.max_batch_size):
        _log.warning("server.max_queue=%d lets only so many of engine.max_batch_size=%d run; raise it", most, slots)
    check_learning(config)
    backend.prepare(config)
    config = with_fixed_target(config)
    with run_folder() as folder:
        status = EngineStatusPage.create(folder / STATUS_NAME)
        learner = LearnerChild(backend.learner_command(folder), LearnerStatusPage.create(folder / LEARNER_STATUS_NAME))
        for rank in range(1, config.engine.devices):
            RankStatusPage.create(rank_path(folder, rank))
        (folder / CONFIG_NAME).write_text(to_yaml(settings_for_learner(config)), encoding="utf-8")
        workers: list[BaseProcess] = []
        http_end, worker_end = socket.socketpair()
        ours = http_end.dup()  # stays open when LitServe closes the other
        try:
            handle_ending(_interrupt)
            workers += start_engine_processes(config, backend, folder, WorkerChannel(worker_end))
            worker_end.close()  # so that the HTTP process sees the end of the worker
            tie_forked_children_to_parent()
            server = _build(config, backend, folder, workers, http_end, status)
            _run(server, config, status, folder, learner if config.learn.enabled else None)
        except KeyboardInterrupt:  # while the model loads; later LitServe itself catches it
            pass
        finally:
            # Then the engine worker ends by itself, and first writes what it records.
            with contextlib.suppress(OSError):  # the worker has ended
                ours.shutdown(socket.SHUT_RDWR)
            ours.close()
            ends = time.monotonic() + (_WRITE_S if status.read().state is WorkerState.READY else 0.0)
            for worker in workers:
                worker.join(max(0.0, ends - time.monotonic()))
                if worker.is_alive():
                    worker.kill()
                    worker.join()
            learner.end()
            gc.freeze()  # the collection at interpreter exit would take seconds on a busy machine
    final = status.read()
    if final.state is WorkerState.FAILED:
        raise AuroraError(f"the server failed: {final.error}")


def _allow_open_files() -> None:
    """As many connections as this user may open; shells and service managers set a lower limit to begin with."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def check_learning(config: AuroraConfig) -> None:
    """Raise ConfigError if a learner is asked for whose drafts could never be published or served."""
    if not config.learn.enabled:
        return
    remedy = None
    if not config.engine.speculate:
        remedy = "set engine.speculate=true, or learn.enabled=false"
    elif config.draft.checkpoint is None and not config.learn.from_scratch:
        remedy = "name a draft.checkpoint to begin with, or set learn.from_scratch=true or learn.enabled=false"
    if remedy is not None:
        raise ConfigError(f"learn.enabled=true needs a draft that is used; {remedy}")
    folder = versions_folder(config)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"checkpoint.dir={config.checkpoint.dir}: {existing} is no folder that can be written to; name another, "
            "or set learn.enabled=false"
        )


def settings_for_learner(config: AuroraConfig) -> AuroraConfig:
    """The settings with absolute paths, so that they hold in any folder, and without the API key."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve())

    target, draft = config.target, draft_folder(config)
    return dataclasses.replace(
        config,
        target=dataclasses.replace(
            target,
            source=absolute(target.source) if Path(target.source).expanduser().is_dir() else target.source,
        ),
        draft=dataclasses.replace(config.draft, checkpoint=None if draft is None else absolute(str(draft))),
        checkpoint=dataclasses.replace(config.checkpoint, dir=absolute(config.checkpoint.dir)),
        server=dataclasses.replace(config.server, api_key=None),
    )


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if this address cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "end the program that uses it, or choose another with server.port=NUMBER"
        else:  # such as IPv6 that is switched off
            remedy = "choose another server.host, such as 127.0.0.1, or another server.port"
        raise ConfigError(f"server.port={port} on {host} cannot be used ({error.strerror}); {remedy}") from error


def _build(
    config: AuroraConfig,
    backend: Backend,
    folder: Path,
    workers: list[BaseProcess],
    http_end: socket.socket,
    status: EngineStatusPage,
) -> AuroraServer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warns at every fork
    from aurora_lit.serve.api import AuroraServer
    from aurora_lit.serve.http.channel import HTTPChannel

    return AuroraServer(
        config,
        backend.load_tokenizer(config),
        folder,
        workers=workers,
        channel=HTTPChannel(http_end),
        status=status,
    )


def _run(
    server: AuroraServer, config: AuroraConfig, status: EngineStatusPage, folder: Path, learner: LearnerChild | None
) -> None:
    from aurora_lit.serve.http.connection import LimitedConnection

    has_stopped = threading.Event()  # set before the workers that still run are killed, which is then no loss of one
    threading.Thread(target=_announce_when_ready, args=(config, status, learner), daemon=True).start()
    watch_args = (server, status, folder, has_stopped)
    threading.Thread(target=_end_when_a_child_ends, args=watch_args, daemon=True).start()
    try:
        server.run(
            host=config.server.host,
            port=config.server.port,
            num_api_servers=1,
            log_level="warning",
            log_config=None,  # uvicorn has no log of its own, and no time in it (logs.py)
            generate_client_file=False,
            access_log=False,
            http=LimitedConnection,
            proxy_headers=False,  # or any client on loopback could take another's address, by which they are told apart
        )
    except RuntimeError as error:
        raise AuroraError(f"the engine could not be built: {status.read().error or error}") from error
    finally:
        has_stopped.set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, on which LitServe drains; further signals are ignored, so they cannot interrupt that."""
    for again in ENDING:
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


def _announce_when_ready(config: AuroraConfig, status: EngineStatusPage, learner: LearnerChild | None) -> None:
    """Once /ready answers 200, start the learner, which takes processor time, and print the URL."""
    # A machine without ::1 may still have "::".
    hosts = {"0.0.0.0": ["127.0.0.1"], "::": ["::1", "127.0.0.1"]}.get(config.server.host, [config.server.host])
    while status.read().state is WorkerState.STARTING or not any(
        _answers_ready(host, config.server.port) for host in hosts
    ):
        if status.read().state is WorkerState.FAILED:
            return
        time.sleep(0.05)
    shown = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    url = f"http://{shown}:{config.server.port}"
    page = f"; watch it at {url}/" if shows_page(config) else ""
    if learner is not None:
        learner.start()  # before the line below, which a full disk or a closed pipe refuses
    with contextlib.suppress(OSError):
        print(f"aurora-lit serves {model_name(config)} on {url}/v1{page}", flush=True)


def _answers_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _is_shutting_down() -> bool:
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def _end_when_a_child_ends(
    server: AuroraServer, status: EngineStatusPage, folder: Path, has_stopped: threading.Event
) -> None:
    """End the server as SIGTERM would, if an engine worker or the HTTP process ends, or a rank's heartbeat stops.

    After the loss of a worker, clients and health checks get WORKER_GRACE_S to be answered.
    """
    watch = RankWatch(server.inference_workers, status, folder)
    ready = False
    while not _is_shutting_down():
        loss = watch.poll()
        if has_stopped.is_set():
            return
        now = status.read()
        ready = ready or now.started_ns != 0  # written once the engine is built, and not taken back
        if now.state is WorkerState.FAILED and not ready:
            return  # the engine could not be built, which the main thread notices
        if _is_shutting_down() and loss is None:
            return
        http_ended = wait([process.sentinel for process in server.http_processes], timeout=0)
        if loss is not None or http_ended:
            break
    else:
        return
    watch.kill()  # the remaining ranks cannot do anything alone
    error = loss or "the HTTP process ended"
    _log.error("%s; the server ends", error)
    status.write(state=WorkerState.FAILED, error=error)
    if loss is not None and ready:
        time.sleep(WORKER_GRACE_S)
    os.kill(os.getpid(), signal.SIGTERM)
