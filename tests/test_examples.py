"""Every script of examples/ and the README's runs: some against a server without a model, all with the real one."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, child_environment
from support.fake_server import MODEL, FakeServer

from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config

EXAMPLES = ROOT / "examples"
MAX_LINES = 40


def run(name: str, *arguments: object) -> str:
    """What a script prints; it must end well."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    env = {key: text for key, text in child_environment().items() if not key.lower().endswith("_proxy")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_example_is_short_and_has_its_line() -> None:
    text = (EXAMPLES / "README.md").read_text()
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 7
    for script in scripts:
        assert len(script.read_text().splitlines()) < MAX_LINES, script.name
        assert f"[{script.name}]({script.name}): " in text


def test_an_answer_is_streamed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By stream.py and by the README's example."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    with FakeServer() as server:
        example = example.replace("http://127.0.0.1:8000", server.url).replace("SmolLM2-135M-Instruct", MODEL)
        exec(compile(example, "README.md", "exec"), {})
        assert len(capsys.readouterr().out) > 10
        monkeypatch.setattr(sys, "argv", ["stream.py", server.url])
        runpy.run_path(str(EXAMPLES / "stream.py"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("64 tokens, ")


@pytest.mark.process
def test_learning_is_watched_while_requests_are_answered() -> None:
    with FakeServer(learner="lives") as server:
        server.wait_until(lambda now: now["learner"]["state"] == "running", 20)
        first = run("watch_it_learn.py", server.url, "--seconds", 0.5)
        second = run("watch_it_learn.py", server.url, "--seconds", 0.5)
    for shown in (first, second):
        assert shown.startswith("   10 requests  ")
        assert "learner running: " in shown


@pytest.mark.process
@pytest.mark.slow
def test_all_examples_with_the_real_model(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    settings = [
        f"server.port={free_port()}",
        f"trace.record={traces}",
        f"checkpoint.dir={tmp_path / 'drafts'}",
        "learn.enabled=false",
        "engine.max_batch_size=2",
    ]
    with running_server(load_config(None, settings), tmp_path / "log") as url:
        assert float(run("stream.py", url).split()[-3]) >= 1
        assert run("json_schema.py", url).split(":")[0] in ("book", "film", "song")
        called, said = run("tools.py", url).split("\n", 1)
        assert called.startswith('get_weather({"city": "')
        assert said.strip()
        assert " requests  " in run("watch_it_learn.py", url, "--seconds", 5)
    assert list(traces.glob("*.safetensors"))
    assert "tokens a round" in run("without_a_server.py", "engine.max_batch_size=2").splitlines()[-1]
    shown = run("replay_traces.py", traces, tmp_path / "replayed", "--steps-per-trace", 0.2)
    assert f"serve it with draft.checkpoint={tmp_path / 'replayed'}/draft" in shown
    assert "d2t" in run("export_draft.py", tmp_path / "exported", f"checkpoint.dir={tmp_path}")
