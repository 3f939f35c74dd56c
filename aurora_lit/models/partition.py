"""Partitions a transformers model on the meta device for one rank, and reads only that shard from the files.

    tensor_parallel    each rank has whole key-value heads with their queries, and columns of every MLP or expert; the
                       outputs of attention and MLP are summed over the ranks. Transformers' own plan of the model says
                       which weights are column-parallel and which row-parallel. Heads need not divide evenly: SmolLM2's
                       three become one and two, and the rank with fewer gets more of the MLP.
    fsdp               FSDP2: each rank has rows of every weight of a decoder layer, and gathers a layer to run it

In both, the vocabulary's rows are distributed: each rank looks up the embeddings it holds and the results are summed;
logits are gathered. No rank ever holds the whole model.

Leaves out: reading shards (shard_reader.py) and running the model on all ranks together (sharded_target.py).

Shapes: E experts, H hidden size, I intermediate size of the MLP, Vr rows of the vocabulary on this rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from aurora_lit.config import AuroraConfig
from aurora_lit.distributed import Ranks
from aurora_lit.errors import ConfigError
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.kv_cache import kv_heads_of
from aurora_lit.models.shard_reader import ShardReader, partition_slices
from aurora_lit.models.torch_target import decoder_layers

_MLP_UNIT = 32
"""An MLP is partitioned in multiples of this many columns: a block of outputs of the kernels."""
_PARTITIONED_KINDS = frozenset({"colwise", "rowwise", "packed_colwise", "moe_tp_experts"})
"""Kinds of transformers' tensor-parallel plans that are partitioned; "replicated…" ones are held whole."""


class VocabParallelEmbedding(nn.Module):
    """An embedding of which every rank holds some rows; a family's own scaling still applies."""

    def __init__(self, embedding: nn.Module, rows_VrH: torch.Tensor, *, first: int, ranks: Ranks) -> None:
        """`embedding`: the model's own, whose weight is replaced by the rows of tokens from `first` on."""
        super().__init__()
        local: Any = embedding
        local.weight = nn.Parameter(rows_VrH, requires_grad=False)
        local.num_embeddings, local.padding_idx = len(rows_VrH), None
        self.local, self._first, self._ranks = local, first, ranks

    @property
    def weight(self) -> torch.Tensor:
        """This rank's rows."""
        weight: torch.Tensor = self.local.weight
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up embeddings; all ranks call it together."""
        local_ids = ids - self._first
        elsewhere = (local_ids < 0) | (local_ids >= len(self.weight))
        embeds: torch.Tensor = self.local(local_ids.masked_fill(elsewhere, 0))
        return self._ranks.sum(embeds.masked_fill(elsewhere[..., None], 0))


def kv_heads_of_rank(config: Any, *, rank: int, size: int) -> slice:
    """The key-value heads of a rank under tensor_parallel. Raises ConfigError if there are too few for all ranks."""
    total = kv_heads_of(config)
    if size > total:
        raise ConfigError(
            f"engine.devices={size}: tensor_parallel gives each device whole key-value heads, and this target has "
            f"{total}; use at most {total}, or engine.strategy=fsdp"
        )
    return partition_slices(total, size)[rank]


def mlp_shares(attention_share: float, heads: Sequence[int]) -> list[float]:
    """Share of the MLPs that each rank holds, so that all ranks hold equally many weights in total.

    `attention_share`: share of attention in all partitioned weights; `heads`: number of key-value heads of each rank.
    """
    equal = 1 / len(heads)
    return [max(0.0, equal - attention_share * count / sum(heads)) for count in heads]


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """Transformers' plan of a model's layers.

    Raises ConfigError if there is none, if it has unknown kinds, or if it leaves out weights of every head.
    """
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    # The vocabulary is divided here; before transformers 5.21 plans of tied embeddings do so too.
    of_layers = {kind for name, kind in plan.items() if name != "embed_tokens"}
    unknown = {kind for kind in of_layers if kind not in _PARTITIONED_KINDS and not kind.startswith("replicated")}
    reason = "" if plan else "transformers has no plan for it"
    if unknown:
        reason = f"its plan has {', '.join(sorted(unknown))}"
    elif config.model_type == "cohere" and config.use_qk_norm:
        reason = "its plan leaves out the norms of use_qk_norm, which have weights of every head"
    if reason:
        raise ConfigError(
            f"engine.strategy=tensor_parallel cannot partition a {config.model_type} ({reason}); "
            "use engine.strategy=fsdp"
        )
    return plan


def check_partition(config: AuroraConfig, model_config: Any) -> None:
    """Raise ConfigError if engine.strategy and engine.devices cannot partition this model.

    `model_config`: the target's transformers configuration.
    """
    if config.engine.strategy == "tensor_parallel":
        tensor_parallel_plan(model_config.get_text_config())
        kv_heads_of_rank(model_config.get_text_config(), rank=0, size=config.engine.devices)


class ModelPartitioner:
    """Partitions one model for this rank.

    The model is on the meta device except for its buffers, and is ready to run after one of the two methods, which
    Fabric's ModelParallelStrategy calls.
    """

    def __init__(
        self, model: PreTrainedModel, ranks: Ranks, reader: ShardReader, *, weight_format: WeightFormat | None
    ) -> None:
        """`weight_format`: under tensor_parallel, linear layers are packed so for the CPU kernels; None: not packed."""
        self._model, self._ranks, self._reader, self._weight_format = model, ranks, reader, weight_format
        self._config = model.config.get_text_config()
        self._mlp_shares: list[float] | None = None

    def apply_tensor_parallel(self, model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
        """Give this rank heads of every attention layer and columns of every MLP."""
        base = model.base_model
        plan = tensor_parallel_plan(self._config)
        size = self._ranks.size
        heads = [kv_heads_of_rank(self._config, rank=rank, size=size) for rank in range(size)]
        kinds = {name: plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "") for name, _ in base.named_modules()}
        attention = {
            name
            for name, _ in base.named_modules()
            if hasattr(base.get_submodule(name.rpartition(".")[0]), "num_key_value_groups")
        }
        sizes = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in base.named_modules()
            if kinds[name] in _PARTITIONED_KINDS
        }
        in_attention = sum(count for name, count in sizes.items() if name in attention)
        self._mlp_shares = mlp_shares(in_attention / sum(sizes.values()), [each.stop - each.start for each in heads])
        for name, module in list(base.named_modules()):
            full_name = f"{model.base_model_prefix}.{name}"
            if isinstance(module, nn.Linear):
                own_heads = heads[self._ranks.rank] if name in attention else None
                base.set_submodule(name, self._partitioned_linear(full_name, module, kinds[name], own_heads))
            elif kinds[name] == "moe_tp_experts":
                self._partition_experts(full_name, module)
        self._finish()
        return model

    @torch.no_grad()
    def apply_fsdp(self, model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
        """Give this rank rows of every weight of every decoder layer (FSDP2)."""
        layers = decoder_layers(model, self._config.num_hidden_layers)
        shards = mesh["data_parallel"]
        names = {module: name for name, module in model.named_modules()}
        for layer in layers:
            buffers = dict(layer.named_buffers())
            fully_shard(layer, mesh=shards, reshard_after_forward=True)
            layer.to_empty(device=self._ranks.device)
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])
            for name, parameter in layer.named_parameters():
                assert isinstance(parameter, DTensor)
                local = parameter.to_local()
                first_row = -(-parameter.shape[0] // self._ranks.size) * self._ranks.rank
                if len(local):
                    rows = slice(first_row, first_row + len(local))
                    local.copy_(self._reader.read(f"{names[layer]}.{name}", rows))
        self._finish()
        # The root module shares its streams with the layers. It has no sharded weights of its own: the others are
        # small, or distributed by vocabulary.
        rest = {parameter for parameter in model.base_model.parameters() if not isinstance(parameter, DTensor)}
        fully_shard(model.base_model, mesh=shards, reshard_after_forward=True, ignored_params=rest)
        return model

    # -- partitioned modules ---------------------------------------------------------------------------------------

    def _partitioned_linear(self, name: str, linear: nn.Linear, kind: str, heads: slice | None) -> nn.Module:
        """This rank's part of a linear layer; `heads`: this rank's key-value heads for a layer in attention."""
        outputs, inputs = linear.weight.shape
        whole = slice(None)
        if kind == "colwise":
            part = self._part_of(outputs, heads)
            index, bias_index = (part, whole), (part,)
        else:
            index, bias_index = (whole, self._part_of(inputs, heads) if kind == "rowwise" else whole), (whole,)
        # Outputs of a row-parallel layer are summed over the ranks, so only rank 0 adds the bias.
        with_bias = linear.bias is not None and (kind != "rowwise" or self._ranks.rank == 0)
        partitioned = self._make_linear(
            self._reader.read(f"{name}.weight", *index),
            self._reader.read(f"{name}.bias", *bias_index) if with_bias else None,
        )
        if kind == "rowwise":
            partitioned.register_forward_hook(self._sum_over_ranks)
        return partitioned

    def _part_of(self, total: int, heads: slice | None) -> slice:
        """This rank's part of a dimension: of its heads, or of an MLP if `heads` is None."""
        if heads is not None:
            unit = total // kv_heads_of(self._config)
            return slice(unit * heads.start, unit * heads.stop)
        unit = _MLP_UNIT if total % _MLP_UNIT == 0 and total // _MLP_UNIT >= self._ranks.size else 1
        return partition_slices(total, self._ranks.size, unit=unit, shares=self._mlp_shares)[self._ranks.rank]

    def _partition_experts(self, name: str, experts: Any) -> None:
        """Give this rank columns of every expert [E, 2I or H, H or I]; their outputs are summed over the ranks."""
        columns = self._part_of(experts.down_proj.shape[2], None)
        gate_up = self._reader.read_gate_up(f"{name}.gate_up_proj", columns)
        down = self._reader.read(f"{name}.down_proj", slice(None), slice(None), columns)
        for kind, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            setattr(experts, kind, nn.Parameter(weight.to(self._ranks.device), requires_grad=False))
        experts.register_forward_hook(self._sum_over_ranks)

    def _make_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """A linear layer with this weight and bias, packed if the partitioner has a weight format."""
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(self._ranks.device), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(self._ranks.device), requires_grad=False)
        return linear if self._weight_format is None else PackedLinear(linear, self._weight_format)

    def _sum_over_ranks(self, _: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(output.contiguous())

    def _finish(self) -> None:
        """Distribute the vocabulary, and read what every rank holds whole: norms, routers, position tables."""
        model, ranks = self._model, self._ranks
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        embedding: Any = model.get_input_embeddings()
        untyped_model: Any = model
        head = untyped_model.get_output_embeddings()
        count = -(-self._config.vocab_size // ranks.size)
        rows = slice(count * ranks.rank, count * (ranks.rank + 1))
        weight = self._reader.read(f"{names[embedding]}.weight", rows).to(ranks.device)
        model.set_input_embeddings(VocabParallelEmbedding(embedding, weight, first=rows.start, ranks=ranks))
        # As transformers does it: files with a head of their own are taken at their word.
        if not self._config.tie_word_embeddings or self._reader.has(f"{names[head]}.weight"):
            weight = self._reader.read(f"{names[head]}.weight", rows)
        bias = None if head.bias is None else self._reader.read(f"{names[head]}.bias", rows)
        untyped_model.set_output_embeddings(self._make_linear(weight, bias))
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                module, _, last = name.rpartition(".")
                whole = nn.Parameter(self._reader.read(name).to(ranks.device), requires_grad=False)
                setattr(model.get_submodule(module), last, whole)
        for module_name, each in model.named_modules():
            for name, buffer in each.named_buffers(recurse=False):
                # Some are trained, such as what corrects experts' scores; others are computed.
                computed = name in each._non_persistent_buffers_set
                stored = None if computed else self._reader.read_exact(f"{module_name}.{name}")
                setattr(each, name, (buffer if stored is None else stored.to(buffer.dtype)).to(ranks.device))
