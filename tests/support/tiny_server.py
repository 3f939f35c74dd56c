"""Real servers with real learners on a tiny model, started in a fraction of a second.

Nothing is faked but the waiting: servers are forked from a process that has imported everything (fork_host.py), and
they fork their worker and their learner likewise, where real ones would start a new interpreter. `_patch` lists what is
patched for that, and which waits are shorter. Learners keep their priority, since on a busy machine a learner of low
priority would not learn within a test.

    with TinyServers(folder) as servers:
        server = servers.start()                 # `aurora-lit serve learn.enabled=true ...`; not yet ready
        servers.wait_ready()
        os.kill(server, signal.SIGKILL)

In `folder`: shm/ (in place of /dev/shm), tmp/ (temporary files), checkpoints/, log, used (what was learned from, a line
of JSON per trace).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aurora_lit.bench.servers import free_port
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatus, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatus, LearnerStatusPage
from aurora_lit.models.loading import load_target
from support.fork_host import ForkedProcess, fork, fork_engine_workers
from support.tiny_models import random_draft, save_model

MODEL = "tiny"


_CHARACTERS = [
    *map(chr, range(33, 127)),
    "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
    "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}",
    "\N{INVERTED EXCLAMATION MARK}",
]
"""Of the vocabulary, as byte-level BPE writes them: two of them are space and line break."""


def text_of(ids: list[int]) -> str:
    """Every token is one character."""
    return "".join(_CHARACTERS[i] for i in ids)


class TinyServers:
    """One deployment, whose server is started again and again; all its processes end with this one."""

    def __init__(self, folder: Path, *, chat_template: str | None = None, **model: Any) -> None:
        """model: what the target has otherwise than tiny_models.py says."""
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for name in ("shm", "tmp"):
            (folder / name).mkdir()
        self.target = load_target(save_model("llama", folder / "target", seed=3, **model), precision="fp32")
        vocabulary = {text_of([i]): i for i in range(self.target.vocab_size)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokens = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)
        tokens.save_pretrained(folder / "target")
        save_draft(random_draft(self.target), folder / "start", dtype=torch.float32)
        self.store = DraftStore(folder / "checkpoints" / "live")
        self.constants: dict[str, Any] = {
            "aurora_lit.learn.online.build.BATCH_POSITIONS": 256,
            "aurora_lit.learn.online.intake.MAX_REPEATED_SHARE": 1.0,
            "aurora_lit.learn.online.loop.SAVE_EVERY_S": 0.2,
        }
        """Of modules, for the servers that are started from now on."""
        self._processes: list[ForkedProcess] = []

    @property
    def _command(self) -> list[str]:
        learn = {
            "enabled": "true",
            "compute_share": 1.0,
            "learning_rate": 4e-3,
            "publish_every_s": 0.3,
            "publish_every_steps": 2,
            "gate_requests": 8,
            "reservoir_mb": 4,
        }
        engine = {
            "max_seq_len": 128,
            "max_draft_tokens": 3,
            "adaptive": "false",
            "lookup": "false",
            "threads": 1,
        }
        return [
            "serve",
            f"target.source={self.folder / 'target'}",
            "target.precision=fp32",
            f"server.port={self.port}",
            f"server.model_name={MODEL}",
            f"draft.checkpoint={self.folder / 'start'}",
            "trace.capacity_mb=1",
            f"checkpoint.dir={self.store.folder.parent}",
            *(f"learn.{key}={value}" for key, value in learn.items()),
            *(f"engine.{key}={value}" for key, value in engine.items()),
        ]

    def __enter__(self) -> TinyServers:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def kill_all(self) -> None:
        """Kill what still runs, so that a test that failed leaves nothing to the next one."""
        families = [pid for process in self._processes for pid in self.family(process.pid)]
        for process in self._processes:
            process.kill()  # the other processes of a server die with its main process
        self._processes.clear()
        self.wait(lambda: not any(map(self.alive, families)))
        for folder in self.run_folders:
            shutil.rmtree(folder)

    def start(self, *overrides: str) -> int:
        """Start a server; its process id."""
        return self.run(*self._command, *overrides)

    def run(self, *command: str) -> int:
        """Start any `aurora-lit` command; its process id."""
        process = fork(
            "support.tiny_server",
            "run_forked",
            [str(self.folder), self.constants, list(command)],
            stdout=self.folder / "log",
            stderr=self.folder / "log",
            environment={"TMPDIR": str(self.folder / "tmp")},
        )
        self._processes.append(process)
        return process.pid

    def status(self) -> dict[str, Any]:
        """What the server says of itself."""
        return dict(httpx.get(f"{self.url}/v1/aurora/status", timeout=20, verify=False).json())

    @property
    def log(self) -> str:
        """What all of them have printed, the end of it."""
        return (self.folder / "log").read_text(errors="replace")[-6000:]

    @property
    def run_folders(self) -> list[Path]:
        return sorted((self.folder / "shm").iterdir())

    def learner(self) -> LearnerStatus | None:
        """The page of the running server's learner; None when there is no server."""
        try:
            (folder,) = self.run_folders
            return LearnerStatusPage.open(folder / LEARNER_STATUS_NAME).read()
        except (OSError, ValueError):
            return None

    def worker(self) -> EngineStatus | None:
        """The engine worker's page."""
        try:
            (folder,) = self.run_folders
            return EngineStatusPage.open(folder / STATUS_NAME).read()
        except (OSError, ValueError):
            return None

    def wait(self, until: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """Until something is true; what it returned then."""
        end = time.monotonic() + timeout_s
        while not (value := until()):
            assert time.monotonic() < end, f"it does not come: {self.learner()}\n{self.worker()}\n{self.log}"
            time.sleep(0.01)
        return value

    def wait_ready(self) -> None:
        """Until the server takes requests."""
        self.wait(self.is_ready)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=10, verify=False).status_code == 200
        except httpx.HTTPError:
            return False

    def alive(self, pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def family(self, server: int) -> list[int]:
        """The processes of a server, itself included."""
        try:
            return [server, *(child.pid for child in psutil.Process(server).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []


# -- in the forked processes ---------------------------------------------------------------------------------------


class ForkedCommand:
    """As much of subprocess.Popen as a server's own learner needs; runs `python -m aurora_lit …` in a fork."""

    def __init__(self, command: list[str], **_: object) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_command(command[3:])

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 0)
        while timeout is not None and self._reap(os.WNOHANG) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("learn", timeout)
            time.sleep(0.01)
        code = self._reap(0)
        assert code is not None
        return code

    def _reap(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def run_forked(folder: str, constants: dict[str, Any], arguments: list[str]) -> None:
    """Run an `aurora-lit` command of the deployment in `folder`; does not return."""
    _patch(Path(folder), constants)
    _run_command(arguments)


def _run_command(arguments: list[str]) -> None:
    """Does not return; prints the exit code to the log."""
    from aurora_lit.cli.main import main

    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        main(arguments, prog_name="aurora-lit")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        print(f"process {os.getpid()} ended with exit code {code}", file=sys.stderr, flush=True)
        os._exit(code)


def _patch(folder: Path, constants: dict[str, Any]) -> None:
    """Let this process and its children keep their files in `folder`, fork instead of spawn, and wait less."""
    from aurora_lit.ipc import learner_status, run_folder
    from aurora_lit.learn.online import loop, process
    from aurora_lit.serve import learner_child, server
    from aurora_lit.traces.record import Trace, from_bytes

    def from_bytes_noted(payload: bytes) -> Trace:
        trace = from_bytes(payload)
        used = {"id": trace.request_id, "first": trace.first_position, "ids": trace.token_ids_T.tolist()}
        descriptor = os.open(folder / "used", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, json.dumps(used).encode() + b"\n")
        os.close(descriptor)
        return trace

    fork_engine_workers()
    run_folder.default_parent = lambda: folder / "shm"
    learner_child.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedCommand, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    learner_child.RESTART_AFTER_S = (0.05,) * 100
    server.WORKER_GRACE_S = 0.5
    learner_status.STALLED_AFTER_S = 3.0
    process._lower_priority = lambda *_: None
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    loop.from_bytes = from_bytes_noted
