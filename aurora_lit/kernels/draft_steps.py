"""A draft's proposals, a chain or a tree for each sequence, in one native call (csrc/drafting.hpp).

`DraftSteps` holds pointers into tensors that it keeps alive.

Leaves out: what another level must promise to be drafted, which the caller says in numbers (serve/speculation/).

Shapes: B sequences, K proposals, J levels, S slots, L positions, F features of a position (the target's auxiliary
hidden states), V vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aurora_lit.kernels import native, products
from aurora_lit.kernels.decoder import Decoder, DecoderCall, Matrix
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat


class _Call(ctypes.Structure):
    """DraftCall in drafting.hpp."""

    _fields_ = (
        ("decoder", DecoderCall),
        *((name, Matrix) for name in ("fuse", "head", "value", "coarse")),
        ("features", ctypes.c_void_p),
        ("features_slot", ctypes.c_int64),
        ("committed", ctypes.c_void_p),
        ("committed_slot", ctypes.c_int64),
        ("embedding", products.RowTable),
        *((name, ctypes.c_void_p) for name in ("target_ids", "done", "ends")),
        *((name, ctypes.c_int64) for name in ("children", "level_width", "max_levels", "max_nodes")),
        *((name, ctypes.c_void_p) for name in ("min_gains", "level_rates")),
        *((name, ctypes.c_void_p) for name in ("temperatures", "keys", "positions")),
        *((name, ctypes.c_void_p) for name in ("outcomes", "tokens", "parents")),
        *((name, ctypes.c_int64) for name in ("levels", "nodes")),
    )


@dataclass(frozen=True, kw_only=True)
class DraftedLevels:
    """What one call has drafted."""

    token_BK: torch.Tensor
    """int64 target ids."""
    parent_BK: torch.Tensor
    """int64 columns, where column 0 is the root."""
    outcome_JB: torch.Tensor
    """fp32. Of chains, the value head's prediction of how many tokens are accepted from a level on. Of trees, the
    draft's probability that the accepted path passes one of the nodes that are expanded after a level; for sequences
    with a temperature that of the perturbed logits."""


class DraftSteps:
    """Drafts for a batch of sequences.

    >>> drafted = steps(slots_B=slots_B, done=[4, 0], ends=[6, 9], num_levels=4, num_nodes=4, width=1, ...)
    >>> drafted.token_BK
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        fuse: PackedLinear,
        head: PackedLinear,
        value: PackedLinear,
        coarse_head: PackedLinear | None = None,
        target_id_D: torch.Tensor,
        embedding: torch.Tensor | PackedEmbedding,
    ) -> None:
        """`embedding`: the target's; a tensor is fp32 [V, H] and contiguous.

        `coarse_head`: a copy in INT4_GROUPED, which is read first where that is faster.
        """
        library = native.library()
        assert library is not None
        assert coarse_head is None or coarse_head.weight_format is WeightFormat.INT4_GROUPED
        if isinstance(embedding, PackedEmbedding):
            table = products.RowTable.of(embedding.table.packed, embedding.table.weight_format)
        else:
            assert embedding.dtype == torch.float32
            assert embedding.is_contiguous()
            table = products.RowTable.of(embedding, None)
        self._kept_alive = (decoder, fuse, head, value, coarse_head, target_id_D, embedding)
        self._decoder = decoder
        self._draft = getattr(library, f"aurora_draft_{head.weight_format.suffix}")
        library.aurora_drafting_new.restype = ctypes.c_void_p
        self._state = ctypes.c_void_p(library.aurora_drafting_new())
        weakref.finalize(self, library.aurora_drafting_free, self._state)
        self._call = _Call(
            fuse=Matrix.of(fuse),
            head=Matrix.of(head),
            value=Matrix.of(value),
            coarse=Matrix() if coarse_head is None else Matrix.of(coarse_head),
            embedding=table,
            target_ids=target_id_D.data_ptr(),
        )
        self._num_outputs = head.out_features
        self._cache: tuple[Sequence[torch.Tensor], DecoderCall] | None = None
        """The keys of the cache that the call points to, and a pass over it, kept alive: the call holds a copy."""

    def __call__(
        self,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        features_SLF: torch.Tensor,
        tokens_SL: torch.Tensor,
        slots_B: torch.Tensor,
        done: Sequence[int],
        ends: Sequence[int],
        num_levels: int,
        num_nodes: int,
        width: int,
        min_gains: Sequence[float] | None = None,
        level_rates: Sequence[float] = (),
        temperature_B: torch.Tensor | None = None,
        key_B: torch.Tensor | None = None,
        position_B: torch.Tensor | None = None,
    ) -> DraftedLevels:
        """Run the draft over positions `done` to `ends` of each sequence, then draft from there.

        These positions use the target's features, `features_SLF`, which have the type of the draft's KV cache.

        Args:
            num_levels: most levels.
            num_nodes: most proposals for each sequence: the most probable nodes of the levels.
            width: most nodes of a level that are expanded, and children considered for each; 1: chains.
            min_gains: accepted tokens, of all sequences together, that each level after the first must promise to be
                drafted. None: all levels are drafted.
            level_rates: of trees, if `min_gains` is set: acceptance rate of a level, for each sequence.
            temperature_B: fp32. Where it is positive, children are ranked by logit / temperature + noise, namely the
                noise that the target's own token is drawn with (`gumbel` in modules/sampling/noise.py); where it is 0,
                by their logits. None: 0 for all.
            key_B: int64, keys of the noise; needed with `temperature_B`, as the next.
            position_B: int64, index in the output of the first proposed token.
        """
        call, B = self._call, len(slots_B)
        done_B, ends_B = (ctypes.c_int64 * B)(*done), (ctypes.c_int64 * B)(*ends)
        if self._cache is None or self._cache[0] is not keys:
            self._cache = (keys, self._decoder.call(keys, values))
            call.decoder = self._cache[1]
        call.decoder.attention.rows = B
        call.decoder.slots, call.decoder.starts = slots_B.data_ptr(), ctypes.addressof(ends_B)
        call.features, call.features_slot = features_SLF.data_ptr(), features_SLF.stride(0)
        call.committed, call.committed_slot = tokens_SL.data_ptr(), tokens_SL.stride(0)
        call.done, call.ends = ctypes.addressof(done_B), ctypes.addressof(ends_B)
        call.children, call.level_width = min(width, self._num_outputs), width
        call.max_levels, call.max_nodes = num_levels, num_nodes
        gains_J, rates_B = _doubles(min_gains), _doubles(level_rates)
        call.min_gains = None if gains_J is None else ctypes.addressof(gains_J)
        call.level_rates = None if rates_B is None else ctypes.addressof(rates_B)
        outcome_JB = torch.empty(num_levels, B)
        found = torch.empty(2, B * num_nodes, dtype=torch.int64)
        call.outcomes, call.tokens = outcome_JB.data_ptr(), found.data_ptr()
        call.parents = call.tokens + found.element_size() * found.shape[1]
        call.temperatures = call.keys = call.positions = None
        if temperature_B is not None:
            assert key_B is not None
            assert position_B is not None
            assert len(temperature_B) == len(key_B) == len(position_B) == B
            temperature_B = temperature_B.float().contiguous()
            key_B, position_B = key_B.long().contiguous(), position_B.long().contiguous()
            call.temperatures, call.keys = temperature_B.data_ptr(), key_B.data_ptr()
            call.positions = position_B.data_ptr()
        self._draft(ctypes.byref(call), self._state)
        levels, nodes = call.levels, call.nodes
        token_BK, parent_BK = found[:, : B * nodes].view(2, B, nodes)
        return DraftedLevels(token_BK=token_BK, parent_BK=parent_BK, outcome_JB=outcome_JB[:levels])


def _doubles(numbers: Sequence[float] | None) -> ctypes.Array[ctypes.c_double] | None:
    return None if numbers is None else (ctypes.c_double * len(numbers))(*numbers)
