"""Fused decoder layers: only for plain Llama forms, equal to the model's own, and independent of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, VOCAB, reference_model, save_model

from aurora_lit.kernels import native
from aurora_lit.models.target import Target

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0"),
    pytest.mark.usefixtures("two_threads"),
]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "attention_factor": 1.4,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 2}),
        ("llama3", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": YARN}),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_models_of_the_plain_form_are_fused_with_the_same_outputs(
    family: str, changes: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    target = Target.load(save_model(family, tmp_path, **changes), precision=precision)
    assert target._decoder is not None
    ids_BT = torch.arange(22).remainder(VOCAB).view(2, 11)
    fused_outputs = run(target, ids_BT, starts=[0, 0])
    target._decoder = None
    expected = run(target, ids_BT, starts=[0, 0])
    for a, b in zip(fused_outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * (1e-5 if precision == "fp32" else 3e-2))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 24}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
        ("mistral", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("mixtral", {}),
        ("gpt2", {}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_models_of_other_forms_are_not_fused(
    family: str, changes: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    target = Target.load(save_model(family, tmp_path, num_hidden_layers=3, **changes), precision=precision)
    assert target._decoder is None


@torch.no_grad()
@pytest.mark.parametrize("rope", [FAMILIES["llama3"][1]["rope_parameters"], YARN], ids=["llama3", "yarn"])
def test_scaled_rotary_embeddings_give_the_logits_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    """Also beyond the length that the model was first trained with, here 32."""
    folder = save_model("llama", tmp_path, rope_parameters=rope)
    target = Target.load(folder, precision="fp32")
    assert target.supports_trees
    ids_BT = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    ours_BTV = target.logits(run(target, ids_BT, starts=[0, 0])[1])
    expected_BTV = reference_model(folder)(input_ids=ids_BT).logits
    torch.testing.assert_close(ours_BTV, expected_BTV, rtol=0, atol=1e-4 * float(expected_BTV.abs().max()))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_model_whose_layers_compute_something_else_is_not_fused(factor: float, tmp_path: Path) -> None:
    target = Target.load(save_model("llama", tmp_path), precision="fp32")
    target._decoder = None
    mlp = target.model.base_model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, out: out * factor)
    assert not target.fuse_layers()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_no_bit_depends_on_the_batch_or_the_chunks(precision: str, tmp_path: Path) -> None:
    target = Target.load(save_model("llama", tmp_path), precision=precision)
    assert target._decoder is not None
    ids_BT = torch.randint(VOCAB, (5, 37), generator=torch.Generator().manual_seed(0))
    aux, last = run(target, ids_BT, starts=[0] * 5)
    kv_cache = target.make_kv_cache(num_slots=5, capacity=64)
    at = 0
    for size in (1, 5, 17, 1, 13):
        for row in (3, 0):
            part = target.forward(
                ids_BT[row : row + 1, at : at + size],
                kv_cache=kv_cache,
                slots_B=torch.tensor([row]),
                starts_B=torch.tensor([at]),
            )
            assert torch.equal(part[0][0], aux[row, at : at + size])
            assert torch.equal(part[1][0], last[row, at : at + size])
        at += size


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_no_bit_of_a_prompt_or_a_decoding_row_depends_on_the_other(
    precision: str, num_threads: int, tmp_path: Path
) -> None:
    target = Target.load(save_model("llama", tmp_path), precision=precision)
    gen = torch.Generator().manual_seed(0)
    prompt_1T, decoding_BT = torch.randint(VOCAB, (1, 61), generator=gen), torch.randint(VOCAB, (2, 5), generator=gen)
    decoding_B, zero_B = torch.tensor([0, 1]), torch.tensor([0, 0])
    zero_1 = torch.tensor([0])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        kv_cache = target.make_kv_cache(num_slots=3, capacity=64)
        decoded = target.forward(decoding_BT, kv_cache=kv_cache, slots_B=decoding_B, starts_B=zero_B)
        kv_cache = target.make_kv_cache(num_slots=1, capacity=64)
        where = {"slots_B": zero_1, "starts_B": zero_1}
        whole = target.forward(prompt_1T, kv_cache=kv_cache, num_prompts=1, **where)
        for sizes in ([17, 44], [1, 5, 16, 39], [33, 28]):
            kv_cache = target.make_kv_cache(num_slots=3, capacity=64)
            at = 0
            for size in sizes:
                chunk = prompt_1T[0, at : at + size]
                aux, last = target.forward_ragged(
                    torch.cat([decoding_BT.flatten(), chunk]),
                    widths=[5, 5, size],
                    kv_cache=kv_cache,
                    slots_B=torch.tensor([0, 1, 2]),
                    starts_B=torch.tensor([0, 0, at]),
                    num_prompts=1,
                )
                for ours, alone, of_prompt in zip((aux, last), decoded, whole, strict=True):
                    assert torch.equal(ours[:10], alone.flatten(0, 1)), "a decoding row beside a prompt"
                    assert torch.equal(ours[10:], of_prompt[0, at : at + size]), "a prompt in chunks, beside others"
                at += size
    finally:
        torch.set_num_threads(before)


def test_a_new_cache_at_the_address_of_an_old_one_is_recognised(tmp_path: Path) -> None:
    target = Target.load(save_model("llama", tmp_path), precision="fp32")
    ids_BT = torch.tensor([[1, 2, 3, 4]])
    expected = run(target, ids_BT, starts=[0])
    for _ in range(20):
        torch.testing.assert_close(run(target, ids_BT, starts=[0]), expected, rtol=0, atol=0)


@torch.no_grad()
def test_rotary_tables_are_as_long_as_the_longest_slot_and_not_as_the_model(tmp_path: Path) -> None:
    target = Target.load(save_model("llama", tmp_path, max_position_embeddings=1 << 20), precision="fp32")
    assert target.decoder is not None
    kv_cache, where = target.make_kv_cache(num_slots=1, capacity=64), {"slots_B": torch.tensor([0])}
    ids_BT = torch.randint(VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    before = target.forward(ids_BT[:, :40], kv_cache=kv_cache, starts_B=torch.tensor([0]), **where)[1]
    assert len(target.decoder._cosines_PD) == 64
    longer = target.make_kv_cache(num_slots=1, capacity=200)
    last_BTH = target.forward(ids_BT, kv_cache=longer, starts_B=torch.tensor([0]), **where)[1]
    assert len(target.decoder._cosines_PD) == 256, "whole blocks of keys"
    expected_BTH = target.forward_uncached(ids_BT)[1]
    torch.testing.assert_close(last_BTH, expected_BTH, rtol=0, atol=1e-5 * float(expected_BTH.abs().max()))
    again = target.forward(ids_BT[:, :40], kv_cache=kv_cache, starts_B=torch.tensor([0]), **where)[1]
    assert torch.equal(again, before), "the shorter cache is used as before"


def test_moves_in_another_cache_do_not_disturb_the_next_pass(tmp_path: Path) -> None:
    """What a pass points to is kept for the next pass over the same cache."""
    target = Target.load(save_model("llama", tmp_path), precision="fp32")
    kv_cache, other = (target.make_kv_cache(num_slots=1, capacity=64) for _ in range(2))
    zero = torch.tensor([0])
    expected = run(target, torch.arange(1, 9)[None], starts=[0])[1]
    reused = []  # memory that is free again gets other contents
    for t in range(8):
        ids_11, starts_1 = torch.tensor([[t + 1]]), torch.tensor([t])
        _, last_11H = target.forward(ids_11, kv_cache=kv_cache, slots_B=zero, starts_B=starts_1)
        torch.testing.assert_close(last_11H[0, 0], expected[0, t], rtol=0, atol=0)
        target.commit_tree_path(kv_cache=other, slot=0, froms=[40], tos=[41])
        reused += [bytearray(b"\xff" * size) for size in range(64, 4096, 8)]


def run(target: Target, ids_BT: torch.Tensor, *, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward pass over a new cache."""
    kv_cache = target.make_kv_cache(num_slots=len(starts), capacity=64)
    return target.forward(ids_BT, kv_cache=kv_cache, slots_B=torch.arange(len(starts)), starts_B=torch.tensor(starts))
