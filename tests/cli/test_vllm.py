"""`aurora-lit vllm` starts vLLM with what it needs, and keeps a learner beside each life of its engine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.fake_drafts import SMALL_SHAPE

from aurora_lit.bench.servers import free_port
from aurora_lit.cli import vllm as vllm_command_file
from aurora_lit.cli.main import main
from aurora_lit.cli.vllm import (
    MIDDLEWARE,
    WORKER_EXTENSION,
    _deployment,
    _serve_metrics,
    _value_of,
    _with_file,
    settings,
    start,
    vllm_command,
)
from aurora_lit.config import PROJECT_FOLDER, draft_folder
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, WorkerState
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.process_lifetime import module_command
from aurora_lit.ipc.ring import RingWriter
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.models import source as source_module
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.vllm.deployment import Deployment

DRAFT = PROJECT_FOLDER / "checkpoints" / "smollm2-base"
SMALL = Eagle3Config(**{**SMALL_SHAPE, "draft_vocab_size": 11})


def command_of(tmp_path: Path, *vllm_arguments: str, starting: Path = DRAFT) -> list[str]:
    """vLLM's command for a target in a folder."""
    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"")
    config = settings(str(target), starting, [f"checkpoint.dir={tmp_path}"])
    draft = draft_folder(config)
    assert draft is not None
    deployment = Deployment(
        run_folder=tmp_path,
        starting_draft=draft,
        versions=tmp_path / "live",
        ring_bytes=1 << 20,
    )
    return vllm_command(config, deployment, vllm_arguments)


def value(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_vllm_gets_its_own_arguments_and_those_it_needs(tmp_path: Path) -> None:
    command = command_of(tmp_path, "--port", "8123", "--tensor-parallel-size", "2")
    assert value(command, "--model") == str(tmp_path / "target")
    assert value(command, "--worker-extension-cls") == WORKER_EXTENSION
    assert value(command, "--middleware") == MIDDLEWARE
    assert command[-4:] == ["--port", "8123", "--tensor-parallel-size", "2"]
    speculation = json.loads(value(command, "--speculative-config"))
    assert speculation["method"] == "eagle3"
    files = sorted(path.name for path in Path(speculation["model"]).iterdir())
    assert "model.safetensors" in files
    assert "value_head.safetensors" not in files  # vLLM loads every file of tensors, and does not know this one


def test_a_starting_draft_of_the_whole_vocabulary_has_no_maps_which_vllm_would_refuse(tmp_path: Path) -> None:
    """vllm/model_executor/models/llama_eagle3.py has a parameter for `d2t` only if the vocabularies differ."""
    draft = Eagle3Draft(SMALL)
    save_draft(draft, tmp_path / "first")
    weights = tmp_path / "first" / "model.safetensors"
    save_file(load_file(weights) | {"d2t": draft.d2t, "t2d": draft.t2d}, weights)  # as drafts of before
    for _ in range(2):  # a second start finds the folder of the first
        command = command_of(tmp_path, starting=tmp_path / "first")
        loaded = Path(json.loads(value(command, "--speculative-config"))["model"])
        assert set(load_file(weights)) - set(load_file(loaded / "model.safetensors")) == {"d2t", "t2d"}


def test_vllm_reads_the_layers_that_a_draft_of_sglangs_form_means(tmp_path: Path) -> None:
    """V1 would take these ids without adding 1 (vllm/v1/worker/gpu_model_runner.py), V2 those of the model."""
    save_draft(Eagle3Draft(SMALL), tmp_path / "first")
    (tmp_path / "first" / "value_head.safetensors").unlink()
    (tmp_path / "first" / "manifest.json").unlink()
    path = tmp_path / "first" / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("eagle_aux_hidden_state_layer_ids") == [1, 2, 3]
    assert fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    path.write_text(json.dumps(fields))
    for _ in range(2):  # a second start finds the folder of the first
        speculation = json.loads(value(command_of(tmp_path, starting=tmp_path / "first"), "--speculative-config"))
        loaded = json.loads((Path(speculation["model"]) / "config.json").read_text())
        assert loaded == {**fields, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    assert json.loads(path.read_text()) == fields


def test_an_argument_that_is_given_is_not_added(tmp_path: Path) -> None:
    command = command_of(tmp_path, "--served-model-name=mine", "--speculative-config.method", "eagle3")
    assert "--served-model-name" not in command
    assert "--speculative-config" not in command
    with pytest.raises(ConfigError, match="--worker-extension-cls"):
        command_of(tmp_path, "--worker-extension-cls", "mine")


@pytest.mark.parametrize(
    "argument", ["--api_server_count=4", "-asc 4", "--data-parallel-multi-port-external-lb", "-dpm"]
)
def test_an_argument_that_only_vllm_serve_acts_on_is_refused_with_the_way_to_give_it(
    tmp_path: Path, argument: str
) -> None:
    """vllm/entrypoints/cli/serve.py; `main` of vllm/entrypoints/launchers/api_server/entry.py does not look at them."""
    said = "leave it out, or add it to the command that --attach prints, with `vllm serve` in place of the words from"
    with pytest.raises(ConfigError, match=said) as caught:
        command_of(tmp_path, "--port", "8123", *argument.split())
    assert str(caught.value).endswith("to vllm.entrypoints.openai.api_server; keep the variables before them")


@pytest.mark.parametrize("argument", ["--grpc", "--grpc-port 50051"])
def test_a_server_that_loads_no_middleware_is_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument.split()[0]} starts a server in which no drafts can be swapped"):
        command_of(tmp_path, *argument.split())


def test_engines_for_the_server_of_another_machine_are_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("headless: true")
    for arguments in (["--headless"], ["--config", str(tmp_path / "my.yaml")]):
        with pytest.raises(ConfigError, match=r"--headless starts engines for .*; run it on .*Several machines"):
            command_of(tmp_path, *arguments)


def test_one_api_server_is_what_is_started(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("headless: false")
    command = command_of(tmp_path, "--config", str(tmp_path / "my.yaml"), "--api-server-count", "1")
    assert value(command, "--api-server-count") == "1"


def test_what_vllms_own_file_gives_is_not_added(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "served_model_name: [mine, other]\nspeculative-config:\n  method: eagle3\n  model: x\nmodel: org/quantised\n"
    )
    command = command_of(tmp_path, "--config", str(tmp_path / "my.yaml"))
    assert not {"--served-model-name", "--speculative-config", "--model"} & set(command)
    assert value(command, "--worker-extension-cls") == WORKER_EXTENSION
    assert command[-2:] == ["--config", str(tmp_path / "my.yaml")], "vLLM reads it itself"
    assert _value_of("--served-model-name", _with_file(command)) == "mine"
    assert _value_of("--served-model-name", _with_file([*command, "--served-model-name", "last"])) == "last"
    (tmp_path / "my.yaml").write_text("worker-extension-cls: mine")
    with pytest.raises(ConfigError, match="--worker-extension-cls is needed"):
        command_of(tmp_path, "--config", str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("text", ["a: [", "only a text"])
def test_a_file_of_vllm_that_cannot_be_read_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)--config .*my\.yaml .* name a YAML file"):
        command_of(tmp_path, "--config", str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("in_file", [False, True])
def test_fields_of_a_speculative_config_are_added_to_ours(tmp_path: Path, in_file: bool) -> None:
    """vLLM makes one object of all such fields, in place of the whole one where both are given."""
    (tmp_path / "my.yaml").write_text("speculative_config.num_speculative_tokens: 5")
    given = ["--config", str(tmp_path / "my.yaml")] if in_file else ["--speculative_config.num_speculative_tokens", "5"]
    command = command_of(tmp_path, *given)
    assert "--speculative-config" not in command
    assert value(command, "--speculative-config.method") == "eagle3"
    assert Path(value(command, "--speculative-config.model")).is_dir()
    assert "--speculative-config.num_speculative_tokens" not in command
    other = command_of(tmp_path, "--speculative-config.method=ngram")
    assert not any(word.startswith("--speculative-config") for word in other if word != other[-1]), "ours would not fit"


def test_vllms_short_name_of_its_speculative_config_is_joined_too(tmp_path: Path) -> None:
    command = command_of(tmp_path, "-sc.num_speculative_tokens", "5")
    assert value(command, "--speculative-config.num_speculative_tokens") == "5"
    assert value(command, "--speculative-config.method") == "eagle3"
    whole = command_of(tmp_path, "-sc", '{"method": "ngram"}')
    assert [word for word in whole if word.startswith("--speculative-config")] == ["--speculative-config"]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ("--spec-tokens 5", {"method", "model"}),
        ("--spec_tokens=5", {"method", "model"}),
        ("--spec-method eagle3 --spec-model x", {"num_speculative_tokens"}),
        ("--spec-method eagle3 --spec-model x --spec-tokens 5", set()),
        ("--spec-method ngram", set()),
        ("--spec-tokens 5 --speculative-config.model x", {"method"}),
        ("--spec-tokens 5 --speculative-config.method ngram", set()),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_field_of_the_speculative_config_that_has_an_argument_of_its_own_is_not_added(
    tmp_path: Path, given: str, added: set[str], in_file: bool
) -> None:
    """vLLM refuses one that is given twice (vllm/engine/arg_utils.py, `create_speculative_config`)."""
    words = given.replace("=", " ").split()
    (tmp_path / "my.yaml").write_text(json.dumps({words[i][2:]: words[i + 1] for i in range(0, len(words), 2)}))
    command = command_of(tmp_path, *(["--config", str(tmp_path / "my.yaml")] if in_file else given.split()))
    ours = command[: command.index("--middleware")]
    found = {word.partition(".")[2] for word in ours if word.startswith("--speculative-config.")}
    if "--speculative-config" in ours:
        found |= set(json.loads(value(ours, "--speculative-config")))
    assert found == added


def test_a_config_file_that_vllm_would_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: other")
    with pytest.raises(ConfigError, match="write --config FILE"):
        command_of(tmp_path, f"--config={tmp_path / 'my.yaml'}")
    elsewhere = command_of(tmp_path, "--config", "/only/in/a/container.yaml")
    assert value(elsewhere, "--model") == str(tmp_path / "target")


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_ends_it_as_ctrl_c_does_unless_nohup_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ignored: bool
) -> None:
    command_of(tmp_path)
    ended = list[bool]()

    def close_terminal(*arguments: Any, gpus: str) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        ended.append(arguments[-1].wait(0.0))

    monkeypatch.setattr(vllm_command_file, "_learn_beside", close_terminal)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else lambda *_: None)
    try:
        config = settings(str(tmp_path / "target"), DRAFT, [f"checkpoint.dir={tmp_path}"])
        assert start(config, [], learner_gpus="", learner_metrics_port=None, attach=True) == 0
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert ended == [not is_ignored]


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_a_target_that_the_learner_cannot_read_is_told_before_vllm_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(source_module._READERS, method, ("no_such_package",))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(main, ["vllm", str(tmp_path), "--draft", str(DRAFT), "--attach"])
    assert result.exit_code == 2
    assert f"{tmp_path} has weights that are quantised with {method}" in result.output
    assert "transformers needs no_such_package, so that no draft can learn" in result.output
    assert "--model FOLDER" in result.output


def test_vllm_may_serve_another_model_than_the_learner_reads(tmp_path: Path) -> None:
    command = command_of(tmp_path, "--model", "org/quantised")
    assert command.count("--model") == 1
    assert value(command, "--model") == "org/quantised"
    assert value(command, "--served-model-name") == str(tmp_path / "target")


def test_the_names_given_to_vllm_exist() -> None:
    for name in (WORKER_EXTENSION, MIDDLEWARE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)


def test_the_learner_has_the_targets_precision_and_vllms_arguments_are_vllms_own() -> None:
    config = settings("m", DRAFT, ["learn.threads=3"])
    assert (config.target.source, config.target.precision, config.target.sha256) == ("m", "bf16", None)
    assert config.learn.threads == 3
    arguments = ["--max-num-seqs", "2048", "-O3"]  # more than engine.max_batch_size may be
    result = CliRunner().invoke(main, ["vllm", "m", "--draft", str(DRAFT), *arguments, "--print-config"])
    assert result.exit_code == 0
    assert "precision: bf16" in result.output


def test_an_argument_of_vllm_is_neither_our_help_nor_the_model() -> None:
    arguments = ["m", "--draft", str(DRAFT), "-dph", "127.0.0.1", "--print-config"]
    result = CliRunner().invoke(main, ["vllm", *arguments])
    assert result.exit_code == 0
    assert "precision: bf16" in result.output
    assert "Usage: " in CliRunner().invoke(main, ["vllm", "--help"]).output
    result = CliRunner().invoke(main, ["vllm", "--port", "8123", "m", "--draft", str(DRAFT), "--print-config"])
    assert result.exit_code == 2
    assert "--port stands where MODEL should; name MODEL before vLLM's own arguments" in result.output


@pytest.mark.parametrize(
    "arguments",
    ["--served_model_name m", "--served-model-name=m", "--served-model-name a --served-model-name m"],
)
def test_an_argument_of_vllm_is_read_however_it_is_written(arguments: str) -> None:
    assert _value_of("--served-model-name", arguments.split()) == "m"
    assert _value_of("--host", arguments.split()) is None


def test_a_module_that_vllm_runs_itself_is_not_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It inspects models with `python -m`, without its own -P (vllm/model_executor/models/registry.py)."""
    command_of(tmp_path)
    (tmp_path / "this.py").write_text("raise SystemExit('this file was run')")
    monkeypatch.chdir(tmp_path)
    vllm = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-m', 'this']).returncode)"
    command = [*module_command("vllm")[:-2], "-c", vllm]
    monkeypatch.setattr(vllm_command_file, "vllm_command", lambda *_: command)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "installed")
    monkeypatch.setattr(vllm_command_file, "handle_ending", lambda end: None)
    config = settings(str(tmp_path / "target"), DRAFT, [f"checkpoint.dir={tmp_path}", "learn.enabled=false"])
    assert start(config, [], learner_gpus="", learner_metrics_port=None, attach=False) == 0, capfd.readouterr().err
    monkeypatch.setattr(threading.Event, "wait", lambda *_: True)
    start(config, [], learner_gpus="", learner_metrics_port=None, attach=True)
    printed = capfd.readouterr().out.partition("start vLLM with")[2]
    assert subprocess.run(printed.strip(), shell=True, check=False).returncode == 0


def test_without_vllm_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["vllm", "m", "--draft", str(DRAFT)])
    assert result.exit_code == 2
    assert "Error: vLLM is not installed in this environment" in result.output


def test_a_folder_for_drafts_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = f"checkpoint.dir={tmp_path / 'file' / 'inside'}"
    result = CliRunner().invoke(main, ["vllm", "m", "--draft", str(DRAFT), "--attach", "--set", folder])
    assert result.exit_code == 2
    assert "is no folder that can be written to" in result.output


def test_versions_of_another_shape_than_the_starting_draft_are_told_before_vllm_starts(tmp_path: Path) -> None:
    """vLLM keeps the shape it has started with, so it would refuse every version, and whatever is learned from them."""
    starting, published = tmp_path / "starting", tmp_path / "live"
    save_draft(Eagle3Draft(SMALL), starting)
    config = settings("m", starting, [f"checkpoint.dir={tmp_path}"])
    DraftStore(published, keep=5).publish(Eagle3Draft(SMALL), record={})
    assert _deployment(config, tmp_path).starting_draft == starting
    other = replace(SMALL, draft_vocab_size=SMALL.draft_vocab_size - 1)
    DraftStore(published, keep=5).publish(Eagle3Draft(other), record={})
    reason = r"draft-000002 is refused: draft_vocab_size .* --set checkpoint.run=NAME$"
    with pytest.raises(CheckpointError, match=reason):
        _deployment(config, tmp_path)
    for damaged in (published / "draft-000002" / "config.json", published / "CURRENT"):
        damaged.write_text("damaged")
        assert _deployment(config, tmp_path).starting_draft == starting, "that is told by what reads it"


def test_a_learner_is_started_for_each_life_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_command_file, "_LOOK_EVERY_S", 0.02)
    status = EngineStatusPage.create(tmp_path / STATUS_NAME)
    page = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    starts, ending = tmp_path / "starts", threading.Event()
    # It ends at once with 0, as when its engine has ended.
    learner = ["sh", "-c", f"echo $CUDA_VISIBLE_DEVICES >> {starts}"]

    def number_of_starts() -> int:
        return len(starts.read_text().split()) if starts.exists() else 0

    def wait_for(number: int) -> None:
        until = time.monotonic() + 20
        while number_of_starts() < number:
            assert time.monotonic() < until
            time.sleep(0.02)

    thread = threading.Thread(
        target=vllm_command_file._learn_beside, args=(None, status, page, learner, ending), kwargs={"gpus": "6"}
    )
    thread.start()
    try:
        time.sleep(0.3)
        assert number_of_starts() == 0  # the engine is not ready
        status.write(state=WorkerState.READY, worker_pid=os.getpid())
        wait_for(1)
        status.write(worker_pid=os.getpid() + 1)  # vLLM was killed, and started again
        wait_for(2)
    finally:
        ending.set()
        thread.join(20)
    assert not thread.is_alive()
    assert set(starts.read_text().split()) == {"6"}, "the learner's own"


def test_the_learners_metrics_are_served_apart_and_go_on_when_it_has_ended(tmp_path: Path) -> None:
    page, port = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME), free_port()
    ring = RingWriter.create(tmp_path / RING_NAME, 1 << 16, layout="0a")
    ring.push(b"a trace")
    page.write(pid=os.getpid(), steps=7, steps_before=6, published=2)
    page.beat()
    _serve_metrics(tmp_path, page, host="127.0.0.1", port=port, model="m")

    def sample(name: str) -> float:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith(f'{name}{{engine="0",model_name="m"}}'))
        return float(line.split()[-1])

    found = [sample(f"aurora_{name}") for name in ("learner_running", "learner_steps_total", "traces_pushed_total")]
    assert found == [1, 1, 1]
    page.write(pid=0, published=3, steps=9)
    found = [sample(f"aurora_learner_{name}") for name in ("running", "published_total", "steps_total")]
    assert found == [0, 3, 3]
    with pytest.raises(ConfigError, match=f"--learner-metrics-port {port} cannot be opened on 127.0.0.1"):
        _serve_metrics(tmp_path, page, host="127.0.0.1", port=port, model="m")
