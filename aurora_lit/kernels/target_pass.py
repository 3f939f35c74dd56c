"""A round's pass of the target in one native call (csrc/target_pass.hpp), from token ids to the target's own tokens.

`TargetPass` takes and gives Python numbers where there are few of them: making a tensor of eight numbers takes longer
than what is done with it.

Leaves out: the layers (decoder.py), the head's choice (packed_linear.py), and targets whose parts are not all packed,
which take one call for each (models/native_target.py).

Shapes: B rows, N columns of all rows, H hidden size, F = 3H auxiliary features, S slots, L capacity of a slot.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from aurora_lit.kernels import matmul, native
from aurora_lit.kernels.decoder import Decoder, Matrix
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear, row_table

_STATES = 5
"""A column's states: the last layer's, after the final norm, and three auxiliary ones."""


class _StateTable(ctypes.Structure):
    """StateTable in target_pass.hpp."""

    _fields_ = (("data", ctypes.c_void_p), ("slot", ctypes.c_int64), ("is_bf16", ctypes.c_int64))

    @staticmethod
    def of(table: torch.Tensor | None) -> _StateTable:
        if table is None:
            return _StateTable()
        assert table.dtype in (torch.float32, torch.bfloat16)
        return _StateTable(table.data_ptr(), table.stride(0), table.dtype == torch.bfloat16)


class _Call(ctypes.Structure):
    """TargetPass in target_pass.hpp."""

    _fields_ = (
        ("decode", ctypes.c_void_p),
        ("embedding", matmul.RowTable),
        ("vocabulary", ctypes.c_int64),
        ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("choose", "decoder", "ids")),
        *((name, ctypes.c_int64) for name in ("columns", "chosen")),
        ("draws", matmul.Draws),
        ("aux", _StateTable),
        ("last", _StateTable),
        ("keeps_last", ctypes.c_void_p),
        ("skips_prompts_last", ctypes.c_int64),
    )


class PassResult:
    """What a pass has computed. The tensors are overwritten by the next one."""

    def __init__(self, buffer: torch.Tensor, columns: int, own_tokens: list[int]) -> None:
        self.own_tokens = own_tokens
        """The target's own token at the columns that were asked for."""
        self._buffer, self._columns = buffer, columns

    @property
    def aux_NF(self) -> torch.Tensor:
        """Auxiliary hidden states, fp32."""
        return self._states(2, 5)

    @property
    def last_NH(self) -> torch.Tensor:
        """Last hidden states after the final norm, fp32."""
        return self._states(1, 2)

    def _states(self, begin: int, end: int) -> torch.Tensor:
        """Some of _STATES. Made when asked for: the first call into torch after a pass takes 0.1 ms."""
        size = self._columns * (self._buffer.shape[1] // _STATES)
        return self._buffer.view(-1)[begin * size : end * size].view(self._columns, -1)


class TargetPass:
    """The passes of one target over one KV cache.

    >>> run = TargetPass(decoder, embedding=embedding, head=head, keys=keys, values=values)
    >>> result = run([[7], [9, 3]], slots=[0, 2], starts=[5, 8], num_chosen=3)
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        embedding: torch.Tensor | PackedEmbedding,
        head: PackedLinear,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        aux_SLF: torch.Tensor | None = None,
        last_SLH: torch.Tensor | None = None,
    ) -> None:
        """`embedding`: a tensor is fp32 [V, H] and contiguous. `keys`, `values`: of the cache. The decoder returns
        auxiliary states; the head has no bias.

        `aux_SLF`, `last_SLH`: fp32 or bf16. The auxiliary and the last states of every column are stored here too: of a
        row's column t at position starts + t of its slot. The last ones only of rows that a call says to keep.
        """
        library = native.library()
        assert library is not None
        assert head.bias is None
        self._kept_alive = (decoder, embedding, head, aux_SLF, last_SLH)
        self._decoder, self._keys, self._values = decoder, keys, values
        self._aux_SLF, self._last_SLH = aux_SLF, last_SLH
        self._run = library.aurora_target_pass
        self._hidden = head.in_features
        self._buffer_NX, self._room = torch.empty(0, _STATES * self._hidden), 0
        self._call = _Call(
            decode=_pointer(decoder.native_decode),
            embedding=row_table(embedding),
            vocabulary=head.out_features,
            head=Matrix.of(head),
            choose=_pointer(getattr(library, f"aurora_choose_{head.weight_format.suffix}")),
            aux=_StateTable.of(aux_SLF),
            last=_StateTable.of(last_SLH),
        )

    def __call__(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        slots: Sequence[int],
        starts: Sequence[int],
        parents: Sequence[Sequence[int]] | None = None,
        num_prompts: int = 0,
        num_chosen: int = 0,
        keeps_last: Sequence[bool] = (),
        skips_prompts_last: bool = False,
        draws: matmul.ColumnDraws | None = None,
    ) -> PassResult:
        """Compute rows of any number of columns; the arguments of `Decoder` as lists. Not for two threads at a time.

        Args:
            tokens: of each row's columns.
            slots: of the rows.
            starts: position of each row's first column.
            parents: for every row that decodes, equally long; None: all are chains.
            num_prompts: so many rows at the end read prompts.
            num_chosen: columns at the beginning whose own token is chosen.
            draws: how, for each of them; None: greedily.
            keeps_last: for each row, whether to store its last states; needed where there is a table for them.
            skips_prompts_last: prompts' last states are not needed and become arbitrary, which saves nearly all of the
                last layer. No other bit changes.

        Raises:
            IndexError: a token is not in the vocabulary.
        """
        B, N = len(tokens), sum(map(len, tokens))
        width = len(parents[0]) if parents else 0
        numbers = (ctypes.c_int64 * (N + 4 * B + 1 + (width * len(parents) if parents else 0)))(
            *itertools.chain.from_iterable(tokens),
            *itertools.accumulate(map(len, tokens), initial=0),
            *slots,
            *starts,
            *(keeps_last or [False] * B),
            *(itertools.chain.from_iterable(parents) if parents else ()),
        )
        ids = ctypes.addressof(numbers)
        begins = ids + 8 * N
        call, decoder = self._call, self._decoder.call_on(self._keys, self._values)
        attention = decoder.attention
        attention.rows, attention.queries, attention.num_prompts = B, max(map(len, tokens)), num_prompts
        attention.begins = begins
        decoder.slots = begins + 8 * (B + 1)
        decoder.starts = decoder.slots + 8 * B
        call.keeps_last = decoder.starts + 8 * B
        decoder.columns, decoder.parents = width, call.keeps_last + 8 * B if width else None
        if self._room < N:
            self._buffer_NX, self._room = torch.empty(N, _STATES * self._hidden), N
        H, at = self._hidden, self._buffer_NX.data_ptr()
        decoder.embeds, decoder.hidden_states = None, at
        decoder.normed, decoder.aux = at + 4 * N * H, at + 8 * N * H
        nanoseconds = self._decoder.nanoseconds
        decoder.nanoseconds = None if nanoseconds is None else nanoseconds.data_ptr()
        own_tokens = (ctypes.c_int64 * num_chosen)()
        call.draws.tokens = ctypes.addressof(own_tokens)
        call.draws.temperatures = None
        if draws is not None:
            temperatures = (ctypes.c_float * num_chosen)(*draws.temperatures)
            keys_and_positions = (ctypes.c_int64 * (2 * num_chosen))(*draws.keys, *draws.positions)
            call.draws.temperatures = ctypes.addressof(temperatures)
            call.draws.keys = ctypes.addressof(keys_and_positions)
            call.draws.positions = call.draws.keys + 8 * num_chosen
        call.skips_prompts_last = skips_prompts_last
        call.decoder, call.ids, call.columns, call.chosen = ctypes.addressof(decoder), ids, N, num_chosen
        if not self._run(ctypes.byref(call)):
            raise IndexError(f"a token of {list(tokens)} is not in the vocabulary of {call.vocabulary}")
        return PassResult(self._buffer_NX, N, own_tokens[:])

    def keep_path(self, columns: Sequence[int], *, slot: int, start: int, keeps_last: bool) -> None:
        """Move what the last pass stored of some columns of a row, ascending, to the positions from `start` on.

        `start`: position of the row's first column; `keeps_last`: as in the pass.
        """
        moves = [(start + column, start + place) for place, column in enumerate(columns) if column > place]
        froms, tos = zip(*moves, strict=True)
        self._decoder.move(self._keys, self._values, slot=slot, froms=froms, tos=tos)
        for table_SLX in (self._aux_SLF, self._last_SLH if keeps_last else None):
            if table_SLX is None:
                continue
            row_bytes = table_SLX.shape[2] * table_SLX.element_size()
            first = table_SLX.data_ptr() + slot * table_SLX.stride(0) * table_SLX.element_size()
            for source, place in moves:
                ctypes.memmove(first + place * row_bytes, first + source * row_bytes, row_bytes)


def _pointer(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
