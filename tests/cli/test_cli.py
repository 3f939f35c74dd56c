"""The command line: exit codes, errors on one line, options passed on, no early import of torch."""

import errno
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.fork_host import run_program

import aurora_lit
from aurora_lit.bench.servers import free_port
from aurora_lit.cli.main import main
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.errors import SourceError
from aurora_lit.ipc.run_folder import FOLDER_VARIABLE

COMMANDS = (
    ["serve"],
    ["learn"],
    ["replay"],
    ["status"],
    ["drafts", "list"],
    ["memory", "clear"],
    ["generate"],
    ["pretrain"],
    ["doctor"],
    ["bench", "throughput"],
    ["bench", "acceptance"],
)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


class Recorder:
    """Replaces the function that a command calls, and records its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, function: str, **others: Any) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        fake = types.ModuleType(module)
        fake.__dict__.update({function: self, **others})
        monkeypatch.setitem(sys.modules, module, fake)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


@pytest.fixture
def prompt_files(tmp_path: Path) -> list[str]:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.txt")]
    for file in files:
        file.write_text("")
    return [str(file) for file in files]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_print_config_needs_none_of_a_commands_own_options(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("aurora_lit.ipc.run_folder.default_parent", lambda: tmp_path)  # `learn` asks a server's
    result = run(*command, "--print-config", "engine.max_batch_size=3")
    assert result.exit_code == 0, result.output
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_config(printed, []) == load_config(None, ["engine.max_batch_size=3"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_misspelt_key_ends_every_command_with_one_line_and_code_2(command: list[str]) -> None:
    result = run(*command, "engine.max_batch=3")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "Error: engine.max_batch=3: there is no such setting; did you mean engine.max_batch_size?\n"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "--config FILE" in result.output
    assert "key=value" in result.output


def test_an_aurora_error_is_printed_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(_: AuroraConfig) -> None:
        raise SourceError("no model\nhere; connect")

    Recorder(monkeypatch, "aurora_lit.serve.server", "serve")
    monkeypatch.setattr(sys.modules["aurora_lit.serve.server"], "serve", serve)
    result = run("serve")
    assert result.exit_code == 2
    assert result.stderr == "Error: no model here; connect\n"


def test_an_error_of_a_file_is_printed_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    errors: list[OSError] = [PermissionError(errno.EACCES, "Permission denied", "/locked"), full, OSError("no file's")]

    def serve(_: AuroraConfig) -> None:
        raise errors.pop(0)

    Recorder(monkeypatch, "aurora_lit.serve.server", "serve")
    monkeypatch.setattr(sys.modules["aurora_lit.serve.server"], "serve", serve)
    result = run("serve")
    assert result.exit_code == 2
    assert result.stderr == "Error: [Errno 13] Permission denied: '/locked'\n"
    assert run("serve").stderr == "Error: [Errno 28] No space left on device\n", "writing knows no name"
    assert isinstance(run("serve").exception, OSError)


def test_any_other_exception_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(_: AuroraConfig) -> None:
        raise ZeroDivisionError

    Recorder(monkeypatch, "aurora_lit.serve.server", "serve")
    monkeypatch.setattr(sys.modules["aurora_lit.serve.server"], "serve", serve)
    assert isinstance(run("serve").exception, ZeroDivisionError)


def test_serve_passes_file_and_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.serve.server", "serve")
    path = tmp_path / "mine.yaml"
    path.write_text("server: {port: 9000}")
    assert run("serve", "server.max_queue=5", "--config", str(path)).exit_code == 0
    (((config,), _),) = recorder.calls
    assert (config.server.port, config.server.max_queue) == (9000, 5)


def test_several_files_are_merged_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.serve.server", "serve")
    base, changes = tmp_path / "base.yaml", tmp_path / "changes.yaml"
    base.write_text("server: {port: 9000, api_key: secret}")
    changes.write_text("server: {port: 9001}")
    assert run("serve", "--config", str(base), "--config", str(changes)).exit_code == 0
    (((config,), _),) = recorder.calls
    assert (config.server.port, config.server.api_key) == (9001, "secret")


def test_generate_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.cli.generate", "generate")
    assert run("generate", "-p", "a = b", "--max-tokens", "7", "--no-compare-plain").exit_code == 0
    ((_, options),) = recorder.calls
    assert options == {"prompt": "a = b", "max_tokens": 7, "temperature": None, "compare_plain": False}


def test_pretrain_takes_several_files_after_one_option(
    monkeypatch: pytest.MonkeyPatch, prompt_files: list[str], tmp_path: Path
) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.learn.pretrain.stages", "pretrain", PretrainOptions=dict)
    a, b, c = prompt_files
    result = run("pretrain", "--prompts", a, b, "--text", c, "--prompts", a, "--out", str(tmp_path), "engine.threads=1")
    assert result.exit_code == 0, result.output
    (((config, options), _),) = recorder.calls
    assert options["prompts"] == (Path(a), Path(b), Path(a))
    assert options["text"] == (Path(c),)
    assert config.engine.threads == 1


def test_pretrain_without_options_uses_the_defaults_of_the_record(
    monkeypatch: pytest.MonkeyPatch, prompt_files: list[str], tmp_path: Path
) -> None:
    from aurora_lit.learn.pretrain import stages as module

    calls: list[module.PretrainOptions] = []
    monkeypatch.setattr(module, "pretrain", lambda config, options: calls.append(options))
    result = run("pretrain", "--prompts", prompt_files[0], "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert calls == [module.PretrainOptions(prompts=(Path(prompt_files[0]),), text=(), out=tmp_path)]


def test_learn_attaches_with_the_settings_of_the_server_that_it_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.learn.online.process", "run_learner", is_follower=lambda _: False)
    (tmp_path / "status").write_text("")
    (tmp_path / "config.yaml").write_text("checkpoint: {dir: /of/the/server}")
    assert run("learn", "--run-folder", str(tmp_path), "learn.threads=2").exit_code == 0
    other = tmp_path / "other.yaml"
    other.write_text("checkpoint: {dir: /mine}")
    assert run("learn", "--run-folder", str(tmp_path), "--config", str(other)).exit_code == 0
    ((first, folder), _), ((second, _), _) = recorder.calls
    assert (first.checkpoint.dir, first.learn.threads, folder) == ("/of/the/server", 2, tmp_path)
    assert second.checkpoint.dir == "/mine"


def test_learn_without_a_run_folder_has_the_settings_of_the_newest_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.learn.online.process", "run_learner", is_follower=lambda _: False)
    (tmp_path / "status").write_text("")
    (tmp_path / "config.yaml").write_text("checkpoint: {dir: /of/the/server}")
    monkeypatch.setattr("aurora_lit.cli.main.live_folders", lambda: [tmp_path])
    assert run("learn", "learn.threads=2").exit_code == 0
    (((config, folder), _),) = recorder.calls
    assert (config.checkpoint.dir, config.learn.threads, folder) == ("/of/the/server", 2, tmp_path)
    assert "dir: /of/the/server" in run("learn", "--print-config").output
    # A second server has started when the learner's followers, which have its command, look for the folder.
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "second").mkdir()
    monkeypatch.setattr("aurora_lit.cli.main.live_folders", lambda: [tmp_path / "second", tmp_path])
    assert run("learn", "learn.threads=2").exit_code == 0
    ((again, inherited), _) = recorder.calls[1]
    assert (again.checkpoint.dir, inherited) == ("/of/the/server", tmp_path)


def test_learn_and_status_without_a_server_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("aurora_lit.ipc.run_folder.default_parent", lambda: tmp_path)
    for command in ("learn", "status"):
        result = run(command)
        assert result.exit_code == 2
        assert "no server of this user runs on this machine" in result.stderr
        result = run(command, "--run-folder", str(tmp_path))
        assert result.exit_code == 2


def test_drafts_are_listed_returned_to_and_promoted(tmp_path: Path) -> None:
    from aurora_lit.drafts.store import DraftStore
    from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft

    where = f"checkpoint.dir={tmp_path}"
    assert "has no version yet" in run("drafts", "list", where).stdout
    assert run("drafts", "rollback", "1", where).exit_code == 2
    assert not list(tmp_path.iterdir()), "a mistyped folder is not created"
    store = DraftStore(tmp_path / "live", keep=5)
    draft = Eagle3Draft(
        Eagle3Config(
            hidden_size=8,
            target_hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=11,
            draft_vocab_size=7,
            aux_layer_ids=(1, 2, 3),
        )
    )
    for number in range(3):
        store.publish(draft, record={"accepted_length": 2 + number / 8, "by_domain": {"[/x]": number}})
    table = run("drafts", "list", where).stdout
    assert "accepted_length 2.25" in table
    assert "[/x]" in table, "clients choose the names of domains"
    assert run("drafts", "rollback", "1", where).exit_code == 0
    listed = json.loads(run("drafts", "list", "--json", where).stdout)
    assert listed["current"] == "draft-000001"
    assert [each["retired"] for each in listed["versions"]] == [None, "rolled back by hand", "rolled back by hand"]
    assert run("drafts", "promote", "3", where).exit_code == 0
    assert store.current() == "draft-000003"
    assert run("drafts", "rollback", "0", where).exit_code == 0
    assert store.current() is None
    refused = run("drafts", "promote", "9", where)
    assert (refused.exit_code, "no version draft-000009" in refused.stderr) == (2, True)


def test_the_memory_on_disk_is_cleared(tmp_path: Path) -> None:
    from aurora_lit.serve.speculation.sources.kept_answers import KeptAnswers

    where = f"memory.keep={tmp_path}"
    kept = KeptAnswers(tmp_path, target=b"", max_bytes=1 << 20)
    used = run("memory", "clear", where)
    assert (used.exit_code, "stop it first" in used.stderr) == (2, True)
    kept.close()
    assert run("memory", "clear", where).stdout == f"{tmp_path}: 0 files of answers are deleted\n"
    assert not (tmp_path / "key").exists()


def test_the_first_file_s_name_may_contain_an_equals_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.bench.throughput", "run")
    folder = tmp_path / "date=2026-11-30"
    folder.mkdir()
    files = [folder / "chat.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("")
    words = [*map(str, files), "engine.max_batch_size=3"]
    assert run("bench", "throughput", "--prompts", *words).exit_code == 0
    ((config,), options) = recorder.calls[0]
    assert (list(options["prompts"]), config.engine.max_batch_size) == (files, 3)


def test_bench_passes_batch_sizes(monkeypatch: pytest.MonkeyPatch, prompt_files: list[str]) -> None:
    recorder = Recorder(monkeypatch, "aurora_lit.bench.throughput", "run")
    assert run("bench", "throughput", "--prompts", prompt_files[0], "--batch", "1,16").exit_code == 0
    options = recorder.calls[0][1]
    assert options["batch_sizes"] == (1, 16)
    assert options["against_transformers"] is False


@pytest.mark.parametrize("batch", ["", "1,x", "0", "1,,2"])
def test_wrong_batch_sizes_are_refused(batch: str, prompt_files: list[str]) -> None:
    result = run("bench", "throughput", "--prompts", prompt_files[0], "--batch", batch)
    assert result.exit_code == 2
    assert "write numbers such as 1,4,8" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["serve", "--nope"],
        ["nope"],
        ["pretrain"],
        ["generate", "--temperature", "3"],
        ["generate"],
        ["bench", "acceptance", "--prompts", "/no/such/file"],
    ],
)
def test_wrong_use_ends_with_code_2(args: list[str]) -> None:
    assert run(*args).exit_code == 2


@pytest.mark.parametrize("can_serve", [True, False])
def test_doctor_exits_with_code_1_if_serving_would_not_start(can_serve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, "aurora_lit.cli.doctor", "doctor")
    monkeypatch.setattr(sys.modules["aurora_lit.cli.doctor"], "doctor", lambda config, as_json: can_serve)
    assert run("doctor").exit_code == (0 if can_serve else 1)


def test_torch_is_not_loaded_by_commands_that_need_no_model() -> None:
    commands = [
        ["--help"],
        ["serve", "--help"],
        ["serve", "--print-config"],
        ["serve", "nope=1"],
        ["learn", "--help"],
        ["status"],
        ["drafts", "list"],
        ["memory", "clear"],
        ["replay", "--help"],
        ["bench", "throughput", "--help"],
    ]
    code = f"""
import sys
from aurora_lit.cli.main import main
for args in {commands}:
    try:
        main(args)
    except SystemExit:
        pass
    heavy = {{"torch", "transformers", "lightning", "litserve"}} & set(sys.modules)
    if heavy:
        sys.exit(f"{{args}} loaded {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "aurora_lit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"aurora-lit, version {aurora_lit.__version__}"


def test_sigterm_ends_a_command_that_does_not_handle_it_as_ctrl_c_would() -> None:
    """Process 1 of a container would ignore it: for that one the system has no default."""
    code = """
import signal, sys
from aurora_lit.__main__ import run
from aurora_lit.cli.main import main

@main.command()
def work():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        print("cleaned up")

sys.argv[1:] = ["work"]
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "cleaned up\n"), done.stderr


def test_every_public_name_can_be_imported() -> None:
    for name in aurora_lit.__all__:
        assert getattr(aurora_lit, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = aurora_lit.nonsense


def test_serve_logs_with_time_and_level_and_tells_its_error_as_before() -> None:
    """`learn.enabled=true` without speculation ends it before any process is started."""
    settings = ["server.host=0.0.0.0", f"server.port={free_port()}", "engine.speculate=false", "learn.enabled=true"]
    command = [sys.executable, "-m", "aurora_lit", "serve", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    warning, error = done.stderr.splitlines()
    begin = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING server\[\d+\] aurora_lit\.serve\.server: "
    assert re.match(begin + r"server\.host=0\.0\.0\.0 is open to everyone", warning)
    assert error.startswith("Error: learn.enabled=true needs a draft")


def test_lightnings_warnings_are_logged_once_like_all_others() -> None:
    """Its loggers tell INFO too, and it has a console of its own, which knows neither time nor process."""
    code = """
import logging
import aurora_lit.logs
aurora_lit.logs.log_to_stderr("learner")
import lightning
for name in ("lightning.fabric.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).info("ready")
    logging.getLogger(name).warning("slow")
logging.getLogger("others").info("hello")
logging.getLogger("aurora_lit.serve").info("draft 7")
logging.getLogger("aurora_lit.serve").debug("read")
"""
    done = run_program(code)
    assert done.returncode == 0, done.stderr
    *lines, own = done.stderr.splitlines()
    assert re.fullmatch(r".* INFO learner\[\d+\] aurora_lit\.serve: draft 7", own), "this package tells INFO too"
    for line, package in zip(lines, ("fabric", "pytorch"), strict=True):
        expected = rf"\d{{4}}-\S+ \S+ WARNING learner\[\d+\] lightning\.{package}\.utilities\.rank_zero: slow"
        assert re.fullmatch(expected, line)


def test_a_program_that_logs_already_keeps_its_log() -> None:
    code = """
import logging
import aurora_lit.logs
logging.basicConfig(format="mine: %(message)s")
aurora_lit.logs.log_to_stderr()
logging.getLogger("aurora_lit").warning("hello")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "mine: hello\n"
