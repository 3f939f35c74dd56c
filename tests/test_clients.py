"""Programs of docs/clients.md run with the newest version of their package, each in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from aurora_lit.config import load_config
from benchmarks.load import free_port, running_server


def example(section: str) -> str:
    """The Python block of a section of docs/clients.md."""
    text = (ROOT / "docs" / "clients.md").read_text().split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return str(block)


def run(program: str, package: str, folder: Path) -> str:
    """What a program prints in an environment with the package; it must end well."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.lower().endswith("_proxy")}
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True, env=dict(os.environ))
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the real model."""
    folder = tmp_path_factory.mktemp("server")
    settings = [f"server.port={free_port()}", "learn.enabled=false", f"checkpoint.dir={folder}"]
    with running_server(load_config(None, settings), folder / "log") as url:
        yield url


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("package", "printed"),
    [
        ("langchain-openai", r"(?s).{20}"),
        ("instructor", r"(name='.*' age=\d+\n){2}"),
        ("pydantic-ai-slim[openai]", r"city='.*' degrees=-?\d+\n.+"),
    ],
)
def test_a_client_runs_unmodified(package: str, printed: str, server: str, tmp_path: Path) -> None:
    section = package.partition("-slim")[0]
    shown = run(example(section).replace("http://127.0.0.1:8000", server), package, tmp_path)
    assert re.match(printed, shown), shown
