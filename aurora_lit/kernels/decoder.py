"""All decoder layers of a forward pass in one native call (csrc/decoder.hpp), over packed weights and the KV cache.

`Decoder` holds pointers into tensors that it keeps alive.

Leaves out: which models qualify (models/families.py).

Shapes: B sequences, T positions of each, N = B·T positions or fewer, C columns of a tree, R = B + 1, H hidden size,
S slots, L slot capacity, D head size, P positions of the rotary tables, M moves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat

PASS_PARTS = ("products", "attention", "rest")
"""Parts of a pass that `Decoder.nanoseconds` tells apart; PassPart in decoder.hpp."""
_NUM_AUX_LAYERS = 3


class Matrix(ctypes.Structure):
    """A packed linear layer; Matrix in matmul.hpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )

    @staticmethod
    def of(linear: PackedLinear) -> Matrix:
        """Pointers into a layer, which the caller must keep alive."""
        bias = None if linear.bias is None else linear.bias.data_ptr()
        bits = linear.weight_format.grouped_bits or 0
        return Matrix(linear.packed.data_ptr(), bias, linear.out_features, linear.in_features, bits)


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
"""A layer's linear layers, in the order of DecoderLayer in decoder.hpp."""
NORMS = ("norm_embeds", "norm_attention", "norm_mlp", "norm_query", "norm_key")
"""A layer's norms, likewise; the first and the last two may be absent."""


class _Layer(ctypes.Structure):
    """DecoderLayer in decoder.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, Matrix) for name in MATRICES),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class DecoderCall(ctypes.Structure):
    """A forward pass; DecoderCall in decoder.hpp."""

    _fields_ = (
        ("attention", native.AttentionShape),
        ("hidden", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("layers", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("max_positions", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "starts", "parents")),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("embeds", "hidden_states", "normed", "aux")),
        ("aux_layer_ids", ctypes.c_int64 * _NUM_AUX_LAYERS),
        ("nanoseconds", ctypes.c_void_p),
        ("only_cache", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer; norms are fp32 vectors, contiguous: [H], those of queries and keys [D]."""

    norm_embeds: torch.Tensor | None = None
    """EAGLE-3's draft layer only: norm of the embedding, which is concatenated with the hidden state."""
    norm_attention: torch.Tensor
    norm_mlp: torch.Tensor
    norm_query: torch.Tensor | None = None
    """Of each head of the queries, before it is rotated; None: they are not normed."""
    norm_key: torch.Tensor | None = None
    """The same of the keys."""
    query: PackedLinear
    key: PackedLinear
    value: PackedLinear
    output: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear


class Decoder:
    """Decoder layers ready to run.

    >>> decoder = Decoder(layers, final_norm=…, rotary=…, num_heads=9, num_kv_heads=3, eps=1e-5)
    >>> hidden_NH, normed_NH, _ = decoder(embeds_NH, keys=kv_cache.keys_SGCQPE, values=kv_cache.values_SGMDE,
    ...                                   slots_B=slots_B, starts_B=starts_B, queries=T)
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        final_norm: torch.Tensor,
        rotary: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        aux_layer_ids: tuple[int, int, int] | None = None,
    ) -> None:
        """`rotary`: gives cosines and sines of the rotary embedding [P, D], for a number of positions P; it is asked
        for those of a slot when a cache is first used. `aux_layer_ids`: layers whose input hidden states are returned
        as auxiliary ones.
        """
        library = native.library()
        assert library is not None
        weight_format = layers[0].query.weight_format
        self._layers = [_checked(layer, weight_format) for layer in layers]
        self._final_norm = final_norm.float().contiguous()
        self._rotary = rotary
        self._cosines_PD = self._sines_PD = torch.empty(0, 0)
        """As many positions as the longest slot so far."""
        self._heads = (num_heads, num_kv_heads)
        self._eps, self._aux_layer_ids = eps, aux_layer_ids
        self.layers_suffix = weight_format.layers_suffix
        """See `WeightFormat.layers_suffix`."""
        self.native_decode = getattr(library, f"aurora_decode_{self.layers_suffix}")
        """The native call itself."""
        self._kv_dtype = weight_format.kv_dtype
        self.has_prompt_arithmetic = bool(getattr(library, f"aurora_has_prompt_arithmetic_{self.layers_suffix}")())
        """True if positions of prompts are computed faster than decoding ones, and rounded differently."""
        self._move = getattr(library, f"aurora_move_{WeightFormat.of_dtype(self._kv_dtype).suffix}")
        self.nanoseconds: torch.Tensor | None = None
        """For benchmarks: int64 [len(PASS_PARTS)], to which each pass adds its first thread's time in each part."""
        self._last_call: tuple[Sequence[torch.Tensor], DecoderCall] | None = None
        """Of the cache that was used last: its list of keys, kept alive, and a call on it, of which each use sets what
        depends on the batch."""

    def __call__(
        self,
        hidden_NH: torch.Tensor,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        queries: int,
        embeds_NH: torch.Tensor | None = None,
        parents_BC: torch.Tensor | None = None,
        begins_R: torch.Tensor | None = None,
        num_prompts: int = 0,
        only_cache: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run `queries` positions of each sequence, which follow its first `starts_B` positions.

        `hidden_NH`: the first layer's input, fp32 and contiguous; it is overwritten. `embeds_NH`: for EAGLE-3's draft
        layer only, the embeddings beside the hidden states.

        `begins_R` int64: the sequences have different query lengths, at most `queries`; the positions of sequence b
        are rows begins_R[b] to begins_R[b + 1] of `hidden_NH`. Of a tree they are the first columns.

        `parents_BC` int64: the positions are the columns of a tree. parents_BC[b, c] is the column that column c
        follows, always a smaller one, or -1 for the last position before the tree. A column has the position of its
        depth; it attends to the positions before the tree, its ancestors and itself. In the cache columns are stored in
        their own order until `move` takes the accepted ones to their positions.

        `num_prompts`: the last so many sequences read their prompts, the others decode; `parents_BC` has rows for the
        others only, and beside it prompts need `begins_R`. Where `has_prompt_arithmetic`,
        the two differ in rounding. The bits of a position depend on its kind, but on no other position of the pass.

        `only_cache`: of the last layer only keys and values are computed, and the results are arbitrary.

        Returns the last layer's hidden state (the same tensor), the final norm of it, and the auxiliary hidden states
        [N, 3H]. Not for two threads at a time.
        """
        N, H = hidden_NH.shape
        normed_NH = torch.empty(N, H)
        aux_NF = None if self._aux_layer_ids is None else torch.empty(N, _NUM_AUX_LAYERS * H)
        call = self.call_on(keys, values)
        attention = call.attention
        attention.rows, attention.queries, attention.num_prompts = slots_B.shape[0], queries, num_prompts
        attention.begins = _address(begins_R)
        call.columns, call.only_cache = 0, only_cache
        if parents_BC is not None:
            parents_BC = parents_BC.contiguous()
            call.columns = parents_BC.shape[1]
            assert begins_R is not None or (queries == call.columns and not num_prompts)
            assert len(parents_BC) == len(slots_B) - num_prompts
        call.slots, call.starts, call.parents = slots_B.data_ptr(), starts_B.data_ptr(), _address(parents_BC)
        call.embeds, call.hidden_states = _address(embeds_NH), hidden_NH.data_ptr()
        call.normed, call.aux = normed_NH.data_ptr(), _address(aux_NF)
        call.nanoseconds = _address(self.nanoseconds)
        self.native_decode(ctypes.byref(call))
        return hidden_NH, normed_NH, aux_NF

    def move(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        slot: int,
        froms: Sequence[int],
        tos: Sequence[int],
    ) -> None:
        """Copy keys and values of positions `froms` of a slot to positions `tos`, one by one."""
        call, count = self.call_on(keys, values), len(froms)
        numbers = (ctypes.c_int64 * (3 * count))(*[slot] * count, *froms, *tos)
        call.slots = ctypes.addressof(numbers)
        at = (ctypes.c_void_p(call.slots + 8 * count * part) for part in (1, 2))
        self._move(ctypes.byref(call), *at, ctypes.c_int64(count))

    def call_on(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> DecoderCall:
        """As `call`; the one of the last use, if that was on the same cache."""
        if self._last_call is None or self._last_call[0] is not keys:
            self._last_call = (keys, self.call(keys, values))
        return self._last_call[1]

    def call(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> DecoderCall:
        """A new call with the fields that do not depend on the batch; it keeps alive layers and tables it points to."""
        positions = keys[0].shape[2] * keys[0].shape[4]
        if len(self._cosines_PD) < positions:
            self._cosines_PD, self._sines_PD = (table.float().contiguous() for table in self._rotary(positions))
        shape, head_dim = native.AttentionShape(), self._cosines_PD.shape[1]
        shape.heads, shape.kv_heads = self._heads
        shape.head_dim, shape.scale = head_dim, head_dim**-0.5
        shape.cache_row_k, shape.cache_head_k = keys[0].stride()[:2]
        shape.cache_row_v, shape.cache_head_v = values[0].stride()[:2]
        shape.pair = keys[0].shape[-1]
        layers = self._layer_records(keys, values)
        call = DecoderCall(
            attention=shape,
            hidden=len(self._final_norm),
            num_layers=len(self._layers),
            layers=ctypes.addressof(layers),
            final_norm=self._final_norm.data_ptr(),
            eps=self._eps,
            cosines=self._cosines_PD.data_ptr(),
            sines=self._sines_PD.data_ptr(),
            max_positions=len(self._cosines_PD),
            aux_layer_ids=(ctypes.c_int64 * _NUM_AUX_LAYERS)(*(self._aux_layer_ids or ())),
        )
        call.kept_alive = (layers, self._cosines_PD, self._sines_PD)
        return call

    def _layer_records(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> ctypes.Array[_Layer]:
        """The layers with the addresses of their keys and values."""
        records = (_Layer * len(self._layers))()
        for record, layer, key, value in zip(records, self._layers, keys, values, strict=True):
            assert key.dtype == value.dtype == self._kv_dtype
            for name in NORMS:
                setattr(record, name, _address(getattr(layer, name)))
            for name in MATRICES:
                setattr(record, name, Matrix.of(getattr(layer, name)))
            record.keys, record.values = key.data_ptr(), value.data_ptr()
        return records


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _checked(layer: LayerWeights, weight_format: WeightFormat) -> LayerWeights:
    for name in MATRICES:
        own = getattr(layer, name).weight_format
        assert own.layers_suffix == weight_format.layers_suffix, (
            f"{name} is in {own.value} beside matrices in {weight_format.value}: formats are mixed only if all are "
            "grouped (4, 5, 6 or 8 bits)"
        )
    for norm in (getattr(layer, name) for name in NORMS):
        assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous())
    return layer
