"""Draft checkpoints: the layout other servers load, complete after a crash, refused with a reason if invalid."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCAB, random_draft, save_model

from aurora_lit.drafts import checkpoint as checkpoint_module
from aurora_lit.drafts.checkpoint import load_draft, save_draft
from aurora_lit.durable import exchange
from aurora_lit.errors import CheckpointError
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

H, V, VD, HEADS, GROUPS, DIM, WIDE = 64, VOCAB, VOCAB - 3, 2, 1, 32, 80
SHAPES = {
    "fc.weight": (H, 3 * H),
    "midlayer.input_layernorm.weight": (H,),
    "midlayer.hidden_norm.weight": (H,),
    "midlayer.post_attention_layernorm.weight": (H,),
    "midlayer.self_attn.q_proj.weight": (HEADS * DIM, 2 * H),
    "midlayer.self_attn.k_proj.weight": (GROUPS * DIM, 2 * H),
    "midlayer.self_attn.v_proj.weight": (GROUPS * DIM, 2 * H),
    "midlayer.self_attn.o_proj.weight": (H, HEADS * DIM),
    "midlayer.mlp.gate_proj.weight": (WIDE, H),
    "midlayer.mlp.up_proj.weight": (WIDE, H),
    "midlayer.mlp.down_proj.weight": (H, WIDE),
    "norm.weight": (H,),
    "lm_head.weight": (VD, H),
    "d2t": (VD,),
    "t2d": (V,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": H,
    "target_hidden_size": H,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "vocab_size": V,
    "draft_vocab_size": VD,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
    "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_model("llama", tmp_path_factory.mktemp("llama")), precision="fp32")


@pytest.fixture
def saved(target: Target, tmp_path: Path) -> Path:
    save_draft(random_draft(target), tmp_path / "draft")
    return tmp_path / "draft"


def test_the_layout_is_the_one_other_servers_load(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert {name: t.dtype for name, t in tensors.items() if t.dtype != torch.bfloat16} == {
        "d2t": torch.int64,
        "t2d": torch.bool,
    }
    assert json.loads((saved / "config.json").read_text()) == CONFIG
    assert [i + offset for i, offset in enumerate(tensors["d2t"].tolist())] == [
        i for i in range(VOCAB) if i not in (0, 5, 6)
    ]
    assert sorted(path.name for path in saved.parent.rglob("*")) == [
        "config.json",
        "draft",
        "manifest.json",
        "model.safetensors",
        "value_head.safetensors",
    ]


def test_a_whole_vocabulary_has_no_maps_which_vllm_would_refuse(target: Target, tmp_path: Path) -> None:
    """vllm/model_executor/models/llama_eagle3.py has a parameter for `d2t` only if the vocabularies differ."""
    whole = Eagle3Draft(replace(random_draft(target).config, draft_vocab_size=V))
    save_draft(whole, tmp_path / "whole")
    assert set(load_file(tmp_path / "whole" / "model.safetensors")) == set(SHAPES) - {"d2t", "t2d"}
    assert load_draft(tmp_path / "whole", target).draft_token_ids.tolist() == list(range(V))
    whole.set_vocabulary(torch.arange(V).flip(0))  # in another order they are needed
    save_draft(whole, tmp_path / "flipped")
    assert load_draft(tmp_path / "flipped", target).draft_token_ids.tolist() == list(range(V))[::-1]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_a_draft_s_files_can_be_read_by_whom_umask_lets(umask: int, mode: int, target: Target, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_draft(random_draft(target), tmp_path / "draft")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "draft").iterdir()} == {mode}


def test_in_8_bits_matrices_are_kept_to_half_a_step_in_half_the_bytes(target: Target, tmp_path: Path) -> None:
    draft, folder = random_draft(target), tmp_path / "draft"
    save_draft(draft, folder, dtype=torch.int8)
    stored = load_file(folder / "model.safetensors")
    assert all(stored[name].dtype == torch.int8 for name, shape in SHAPES.items() if len(shape) == 2)
    back = load_draft(folder, target).state_dict()
    for name in stored.keys() & SHAPES.keys() - {"d2t", "t2d"}:
        tensor = draft.state_dict()[name]
        step = stored[f"{name}_scale"][:, None] if f"{name}_scale" in stored else torch.zeros(())
        # Half a step, and bf16's own rounding of what was stored in bf16, or is read back.
        assert bool(((back[name] - tensor).abs() <= step / 2 + tensor.abs() * 2**-8).all()), name
    (folder / "manifest.json").unlink()
    save_file(
        {name: tensor for name, tensor in stored.items() if name != "fc.weight_scale"}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="fc.weight_scale are not its scales"):
        load_draft(folder, target)


def test_a_round_trip_keeps_every_tensor(target: Target, tmp_path: Path) -> None:
    draft = random_draft(target)
    save_draft(draft, tmp_path / "draft", dtype=torch.float32)
    back = load_draft(tmp_path / "draft", target)
    assert back.config == draft.config
    assert back.state_dict().keys() == draft.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, draft.state_dict()[name]), name


def test_a_draft_without_value_head_and_manifest_is_accepted(target: Target, saved: Path) -> None:
    (saved / "value_head.safetensors").unlink()
    (saved / "manifest.json").unlink()
    config = json.loads((saved / "config.json").read_text())
    del config["eagle_aux_hidden_state_layer_ids"], config["target_hidden_size"]
    (saved / "config.json").write_text(json.dumps(config))
    assert load_draft(saved, target).value_head.weight.abs().max() == 0


def edit_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        (folder / "manifest.json").unlink()

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        (folder / "manifest.json").unlink()

    return edit


def put_in_config(**changes: Any) -> Callable[[Path], None]:
    """As `edit_config`, but None is written as null."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        (folder / "manifest.json").unlink()

    return edit


def truncate(name: str, *, manifest: bool) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])
        if not manifest:
            (folder / "manifest.json").unlink()

    return edit


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(content)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "config.json cannot be read"),
    "truncated": (truncate("model.safetensors", manifest=True), "model.safetensors does not match manifest.json"),
    "truncated, no manifest": (truncate("model.safetensors", manifest=False), "model.safetensors cannot be read"),
    "truncated config": (truncate("config.json", manifest=False), "config.json cannot be read"),
    "truncated value head": (truncate("value_head.safetensors", manifest=False), "value_head.safetensors cannot"),
    "a flipped byte": (flip_a_byte, "model.safetensors does not match manifest.json"),
    "a file gone": (lambda folder: (folder / "value_head.safetensors").unlink(), "does not match manifest.json"),
    "a garbled manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "not a JSON object"),
    "NaN": (edit_tensors(lambda t: t["fc.weight"][3].fill_(torch.nan)), "fc.weight holds NaN"),
    "infinity": (edit_tensors(lambda t: t["norm.weight"][3].fill_(torch.inf)), "norm.weight holds NaN or inf"),
    "wrong shape": (
        edit_tensors(lambda t: t.update({"fc.weight": torch.zeros(64, 64)})),
        r"fc.weight has shape \(64, 64\)",
    ),
    "a tensor missing": (edit_tensors(lambda t: t.pop("norm.weight")), r"missing: \['norm.weight'\]"),
    "a tensor too many": (edit_tensors(lambda t: t.update(x=torch.zeros(1))), r"unknown: \['x'\]"),
    "other layers": (
        edit_config(eagle_aux_hidden_state_layer_ids=[1, 3, 5]),
        r"layer_ids is \(1, 3, 5\).*needs \(2, 3, 4\)",
    ),
    "other vocabulary": (edit_config(vocab_size=V + 1), f"vocab_size is {V + 1}.*needs {V}"),
    "other hidden size": (edit_config(target_hidden_size=128), "target_hidden_size is 128.*needs 64"),
    "another head count": (edit_config(num_key_value_heads=2), "k_proj.weight has shape"),
    "another architecture": (edit_config(architectures=["LlamaForCausalLM"]), "architectures is"),
    "no layers": (
        edit_config(eagle_aux_hidden_state_layer_ids=None, eagle_config={}),
        "add eagle_aux_hidden_state_layer_ids to config.json",
    ),
    "a field missing": (edit_config(rms_norm_eps=None), "a field of config.json is missing or invalid.*rms_norm_eps"),
    "words for numbers": (edit_config(head_dim="many"), "a field of config.json is missing or invalid.*many"),
    "infinity for a number": (
        put_in_config(intermediate_size=float("inf")),
        "invalid: intermediate_size is inf; give a",
    ),
    "endless digits": (put_in_config(rms_norm_eps=10**400), "invalid: rms_norm_eps is 1000"),
    "a negative size": (put_in_config(intermediate_size=-1), "no draft can have the sizes in config.json"),
    "more than the vocabulary": (put_in_config(draft_vocab_size=V + 1), "no draft can have the sizes in config.json"),
    "null for a number": (
        put_in_config(draft_vocab_size=None),
        "a field of config.json is missing or invalid: draft_vocab_size is None; give a number",
    ),
    "two layers": (
        edit_config(eagle_aux_hidden_state_layer_ids=[2, 3]),
        r"eagle_aux_hidden_state_layer_ids is \[2, 3\]; .* reads three layers",
    ),
    "five layers, as SGLang names them": (
        edit_config(
            eagle_aux_hidden_state_layer_ids=None, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3, 4]}
        ),
        r"eagle_config.eagle_aux_hidden_state_layer_ids is \[0, 1, 2, 3, 4\]; .* reads three layers",
    ),
    "a layer that is no list": (
        edit_config(eagle_aux_hidden_state_layer_ids="2,3,4"),
        "eagle_aux_hidden_state_layer_ids is '2,3,4'; .* reads three layers",
    ),
    "layers that are words": (
        edit_config(eagle_aux_hidden_state_layer_ids=["low", "mid", "high"]),
        "eagle_aux_hidden_state_layer_ids is .'low', 'mid', 'high'.; .* reads three layers",
    ),
    "a list of rotations": (edit_config(rope_parameters=[1]), r"rope_parameters is \[1\]; give a JSON object"),
    "a scaling that is a word": (edit_config(rope_scaling="x"), "rope_scaling is 'x'; give a JSON object"),
    "a list for eagle_config": (edit_config(eagle_config=[1]), r"eagle_config is \[1\]; give a JSON object"),
    "d2t out of range": (edit_tensors(lambda t: t["d2t"].fill_(V)), "d2t does not name distinct tokens"),
    "d2t twice the same": (edit_tensors(lambda t: t["d2t"][1].sub_(1)), "d2t does not name distinct tokens"),
    "t2d of another draft": (edit_tensors(lambda t: t["t2d"].roll(1, 0) is t["t2d"].fill_(True)), "disagree"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_invalid_draft_is_refused_with_the_reason(name: str, target: Target, saved: Path) -> None:
    spoil, reason = REFUSALS[name]
    load_draft(saved, target)
    spoil(saved)
    with pytest.raises(CheckpointError, match=f"draft.checkpoint: .*refused: .*{reason}"):
        load_draft(saved, target)


def test_a_read_that_fails_is_a_refusal(target: Target, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_module, "_sha256", broken)
    with pytest.raises(CheckpointError, match="draft.checkpoint: .*refused: it cannot be read: .*Input/output error"):
        load_draft(saved, target)


@pytest.mark.parametrize("call", range(7))
def test_a_crash_while_saving_leaves_the_old_draft_complete(
    call: int, target: Target, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash before either tensor file (0, 1), a digest (2, 3, 4), the move (5), or the exchange of names (6)."""
    old: Eagle3Draft = load_draft(saved, target)
    calls = iter(range(100))

    def breaking(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*args, **options)

        return wrapped

    monkeypatch.setattr(checkpoint_module, "save_file", breaking(checkpoint_module.save_file))
    monkeypatch.setattr(checkpoint_module, "_sha256", breaking(checkpoint_module._sha256))
    monkeypatch.setattr(checkpoint_module, "_replace_folder", breaking(checkpoint_module._replace_folder))
    monkeypatch.setattr(checkpoint_module, "exchange", breaking(checkpoint_module.exchange))
    with pytest.raises(KeyboardInterrupt):
        save_draft(random_draft(target, seed=9), saved)
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == ["draft"]
    for name, tensor in load_draft(saved, target).state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name])


def test_a_disk_that_takes_no_more_is_an_os_error_and_the_older_draft_stays(target: Target, saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written") as raised:
            save_draft(random_draft(target), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename, "so that a command prints it on one line"
    assert (saved / "model.safetensors").read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_names_are_exchanged_atomically_or_not_at_all(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "file").touch()
    assert not exchange(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    other.mkdir()
    assert exchange(one, other)
    assert (other / "file").exists()
    assert list(one.iterdir()) == []


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_newer_draft_replaces_the_older(
    exchanging: bool, target: Target, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exchanging:
        monkeypatch.setattr(checkpoint_module.os, "replace", None)  # would leave an instant without a draft
    else:
        monkeypatch.setattr(checkpoint_module, "exchange", lambda *_: False)
    newer = random_draft(target, seed=9)
    save_draft(newer, saved, dtype=torch.float32)
    monkeypatch.undo()
    assert torch.equal(load_draft(saved, target).fc.weight, newer.fc.weight)
    assert [path.name for path in saved.parent.iterdir()] == ["draft"]


def test_a_folder_with_anything_but_a_draft_is_not_replaced(
    target: Target, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, mine = random_draft(target), tmp_path / "mine"
    mine.mkdir()
    save_draft(draft, mine)  # it was empty
    for config in (None, "{", json.dumps({"architectures": ["LlamaForCausalLM"]})):
        (mine / "config.json").unlink()
        if config is not None:
            (mine / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match="mine holds files, but no draft .* name a new folder"):
            save_draft(draft, mine)
        assert (mine / "model.safetensors").exists()
        (mine / "config.json").touch()
    monkeypatch.chdir(saved)
    with pytest.raises(CheckpointError, match=". is the present folder"):
        save_draft(draft, Path("."))
