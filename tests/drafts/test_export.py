"""Export writes exactly EAGLE-3's layout; the tests read it without the package's own loader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.tiny_models import random_draft
from torch.nn import functional as F

from aurora_lit.cli.main import main
from aurora_lit.drafts.checkpoint import load_draft, read_config, save_draft
from aurora_lit.drafts.export import loadable
from aurora_lit.drafts.store import DraftStore
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

H, V, N, G, L = 64, 61, 2, 1, 7


def a_draft(seed: int = 0) -> Eagle3Draft:
    target = SimpleNamespace(hidden_size=H, vocab_size=V, aux_layer_ids=(2, L // 2, L - 3))
    return random_draft(target, seed=seed)  # type: ignore[arg-type]


@pytest.fixture
def deployment(tmp_path: Path) -> list[str]:
    """A starting draft and two published versions, of which the second is current."""
    save_draft(a_draft(0), tmp_path / "start", dtype=torch.float32)
    store = DraftStore(tmp_path / "checkpoints" / "live", keep=5)
    for seed in (1, 2):
        store.publish(a_draft(seed), record={"score": 1.0})
    return [f"checkpoint.dir={tmp_path / 'checkpoints'}", f"draft.checkpoint={tmp_path / 'start'}"]


def exported(out: Path, *words: str) -> dict[str, torch.Tensor]:
    done = CliRunner().invoke(main, ["export", "--out", str(out), *words])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    return load_file(out / "model.safetensors")


def test_the_files_are_those_of_a_published_draft(deployment: list[str], tmp_path: Path) -> None:
    """Whose layout test_checkpoint.py spells out."""
    published, out = tmp_path / "checkpoints" / "live" / "draft-000002", tmp_path / "out"
    tensors, own = exported(out, *deployment), load_file(published / "model.safetensors")
    assert tensors.keys() == own.keys() > {"d2t", "t2d", "lm_head.weight"}
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((published / "config.json").read_text())
    # vLLM takes the input of these layers, SGLang the output.
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, L // 2, L - 3]
    assert [layer + 1 for layer in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]] == [2, L // 2, L - 3]
    assert config["eagle_config"]["use_aux_hidden_state"] is True


def test_maps_of_a_whole_vocabulary_are_left_out(tmp_path: Path) -> None:
    """Drafts of before have them, and vLLM would refuse them (vllm/model_executor/models/llama_eagle3.py)."""
    whole = Eagle3Draft(replace(a_draft().config, draft_vocab_size=V))
    save_draft(whole, tmp_path / "start")
    weights = tmp_path / "start" / "model.safetensors"
    published = load_file(weights)
    save_file(published | {"d2t": whole.d2t, "t2d": whole.t2d}, weights)
    (tmp_path / "start" / "manifest.json").unlink()
    settings = [f"checkpoint.dir={tmp_path / 'none'}", f"draft.checkpoint={tmp_path / 'start'}"]
    assert set(exported(tmp_path / "out", *settings)) == set(published)


def test_a_draft_in_8_bits_is_written_in_bf16_for_other_engines(tmp_path: Path) -> None:
    start = tmp_path / "start"
    save_draft(a_draft(), start, dtype=torch.int8)
    settings = [f"checkpoint.dir={tmp_path / 'none'}", f"draft.checkpoint={start}"]
    tensors = exported(tmp_path / "out", *settings)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.int64, torch.bool}
    own = load_draft(start, read_config(start)).state_dict()
    assert all(torch.equal(tensor.to(own[name].dtype), own[name]) for name, tensor in tensors.items())
    for_vllm = load_file(loadable(start, tmp_path / "linked") / "model.safetensors")
    assert for_vllm.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in for_vllm.items())


def test_a_forward_pass_from_the_exported_tensors_equals_the_drafts(deployment: list[str], tmp_path: Path) -> None:
    """One position, which attends only to itself: normed embedding and normed hidden state, then the MLP."""
    w = exported(tmp_path / "out", "draft.checkpoint=null", *deployment[:1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    w = {name: tensor.float() for name, tensor in w.items()}
    embed_H, aux_3H = torch.randn(H), torch.randn(3 * H)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (H,), w[f"{name}.weight"], config["rms_norm_eps"])

    hidden_H = w["fc.weight"] @ aux_3H
    joined = torch.cat([norm(embed_H, "midlayer.input_layernorm"), norm(hidden_H, "midlayer.hidden_norm")])
    value = (w["midlayer.self_attn.v_proj.weight"] @ joined).repeat(N // G)
    hidden_H = hidden_H + w["midlayer.self_attn.o_proj.weight"] @ value
    x = norm(hidden_H, "midlayer.post_attention_layernorm")
    gated = F.silu(w["midlayer.mlp.gate_proj.weight"] @ x) * (w["midlayer.mlp.up_proj.weight"] @ x)
    hidden_H = hidden_H + w["midlayer.mlp.down_proj.weight"] @ gated
    logits = w["lm_head.weight"] @ norm(hidden_H, "norm")

    draft = load_draft(tmp_path / "out", read_config(tmp_path / "out"))
    own_hidden = draft.combine_hidden_states(aux_3H.view(1, 1, -1))
    _, _, value_BGTD = draft.project_qkv(embed_H.view(1, 1, -1), own_hidden, torch.tensor([[0]]))
    own = draft.compute_logits(
        draft.complete_layer(value_BGTD.repeat(1, N // G, 1, 1).transpose(1, 2).flatten(2), own_hidden)
    )
    torch.testing.assert_close(logits, own[0, 0], atol=1e-4, rtol=0)


def test_which_draft_is_exported(deployment: list[str], tmp_path: Path) -> None:
    def head(out: str, *words: str) -> torch.Tensor:
        return exported(tmp_path / out, *words)["lm_head.weight"].bfloat16()

    assert torch.equal(head("current", *deployment), a_draft(2).lm_head.weight.bfloat16())
    assert torch.equal(head("first", "--version", "1", *deployment), a_draft(1).lm_head.weight.bfloat16())
    elsewhere = [f"checkpoint.dir={tmp_path / 'none'}", deployment[1]]
    assert torch.equal(head("beginning", *elsewhere), a_draft(0).lm_head.weight.bfloat16())


def test_an_empty_working_directory_can_be_named_by_a_dot(
    deployment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = CliRunner().invoke(main, ["export", "--out", ".", *deployment])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_export_explains_itself_and_leaves_nothing(deployment: list[str], tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = CliRunner().invoke(main, ["export", "--out", str(tmp_path / "out"), *words])
        assert done.exit_code == 2
        return done.output

    assert "there is no" in said("--version", "9", *deployment)
    assert "name one with --version" in said(f"checkpoint.dir={tmp_path / 'none'}", "draft.checkpoint=null")
    (tmp_path / "start" / "model.safetensors").write_bytes(b"damaged")
    assert "is refused" in said(f"checkpoint.dir={tmp_path / 'none'}", deployment[1])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert "exists already" in said(*deployment)
    done = CliRunner().invoke(main, ["export", "--out", str(tmp_path / "out" / "mine" / "draft"), *deployment])
    assert "cannot be written" in done.output
    assert not list(tmp_path.glob(".out*"))
