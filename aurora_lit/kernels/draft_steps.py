"""A draft's proposals by native calls (csrc/drafting.hpp): first the newly committed positions, then level by level.

`DraftSteps` holds pointers into tensors that it keeps alive.

Leaves out: whether another level is profitable, which the caller decides between levels (serve/speculation/).

Shapes: B sequences, K proposals, S slots, L positions, F features of a position (the target's auxiliary hidden states),
V vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

from aurora_lit.kernels import native
from aurora_lit.kernels.decoder import Decoder, DecoderCall, Matrix
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear


class _Call(ctypes.Structure):
    """DraftCall in drafting.hpp."""

    _fields_ = (
        ("decoder", DecoderCall),
        *((name, Matrix) for name in ("fuse", "head", "value")),
        ("features", ctypes.c_void_p),
        ("features_slot", ctypes.c_int64),
        ("committed", ctypes.c_void_p),
        ("committed_slot", ctypes.c_int64),
        ("embedding", native.RowTable),
        *((name, ctypes.c_void_p) for name in ("target_ids", "done", "ends")),
        *((name, ctypes.c_int64) for name in ("children", "level_width")),
        *((name, ctypes.c_void_p) for name in ("reach", "values")),
    )


class DraftSteps:
    """Proposals for a batch of sequences: call `start`, then `step` any number of times, then `proposals`.

    >>> values_B = steps.start(slots_B=slots_B, done=[4, 0], ends=[6, 9], width=1, ...)
    >>> values_B = steps.step()
    >>> token_BK, _ = steps.proposals(2)
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        fuse: PackedLinear,
        head: PackedLinear,
        value: PackedLinear,
        target_id_D: torch.Tensor,
        embedding: torch.Tensor | PackedEmbedding,
    ) -> None:
        """`embedding`: the target's; a tensor is fp32 [V, H] and contiguous."""
        library = native.library()
        assert library is not None
        if isinstance(embedding, PackedEmbedding):
            table = native.RowTable.of(embedding.table.packed, embedding.table.weight_format)
        else:
            assert embedding.dtype == torch.float32
            assert embedding.is_contiguous()
            table = native.RowTable.of(embedding, None)
        self._kept_alive = (decoder, fuse, head, value, target_id_D, embedding)
        self._decoder = decoder
        suffix = head.weight_format.suffix
        self._start = getattr(library, f"aurora_draft_start_{suffix}")
        self._step = getattr(library, f"aurora_draft_step_{suffix}")
        self._finish = library.aurora_draft_finish
        self._finish.restype = ctypes.c_int64
        library.aurora_drafting_new.restype = ctypes.c_void_p
        self._state = ctypes.c_void_p(library.aurora_drafting_new())
        weakref.finalize(self, library.aurora_drafting_free, self._state)
        self._call = _Call(
            fuse=Matrix.of(fuse),
            head=Matrix.of(head),
            value=Matrix.of(value),
            embedding=table,
            target_ids=target_id_D.data_ptr(),
        )
        self._num_outputs = head.out_features
        self._batch: tuple[torch.Tensor, ...] = ()  # tensors that the call points to

    def start(
        self,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        features_SLF: torch.Tensor,
        tokens_SL: torch.Tensor,
        slots_B: torch.Tensor,
        done: Sequence[int],
        ends: Sequence[int],
        width: int,
    ) -> torch.Tensor:
        """Run the draft over positions `done` to `ends` of each sequence, then choose the first level.

        These positions use the target's features, `features_SLF`, which have the type of the draft's KV cache.
        `width`: largest number of nodes of a level that are expanded, and number of children considered for each.

        Returns for chains (width 1) the value head's prediction [B] at the last position, and for trees the draft's
        probability [B] that the target's continuation passes through one of the nodes to be expanded. The next call of
        either method overwrites it.
        """
        call, B = self._call, len(slots_B)
        done_B, ends_B, outcome_B = torch.tensor(done), torch.tensor(ends), torch.empty(B)
        self._batch = (slots_B, done_B, ends_B, outcome_B, features_SLF, tokens_SL)
        call.decoder = self._decoder.call(keys, values)
        call.decoder.attention.rows = B
        call.decoder.slots, call.decoder.starts = slots_B.data_ptr(), ends_B.data_ptr()
        call.features, call.features_slot = features_SLF.data_ptr(), features_SLF.stride(0)
        call.committed, call.committed_slot = tokens_SL.data_ptr(), tokens_SL.stride(0)
        call.done, call.ends = done_B.data_ptr(), ends_B.data_ptr()
        call.children, call.level_width = min(width, self._num_outputs), width
        call.values, call.reach = (outcome_B.data_ptr(), None) if width == 1 else (None, outcome_B.data_ptr())
        self._start(ctypes.byref(call), self._state)
        return outcome_B

    def step(self) -> torch.Tensor:
        """Expand the nodes of the current level and choose the next level; returns as `start` does."""
        self._step(ctypes.byref(self._call), self._state)
        return self._batch[3]

    def proposals(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` most probable nodes, or all if there are fewer: target ids and parents' columns, int64 [B, K]."""
        found = torch.empty(2, len(self._batch[0]) * count, dtype=torch.int64)
        tokens, parents = (ctypes.c_void_p(part.data_ptr()) for part in found)
        nodes = self._finish(self._state, ctypes.c_int64(count), tokens, parents)
        token_BK, parent_BK = found[:, : len(self._batch[0]) * nodes].view(2, -1, nodes)
        return token_BK, parent_BK
