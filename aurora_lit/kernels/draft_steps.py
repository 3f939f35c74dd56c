"""A draft's proposals, a chain for each sequence, maybe with siblings, in one native call (csrc/drafting.hpp).

`DraftSteps` holds pointers into tensors that it keeps alive.

Leaves out: what another level must promise to be drafted, which the caller says in numbers (serve/speculation/).

Shapes: B sequences, K proposals, J levels, S slots, L positions, F features of a position (the target's auxiliary
hidden states), V vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aurora_lit.kernels import matmul, native
from aurora_lit.kernels.decoder import Decoder, DecoderCall, Matrix
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear, row_table
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
        ("embedding", matmul.RowTable),
        *((name, ctypes.c_void_p) for name in ("target_ids", "done", "ends")),
        *((name, ctypes.c_int64) for name in ("children", "max_levels", "max_nodes")),
        *((name, ctypes.c_void_p) for name in ("temperatures", "keys", "positions")),
        *((name, ctypes.c_void_p) for name in ("acceptance", "level_rates")),
        ("speed", ctypes.c_double),
        ("columns_s", ctypes.c_void_p),
        ("num_columns", ctypes.c_int64),
        ("levels_s", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("outcomes", "shares", "first", "counts", "tokens", "parents")),
        ("levels", ctypes.c_int64),
    )


SHARE_CLASSES = 16
"""Classes of the share that a draft gives its first choice, equally wide (SHARES in drafting.hpp)."""


class Prices(NamedTuple):
    """What holds for the weighing of some rounds."""

    acceptance_KC: torch.Tensor
    """fp32: how often the draft's first choice is accepted after what was accepted, of greedy sequences and of sampled
    ones, by the class of its share."""
    columns_s: ctypes.Array[ctypes.c_double]
    """Seconds that 0, 1, 2, … proposals of all sequences together take in the target's pass; there are never more."""
    levels_s: ctypes.Array[ctypes.c_double]
    """Seconds that each level of the draft after the first takes."""


class Weighing(NamedTuple):
    """What proposals promise, and what they cost: each must promise the tokens that its time would give otherwise."""

    prices: Prices
    level_rates: Sequence[float]
    """What a further level is expected to be accepted with, for each sequence."""
    speed: float
    """Tokens per second that time is worth."""


class Drafted(NamedTuple):
    """A chain for each sequence, or of a weighed one what is worth proposing, siblings among it."""

    tokens: list[list[int]]
    """Target ids [B][K]; where they were weighed, each sequence has its own number, maybe none."""
    parents: list[list[int]] | None
    """Of weighed chains: the column that each token follows, where column 0 is the last committed token."""
    outcomes: list[list[float]]
    """By level [J][B]: the value head's prediction of how many tokens are accepted from there on. Of weighed chains:
    the probability that the first choices until that level are accepted."""
    first_choices: list[list[int]] | None = None
    """Of weighed chains: the token of each level that the draft takes for the likeliest, proposed or not [B][J]."""
    shares: list[list[float]] | None = None
    """Of weighed chains: the draft's probability of each of `first_choices` after the one before it [B][J]; for
    sequences with a temperature that of the perturbed logits."""

    @property
    def token_BK(self) -> torch.Tensor:
        """`tokens`, int64."""
        return torch.tensor(self.tokens)

    @property
    def num_levels(self) -> int:
        """How many levels were drafted."""
        return len(self.outcomes)

    @property
    def outcome_JB(self) -> torch.Tensor:
        """`outcomes`, fp32."""
        return torch.tensor(self.outcomes)


class DraftSources(NamedTuple):
    """What native steps read: the draft's cache, which they also write, and two tables of the engine by slot."""

    keys: Sequence[torch.Tensor]
    """Of the cache."""
    values: Sequence[torch.Tensor]
    features_SLF: torch.Tensor
    """The target's features of positions, in the type of the cache."""
    tokens_SL: torch.Tensor
    """Committed tokens, int64."""


class DraftRows(NamedTuple):
    """The sequences: the draft reads positions `done` to `ends` of each, and goes on from there."""

    slots: Sequence[int]
    done: Sequence[int]
    ends: Sequence[int]
    draws: ColumnDraws | None = None
    """Of each sequence's first proposed token. Where the temperature is positive, tokens are ranked by
    logit / temperature + noise, namely the noise that the target's own token is drawn with (`gumbel` in
    modules/sampling/noise.py); where it is 0, by their logits. None: 0 for all."""


class _Room:
    """The arrays that calls for so many sequences, levels and nodes read and write: making them takes longer."""

    def __init__(self, call: _Call, sequences: int, levels: int, nodes: int) -> None:
        """`call`: its pointers are set to these arrays."""
        self.sizes = sequences, levels, nodes
        self.numbers = (ctypes.c_int64 * (3 * sequences))()
        """Slots, first positions and ends."""
        self.level_rates = (ctypes.c_double * sequences)()
        self.temperatures = (ctypes.c_float * sequences)()
        self.noise = (ctypes.c_int64 * (2 * sequences))()
        """Keys and positions."""
        self.outcomes = (ctypes.c_float * (levels * sequences))()
        self.shares = (ctypes.c_float * (levels * sequences))()
        self.found = (ctypes.c_int64 * (sequences * (1 + 2 * nodes + levels)))()
        """Counts, tokens, parents and first choices."""
        row = 8 * sequences
        call.decoder.attention.rows, call.max_levels, call.max_nodes = sequences, levels, nodes
        call.decoder.slots = ctypes.addressof(self.numbers)
        call.done = call.decoder.slots + row
        call.ends = call.done + row
        call.level_rates, call.keys = ctypes.addressof(self.level_rates), ctypes.addressof(self.noise)
        call.positions = call.keys + row
        call.outcomes, call.shares = ctypes.addressof(self.outcomes), ctypes.addressof(self.shares)
        call.counts = ctypes.addressof(self.found)
        call.tokens = call.counts + row
        call.parents = call.tokens + row * nodes
        call.first = call.parents + row * nodes

    def drafted(self, levels: int, *, is_weighed: bool) -> Drafted:
        """What the call has found, which has drafted so many levels."""
        B, _, nodes = self.sizes
        found = self.found
        begins = [(b * nodes, b * nodes + found[b]) for b in range(B)]
        tokens = [found[B + begin : B + end] for begin, end in begins]
        outcomes = [self.outcomes[j : j + B] for j in range(0, levels * B, B)]
        if not is_weighed:
            return Drafted(tokens, None, outcomes)
        parents, first, stop = B * (1 + nodes), B * (1 + 2 * nodes), levels * B
        return Drafted(
            tokens,
            [found[parents + begin : parents + end] for begin, end in begins],
            outcomes,
            first_choices=[found[first + b : first + stop : B] for b in range(B)],
            shares=[self.shares[b:stop:B] for b in range(B)],
        )


class DraftSteps:
    """Drafts for a batch of sequences.

    >>> drafted = steps(sources, DraftRows(slots=[0, 2], done=[4, 0], ends=[6, 9]), num_levels=4)
    >>> drafted.tokens
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
        self._kept_alive = (decoder, fuse, head, value, coarse_head, target_id_D, embedding)
        self._decoder = decoder
        assert all(each.weight_format.layers_suffix == decoder.layers_suffix for each in (fuse, head, value))
        self._draft = getattr(library, f"aurora_draft_{decoder.layers_suffix}")
        library.aurora_drafting_new.restype = ctypes.c_void_p
        self._state = ctypes.c_void_p(library.aurora_drafting_new())
        weakref.finalize(self, library.aurora_drafting_free, self._state)
        self._call = _Call(
            fuse=Matrix.of(fuse),
            head=Matrix.of(head),
            value=Matrix.of(value),
            coarse=Matrix() if coarse_head is None else Matrix.of(coarse_head),
            embedding=row_table(embedding),
            target_ids=target_id_D.data_ptr(),
        )
        self._num_outputs = head.out_features
        self._sources: DraftSources | None = None
        self._pass: DecoderCall | None = None
        """A pass over the sources' cache, of which the call holds a copy; both are kept alive."""
        self._room: _Room | None = None
        self._prices: Prices | None = None
        """What the call points to."""

    def __call__(
        self,
        sources: DraftSources,
        rows: DraftRows,
        *,
        num_levels: int,
        num_siblings: int = 0,
        num_nodes: int = 0,
        weighing: Weighing | None = None,
    ) -> Drafted:
        """Run the draft over each sequence's new positions, then draft from there.

        Args:
            num_levels: most levels.
            num_siblings: of a weighed chain, tokens that are considered beside each of its own.
            num_nodes: of a weighed chain, most proposals for each sequence.
            weighing: which levels are drafted, and which tokens proposed. None: the whole chain, without siblings.
        """
        assert weighing is not None or not (num_siblings or num_nodes), "nothing is chosen from"
        room, call = self._room_for(sources, (len(rows.slots), num_levels, num_nodes or num_levels)), self._call
        room.numbers[:] = [*rows.slots, *rows.done, *rows.ends]
        call.children = min(1 + num_siblings, self._num_outputs)
        call.temperatures = None
        if rows.draws is not None:
            temperatures, keys, positions = rows.draws
            room.temperatures[:], room.noise[:] = list(temperatures), [*keys, *positions]
            call.temperatures = ctypes.addressof(room.temperatures)
        if weighing is None:
            call.acceptance = self._prices = None
        else:
            room.level_rates[:], call.speed = list(weighing.level_rates), weighing.speed
            self._point_to_prices(weighing.prices)
        self._draft(ctypes.byref(call), self._state)
        return room.drafted(call.levels, is_weighed=weighing is not None)

    def _room_for(self, sources: DraftSources, sizes: tuple[int, int, int]) -> _Room:
        """The arrays for so many sequences, levels and nodes; the call points to them and to the sources."""
        call = self._call
        if self._sources is None or not all(map(operator.is_, sources, self._sources)):
            self._sources, self._pass = sources, self._decoder.call(sources.keys, sources.values)
            call.decoder, self._room = self._pass, None
            call.features, call.features_slot = sources.features_SLF.data_ptr(), sources.features_SLF.stride(0)
            call.committed, call.committed_slot = sources.tokens_SL.data_ptr(), sources.tokens_SL.stride(0)
        if self._room is None or self._room.sizes != sizes:
            self._room = _Room(call, *sizes)
        return self._room

    def _point_to_prices(self, prices: Prices) -> None:
        if prices is not self._prices:
            self._prices, call = prices, self._call
            call.acceptance = prices.acceptance_KC.data_ptr()
            call.columns_s, call.num_columns = ctypes.addressof(prices.columns_s), len(prices.columns_s)
            call.levels_s = ctypes.addressof(prices.levels_s)


def doubles(numbers: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    """An array for native code."""
    return (ctypes.c_double * len(numbers))(*numbers)
