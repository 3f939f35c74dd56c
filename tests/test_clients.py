"""Programs of docs/clients.md run with the newest version of their package, each in an environment of its own.

The environments are made while the server starts: their packages are downloaded meanwhile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config

Installation = tuple[Path, subprocess.Popen[bytes]]
PRINTED = {
    "langchain-openai": r"(?s).{20}",
    "instructor": r"(name='.*' age=\d+\n){2}",
    "pydantic-ai-slim[openai]": r"city='.*' degrees=-?\d+\n.+",
}
"""What the program of each package prints."""


def example(section: str) -> str:
    """The Python block of a section of docs/clients.md."""
    text = (ROOT / "docs" / "clients.md").read_text().split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Installation]]:
    """By package: the Python of its environment, into which this environment's pip still installs it."""
    installations = {}
    for package in PRINTED:
        venv = tmp_path_factory.mktemp("client") / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(venv), "install", "--quiet", "--no-compile", package]
        installations[package] = (venv / "bin" / "python", subprocess.Popen(pip))
    yield installations
    for _, process in installations.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(installed: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the real model."""
    folder = tmp_path_factory.mktemp("server")
    settings = [f"server.port={free_port()}", "learn.enabled=false", "engine.max_batch_size=2"]
    with running_server(load_config(None, [*settings, f"checkpoint.dir={folder}"]), folder / "log") as url:
        yield url


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("package", PRINTED)
def test_a_client_runs_unmodified(package: str, server: str, installed: dict[str, Installation]) -> None:
    python, installation = installed[package]
    assert installation.wait() == 0
    program = example(package.partition("-slim")[0]).replace("http://127.0.0.1:8000", server)
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.lower().endswith("_proxy")}
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert re.match(PRINTED[package], done.stdout), done.stdout
