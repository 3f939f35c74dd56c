"""The README and the documents: commands can be typed, names exist, and every metric is described."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
import yaml
from click.testing import CliRunner
from support import ROOT

import aurora_lit
from aurora_lit.cli.main import main
from aurora_lit.config import load_config
from aurora_lit.kernels import native
from aurora_lit.settings import AuroraConfig

if TYPE_CHECKING:
    from aurora_lit.models.interface import Target

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
METRICS = ROOT / "docs" / "metrics.md"
MAX_README_WORDS = 900


def blocks(path: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == kind]


def shell_commands(path: Path) -> Iterator[list[str]]:
    """The words of every command in a document's shell blocks, without variables that are set before it."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if "{" in line or "'" in line and line.count("'") % 2:  # the JSON body of a request
                continue
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    yield words


def inline_code(path: Path) -> list[str]:
    """What is between backticks outside fenced blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


COMMANDS = sorted({tuple(words) for path in DOCUMENTS for words in shell_commands(path)})
AURORA_COMMANDS = [words[1:] for words in COMMANDS if words[0] == "aurora-lit"]
SCRIPTS = [words[1:] for words in COMMANDS if words[0] in ("python", "python3") and words[1:3] != ("-m", "venv")]


def command_paths(group: click.Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, without options."""
    for name, command in group.commands.items():
        paths = command_paths(command, (*prefix, name)) if isinstance(command, click.Group) else [(*prefix, name)]
        yield from paths


# -- the README ----------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_sets_up_with_two_commands() -> None:
    assert len(README.read_text().split()) <= MAX_README_WORDS
    lines = [line for block in blocks(README, "bash") for line in block.splitlines() if "pip install" in line]
    assert lines == ["pip install -e . && aurora-lit serve", "pip install -e '.[test]' && pytest"]


def test_the_readmes_settings_have_these_defaults() -> None:
    config = load_config(None, [])
    rows = re.findall(r"^\| `([a-z]+)\.([a-z_]+)` \| (.*?) \|", README.read_text(), flags=re.MULTILINE)
    assert len(rows) == 8
    for section, key, text in rows:
        actual = getattr(getattr(config, section), key)
        shown = "null" if actual is None else str(actual).lower() if isinstance(actual, bool) else str(actual)
        if text.startswith("`"):
            assert text == f"`{shown}`", f"{section}.{key}"


@pytest.mark.slow
def test_the_readmes_request_has_the_printed_answer() -> None:
    """Whatever the arithmetic: where first tokens are nearly tied, another processor answers something else."""
    (request,) = (block for block in blocks(README, "bash") if block.startswith("curl"))
    (answer,) = re.findall(r'"content":"(.*?)"', "".join(blocks(README, "text")))
    body = json.loads(request[request.index("{") : request.rindex("}") + 1])
    for precision in ("fp32", "bf16", "int8", "int4") if native.library() else ("fp32", "bf16"):
        settings = [f"target.precision={precision}", "engine.max_batch_size=1"]  # no costs of batches are measured
        with aurora_lit.LLM(overrides=settings) as llm:
            (given,) = llm.chat(body["messages"], aurora_lit.SamplingParams(temperature=body["temperature"]))
        assert given.outputs[0].text == answer, precision


# -- commands ------------------------------------------------------------------------------------------------------


def test_every_command_line_is_understood_and_every_command_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("aurora_lit.ipc.run_folder.default_parent", lambda: tmp_path)  # `learn` asks a server's
    for words in AURORA_COMMANDS:
        result = CliRunner().invoke(main, [*words, "--print-config"])
        assert result.exit_code == 0, f"{' '.join(words)}: {result.output}"
    shown = {words[:length] for words in AURORA_COMMANDS for length in (1, 2)}
    paths = set(command_paths(main))
    assert paths - shown == set()
    known = {path[: end + 1] for path in paths for end in range(len(path))}
    for code in {code for document in DOCUMENTS for code in inline_code(document)}:
        named = re.match(r"aurora-lit ((?:[a-z]+ ?)*)", code)
        assert not named or not named[1] or tuple(named[1].split()) in known, code


def script_of(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The file of a command's script, its arguments, and the settings after " -- "."""
    arguments, _, overrides = " ".join(words).partition(" -- ")
    name, *rest = arguments.removeprefix("-m ").split()
    if words[0] == "-m":
        name = name.replace(".", "/")
        name += "/__main__.py" if (ROOT / name).is_dir() else ".py"
    return name, rest, overrides.split()


def test_scripts_of_the_documents_have_these_options() -> None:
    """Options are read from a script's text, and from that of what it imports from its folder."""
    for words in SCRIPTS:
        script, arguments, overrides = script_of(words)
        load_config(None, overrides)
        text = (ROOT / script).read_text()
        modules = re.findall(r"^(?:from|import) (?:benchmarks)?\.?(\w+)", text, flags=re.MULTILINE)
        neighbours = [ROOT / "benchmarks" / f"{module}.py" for module in modules]
        text += "".join(path.read_text() for path in neighbours if path.exists())
        for word in arguments:
            assert not word.startswith("--") or f'"{word}"' in text, f"{script} {word}"


@pytest.mark.slow
def test_every_script_explains_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """So none imports what is gone. They run in this process: seventeen interpreters would load torch each."""
    for script in sorted({script_of(words)[0] for words in SCRIPTS} - {"scripts/settings_reference.py"}):  # no options
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        module = script.removesuffix(".py").replace("/", ".")
        monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns if a test imported it
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert end.value.code in (0, None), script
        assert "usage" in capsys.readouterr().out.lower()


def test_a_container_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On 0.0.0.0 no Host header is checked, so without one any web page could use what is published on loopback."""
    (words,) = re.findall(r"^CMD (.*)$", (ROOT / "Containerfile").read_text(), flags=re.MULTILINE)
    command = [*json.loads(words), "--print-config"]
    monkeypatch.delenv("AURORA_LIT_API_KEY", raising=False)
    without = CliRunner().invoke(main, command)
    assert without.exit_code == 2
    assert "AURORA_LIT_API_KEY" in without.output
    monkeypatch.setenv("AURORA_LIT_API_KEY", "secret")
    with_key = CliRunner().invoke(main, command).output
    assert "secret" not in with_key
    assert "api_key: ${oc.env:AURORA_LIT_API_KEY}" in with_key, "printed settings can be used as a file"
    (tmp_path / "printed.yaml").write_text(with_key)
    assert load_config(tmp_path / "printed.yaml", []).server.api_key == "secret"


def test_compose_publishes_on_loopback_only() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


# -- pictures and the site -----------------------------------------------------------------------------------------


def test_the_picture_shows_the_figures_of_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "picture.svg"
    monkeypatch.setattr(sys, "argv", ["readme_picture.py", "--out", str(out)])
    runpy.run_path(str(ROOT / "scripts" / "readme_picture.py"), run_name="__main__")
    committed = (ROOT / "docs" / "images" / "speculation.svg").read_text()
    assert len(committed) < 200_000

    def texts(svg: str) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)</text>", svg)

    assert len(texts(committed)) > 10
    assert texts(committed) == texts(out.read_text()), "run python scripts/readme_picture.py"


def test_pages_are_prepared_for_the_site() -> None:
    hooks = runpy.run_path(str(ROOT / "scripts" / "mkdocs_hooks.py"))
    page = "Text\n- one\n  more\n- two\n\n| a |\n|---|\nText:\n| a |\n|---|\n```\nls\n- x\n```\n1. one\n2. two\n"
    shown = "Text\n\n- one\n  more\n- two\n\n| a |\n|---|\nText:\n\n| a |\n|---|\n```\nls\n- x\n```\n\n1. one\n2. two\n"
    assert hooks["with_blank_lines"](page) == shown
    links = "[a](../README.md) [b](../NOTHING.md) [c](metrics.md#x) [d](https://e.org) ![e](../README.md)"
    assert hooks["plain_links"](links, ROOT / "docs") == links.replace("[a](../README.md)", "a", 1)


# -- links, files, settings ----------------------------------------------------------------------------------------


def links(document: Path) -> list[Path]:
    """The files that a document's links lead to, without places in them."""
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    return [(document.parent / each.partition("#")[0]).resolve() for each in targets if not each.startswith("http")]


def test_links_lead_to_files_and_every_document_is_linked() -> None:
    linked = {document: links(document) for document in [*DOCUMENTS, ROOT / "ARCHITECTURE.md"]}
    assert [(source.name, str(file)) for source, files in linked.items() for file in files if not file.exists()] == []
    assert set(DOCUMENTS[1:]) - {file for files in linked.values() for file in files} == set()


def test_files_named_in_backticks_exist() -> None:
    folders = ("aurora_lit/", "benchmarks/", "configs/", "docs/", "scripts/", "tests/", ".ci/")
    words = {word for document in DOCUMENTS for code in inline_code(document) for word in code.split()}
    named = {word for word in words if word.startswith(folders) and re.fullmatch(r"[\w./-]+", word)}
    assert len(named) > 50
    assert sorted(word for word in named if not (ROOT / word).exists()) == []


def test_files_named_in_the_architecture_and_in_pictures_exist() -> None:
    """Paths are the package's; in the architecture a bare name is a file `there`, in a folder named before."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## The map")[0]
    named = re.findall(r"`(?:aurora_lit/)?([\w/]+\.py)`", text)
    for path in (ROOT / "docs" / "images").glob("*.svg"):
        named += re.findall(r"[\w/]+\.py", path.read_text())
    files = {path.relative_to(ROOT / "aurora_lit").as_posix() for path in (ROOT / "aurora_lit").rglob("*.py")}
    names = files | {file.rpartition("/")[2] for file in files}
    assert len(named) > 70
    assert [name for name in named if name not in names] == []


def test_settings_named_in_documents_exist() -> None:
    sections = {field.name: {setting.name for setting in fields(field.type)} for field in fields(AuroraConfig)}  # type: ignore[arg-type]
    pattern = rf"(?<![\w./-])({'|'.join(sections)})\.([a-z_0-9]+)\b(?!\()"
    named = {(document.name, *found) for document in DOCUMENTS for found in re.findall(pattern, document.read_text())}
    assert [each for each in named if each[2] not in sections[each[1]] and each[2] not in ("py", "jsonl")] == []


def test_python_blocks_are_python() -> None:
    for document in DOCUMENTS:
        for block in blocks(document, "python"):
            ast.parse(block, document.name)


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == aurora_lit.__version__


def test_pre_commit_runs_what_the_check_script_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    script = (ROOT / "scripts" / "check").read_text().splitlines()
    commands = [line for line in script if line.startswith(("ruff", "mypy"))]
    assert [hook["entry"] for hook in repository["hooks"]] == commands


# -- metrics -------------------------------------------------------------------------------------------------------


def documented_metrics(section: str) -> list[str]:
    text = METRICS.read_text().split(f"## {section}", 1)[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def test_every_exported_metric_has_its_line_and_no_other(tmp_path: Path) -> None:
    from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
    from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
    from aurora_lit.ipc.ring import RingWriter
    from aurora_lit.ipc.run_folder import RING_NAME
    from aurora_lit.serve.http.metrics import ServerMetrics
    from aurora_lit.serve.http.status import ring_counters

    engine = EngineStatusPage.create(tmp_path / STATUS_NAME)
    engine.write(max_draft_tokens=1, drafts=1, proposed=1, accepted=1, accepted_by_position=[1])
    learner = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    learner.write(pid=os.getpid(), steps=1, loss=1.0, rate_factor=1.0)
    learner.beat()
    RingWriter.create(tmp_path / RING_NAME, 4096, layout="12")
    metrics = ServerMetrics(model="m", status=engine, learner=learner, ring=lambda: ring_counters(tmp_path))
    metrics.finish("stop")
    metrics.refuse(429)
    exported = re.findall(r"^# TYPE (\S+) (\w+)$", metrics.render().decode(), flags=re.MULTILINE)
    names = [name for name, kind in exported if not name.endswith("_created")]
    assert sorted(names) == sorted(documented_metrics("Exported at `/metrics`"))


def test_every_logged_metric_has_its_line_and_no_other(target: Target, tmp_path: Path) -> None:
    from support.learner_harness import LearnerHarness
    from support.live_traces import serve, some_requests

    from aurora_lit.modules.losses.objective import OnlineWeights

    harness = LearnerHarness(target, tmp_path, publish_every_steps=8, batch_positions=256)
    logged: set[str] = set()
    harness.learner.log = logged.update  # type: ignore[method-assign, assignment]
    harness.learner.module.module.online = OnlineWeights(ppo=True)
    harness.ring.records.extend(serve(target, harness.starting, some_requests(60)))
    harness.tick_until(lambda: {"gate_passed", "stopped_0"} <= logged)
    names = {re.sub(r"_\d+$", "_N", name) for name in logged}
    assert sorted(names) == sorted(documented_metrics("Logged by the learner"))
