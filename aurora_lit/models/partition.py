"""Cuts a transformers model on the meta device into this rank's part, and reads only that part from the files.

    tensor_parallel    each rank has whole key-value heads with their queries, and columns of every MLP or expert; what
                       leaves attention and MLP is summed over the ranks. Which weights are cut how is transformers' own
                       plan of the model. Heads need not divide evenly: SmolLM2's three become one and two, and the
                       rank with fewer gets more of the MLP.
    fully_sharded      FSDP2: each rank has rows of every weight of a decoder layer, and gathers a layer to run it

In both the vocabulary's rows are spread: embeddings are looked up where they lie and summed, logits are gathered.
No rank ever holds the whole model. What is left out: reading parts (models/shard_reader.py), orders (models/sharded_target.py).
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
from aurora_lit.models.layers import decoder_layers
from aurora_lit.models.shard_reader import ShardReader, split

_MLP_UNIT = 32
"""Columns that stay together in an MLP, for the kernels' sake."""


class VocabEmbedding(nn.Module):
    """An embedding of which every rank holds some rows; a family's own scaling stays in force."""

    def __init__(self, embedding: nn.Module, rows_VrH: torch.Tensor, *, first: int, ranks: Ranks) -> None:
        """`embedding`: of this family; takes the rows that begin at token `first`."""
        super().__init__()
        inner: Any = embedding
        inner.weight = nn.Parameter(rows_VrH, requires_grad=False)
        inner.num_embeddings, inner.padding_idx = len(rows_VrH), None
        self.inner, self._first, self._ranks = inner, first, ranks

    @property
    def weight(self) -> torch.Tensor:
        """This rank's rows."""
        weight: torch.Tensor = self.inner.weight
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up on all ranks at once."""
        places = ids - self._first
        elsewhere = (places < 0) | (places >= len(self.weight))
        found: torch.Tensor = self.inner(places.masked_fill(elsewhere, 0))
        return self._ranks.sum(found.masked_fill(elsewhere[..., None], 0))


def local_heads(config: Any, *, rank: int, size: int) -> slice:
    """The key-value heads that a rank has under tensor_parallel. Raises ConfigError when there are too few."""
    total = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if size > total:
        raise ConfigError(
            f"engine.devices={size}: tensor_parallel gives each device whole key-value heads, and this target has "
            f"{total}; use at most {total}, or engine.strategy=fsdp"
        )
    return split(total, size)[rank]


def mlp_shares(attention_share: float, heads: Sequence[int]) -> list[float]:
    """How much of the MLPs each rank is to have, so that all have as much in all.

    `attention_share`: of all weights that are cut, those in attention; `heads`: key-value heads of each rank.
    """
    equal = 1 / len(heads)
    return [max(0.0, equal - attention_share * count / sum(heads)) for count in heads]


def check_plan(config: Any) -> dict[str, str]:
    """Transformers' plan of a model's layers. Raises ConfigError when there is none that we know."""
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    known = {"colwise", "rowwise", "packed_colwise", "moe_tp_experts"}
    odd = {kind for kind in plan.values() if kind not in known and not kind.startswith("replicated")}
    if not plan or odd:
        reason = f"its plan has {', '.join(sorted(odd))}" if odd else "transformers has no plan for it"
        raise ConfigError(
            f"engine.strategy=tensor_parallel does not know how to cut a {config.model_type} ({reason}); "
            "use engine.strategy=fsdp"
        )
    return plan


def check_shareable(config: AuroraConfig, shape: Any) -> None:
    """Refuse a target (its transformers configuration) that engine.devices cannot share so. Raises ConfigError."""
    if config.engine.strategy == "tensor_parallel":
        check_plan(shape.get_text_config())
        local_heads(shape.get_text_config(), rank=0, size=config.engine.devices)


class Cutter:
    """Cuts one model; `model` lies on the meta device but for its buffers, and is ready to run afterwards."""

    def __init__(self, model: PreTrainedModel, ranks: Ranks, reader: ShardReader, *, pack: torch.dtype | None) -> None:
        """`pack`: tensor_parallel keeps linear layers packed for the CPU kernels in this type; None: as they are."""
        self._model, self._ranks, self._reader, self._pack = model, ranks, reader, pack
        self._config = model.config.get_text_config()
        self._shares: list[float] | None = None

    def tensor_parallel(self, model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
        """For Fabric's ModelParallelStrategy."""
        base = model.base_model
        plan = check_plan(self._config)
        size = self._ranks.size
        heads = [local_heads(self._config, rank=rank, size=size) for rank in range(size)]
        kinds = {name: plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "") for name, _ in base.named_modules()}
        attention = {
            name
            for name, _ in base.named_modules()
            if hasattr(base.get_submodule(name.rpartition(".")[0]), "num_key_value_groups")
        }
        sizes = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in base.named_modules()
            if kinds[name].endswith("wise") or kinds[name] == "moe_tp_experts"
        }
        in_attention = sum(count for name, count in sizes.items() if name in attention)
        self._shares = mlp_shares(in_attention / sum(sizes.values()), [each.stop - each.start for each in heads])
        for name, module in list(base.named_modules()):
            full = f"{model.base_model_prefix}.{name}"
            if isinstance(module, nn.Linear):
                part = heads[self._ranks.rank] if name in attention else None
                base.set_submodule(name, self._linear(full, module, kinds[name], part))
            elif kinds[name] == "moe_tp_experts":
                self._experts(full, module)
        self._finish()
        return model

    @torch.no_grad()
    def fully_sharded(self, model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
        """For Fabric's ModelParallelStrategy."""
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
                rows = -(-parameter.shape[0] // self._ranks.size) * self._ranks.rank
                if len(local):
                    local.copy_(self._reader.read(f"{names[layer]}.{name}", slice(rows, rows + len(local))))
        self._finish()
        # The root shares the layers' streams; it has no weights of its own, since what is left is small or spread.
        rest = {parameter for parameter in model.base_model.parameters() if not isinstance(parameter, DTensor)}
        fully_shard(model.base_model, mesh=shards, reshard_after_forward=True, ignored_params=rest)
        return model

    # -- parts -----------------------------------------------------------------------------------------------------

    def _linear(self, name: str, linear: nn.Linear, kind: str, heads: slice | None) -> nn.Module:
        """This rank's part of a linear layer; `heads`: its key-value heads where it belongs to attention."""
        outputs, inputs = linear.weight.shape
        whole = slice(None)
        if kind == "colwise":
            part = self._part(outputs, heads)
            index, bias_index = (part, whole), (part,)
        else:
            index, bias_index = (whole, self._part(inputs, heads) if kind == "rowwise" else whole), (whole,)
        # The bias of a sum is added once.
        with_bias = linear.bias is not None and (kind != "rowwise" or self._ranks.rank == 0)
        cut = self._made(
            self._reader.read(f"{name}.weight", *index),
            self._reader.read(f"{name}.bias", *bias_index) if with_bias else None,
        )
        if kind == "rowwise":
            cut.register_forward_hook(self._sum)
        return cut

    def _part(self, total: int, heads: slice | None) -> slice:
        if heads is not None:
            kv_heads = getattr(self._config, "num_key_value_heads", None) or self._config.num_attention_heads
            unit = total // kv_heads
            return slice(unit * heads.start, unit * heads.stop)
        unit = _MLP_UNIT if total % _MLP_UNIT == 0 and total // _MLP_UNIT >= self._ranks.size else 1
        return split(total, self._ranks.size, unit=unit, shares=self._shares)[self._ranks.rank]

    def _experts(self, name: str, experts: Any) -> None:
        """Columns of every expert [E, 2I or H, H or I]; what they give is summed."""
        columns = self._part(experts.down_proj.shape[2], None)
        gate_up = self._reader.read_gate_up(f"{name}.gate_up_proj", columns)
        down = self._reader.read(f"{name}.down_proj", slice(None), slice(None), columns)
        for kind, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            setattr(experts, kind, nn.Parameter(weight.to(self._ranks.device), requires_grad=False))
        experts.register_forward_hook(self._sum)

    def _made(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """A linear layer of these weights, packed at once where it is to be."""
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(self._ranks.device), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(self._ranks.device), requires_grad=False)
        return linear if self._pack is None else PackedLinear(linear, self._pack)

    def _sum(self, _: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(output.contiguous())

    def _finish(self) -> None:
        """Spread the vocabulary, and read what every rank has whole: norms, routers, position tables."""
        model, ranks = self._model, self._ranks
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        embedding: Any = model.get_input_embeddings()
        ends: Any = model  # untyped where it matters
        head = ends.get_output_embeddings()
        count = -(-self._config.vocab_size // ranks.size)
        rows = slice(count * ranks.rank, count * (ranks.rank + 1))
        weight = self._reader.read(f"{names[embedding]}.weight", rows).to(ranks.device)
        model.set_input_embeddings(VocabEmbedding(embedding, weight, first=rows.start, ranks=ranks))
        if not self._config.tie_word_embeddings:
            weight = self._reader.read(f"{names[head]}.weight", rows)
        bias = None if head.bias is None else self._reader.read(f"{names[head]}.bias", rows)
        ends.set_output_embeddings(self._made(weight, bias))
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                module, _, last = name.rpartition(".")
                whole = nn.Parameter(self._reader.read(name).to(ranks.device), requires_grad=False)
                setattr(model.get_submodule(module), last, whole)
        for each in model.modules():
            for name, buffer in each.named_buffers(recurse=False):
                setattr(each, name, buffer.to(ranks.device))
