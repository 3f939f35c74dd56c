"""Native layers: for the families of families.py, equal to the model's own, and independent of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_formats import pack_in_turn
from support.tiny_models import FAMILIES, VOCAB, reference_model, save_model
from torch import nn

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models import loading
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.models.native_target import NativeTarget, make_native
from aurora_lit.models.torch_target import TorchTarget

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0"),
    pytest.mark.usefixtures("two_threads"),
]
PRECISIONS = ("fp32", "bf16", "int8", "int4", "mixed")
"""The last: linear layers have 8, 6, 5 and 4 bits in turn, so that every matrix of a layer has each somewhere."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "attention_factor": 1.4,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def targets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeTarget]:
    """By precision, of a family whose attention has no norms, and of one that has."""
    folder = save_model(request.param, tmp_path_factory.mktemp(request.param))
    return {precision: load(folder, precision) for precision in PRECISIONS}


def load(folder: Path, precision: str) -> Target:
    if precision != "mixed":
        return load_target(folder, precision=precision)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "pack_model", pack_in_turn)
        return load_target(folder, precision="int4")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 2}),
        ("llama3", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": YARN}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 64, "attention_bias": True}),
    ],
)
def test_families_with_a_row_run_natively_with_the_same_outputs(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder, ids_BT = save_model(family, tmp_path, **changes), torch.arange(22).remainder(VOCAB).view(2, 11)
    for precision in PRECISIONS:
        target = load(folder, precision)
        assert isinstance(target, NativeTarget)
        assert target.in_torch is not None
        tolerance = 1e-5 if precision == "fp32" else 3e-2
        for a, b in zip(run(target, ids_BT), run(target.in_torch, ids_BT), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * tolerance)


def test_grouped_matrices_are_not_mixed_with_others(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path), precision="int4")
    layer = target.in_torch.model.base_model.layers[1].mlp
    linear = nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    layer.up_proj = PackedLinear(linear, WeightFormat.BF16)
    with pytest.raises(AssertionError, match="up is in bf16 beside matrices in int4: formats are mixed only if"):
        make_native(target.in_torch)


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_norms_of_queries_and_keys_each_count(norm: str, tmp_path: Path) -> None:
    """Their weights are those of the model: a layer without one of them would be another one."""
    folder, ids_BT = save_model("qwen3", tmp_path), torch.arange(22).remainder(VOCAB).view(2, 11)
    target = load_target(folder, precision="fp32")
    before = run(target, ids_BT)[1]
    for layer in target.in_torch.model.base_model.layers:
        weight = getattr(layer.self_attn, norm).weight
        weight *= torch.linspace(0.5, 2, len(weight))
    changed = make_native(target.in_torch)
    assert isinstance(changed, NativeTarget), changed
    assert float((run(changed, ids_BT)[1] - before).norm()) > 1e-2 * float(before.norm())


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"head_dim": 24}, "head_dim=24 is no multiple of 32"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "rope_type=dynamic",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}}, "a part of each head"),
        ("mistral", {}, "windows"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "windows"),
        ("gemma", {}, "no row for gemma"),
        ("mixtral", {}, "no row for mixtral"),
        ("gpt2", {}, "no row for gpt2"),
    ],
)
def test_models_of_other_forms_run_in_torch_and_say_why(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_model(family, tmp_path, num_hidden_layers=3, **changes)
    for precision in ("fp32", "int4"):
        target = load_target(folder, precision=precision)
        assert isinstance(target, TorchTarget)
        assert reason in target.why_not_native


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "rope"),
    [("llama", FAMILIES["llama3"][1]["rope_parameters"]), ("llama", YARN), ("qwen3", None)],
    ids=["llama3", "yarn", "qwen3"],
)
def test_native_logits_are_those_of_transformers(family: str, rope: dict[str, Any] | None, tmp_path: Path) -> None:
    """Of scaled rotary embeddings also beyond the length that the model was first trained with, here 32."""
    folder = save_model(family, tmp_path, **({} if rope is None else {"rope_parameters": rope}))
    target = load_target(folder, precision="fp32")
    assert target.has_native_decoder
    ids_BT = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    ours_BTV = target.logits(run(target, ids_BT)[1])
    expected_BTV = reference_model(folder)(input_ids=ids_BT).logits
    torch.testing.assert_close(ours_BTV, expected_BTV, rtol=0, atol=1e-4 * float(expected_BTV.abs().max()))
    assert torch.equal(ours_BTV.argmax(-1), expected_BTV.argmax(-1))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_model_whose_layers_compute_something_else_runs_in_torch(factor: float, tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path), precision="fp32").in_torch
    mlp = target.in_torch.model.base_model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, out: out * factor)
    assert "do not compute" in make_native(target)


def test_a_model_whose_layers_are_not_packed_runs_in_torch(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path), precision="fp32").in_torch
    target.in_torch.model.base_model.layers[1].mlp.up_proj = nn.Linear(64, 96)
    assert "not packed" in make_native(target)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_bit_depends_on_the_batch_or_the_chunks(precision: str, targets: dict[str, NativeTarget]) -> None:
    target = targets[precision]
    ids_BT = torch.randint(VOCAB, (5, 37), generator=torch.Generator().manual_seed(0))
    aux, last = run(target, ids_BT)
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
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_bit_of_a_prompt_or_a_decoding_row_depends_on_the_other(
    precision: str, num_threads: int, targets: dict[str, NativeTarget]
) -> None:
    target = targets[precision]
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
    target = load_target(save_model("llama", tmp_path), precision="fp32")
    ids_BT = torch.tensor([[1, 2, 3, 4]])
    expected = run(target, ids_BT)
    for _ in range(20):
        torch.testing.assert_close(run(target, ids_BT), expected, rtol=0, atol=0)


@torch.no_grad()
def test_rotary_tables_are_as_long_as_the_longest_slot_and_not_as_the_model(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path, max_position_embeddings=1 << 20), precision="fp32")
    kv_cache, where = target.make_kv_cache(num_slots=1, capacity=64), {"slots_B": torch.tensor([0])}
    ids_BT = torch.randint(VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    before = target.forward(ids_BT[:, :40], kv_cache=kv_cache, starts_B=torch.tensor([0]), **where)[1]
    assert len(target.decoder._cosines_PD) == 64
    longer = target.make_kv_cache(num_slots=1, capacity=200)
    last_BTH = target.forward(ids_BT, kv_cache=longer, starts_B=torch.tensor([0]), **where)[1]
    assert len(target.decoder._cosines_PD) == 256, "whole blocks of keys"
    expected_BTH = target.in_torch.forward_uncached(ids_BT)[1]
    torch.testing.assert_close(last_BTH, expected_BTH, rtol=0, atol=1e-5 * float(expected_BTH.abs().max()))
    again = target.forward(ids_BT[:, :40], kv_cache=kv_cache, starts_B=torch.tensor([0]), **where)[1]
    assert torch.equal(again, before), "the shorter cache is used as before"


def test_moves_in_another_cache_do_not_disturb_the_next_pass(tmp_path: Path) -> None:
    """What a pass points to is kept for the next pass over the same cache."""
    target = load_target(save_model("llama", tmp_path), precision="fp32")
    kv_cache, other = (target.make_kv_cache(num_slots=1, capacity=64) for _ in range(2))
    zero = torch.tensor([0])
    expected = run(target, torch.arange(1, 9)[None])[1]
    reused = []  # memory that is free again gets other contents
    for t in range(8):
        ids_11, starts_1 = torch.tensor([[t + 1]]), torch.tensor([t])
        _, last_11H = target.forward(ids_11, kv_cache=kv_cache, slots_B=zero, starts_B=starts_1)
        torch.testing.assert_close(last_11H[0, 0], expected[0, t], rtol=0, atol=0)
        target.commit_tree_path(kv_cache=other, slot=0, froms=[40], tos=[41])
        reused += [bytearray(b"\xff" * size) for size in range(64, 4096, 8)]


def run(target: Target, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward pass over a new cache."""
    rows = len(ids_BT)
    kv_cache = target.make_kv_cache(num_slots=rows, capacity=64)
    return target.forward(ids_BT, kv_cache=kv_cache, slots_B=torch.arange(rows), starts_B=torch.zeros(rows).long())
