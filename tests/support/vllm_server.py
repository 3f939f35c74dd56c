"""A real vLLM server beside which nothing or `aurora-lit vllm` runs. Needs vLLM, and half a minute to start.

with VllmServer(folder, learner=False) as server:
    server.complete("def f(")["choices"][0]["token_ids"]
    server.traces()
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from aurora_lit.bench.servers import free_port
from aurora_lit.config import PROJECT_FOLDER, load_config
from aurora_lit.drafts.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import ConfigError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatus, EngineStatusPage
from aurora_lit.ipc.ring import RingReader
from aurora_lit.ipc.run_folder import RING_NAME, live_folders
from aurora_lit.models.gguf_model import in_safetensors
from aurora_lit.models.source import find_target
from aurora_lit.traces.record import LAYOUT_DIGEST, Trace, from_bytes
from aurora_lit.vllm.deployment import VARIABLE, Deployment

SOURCE = load_config(None, []).target.source
DRAFT = PROJECT_FOLDER / "checkpoints" / "smollm2-base"
MODEL = "m"
_START_S = 400.0


class VllmServer:
    """vLLM on SmolLM2 with the shipped draft; with `beside`, started by `aurora-lit vllm`."""

    def __init__(
        self,
        folder: Path,
        *,
        beside: bool = True,
        by_hand: bool = False,
        learner: bool = False,
        settings: tuple[str, ...] = (),
        draft: Path = DRAFT,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ):
        """by_hand: vLLM is started with the command that `aurora-lit vllm --attach` prints."""
        self.folder, self.port, self._draft, self._by_hand = folder, free_port(), draft, by_hand
        self.url = f"http://127.0.0.1:{self.port}"
        self._beside, self._arguments = beside, arguments
        self._settings = (f"learn.enabled={learner}".lower(), *settings)
        self._environment = {**os.environ, "PYTHONPATH": str(PROJECT_FOLDER), **(environment or {})}
        self.log = folder / "vllm.log"
        """Of vLLM; of its last start, if by hand."""
        self.processes: list[subprocess.Popen[bytes]] = []
        """What was started and may still run."""

    def __enter__(self) -> VllmServer:
        """Start it, and wait until it answers."""
        common = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL]
        common += ["--dtype", "bfloat16", "--enforce-eager", "--gpu-memory-utilization", "0.2", *self._arguments]
        if self._beside:
            ours = ["-m", "aurora_lit", "vllm", SOURCE, "--draft", str(self._draft)]
            ours += [word for each in self._settings for word in ("--set", each)]
            command = [*ours, *(["--attach"] if self._by_hand else []), *common]
        else:
            model = in_safetensors(find_target(load_config(None, [])))
            command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
            command += [*common, "--speculative-config", self._speculation()]
        if self._by_hand:
            printed = self.folder / "attach.log"
            self._start([sys.executable, *command], printed)
            while VARIABLE not in printed.read_text():
                assert self.processes[0].poll() is None, printed.read_text()
                time.sleep(0.1)
            line = next(line for line in printed.read_text().splitlines() if VARIABLE in line)
            self._command = ["env", *shlex.split(line)]
        else:
            self._command = [sys.executable, *command]
        self.start_vllm()
        return self

    def start_vllm(self) -> None:
        """Start vLLM (also again, if by hand), and wait until it answers and, with `beside`, until ours has begun."""
        process = self._start(self._command, self.log)
        until = time.monotonic() + _START_S
        try:
            while not self._has_started():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"vLLM did not start: {self.log.read_text()[-4000:]}")
                time.sleep(0.5)
        except BaseException:  # a test that is interrupted too
            self.end()
            raise
        if self._beside:
            self.run_folder = next(folder for folder in live_folders() if self._is_ours(folder))

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.end()

    def end(self) -> list[int]:
        """End all that was started, and wait. Returns their exit codes."""
        codes = []
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                codes.append(process.wait(60))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        self.processes.clear()
        return codes

    def complete(self, prompt: str, **fields: Any) -> Any:
        """A completion, greedy unless `fields` say otherwise, with token ids."""
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 64, "return_token_ids": True}
        response = httpx.post(f"{self.url}/v1/completions", json={**body, **fields}, timeout=120)
        response.raise_for_status()
        return response.json()

    def traces(self) -> list[Trace]:
        """The traces that no one has read yet, after those of ended requests have come."""
        time.sleep(0.5)
        reader = RingReader.open(self.run_folder / RING_NAME, layout=LAYOUT_DIGEST)
        try:
            found = []
            while (payload := reader.pop()) is not None:
                found.append(from_bytes(payload))
            return found
        finally:
            reader.close()

    @property
    def status(self) -> EngineStatus:
        """The engine's status page."""
        return EngineStatusPage.open(self.run_folder / STATUS_NAME).read()

    @property
    def store(self) -> DraftStore:
        """The published versions."""
        return DraftStore(self.folder / "checkpoints" / "live", keep=5)

    def _speculation(self) -> str:
        """As `aurora-lit vllm` has it; vLLM does not know a value head."""
        folder = self.folder / "draft"
        folder.mkdir()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (folder / name).symlink_to(self._draft / name)
        return json.dumps({"method": "eagle3", "model": str(folder), "num_speculative_tokens": 3})

    def _start(self, command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
        with log_path.open("w") as log:
            self.processes.append(
                subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=self._environment)
            )
        return self.processes[-1]

    def _is_ours(self, run_folder: Path) -> bool:
        """False for the run folder of another server on this machine."""
        with contextlib.suppress(ConfigError):
            return Deployment.read(run_folder).versions == self.store.folder.resolve()
        return False

    def _has_started(self) -> bool:
        try:
            answers = httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False
        assert "aurora-lit is off" not in self.log.read_text()
        return answers and (not self._beside or "traces are made, and drafts" in self.log.read_text())
