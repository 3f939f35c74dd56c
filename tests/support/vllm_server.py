"""A real vLLM server beside which nothing or `aurora-lit vllm` runs. Needs vLLM, and half a minute to start.

with VllmServer(folder, learner=False) as server:
    server.complete("def f(")["choices"][0]["token_ids"]
    server.traces()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from aurora_lit.config import PROJECT_FOLDER, load_config
from aurora_lit.drafts.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from aurora_lit.drafts.versions import DraftStore
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatus, EngineStatusPage
from aurora_lit.ipc.ring import RingReader
from aurora_lit.ipc.run_folder import RING_NAME, live_folders
from aurora_lit.models.source import find_target
from aurora_lit.traces.record import LAYOUT_DIGEST, Trace, from_bytes
from support.fake_server import free_port

SOURCE = load_config(None, []).target.source
DRAFT = PROJECT_FOLDER / "checkpoints" / "smollm2-base"
MODEL = "m"
_START_S = 240.0


class VllmServer:
    """vLLM on SmolLM2 with the shipped draft; with `beside`, started by `aurora-lit vllm`."""

    def __init__(
        self,
        folder: Path,
        *,
        beside: bool = True,
        learner: bool = False,
        draft: Path = DRAFT,
        arguments: tuple[str, ...] = (),
    ):
        self.folder, self.port, self._draft = folder, free_port(), draft
        self.url = f"http://127.0.0.1:{self.port}"
        self._beside, self._learner, self._arguments = beside, learner, arguments

    def __enter__(self) -> VllmServer:
        """Start it, and wait until it answers."""
        common = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL]
        common += ["--dtype", "bfloat16", "--enforce-eager", "--gpu-memory-utilization", "0.2", *self._arguments]
        if self._beside:
            ours = ["-m", "aurora_lit", "vllm", SOURCE, "--draft", str(self._draft)]
            command = [*ours, "--set", f"learn.enabled={self._learner}".lower(), *common]
        else:
            command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(find_target(load_config(None, [])))]
            command += [*common, "--speculative-config", self._speculation()]
        self.log = self.folder / "vllm.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(PROJECT_FOLDER)},
            )
        until = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError(f"vLLM did not start: {self.log.read_text()[-4000:]}")
            time.sleep(0.5)
        if self._beside:
            self.run_folder = live_folders()[0]
            while "traces are made" not in self.log.read_text():
                assert "aurora-lit is off" not in self.log.read_text()
                time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

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

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False
