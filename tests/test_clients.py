"""Programs of docs/clients.md run with the newest version of their package, each in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.fake_server import MODEL, FakeServer


def example(section: str) -> str:
    """The Python block of a section of docs/clients.md."""
    text = (ROOT / "docs" / "clients.md").read_text().split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("section", "package"), [("langchain-openai", "langchain-openai")])
def test_a_client_runs_unmodified(section: str, package: str, tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.lower().endswith("_proxy")}
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True, env=dict(os.environ))
    with FakeServer() as server:
        program = example(section).replace("http://127.0.0.1:8000", server.url).replace("SmolLM2-135M-Instruct", MODEL)
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
