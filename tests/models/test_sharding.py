"""A target sharded over two ranks gives the unsharded answers, each rank has about half, a lost rank is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCAB, make_engine, request, run, save_model
from support.two_ranks import LATER_PROMPTS, MAX_TOKENS, PROMPTS, SHAPE, Case, num_weights, run_cases
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig

from aurora_lit.errors import ConfigError, SourceError
from aurora_lit.kernels import native
from aurora_lit.models.loading import load_target
from aurora_lit.models.partition import kv_heads_of_rank, mlp_shares, tensor_parallel_plan
from aurora_lit.models.shard_reader import ShardReader, partition_slices

Reports = list[dict[str, Any]]
process = pytest.mark.process
BY_DEFAULT = "tensor_parallel"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its 61 tokens cannot be divided by two either, and its embedding is tied to its head."""
    return save_model("llama", tmp_path_factory.mktemp("llama"), seed=3, tie_word_embeddings=True, **SHAPE)


@pytest.fixture(scope="module")
def own_head(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another head in its files."""
    folder = tmp_path_factory.mktemp("own_head")
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def trained_buffers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts whose scores are corrected by trained numbers that are no parameters."""
    folder = tmp_path_factory.mktemp("buffers")
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shape |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "initializer_range": 0.15}
    torch.manual_seed(3)
    config = AutoConfig.for_model("glm4_moe", **shape, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reports(
    llama: Path, own_head: Path, trained_buffers: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reports]:
    """The ranks' reports by case: of the one that the default run has, or of the others, which are run together."""
    folder = tmp_path_factory.mktemp("ranks")
    gpt2 = save_model("gpt2", folder / "gpt2", seed=3)
    model = str(llama)
    quantised = folder / "quantised"
    shutil.copytree(llama, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(config))
    cases = [
        Case(name="a head of its own", model=str(own_head), strategy="tensor_parallel"),
        Case(name="quantised", model=str(quantised), strategy="tensor_parallel"),
        Case(name="tensor_parallel", model=model, strategy="tensor_parallel"),
        Case(name="tensor_parallel in torch", model=model, strategy="tensor_parallel", native=False),
        Case(name="fsdp", model=model, strategy="fsdp"),
        Case(name="trained buffers", model=str(trained_buffers), strategy="fsdp"),
        Case(name="fsdp in bf16", model=model, strategy="fsdp", precision="bf16"),
        Case(name="dies", model=model, strategy="tensor_parallel", fault="dies"),
        Case(name="miscounts", model=model, strategy="tensor_parallel", fault="miscounts"),
        Case(name="unknown", model=str(gpt2), strategy="tensor_parallel"),
    ]

    class OnDemand(dict[str, Reports]):
        def __missing__(self, name: str) -> Reports:
            self.update(
                run_cases(folder, [case for case in cases if (case.name == BY_DEFAULT) == (name == BY_DEFAULT)])
            )
            return self[name]

    return OnDemand()


@process
def test_trained_buffers_are_read_from_the_files(reports, trained_buffers):
    assert reports["trained buffers"][0]["tokens"] == unsharded_answers(trained_buffers, "fp32")


def unsharded_answers(
    folder: Path, precision: str = "fp32", prompts: Sequence[Sequence[int]] = PROMPTS
) -> list[list[int]]:
    """Answers of the unsharded target without a draft."""
    engine = make_engine(load_target(folder, precision=precision), prefix_cache_mb=0)
    answers = run(engine, [request(str(i), ids, max_tokens=MAX_TOKENS) for i, ids in enumerate(prompts)])
    return [answers[str(i)].token_ids for i in range(len(prompts))]


@process
def test_files_with_a_head_of_their_own_are_taken_at_their_word(reports, llama, own_head):
    """Although the configuration says that the head is the embedding; transformers does the same."""
    answers = reports["a head of its own"][0]["tokens"]
    assert answers == unsharded_answers(own_head) != unsharded_answers(llama)


@process
def test_quantised_weights_are_refused(reports):
    assert all("holds quantised weights" in rank["refused"] for rank in reports["quantised"])


STRATEGIES = [BY_DEFAULT, *(pytest.param(name, marks=process) for name in ("tensor_parallel in torch", "fsdp"))]


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_give_the_unsharded_answers_while_the_draft_is_swapped(name, reports, llama):
    assert reports[name][0]["tokens"] == unsharded_answers(llama)
    assert reports[name][0]["proposed"] > 0
    assert 16 <= reports[name][0]["cached"] <= 40, "one prompt's prefix is copied on both ranks"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_prefix_that_has_left_its_slot_is_kept_on_both_ranks(name, reports, llama):
    assert reports[name][0]["later_tokens"] == unsharded_answers(llama, prompts=LATER_PROMPTS)
    assert reports[name][0]["later_cached"] == 64


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rank_has_the_same_draft_version_at_every_order(name, reports):
    first, second = (rank["versions"] for rank in reports[name])
    assert second == first[: len(second)]
    assert first[len(second) :] == ["STOP draft-000001"]
    assert second.count("VERSION draft-000001") == 1
    assert second.index("VERSION draft-000001") < len(second) - 4, "the draft is swapped between rounds"


@pytest.mark.parametrize("name", STRATEGIES)
def test_embeddings_are_looked_up_on_both_ranks_in_orders_of_any_length(name, reports, llama):
    ids = torch.arange(1500).view(30, 50) % 61
    expected = load_target(llama, precision="fp32").embedding(ids)
    torch.testing.assert_close(torch.tensor(reports[name][0]["embeds"]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_rank_holds_about_half_of_the_weights(name, reports, llama):
    whole = num_weights(load_target(llama, precision="fp32"))
    shares = [rank["weights"] / whole for rank in reports[name]]
    assert sum(shares) < 1.04  # norms are on both
    assert max(shares) < 0.60


@process
@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
def test_the_drafts_kernels_get_fp32_embeddings_from_a_bf16_target(reports):
    assert reports["fsdp in bf16"][0]["embeds_type"] == "torch.float32"
    assert [len(tokens) for tokens in reports["fsdp in bf16"][0]["tokens"]] == [MAX_TOKENS] * len(PROMPTS)


@process
def test_key_value_heads_are_divided_unevenly_and_only_under_tensor_parallel(reports):
    """Of a rank, and of both together, which are on one machine."""
    assert [rank["kv_heads"] for rank in reports["tensor_parallel"]] == [[1, 3], [2, 3]]
    assert [rank["kv_heads"] for rank in reports["fsdp"]] == [[3, 6], [3, 6]]


@process
def test_a_rank_that_dies_is_an_error_on_rank_0(reports):
    assert reports["dies"][1] == {"exit": 9}
    assert reports["dies"][0]["error"].startswith("the engine's processes cannot continue together: ")


@process
def test_a_rank_that_counts_other_draft_versions_refuses_to_continue(reports):
    assert reports["miscounts"][1]["error"] == "rank 1 has counted 1 drafts, rank 0 has announced 0"
    assert "error" in reports["miscounts"][0]


@process
def test_a_model_without_a_tensor_parallel_plan_is_refused_on_every_rank(reports):
    message = "cannot partition a gpt2 (transformers has no plan for it); use engine.strategy=fsdp"
    assert all(message in rank["refused"] for rank in reports["unknown"])


@pytest.mark.process
@pytest.mark.slow
def test_other_families(tmp_path):
    """Scaled embeddings, soft caps, biases, norms of heads, windows, experts; GPT-2 only under fsdp."""
    families = {
        "qwen2": {},
        "qwen3": {},
        "gemma2": {"num_attention_heads": 6},
        "mixtral": {},
        "mistral": {},
        "gpt2": None,
    }
    models, cases = {}, []
    for family, changes in families.items():
        shape = {} if changes is None else SHAPE | changes
        models[family] = save_model(family, tmp_path / family, seed=3, **shape)
        strategies = ["fsdp"] if changes is None else ["fsdp", "tensor_parallel"]
        cases += [
            Case(name=f"{family}-{each}-{precision}", model=str(models[family]), strategy=each, precision=precision)
            for each in strategies
            for precision in ("fp32", "bf16")
        ]
    reports = run_cases(tmp_path, cases)
    expected = {
        (family, precision): unsharded_answers(folder, precision)
        for family, folder in models.items()
        for precision in ("fp32", "bf16")
    }
    for case in cases:
        family, answers = case.name.split("-")[0], reports[case.name][0]["tokens"]
        whole_answers = expected[family, case.precision]
        if case.precision == "fp32":
            assert answers == whole_answers, case.name
        elif case.strategy == "tensor_parallel" and native.library() is not None:
            for prompt, whole, sharded in zip(PROMPTS, whole_answers, answers, strict=True):
                assert differ_only_by_rounding(models[family], prompt, whole, sharded), case.name
        assert all(len(tokens) == MAX_TOKENS for tokens in answers)


def differ_only_by_rounding(folder: Path, prompt: Sequence[int], whole: list[int], sharded: list[int]) -> bool:
    """True if two bf16 answers are equal, or first differ where two logits are as close as bf16 is to fp32.

    Ranks add up their partial sums in another order, and keys and values are then rounded to eight bits of mantissa.
    Where that sends a token to another expert, rounding changes logits by more than it rounds them.
    """
    first = next((i for i, (a, b) in enumerate(zip(whole, sharded, strict=True)) if a != b), None)
    if first is None:
        return True
    ids, logits = torch.tensor([[*prompt, *whole[:first]]]), []
    for precision in ("fp32", "bf16"):
        target = load_target(folder, precision=precision)
        with torch.no_grad():
            logits.append(target.logits(target.in_torch.forward_uncached(ids)[1])[0, -1])
    exact_V, rounded_V = logits
    gap = rounded_V[whole[first]] - rounded_V[sharded[first]]
    return bool(gap.abs() <= (rounded_V - exact_V).abs().max())


# -- parts -------------------------------------------------------------------------------------------------------------


def test_partition_slices_are_whole_units_with_the_larger_parts_last():
    assert partition_slices(3, 2) == [slice(0, 1), slice(1, 3)]
    assert partition_slices(1536, 2, unit=32) == [slice(0, 768), slice(768, 1536)]
    assert partition_slices(9, 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 9)]
    assert partition_slices(96, 2, unit=32, shares=[0.6, 0.4]) == [slice(0, 64), slice(64, 96)]
    assert partition_slices(64, 2, unit=32, shares=[0.0, 1.0]) == [slice(0, 32), slice(32, 64)], "no part is empty"
    with pytest.raises(ValueError, match="cannot be divided"):
        partition_slices(2, 3)
    with pytest.raises(ValueError, match="cannot be divided"):
        partition_slices(33, 2, unit=32)


def test_mlp_shares_compensate_for_uneven_heads():
    shares = mlp_shares(0.25, [1, 2])  # SmolLM2: a quarter of a layer is attention
    assert [share + 0.25 * heads / 3 for share, heads in zip(shares, (1, 2), strict=True)] == pytest.approx([0.5, 0.5])
    assert mlp_shares(0.25, [4, 4]) == [0.375, 0.375]


def test_more_devices_than_heads_are_refused_with_a_remedy():
    config = SimpleNamespace(num_attention_heads=9, num_key_value_heads=3)
    assert kv_heads_of_rank(config, rank=1, size=2) == slice(1, 3)
    with pytest.raises(ConfigError, match=r"engine\.devices=4: .* this target has 3; use at most 3, or .*fsdp"):
        kv_heads_of_rank(config, rank=0, size=4)


def test_a_plan_with_unknown_kinds_is_refused():
    plan = {"layers.*.self_attn.qkv_proj": "colwise_gather_output"}
    config = SimpleNamespace(model_type="phi3", base_model_tp_plan=plan)
    with pytest.raises(ConfigError, match=r"phi3 \(its plan has colwise_gather_output\)"):
        tensor_parallel_plan(config)


def test_a_plan_that_divides_a_tied_embedding_is_accepted():
    """As transformers has it before 5.21: the vocabulary is divided without it."""
    plan = {"embed_tokens": "embedding_rowwise", "layers.*.self_attn.q_proj": "colwise"}
    assert tensor_parallel_plan(SimpleNamespace(model_type="llama", base_model_tp_plan=plan)) == plan


def test_norms_with_weights_of_every_head_which_the_plan_leaves_out_are_refused():
    """Command R+: every rank would hold the weights of all heads, and the queries of its own."""
    assert tensor_parallel_plan(CohereConfig(use_qk_norm=False))
    with pytest.raises(ConfigError, match=r"cannot partition a cohere \(.*use_qk_norm.*\); use engine.strategy=fsdp"):
        tensor_parallel_plan(CohereConfig(use_qk_norm=True))


def test_the_reader_reads_parts_of_stored_weights(llama):
    whole = load_file(llama / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    with ShardReader(llama, dtype=torch.float64, base_prefix="model") as reader:
        part = reader.read(name, slice(None), slice(10, 30))
        assert part.dtype == torch.float64
        torch.testing.assert_close(part, whole[name][:, 10:30].double(), rtol=0, atol=0)
        padded = reader.read("model.embed_tokens.weight", slice(50, 70))
        assert padded[:11].equal(whole["model.embed_tokens.weight"][50:].double())
        assert padded[11:].equal(torch.zeros(9, 96, dtype=torch.float64))
        with pytest.raises(SourceError, match=r"lacks the weight model\.layers\.9\.mlp\.up_proj\.weight"):
            reader.read("model.layers.9.mlp.up_proj.weight")


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_the_reader_refuses_quantised_weights_that_no_configuration_tells_of(stored, tmp_path):
    """Their scales are in tensors of their own, which no parameter asks for."""
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: torch.ones(4, 4).to(stored), f"{name}_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    with (
        ShardReader(tmp_path, dtype=torch.float32, base_prefix="model") as reader,
        pytest.raises(SourceError, match=r"target.source: .* quantised \(.*\); name the model with weights in bf16"),
    ):
        reader.read(name, slice(0, 2))


def test_the_reader_stacks_experts_as_transformers_does(tmp_path):
    folder = save_model("mixtral", tmp_path, seed=3)
    whole = dict(load_target(folder, precision="fp32").model.named_parameters())
    gate_up, down = (f"model.layers.1.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj"))
    with ShardReader(folder, dtype=torch.float32, base_prefix="model") as reader:
        assert reader.read(gate_up, slice(1, 3)).equal(whole[gate_up][1:3])
        assert reader.read(down, slice(None), slice(None), slice(5, 9)).equal(whole[down][:, :, 5:9])
        half = whole[gate_up].shape[1] // 2
        rows = torch.cat([whole[gate_up][:, 5:9], whole[gate_up][:, half + 5 : half + 9]], dim=1)
        assert reader.read_gate_up(gate_up, slice(5, 9)).equal(rows)


def test_missing_safetensors_weights_are_an_error(tmp_path):
    folder = save_model("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with (
        pytest.raises(SourceError, match="has neither safetensors files nor a GGUF file"),
        ShardReader(folder, dtype=torch.float32, base_prefix="model"),
    ):
        pass
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with ShardReader(folder, dtype=torch.float32, base_prefix="model") as reader, pytest.raises(SourceError):
        reader.read("model.norm.weight")
