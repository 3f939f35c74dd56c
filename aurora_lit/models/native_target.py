"""A target whose decoder layers are one native call over packed weights.

    native = make_native(torch_target)            # from a loaded model; or the reason why its layers do not fit
    facts, tensors = packed_contents(native)      # all that a forward pass reads
    native = read_native(facts, tensors)          # the same bits, without a transformers model

Leaves out: which layers fit (families.py), and the file that `packed_contents` are kept in (loading.py).

Shapes: B sequences, T positions, N positions of a flat batch, R = B + 1, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aurora_lit.kernels import matmul
from aurora_lit.kernels.decoder import MATRICES, NORMS, Decoder, LayerWeights
from aurora_lit.kernels.packed_linear import TENSOR_NAMES, PackedEmbedding, PackedLinear
from aurora_lit.kernels.target_pass import TargetPass
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.families import family_of
from aurora_lit.models.fused_layers import decoder_parts, embedding_table, make_decoder
from aurora_lit.models.interface import CPU, WholeTarget
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.target_check import probe_states
from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.modules.draft.logit_transform import LogitTransform

_TABLES = ("final_norm", "frequencies_F")
_PLAIN_FACTS = ("vocab_size", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "rope", "max_positions")
"""Facts of a target that JSON holds as they are."""


class NativeTarget(WholeTarget):
    """Decoder layers, embedding and head in native calls, for prompts, chains and trees of any size in one pass."""

    has_native_decoder = True

    def __init__(
        self,
        facts: dict[str, Any],
        decoder: Decoder,
        *,
        head: PackedLinear,
        embedding: nn.Module,
        in_torch: TorchTarget | None = None,
    ) -> None:
        """`facts`: see `Target`; the decoder returns auxiliary states."""
        super().__init__(facts)
        self.decoder = decoder
        self.has_prompt_arithmetic = decoder.has_prompt_arithmetic
        self.in_torch = in_torch
        """The same model, run by transformers' code: for whole sequences without a cache, and for a new draft that
        begins with its weights. None if this target was read from its packed file."""
        self._head, self._embedding = head, embedding

    @property
    def device(self) -> torch.device:
        """Where the kernels run."""
        return CPU

    @property
    def head(self) -> PackedLinear:
        """The output embedding."""
        return self._head

    @property
    def embedding(self) -> nn.Module:
        """The input embedding."""
        return self._embedding

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Target.forward`. `parents_BT`: the tokens form a tree (see `Decoder`), of which `commit_tree_path` then
        keeps one path.
        """
        batch = {"slots_B": slots_B, "starts_B": starts_B, "parents_BC": parents_BT, "num_prompts": num_prompts}
        aux_NF, last_NH = self._run(ids_BT.flatten(), kv_cache, queries=ids_BT.shape[1], **batch)
        return aux_NF.view(*ids_BT.shape, -1), last_NH.view(*ids_BT.shape, -1)

    def forward_ragged(
        self,
        ids_N: torch.Tensor,
        *,
        widths: Sequence[int],
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, for sequences with query lengths `widths`, whose tokens are concatenated in `ids_N`.

        Gives the same bits as `forward` with the largest width for every sequence; returns [N, 3H] and [N, H].
        `parents_BT`: of the sequences that decode.
        """
        begins_R = torch.tensor([0, *itertools.accumulate(widths)])
        batch = {"slots_B": slots_B, "starts_B": starts_B, "parents_BC": parents_BT, "num_prompts": num_prompts}
        return self._run(ids_N, kv_cache, queries=max(widths), begins_R=begins_R, **batch)

    def make_pass(
        self, kv_cache: KVCache, *, aux_SLF: torch.Tensor | None, last_SLH: torch.Tensor | None
    ) -> TargetPass | None:
        """As `Target.make_pass`; None if the embedding is no plain table, or if logits are more than products."""
        head, table = self.choosing_head, embedding_table(self.embedding)
        if head is None or table is None:
            return None
        return TargetPass(
            self.decoder,
            embedding=table,
            head=head,
            keys=kv_cache.keys_SGCQPE,
            values=kv_cache.values_SGMDE,
            aux_SLF=aux_SLF,
            last_SLH=last_SLH,
        )

    def commit_tree_path(self, *, kv_cache: KVCache, slot: int, froms: Sequence[int], tos: Sequence[int]) -> None:
        """Move a slot's keys and values from the tree's columns to the positions of the committed tokens, one by one.

        `froms`, `tos`: positions in the cache.
        """
        self.decoder.move(kv_cache.keys_SGCQPE, kv_cache.values_SGMDE, slot=slot, froms=froms, tos=tos)

    def _run(self, ids_N: torch.Tensor, kv_cache: KVCache, **batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch |= {"keys": kv_cache.keys_SGCQPE, "values": kv_cache.values_SGMDE}
        _, last_NH, aux_NF = self.decoder(self.embedding(ids_N).float(), **batch)
        assert aux_NF is not None
        return aux_NF, last_NH


@torch.no_grad()
def make_native(target: TorchTarget) -> NativeTarget | str:
    """A native target of a packed model's weights; or the reason why there is none."""
    family = family_of(target.model.config.get_text_config())
    if isinstance(family, str):
        return family
    parts, head = decoder_parts(target.model, family), target.head
    if parts is None or not isinstance(head, PackedLinear):
        return "its linear layers are not packed"
    decoder = make_decoder(**parts, aux_layer_ids=target.aux_layer_ids)
    native = NativeTarget(target.facts, decoder, head=head, embedding=target.embedding, in_torch=target)
    expected = probe_states(target)
    # Of the root mean square. Rounding only; but the last bit of an input may decide how it is rounded to 8 bits.
    tolerance = 1e-4 if target.kv_dtype == torch.float32 else 0.2
    for num_prompts in (0, 2):
        for ours, own in zip(probe_states(native, num_prompts=num_prompts), expected, strict=True):
            if not float((ours - own).norm()) <= tolerance * float(own.norm()):  # true for NaN too
                return "native layers do not compute what its own compute"
    return native


def packed_contents(target: NativeTarget) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Everything that a native target's forward pass reads: what JSON holds, and tensors."""
    assert target.in_torch is not None
    family = family_of(target.in_torch.model.config.get_text_config())
    assert not isinstance(family, str)
    parts = decoder_parts(target.in_torch.model, family)
    assert parts is not None
    linears = {"head": target.head}
    tensors: dict[str, torch.Tensor] = {name: parts.pop(name) for name in _TABLES}
    for index, layer in enumerate(parts.pop("layers")):
        linears |= {f"{index}.{name}": getattr(layer, name) for name in MATRICES}
        norms = {f"{index}.{name}": getattr(layer, name) for name in NORMS}
        tensors |= {name: weight for name, weight in norms.items() if weight is not None}
    table = target.embedding.table if isinstance(target.embedding, PackedEmbedding) else _exact_table(target)
    if table is not None and table is not target.head:
        linears["embedding"] = table
    if target.logit_transform.bias_V is not None:
        tensors["logit_bias"] = target.logit_transform.bias_V
    for name, linear in linears.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in linear.tensors().items()}
    facts = {
        **{name: getattr(target, name) for name in _PLAIN_FACTS},
        "aux_layer_ids": target.aux_layer_ids,
        "end_of_text_ids": sorted(target.end_of_text_ids),
        "softcap": target.logit_transform.softcap,
        "kv_dtype": WeightFormat.of_dtype(target.kv_dtype).value,
        "decoder": parts,
        "linears": {
            name: [each.weight_format.value, each.out_features, each.in_features] for name, each in linears.items()
        },
    }
    return facts, tensors


def read_native(packed: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> NativeTarget:
    """The target whose `packed_contents` these are."""
    facts = {
        **{name: packed[name] for name in _PLAIN_FACTS},
        "aux_layer_ids": tuple(packed["aux_layer_ids"]),
        "end_of_text_ids": frozenset(packed["end_of_text_ids"]),
        "kv_dtype": WeightFormat(packed["kv_dtype"]).storage_dtype,
        "hidden_dtype": torch.float32,
        "logit_transform": LogitTransform(bias_V=tensors.get("logit_bias"), softcap=packed["softcap"]),
    }
    linears = {}
    for name, (weight_format, *shape) in packed["linears"].items():
        of_linear = {part: tensors[f"{name}.{part}"] for part in TENSOR_NAMES if f"{name}.{part}" in tensors}
        linears[name] = PackedLinear.from_tensors(of_linear, WeightFormat(weight_format), shape)
    layers = []
    for index in range(packed["num_layers"]):
        weights: dict[str, Any] = {name: linears[f"{index}.{name}"] for name in MATRICES}
        weights |= {name: tensors[f"{index}.{name}"] for name in NORMS if f"{index}.{name}" in tensors}
        layers.append(LayerWeights(**weights))
    tables = {name: tensors[name] for name in _TABLES}
    parts = {**packed["decoder"], **tables, "layers": layers, "aux_layer_ids": facts["aux_layer_ids"]}
    head = linears["head"]
    embedding = PackedEmbedding(linears.get("embedding", head))
    return NativeTarget(facts, make_decoder(**parts), head=head, embedding=embedding)


def _exact_table(target: NativeTarget) -> PackedLinear | None:
    """The embedding in the fewest bits that change none of its values; None: the head has these values already."""
    rows_VH = target.embedding_rows()
    if torch.equal(target.head.rows(torch.arange(len(rows_VH))), rows_VH):
        return None
    formats = [WeightFormat.INT4_GROUPED, WeightFormat.INT8_GROUPED, WeightFormat.BF16, WeightFormat.FP32]
    fewest = next(each for each in formats if torch.equal(matmul.packed_values(rows_VH, each), rows_VH))
    table = nn.Linear(rows_VH.shape[1], len(rows_VH), bias=False, device="meta")
    table.weight = nn.Parameter(rows_VH, requires_grad=False)
    return PackedLinear(table, fewest)
