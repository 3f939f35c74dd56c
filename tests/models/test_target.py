"""The target gives the logits and auxiliary hidden states of transformers, without a cache and over the KV cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.kernel_formats import rounded_inputs, stored_weight
from support.tiny_models import FAMILIES, VOCAB, reference_model, save_model

from aurora_lit.bench.reference import load_reference
from aurora_lit.cli.footprint import model_shape
from aurora_lit.config import load_config
from aurora_lit.distributed import Ranks
from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models import source as source_module
from aurora_lit.models.interface import CPU
from aurora_lit.models.loading import load_target
from aurora_lit.models.sharded_target import read_shard
from aurora_lit.models.source import cache_root, resolve
from aurora_lit.models.tokenizer import transformers_tokenizer
from aurora_lit.models.torch_target import aux_layer_ids
from aurora_lit.modules.sampling.choice import choose
from aurora_lit.request import SamplingParams
from aurora_lit.serve.worker import load_models

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
OF_EACH_KIND = ("llama", "gpt2", "phi", "gemma2", "cohere", "mixtral", "gpt_oss")
"""Families whose linear layers or heads differ in form: plain, transposed, with biases, soft caps, a scale, experts."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Outputs of transformers for some tokens."""

    folder: Path
    ids_BT: torch.Tensor
    logits_BTV: torch.Tensor
    hidden_LBTH: torch.Tensor

    def auxiliary(self, layers: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([self.hidden_LBTH[layer] for layer in layers], dim=-1)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folders = {family: save_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    return {family: reference(folder, tokens(3, 40)) for family, folder in folders.items()}


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no native kernels here")
    return str(request.param)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(folder: Path, ids_BT: torch.Tensor) -> Reference:
    out = reference_model(folder)(ids_BT, output_hidden_states=True)
    return Reference(folder=folder, ids_BT=ids_BT, logits_BTV=out.logits, hidden_LBTH=torch.stack(out.hidden_states))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_equal_transformers_without_a_cache_and_in_uneven_chunks_over_scattered_slots(
    family: str, references: dict[str, Reference], kernels: str
) -> None:
    expected = references[family]
    target = load_target(expected.folder, precision="fp32")
    assert target.aux_layer_ids == (2, 3, 4)
    expected_aux = expected.auxiliary((2, 3, 4))

    aux_BT3H, last_BTH = target.in_torch.forward_uncached(expected.ids_BT)
    torch.testing.assert_close(aux_BT3H, expected_aux, **TOLERANCE)
    torch.testing.assert_close(target.logits(last_BTH), expected.logits_BTV, **TOLERANCE)
    lse = TargetHead(target).log_sum_exp(last_BTH.flatten(0, 1), chunk=7)
    torch.testing.assert_close(lse, expected.logits_BTV.logsumexp(-1).flatten(), **TOLERANCE)

    kv_cache = target.make_kv_cache(num_slots=5, capacity=48)
    for cached in (*kv_cache.keys_SGCQPE, *kv_cache.values_SGMDE):
        cached.normal_()  # an earlier sequence may have left any values
    slots_B, starts = torch.tensor([4, 0, 2]), [0, 0, 0]

    def run(rows: list[int], size: int) -> None:
        at = [starts[row] for row in rows]
        chunk = torch.stack([expected.ids_BT[row, a : a + size] for row, a in zip(rows, at, strict=True)])
        aux, last = target(chunk, kv_cache=kv_cache, slots_B=slots_B[rows], starts_B=torch.tensor(at))
        for i, row in enumerate(rows):
            here = slice(at[i], at[i] + size)
            torch.testing.assert_close(aux[i], expected_aux[row, here], **TOLERANCE)
            torch.testing.assert_close(target.logits(last[i]), expected.logits_BTV[row, here], **TOLERANCE)
            starts[row] += size

    run([0], 17)
    run([1], 3)
    run([2, 0, 1], 1)
    run([0, 1, 2], 5)
    run([0, 2], 5)
    run([1, 0, 2], 4)
    # Rejection: keys and values beyond a sequence's length are overwritten.
    target(tokens(3, 6).flip(1), kv_cache=kv_cache, slots_B=slots_B, starts_B=torch.tensor(starts))
    run([0, 1, 2], 5)


def test_weights_are_packed_if_there_are_kernels(references: dict[str, Reference], kernels: str) -> None:
    target = load_target(references["llama"].folder, precision="fp32")
    packed = sum(isinstance(module, PackedLinear) for module in target.modules())
    assert packed == (7 * 7 + 1 if kernels == "native" else 0)


@torch.no_grad()
def test_bf16_is_close_and_keeps_a_bf16_cache(references: dict[str, Reference], kernels: str) -> None:
    expected = references["llama"]
    target = load_target(expected.folder, precision="bf16")
    kv_cache = target.make_kv_cache(num_slots=3, capacity=40)
    assert kv_cache.keys_SGCQPE[0].dtype == torch.bfloat16
    _, last = target(
        expected.ids_BT, kv_cache=kv_cache, slots_B=torch.tensor([1, 0, 2]), starts_B=torch.tensor([0, 0, 0])
    )
    difference = (target.logits(last) - expected.logits_BTV).abs()
    assert target.logits(last).dtype == torch.float32
    assert 1e-4 < difference.max() < 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "precision"),
    [(family, precision) for family in OF_EACH_KIND for precision in ("int4", "int8")],
)
def test_grouped_formats_give_the_outputs_of_the_model_with_rounded_weights_and_inputs(
    family: str, precision: str, references: dict[str, Reference]
) -> None:
    """Linear layers round their weights, the head's to 8 bits, and inputs; with an fp32 cache nothing else differs.

    The last bit of an input may decide how it is rounded, so each layer of the reference gets the target's very input
    once that was compared.
    """
    if native.library() is None:
        pytest.skip("no native kernels here")
    folder, ids_BT = references[family].folder, references[family].ids_BT
    target = load_target(folder, precision=precision).in_torch
    assert isinstance(target.head, PackedLinear)
    assert (target.kv_dtype, target.head.weight_format) == (torch.bfloat16, WeightFormat.INT8_SPLIT)
    target.kv_dtype = torch.float32
    inputs_of: dict[str, torch.Tensor] = {}
    for name, module in target.model.named_modules():
        if isinstance(module, PackedLinear):
            module.register_forward_pre_hook(partial(_note_input, inputs_of, name))
    kv_cache = target.make_kv_cache(num_slots=3, capacity=40)
    _, last = target(ids_BT, kv_cache=kv_cache, slots_B=torch.tensor([1, 0, 2]), starts_B=torch.tensor([0, 0, 0]))
    logits_BTV = target.logits(last)

    model = reference_model(folder)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone())  # a copy, because the embedding may be tied to it
    linears = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert linears.keys() == inputs_of.keys()
    for name, module in linears.items():
        weight_format = WeightFormat.INT8_SPLIT if module is head else WeightFormat(precision)
        module.weight.copy_(stored_weight(module.weight, weight_format))
        scale = getattr(model.config, "logit_scale", 1.0) if module is head else 1.0  # the target scales hidden states
        module.register_forward_pre_hook(partial(_compare_and_round, inputs_of[name], scale, weight_format))
    expected_BTV = model(ids_BT).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, **TOLERANCE)


def _note_input(inputs_of: dict[str, torch.Tensor], name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    inputs_of[name] = inputs[0].clone()


def _compare_and_round(
    given: torch.Tensor, scale: float, weight_format: WeightFormat, _: torch.nn.Module, inputs: tuple[torch.Tensor]
) -> torch.Tensor:
    """`given`: what the target's layer was given, `scale` times the reference's input."""
    torch.testing.assert_close(inputs[0].view_as(given), given / scale, **TOLERANCE)
    return (rounded_inputs(given, weight_format).float() / scale).view_as(inputs[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "byte_products", "chosen"),
    [
        ("int4", True, "int4"),
        ("int8", True, "int8"),
        ("bf16", True, "bf16"),
        ("int4", False, "bf16"),
        ("one other layer", True, "bf16"),
    ],
)
def test_auto_chooses_the_fewest_bits_that_change_no_weight(
    file: str, byte_products: bool, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.library() is None:
        pytest.skip("no native kernels here")
    monkeypatch.setattr(native, "has_byte_products", lambda: byte_products)
    model = reference_model(save_model("llama", tmp_path))
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if (
            type(module) is torch.nn.Linear
            and file != "bf16"
            and not (file == "one other layer" and "3.mlp.up" in name)
        ):
            has_8_bits = module is head or file == "int8"
            weight_format = WeightFormat.INT8_GROUPED if has_8_bits else WeightFormat.INT4_GROUPED
            module.weight.copy_(stored_weight(module.weight, weight_format))
    model.save_pretrained(tmp_path)
    model = load_target(tmp_path, precision="auto").in_torch.model
    formats = {name: m.weight_format for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert formats.pop("lm_head") is WeightFormat("int8_split" if chosen in ("int4", "int8") else chosen)
    assert set(formats.values()) == {WeightFormat(chosen)}


@pytest.mark.parametrize(
    ("precision", "has_onednn", "has_kernels", "expected"),
    [
        ("auto", False, False, torch.float32),
        ("auto", True, False, torch.bfloat16),
        ("auto", False, True, torch.bfloat16),
        ("bf16", False, False, torch.bfloat16),
    ],
)
def test_auto_is_fp32_where_torch_multiplies_bf16_in_a_plain_loop(
    precision: str,
    has_onednn: bool,
    has_kernels: bool,
    expected: torch.dtype,
    references: dict[str, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch for macOS is built without oneDNN; a prompt then takes ten times as long in bf16 as in fp32."""
    if has_kernels and native.library() is None:
        pytest.skip("no native kernels here")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    if not has_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    target = load_target(references["llama"].folder, precision=precision)
    assert target.kv_dtype == expected
    if not has_kernels:
        assert {parameter.dtype for parameter in target.parameters()} == {expected}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_grouped_formats_need_the_kernels(
    precision: str, references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(SourceError, match=f"target.precision={precision} needs the native kernels.*or use bf16"):
        load_target(references["llama"].folder, precision=precision)


@torch.no_grad()
def test_head_and_embedding_rows(references: dict[str, Reference], kernels: str) -> None:
    model = reference_model(references["llama"].folder)
    target = load_target(references["llama"].folder, precision="fp32")
    ids = torch.tensor([60, 3, 7])
    assert torch.equal(target.head_rows(ids), model.get_output_embeddings().weight[ids])
    assert torch.equal(target.embedding_rows(), model.get_input_embeddings().weight)


@torch.no_grad()
@pytest.mark.parametrize(("setting", "compiled"), [("on", True), ("off", False), ("auto", False)])
def test_the_forward_pass_is_compiled_only_if_the_setting_is_on(
    setting: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_passes = []

    class Compiled(torch.nn.Module):
        def __init__(self, module: torch.nn.Module, **_: object) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: object) -> object:
            compiled_passes.append(1)
            return self.module(**inputs)

    monkeypatch.setattr(torch, "compile", Compiled)  # the real one takes minutes
    folder = save_model("llama", tmp_path)
    settings = [
        f"target.source={folder}",
        "target.precision=fp32",
        "engine.max_seq_len=64",
        f"engine.compile={setting}",
    ]
    target, plain = load_models.load_target(load_config(None, settings)), load_target(folder, precision="fp32")
    batch = {"slots_B": torch.tensor([0]), "starts_B": torch.tensor([0])}
    ids_BT = torch.tensor([[1, 2, 3]])
    _, last_BTH = target(ids_BT, kv_cache=target.make_kv_cache(num_slots=1, capacity=8), **batch)
    _, expected_BTH = plain(ids_BT, kv_cache=plain.make_kv_cache(num_slots=1, capacity=8), **batch)
    assert (len(compiled_passes) == 1) == compiled
    torch.testing.assert_close(last_BTH, expected_BTH, **TOLERANCE)


def test_positions_beyond_a_learned_table_do_not_fail(tmp_path: Path) -> None:
    """Proposals of a sequence near its limit extend beyond it; they are computed, but never committed."""
    target = load_target(save_model("gpt2", tmp_path, n_positions=16), precision="fp32")
    kv_cache = target.make_kv_cache(num_slots=1, capacity=24)
    target(tokens(1, 5), kv_cache=kv_cache, slots_B=torch.tensor([0]), starts_B=torch.tensor([14]))


@pytest.mark.parametrize(
    ("layers", "ids"), [(30, (2, 15, 27)), (32, (2, 16, 29)), (7, (2, 3, 4)), (2, (1, 1, 0)), (1, (0, 0, 0))]
)
def test_aux_layer_ids(layers: int, ids: tuple[int, int, int]) -> None:
    assert aux_layer_ids(layers) == ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 64}, "vocab_size and the other sizes in config.json must"),
        ({"vocab_size": 64, "quantization_config": {"quant_method": "bitnet"}}, "sizes.*; name the model with weights"),
        ({"num_attention_heads": 3}, "size .64. is not a multiple of the number of attention heads"),
        ({"max_position_embeddings": None}, "'max_position_embeddings' expected int.*; name a folder"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "KeyError.*su.*; name a folder"),
        ({"quantization_config": {"quant_method": "higgs"}}, "HIGGS .* GPU.*; name the model with weights in bf16"),
        ({"eos_token_id": [3, [4]]}, r"eos_token_id=\[3, \[4\]\] in generation_config.json"),
    ],
)
def test_what_cannot_be_loaded_is_told_with_the_field_and_a_remedy(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = save_model("llama", tmp_path) / ("generation_config.json" if "eos_token_id" in changes else "config.json")
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**fields, **changes}))
    with pytest.raises(SourceError, match=f"^target.source: .*{message}"):
        load_target(tmp_path, precision="fp32")


@pytest.mark.parametrize("content", [None, "", "{}", '{"model_type": "bert"}', '{"model_type": "no such"}'])
def test_a_folder_that_is_not_a_model_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError, match=f"target.source: .*{tmp_path.name}"):
        load_target(tmp_path, precision="fp32")


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a tokenizer with Python code of their own, which leaves a file; a terminal that would say yes."""
    folder = tmp_path / "model"
    folder.mkdir()
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Own"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "no such", "auto_map": auto_map}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'was run')!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@pytest.mark.parametrize("caller", ["target", "shard", "tokenizer", "table", "partition", "reference"])
def test_a_models_own_python_code_is_never_run(
    caller: str, own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal."""
    config = load_config(None, [f"target.source={own_code}", "draft.checkpoint=null", "learn.enabled=false"])
    sharded = replace(config, engine=replace(config.engine, strategy="fsdp", devices=2))
    monkeypatch.setattr(load_models, "keep_tokenizer", lambda *_, **__: None)
    calls: dict[str, Callable[[], object]] = {
        "target": lambda: load_target(own_code, precision="fp32"),
        "shard": lambda: read_shard(
            own_code, precision="fp32", strategy="fsdp", ranks=cast(Ranks, SimpleNamespace(device=CPU))
        ),
        "tokenizer": lambda: transformers_tokenizer(own_code),
        "table": lambda: model_shape(config, own_code),
        "partition": lambda: load_models.prepare(sharded),
        "reference": lambda: load_reference(config, frozenset([1]), SamplingParams(max_tokens=1, temperature=0.0)),
    }
    with pytest.raises(SourceError, match="target.source.*code of their own are not supported; choose another model$"):
        calls[caller]()
    assert not (tmp_path / "was run").exists()


def test_quantised_weights_without_the_package_that_reads_them_are_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GPTQ transformers says so in an error of another class if one of its two packages is there."""
    monkeypatch.setitem(source_module._READERS, "gptq", ("no_such_package",))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(SourceError, match="quantised with gptq.* needs no_such_package; name the model"):
        load_target(tmp_path, precision="fp32")


def save_quantised(folder: Path, form: str, config: Mapping[str, object] | None = None) -> None:
    """Replace a model's linear weights by those of a checkpoint in `form`, and describe them in its config.json."""
    path, weights = folder / "model.safetensors", {}
    for name, value in load_file(folder / "model.safetensors").items():
        linear = name.removesuffix("_proj.weight")
        if linear == name:
            weights[name] = value
        elif form == "packed":
            weights |= {f"{linear}_proj.{part}": value.to(torch.int32) for part in ("qweight", "qzeros", "scales")}
        elif form == "int8":
            weights |= {name: (value * 127).to(torch.int8), f"{name}_scale": torch.tensor(1 / 127)}
        elif form == "fp8":
            weights |= {name: (value * 100).to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(0.01)}
        else:  # one scale for each block of 16 x 16
            rows, columns = (size // 16 for size in value.shape)
            scale = torch.full((rows, columns), 0.01)
            weights |= {name: (value * 100).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(weights, path, metadata={"format": "pt"})
    if config is not None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))


@pytest.mark.parametrize(
    ("family", "form", "config"),
    [
        ("llama", "fp8", {"quant_method": "fp8", "activation_scheme": "static"}),
        ("llama", "fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ("llama", "fp8", None),
        ("qwen3_moe", "fp8", None),  # the files hold experts one by one
        ("llama", "int8", None),
        ("llama", "packed", None),
    ],
)
def test_quantised_weights_that_would_be_read_without_their_scales_are_refused(
    family: str, form: str, config: Mapping[str, object] | None, tmp_path: Path
) -> None:
    """transformers reads them as they are, and says no more than that it does not know the scales."""
    save_quantised(save_model(family, tmp_path), form, config)
    with pytest.raises(SourceError, match=r"target.source: .* quantised .*_proj.*; name the model with weights in"):
        load_target(tmp_path, precision="bf16")


@torch.no_grad()
def test_fp8_weights_with_scales_of_blocks_are_read_and_layers_that_the_model_lacks_are_not(tmp_path: Path) -> None:
    """Such as those of a multi-token prediction, which have scales too."""
    expected = reference_model(save_model("llama", tmp_path))(tokens(2, 8)).logits
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16], "fmt": "e4m3"}
    save_quantised(tmp_path, "fp8 in blocks", config)
    weights = load_file(tmp_path / "model.safetensors")
    more = {name.replace(".6.", ".7."): value.clone() for name, value in weights.items() if ".6." in name}
    more |= {"mtp.up_proj.weight": torch.ones(2, 2), "mtp.up_proj.weight_scale": torch.ones(1)}
    save_file({**weights, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = load_target(tmp_path, precision="fp32")
    logits = target.logits(target.in_torch.forward_uncached(tokens(2, 8))[1])
    assert float((logits - expected).norm()) < 0.2 * float(expected.norm())


def test_a_folder_with_broken_weights_is_refused(tmp_path: Path) -> None:
    weights = save_model("llama", tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SourceError, match="^target.source: .*; copy the folder again"):
        load_target(tmp_path, precision="fp32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    """No comparison with NaN is true, so that a single one would pass every other check."""
    path = save_model("llama", tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"target.source: .* values that are NaN or infinite; copy or convert"):
        load_target(tmp_path, precision="fp32")


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="lacks weights .*up_proj"):
        load_target(tmp_path, precision="fp32")


@pytest.mark.slow
@torch.no_grad()
def test_the_real_model(kernels: str) -> None:
    config = load_config(None, [])
    folder = resolve(config.target.source, cache_dir=cache_root(), sha256=config.target.sha256)
    ids_BT = torch.randint(0, 49_000, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = reference(folder, ids_BT)
    target = load_target(folder, precision="fp32")
    assert target.aux_layer_ids == (2, 15, 27)
    aux, last = target.in_torch.forward_uncached(ids_BT)
    torch.testing.assert_close(aux, expected.auxiliary(target.aux_layer_ids), atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(target.logits(last), expected.logits_BTV, atol=2e-3, rtol=0)
    kv_cache = target.make_kv_cache(num_slots=3, capacity=64)
    start = 0
    for size in (40, 1, 5, 14):
        _, last = target(
            ids_BT[:, start : start + size],
            kv_cache=kv_cache,
            slots_B=torch.tensor([2, 0]),
            starts_B=torch.tensor([start, start]),
        )
        expected_here = expected.logits_BTV[:, start : start + size]
        torch.testing.assert_close(target.logits(last), expected_here, atol=2e-3, rtol=0)
        start += size


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_the_targets_own_token_is_chosen_from_its_logits(family: str, kernels: str, references) -> None:
    """With a plain head, one with a bias and one with a soft cap; greedy, drawn, and positions with dense logits."""
    target = load_target(references[family].folder, precision="fp32")
    last_NH = target.in_torch.forward_uncached(references[family].ids_BT)[1].flatten(0, 1)
    N = len(last_NH)
    draws = {"temperature_N": torch.arange(N) % 3 * 0.5, "key_N": torch.arange(N), "position_N": torch.arange(N) % 9}
    dense_N = torch.full((N,), -1)
    dense_N[[7, 2, 11]] = torch.tensor([0, 2, 1])
    token_N, dense_DV = target.choose(last_NH, **draws, dense_N=dense_N)
    logits_NV = target.logits(last_NH)
    assert torch.equal(token_N[dense_N < 0], choose(logits_NV, **draws)[dense_N < 0])
    assert torch.equal(dense_DV, logits_NV[[7, 11, 2]])
