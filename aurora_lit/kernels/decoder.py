"""Whole decoder layers in one native call (decoder.hpp), over packed weights and slots.

`Decoder` holds pointers into tensors that it keeps alive. What is left out: which models qualify (models/fused_layers.py).

Shapes: B rows, T positions, N = B·T or fewer, C columns of a tree, H hidden, S slots, L capacity, D head size, P
positions, M moves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear

_TAPS = 3
MAX_DEPTH = 32
"""Most columns on a path of a tree; MAX_PATH in attention.hpp."""


class Matrix(ctypes.Structure):
    """A packed linear layer as decoder.hpp reads it."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    )

    @staticmethod
    def of(linear: PackedLinear) -> Matrix:
        """Pointers into a layer that the caller keeps alive."""
        bias = None if linear.bias is None else linear.bias.data_ptr()
        return Matrix(linear.packed.data_ptr(), bias, linear.out_features, linear.in_features)


_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm_embeds", ctypes.c_void_p),
        ("norm_attention", ctypes.c_void_p),
        ("norm_mlp", ctypes.c_void_p),
        *((name, Matrix) for name in _MATRICES),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class DecoderCall(ctypes.Structure):
    """A pass as decoder.hpp reads it."""

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
        *((name, ctypes.c_void_p) for name in ("embeds", "stream", "normed", "aux")),
        ("taps", ctypes.c_int64 * _TAPS),
    )


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer; norms are fp32 vectors [H]."""

    norm_embeds: torch.Tensor | None = None
    """EAGLE-3's draft layer only: the norm of the embedding that stands beside the hidden state."""
    norm_attention: torch.Tensor
    norm_mlp: torch.Tensor
    query: PackedLinear
    key: PackedLinear
    value: PackedLinear
    output: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear


class Decoder:
    """Layers ready to run.

    >>> decoder = Decoder(layers, final_norm=…, cosines_PD=…, sines_PD=…, num_heads=9, num_kv_heads=3, eps=1e-5)
    >>> stream_NH, normed_NH = decoder(hidden_NH, keys=slots.keys_SGCDP, values=slots.values_SGLD,
    ...                                slots_B=slots_B, starts_B=starts_B, queries=T)
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        final_norm: torch.Tensor,
        cosines_PD: torch.Tensor,
        sines_PD: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        taps: tuple[int, int, int] | None = None,
    ) -> None:
        """`taps`: layers in front of which the hidden state is to be noted."""
        library = native.library()
        assert library is not None
        self._layers = [_checked(layer) for layer in layers]
        self._final_norm = final_norm.float().contiguous()
        self._cosines_PD, self._sines_PD = cosines_PD.float().contiguous(), sines_PD.float().contiguous()
        self._heads = (num_heads, num_kv_heads)
        self._eps, self._taps = eps, taps
        weights = layers[0].query.packed.dtype
        self._run = getattr(library, f"aurora_decode_{native.SUFFIXES[weights]}")
        self._slot_dtype = torch.float32 if weights == torch.float32 else torch.bfloat16
        self._move = getattr(library, f"aurora_move_{native.SUFFIXES[self._slot_dtype]}")
        self._slots: tuple[Sequence[torch.Tensor], ctypes.Array[_Layer]] | None = None  # keeps the keys' lists alive

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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run `queries` positions of each row behind its start; `hidden_NH` fp32 contiguous is overwritten.

        `begins_R` int64 [B + 1]: rows have positions of their own number, `queries` at most, and lie one behind the
        other: those of row b begin at begins_R[b]. Of a tree they are the first columns.

        `parents_BC` int64: the positions are the last `queries` columns of a tree, whose earlier ones were run before.
        A column follows its parent, which comes before it, or the row's start where that is -1; it stands at the
        position of its depth and attends to what is before the start, its ancestors and itself. Columns lie in the slot
        in their order until `move` takes the wanted ones to their positions.

        Returns the last layer's hidden state (that same tensor), it after the final norm, and the taps [N, 3, H].
        """
        N, H = hidden_NH.shape
        normed_NH = torch.empty(N, H)
        aux_N3H = None if self._taps is None else torch.empty(N, _TAPS, H)
        call = self.call(keys, values)
        call.attention.rows, call.attention.queries = len(slots_B), queries
        if begins_R is not None:
            call.attention.begins = begins_R.data_ptr()
        if parents_BC is not None:
            parents_BC = parents_BC.contiguous()
            call.columns = parents_BC.shape[1]
            assert queries <= call.columns if begins_R is None else queries == call.columns
        for name, tensor in (
            ("slots", slots_B),
            ("starts", starts_B),
            ("parents", parents_BC),
            ("embeds", embeds_NH),
            ("stream", hidden_NH),
            ("normed", normed_NH),
            ("aux", aux_N3H),
        ):
            setattr(call, name, None if tensor is None else tensor.data_ptr())
        if self._taps is not None:
            call.taps = (ctypes.c_int64 * _TAPS)(*self._taps)
        self._run(ctypes.byref(call))
        return hidden_NH, normed_NH, aux_N3H

    def move(
        self,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        slots_M: torch.Tensor,
        from_M: torch.Tensor,
        to_M: torch.Tensor,
    ) -> None:
        """Copy keys and values of position from to position to, one after the other; all int64."""
        call = self.call(keys, values)
        call.slots = slots_M.data_ptr()
        self._move(
            ctypes.byref(call),
            ctypes.c_void_p(from_M.data_ptr()),
            ctypes.c_void_p(to_M.data_ptr()),
            ctypes.c_int64(len(slots_M)),
        )

    def call(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> DecoderCall:
        """What all calls over these slots have in common."""
        shape, head_dim = native.AttentionShape(), self._cosines_PD.shape[1]
        shape.heads, shape.kv_heads = self._heads
        shape.head_dim, shape.scale = head_dim, head_dim**-0.5
        shape.cache_row_k, shape.cache_head_k = keys[0].stride()[:2]
        shape.cache_row_v, shape.cache_head_v = values[0].stride()[:2]
        return DecoderCall(
            attention=shape,
            hidden=len(self._final_norm),
            num_layers=len(self._layers),
            layers=ctypes.addressof(self._record(keys, values)),
            final_norm=self._final_norm.data_ptr(),
            eps=self._eps,
            cosines=self._cosines_PD.data_ptr(),
            sines=self._sines_PD.data_ptr(),
            max_positions=len(self._cosines_PD),
        )

    def _record(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> ctypes.Array[_Layer]:
        """The layers with their slots' addresses; made once a cache."""
        if self._slots is None or self._slots[0] is not keys:
            records = (_Layer * len(self._layers))()
            for record, layer, key, value in zip(records, self._layers, keys, values, strict=True):
                assert key.dtype == value.dtype == self._slot_dtype
                for name in ("norm_embeds", "norm_attention", "norm_mlp"):
                    weight = getattr(layer, name)
                    setattr(record, name, None if weight is None else weight.data_ptr())
                for name in _MATRICES:
                    setattr(record, name, Matrix.of(getattr(layer, name)))
                record.keys, record.values = key.data_ptr(), value.data_ptr()
            self._slots = (keys, records)
        return self._slots[1]


def _checked(layer: LayerWeights) -> LayerWeights:
    for norm in (layer.norm_embeds, layer.norm_attention, layer.norm_mlp):
        assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous())
    return layer
