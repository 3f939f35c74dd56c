"""Building an engine: what is taken from the settings, the model and its tokenizer, and whose costs are kept."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.fake_engine import tiny_tokenizer
from support.tiny_models import make_engine, random_draft, request, run, save_model

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.loading import load_target
from aurora_lit.request import StructuredOutputsParams
from aurora_lit.serve.engine.slot_allocator import slot_capacity
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.worker import build, load_models
from aurora_lit.serve.worker.load_models import eos_token_ids


def test_an_end_token_that_has_no_row_in_the_model_ends_nothing() -> None:
    target: Any = SimpleNamespace(end_of_text_ids=frozenset({2, 99}), vocab_size=50)
    for of_tokenizer, expected in ((7, {2, 7}), (50, {2}), (None, {2})):
        tokenizer: Any = SimpleNamespace(eos_token_id=of_tokenizer)
        assert eos_token_ids(target, tokenizer) == expected


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return load_target(save_model("llama", tmp_path / "target", num_hidden_layers=4), precision="fp32")


def test_every_setting_of_the_engine_reaches_it(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings of each, so that no constant passes."""
    settings: dict[str, tuple[Any, Any]] = {
        "max_batch_size": (3, 5),
        "max_seq_len": (128, 192),
        "max_draft_tokens": (2, 3),
        "lookup": (True, False),
        "adaptive": (True, False),
        "prefix_cache_mb": (7, 0),
    }
    monkeypatch.setattr(build, "Engine", lambda target, draft, settings, **more: (settings, more["memory"]))
    for number in (0, 1):
        given = [f"engine.{name}={str(values[number]).lower()}" for name, values in settings.items()]
        more = [
            f"memory.capacity_mb={(3, 9)[number]}",
            f"server.host={('127.0.0.1', '0.0.0.0')[number]}",
        ]
        config = load_config(None, ["draft.checkpoint=null", "learn.enabled=false", *given, *more])
        found: Any = build._engine(config, target, tiny_tokenizer(), observer=None)
        engine, memory = found
        assert {name: getattr(engine, name) for name in settings} == {
            name: values[number] for name, values in settings.items()
        }
        assert memory.capacity_mb == (3, 9)[number]
        assert memory.scope == ("domain", "client")[number], "others can connect: each client has its own"


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
def test_a_target_whose_layers_are_not_native_says_why_at_the_start(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "Engine", lambda *_, **__: "an engine")
    config = load_config(None, ["draft.checkpoint=null", "learn.enabled=false"])
    for folder, told in ((None, []), (save_model("gemma", tmp_path / "gemma"), ["no row for gemma"])):
        served = target if folder is None else load_target(folder, precision="bf16")
        build._engine(config, served, tiny_tokenizer(), observer=None)
        assert [record.getMessage().split("families.py has ")[-1] for record in caplog.records] == told


def test_a_named_draft_is_used_where_nothing_learns_and_told_of_where_it_is_not(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "load_tokenizer", lambda _: tiny_tokenizer())
    monkeypatch.setattr(build, "Engine", lambda *_, draft_version, **__: draft_version)
    save_draft(random_draft(target), tmp_path / "mine")
    settings = [f"target.source={tmp_path / 'target'}", "target.precision=fp32"]
    config = load_config(None, [*settings, f"draft.checkpoint={tmp_path / 'mine'}", "learn.from_scratch=true"])
    assert build.build_engine(config, target=target)[0] == "mine"
    assert "from_scratch" not in caplog.text
    assert load_models.starting_draft(config, target)[1] == load_models.UNTRAINED_VERSION, (
        "a server's learner trains it"
    )
    assert f"draft.checkpoint={tmp_path / 'mine'} are not used" in caplog.text


@pytest.mark.parametrize("copies", [1, 3])
def test_slots_whose_keys_and_values_do_not_fit_into_memory_are_refused_and_others_are_not(
    copies: int, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte decides. The draft's keys and values count, those of every process that holds a part of the target, and
    the states that draft and traces are made of.

    `copies`: of the one head that this process holds, in all processes.
    """
    assert target.num_kv_heads == 1
    monkeypatch.setattr(type(target), "all_kv_heads", property(lambda _: copies))
    settings = ["engine.max_batch_size=3", "engine.max_seq_len=256"]
    more = ["target.precision=fp32", "draft.checkpoint=null", "learn.from_scratch=true"]
    config = load_config(None, [*settings, *more])
    monkeypatch.setattr(build, "Engine", lambda *_, **__: "an engine")
    of_target = KVCache(num_layers=4, num_slots=3, num_kv_heads=1, head_dim=target.head_dim, capacity=320)
    heads = target.hidden_size // target.head_dim
    of_draft = KVCache(num_layers=1, num_slots=3, num_kv_heads=heads, head_dim=target.head_dim, capacity=320)
    capacity = slot_capacity(config.engine, config.memory)
    states = 3 * capacity * target.hidden_size
    observer: Any = TraceRecorder(lambda _: None, hidden_size=target.hidden_size)
    of_features, of_last = 3 * states * target.kv_dtype.itemsize, 2 * states
    for watches, of_states in ((None, of_features), (observer, of_features + of_last)):
        needed = copies * num_bytes(of_target) + num_bytes(of_draft) + of_states
        monkeypatch.setattr(build, "available_bytes", lambda: needed)  # noqa: B023
        assert build._engine(config, target, tiny_tokenizer(), observer=watches) == "an engine"
        monkeypatch.setattr(build, "available_bytes", lambda: needed - 1)  # noqa: B023
        told = r"engine.max_batch_size=3, engine.max_seq_len=256: .* [0-9.]+ GiB .*; lower one of the two"
        with pytest.raises(ConfigError, match=told):
            build._engine(config, target, tiny_tokenizer(), observer=watches)


def num_bytes(cache: KVCache) -> int:
    return sum(tensor.nbytes for tensor in (*cache.keys_SGCQPE, *cache.values_SGMDE))


def test_memory_that_the_system_does_not_reserve_is_told_with_the_settings(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it promises no more than there is, or to this process (`ulimit -v`)."""

    def refuse(error: BaseException) -> None:
        monkeypatch.setattr("mmap.mmap", Mock(side_effect=error))

    config = load_config(None, ["engine.max_batch_size=64", "draft.checkpoint=null", "learn.enabled=false"])
    with pytest.raises(RuntimeError, match="can't allocate memory") as of_torch:
        torch.empty(1 << 55, dtype=torch.uint8)
    told = r"max_batch_size=64, engine.max_seq_len=2048: .* no memory .*; lower one"
    for error in (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), of_torch.value):
        refuse(error)
        with pytest.raises(ConfigError, match=told):
            build._engine(config, target, tiny_tokenizer(), observer=None)
    for error in (PermissionError(errno.EPERM, os.strerror(errno.EPERM)), RuntimeError("another")):
        refuse(error)
        with pytest.raises(type(error)):
            build._engine(config, target, tiny_tokenizer(), observer=None)


def test_structured_outputs_are_served_though_the_tokenizer_has_a_token_more_than_the_target(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    target = load_target(save_model("llama", tmp_path, vocab_size=len(tokenizer)), precision="fp32")
    tokenizer.backend_tokenizer.add_special_tokens(["<|image|>"])
    settings = ["draft.checkpoint=null", "learn.enabled=false"]
    sizes = ["engine.max_seq_len=64"]
    engine = build._engine(load_config(None, [*settings, *sizes]), target, tokenizer, observer=None)
    asked = request("a", (1, 2, 3), structured_outputs=StructuredOutputsParams(choice=("a",)))
    assert tokenizer.decode(run(engine, [asked])["a"].token_ids) == "a<|end|>"


@pytest.mark.parametrize("strategy", ["single", "tensor_parallel"])
def test_a_sharded_target_makes_its_grammars_tokenizers_before_it_is_watched(
    strategy: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[bool]()
    monkeypatch.setattr(build.GrammarCompiler, "prepare", lambda self: made.append(True))
    monkeypatch.setattr(build, "Engine", lambda *_, **__: "an engine")
    is_sharded = strategy != "single"
    settings = ["target.precision=fp32", "draft.checkpoint=null", "learn.enabled=false", f"engine.strategy={strategy}"]
    config = load_config(None, [*settings, f"engine.devices={2 if is_sharded else 1}"])
    build._engine(config, target, tiny_tokenizer(), observer=None)
    assert made == [True] * is_sharded


def test_the_shape_of_another_targets_draft_is_refused_too(target: Target, tmp_path: Path) -> None:
    other = load_target(save_model("llama", tmp_path / "other", hidden_size=96, num_hidden_layers=4), precision="fp32")
    save_draft(random_draft(other), tmp_path / "theirs")
    config = load_config(None, [f"draft.checkpoint={tmp_path / 'theirs'}", "learn.from_scratch=true"])
    with pytest.raises(CheckpointError, match=r"draft.checkpoint: .*hidden_size is 96, but the target needs 64; train"):
        load_models.starting_draft(config, target)


def test_a_folder_in_which_another_server_records_is_refused(tmp_path: Path) -> None:
    config = load_config(None, [f"trace.record={tmp_path / 'traces'}", "draft.checkpoint=null", "learn.enabled=false"])
    sinks = build._sinks(config, tmp_path)
    with pytest.raises(ConfigError, match="trace.record=.*traces: another process writes there; name another folder"):
        build._sinks(config, tmp_path)
    sinks.close()
    build._sinks(config, tmp_path).close()


@pytest.mark.skipif(native.library() is None, reason="needs kernels")
def test_a_server_keeps_its_memory_where_one_is_named_and_no_other_server_uses_it(
    target: Target, tmp_path: Path
) -> None:
    settings = [f"target.source={tmp_path / 'target'}", "draft.checkpoint=null", "learn.enabled=false"]
    keep = tmp_path / "memory"

    def config(*more: str) -> AuroraConfig:
        return load_config(None, [*settings, "memory.capacity_mb=1", *more])

    engine = make_engine(target, copied_tokens=15, memory_scope="domain")
    assert build._kept_answers(config(), engine) is None
    assert build._kept_answers(config(f"memory.keep={keep}"), make_engine(target)) is None
    assert not keep.exists()
    kept = build._kept_answers(config(f"memory.keep={keep}"), engine)
    assert kept is not None
    with pytest.raises(ConfigError, match="memory.keep=.*memory: another process writes there; name another folder"):
        build._kept_answers(config(f"memory.keep={keep}"), engine)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="memory.keep=.*file cannot be used .* name a folder that can be made"):
        build._kept_answers(config(f"memory.keep={tmp_path / 'file'}"), engine)
    run(engine, [request("a", [5, 6, 7], max_tokens=24)])
    kept.close()
    again = make_engine(target, copied_tokens=15, memory_scope="domain")
    kept = build._kept_answers(config(f"memory.keep={keep}"), again)
    assert kept is not None
    while not kept.is_read:
        time.sleep(0.001)
    kept.close()
    assert again.memory is not None
    assert engine.memory is not None
    assert again.memory.index.counts == engine.memory.index.counts != (0, 0)
