"""Drafting for a batch: the draft's own KV cache, its prefill, and chains of proposals.

Lifecycle of a sequence here: the engine stores the target's features of every position that the target computes
(`store_features`); the draft computes nothing until proposals are wanted. Then `propose` first prefills the draft's
cache up to the last committed token, from the target's features, and goes on from there with the draft's own. The next
prefill overwrites what the chain wrote, so a rejection needs no clean-up.

For sampled requests the target's own token is the argmax of its log-probabilities plus noise
(modules/sampling/noise.py). The draft adds the same noise to its own (`ColumnDraws`), so that both tend to choose the
same token even where many are about as probable.

Left out: how many proposals, and what they cost (serve/speculation/weigh.py); what of a weighed chain is worth
proposing (kernels/csrc/drafting.hpp); verification (serve/engine/round_plan.py).

Shapes: B sequences, T positions, K proposals, H hidden, S slots, L capacity of a slot, F features of a position,
D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aurora_lit.kernels import huge_pages
from aurora_lit.kernels.draft_steps import Drafted, DraftRows, DraftSources, Weighing
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.kernels.native import KEY_BLOCK
from aurora_lit.models.attention import KVCacheView
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache, state_pool
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.sampling.noise import gumbel
from aurora_lit.serve.speculation.sources.runtime_draft import RuntimeDraft, prepare_draft, uses_kernels

_PREFILL_CHUNK_TOKENS = 256
"""Most positions of one forward pass of the draft's prefill."""
_LAST_PASS_TOKENS = 24
"""Positions that are left to the pass that proposes, which computes each in full: writing so few alone takes longer."""


@dataclass(frozen=True, kw_only=True)
class DraftInputs:
    """The sequences to draft for."""

    slots: list[int]
    lengths: list[int]
    """Committed tokens of each sequence; the target has not computed the last of them yet."""


class Drafter:
    """A draft with a KV cache of its own, over the same slots as the target's.

    >>> drafter = Drafter(draft, target, tokens_SL=tokens_SL, capacity=capacity)
    >>> drafter.store_features(slot=0, start=0, aux_TF=aux_TF)  # after a pass of the target
    >>> drafted = drafter.propose(DraftInputs(slots=[0], lengths=[9]), num_steps=4)
    """

    def __init__(self, draft: Eagle3Draft, target: Target, *, tokens_SL: torch.Tensor, capacity: int) -> None:
        """`tokens_SL`: the engine's table of committed tokens by slot and position. Raises CheckpointError."""
        self._target = target
        self._capacity = capacity
        self._tokens_SL = tokens_SL
        shape_SLF = (len(tokens_SL), capacity, 3 * target.hidden_size)
        self.features_SLF = huge_pages.growing(shape_SLF, target.kv_dtype, device=tokens_SL.device)
        """The target's features, valid for every position that the target has computed and committed."""
        self._num_cached = [0] * len(tokens_SL)
        """Positions of each slot whose keys and values were computed from the target's features."""
        self._runtime_draft = self.prepare(draft)
        self._cache = self._make_cache()
        self._weights = 1
        """Counts the drafts whose keys and values are not used with those of the one before."""
        self._weights_of_place: list[int] = []
        """By which of them a block of the pool was computed; 0: by none."""

    @property
    def draft(self) -> Eagle3Draft:
        """The draft that proposes now."""
        return self._runtime_draft.draft

    @property
    def is_native(self) -> bool:
        """True if the draft runs in native steps, which weighing needs."""
        return self._runtime_draft.steps is not None

    def prepare(self, draft: Eagle3Draft) -> RuntimeDraft:
        """Prepare a draft for `swap`; from any thread. Raises CheckpointError."""
        return prepare_draft(draft, self._target, capacity=self._capacity)

    def swap(self, draft: Eagle3Draft | RuntimeDraft, *, recompute: bool = False) -> None:
        """Propose with another draft from now on; running requests continue. An unprepared draft is prepared first.

        Keys and values that the old weights computed stay in use unless `recompute`: then the next proposals of each
        running request prefill the draft's cache again from the stored features. That makes one long round, and helps
        only after a bad draft: between neighbouring versions it gains nothing (SmolLM2-135M, eight steps apart: 1.166
        tokens accepted per round against 1.165). The output never depends on it.
        """
        prepared = self.prepare(draft) if isinstance(draft, Eagle3Draft) else draft
        assert len(prepared.draft.cos_LD) >= self._capacity, "prepared for shorter sequences"
        before, after = self.draft.config, prepared.draft.config
        self._runtime_draft = prepared
        if (before.num_key_value_heads, before.head_dim) != (after.num_key_value_heads, after.head_dim):
            self._cache, recompute = self._make_cache(), True
            self.make_pool(len(self._weights_of_place))
        if recompute:
            self._num_cached = [0] * len(self._num_cached)
            self._weights += 1

    def _make_cache(self) -> KVCache:
        config = self.draft.config
        return KVCache(
            num_layers=1,
            num_slots=len(self._tokens_SL),
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            capacity=self._capacity,
            dtype=self._target.kv_dtype,
            device=self._tokens_SL.device,
        )

    # -- what the slots hold -------------------------------------------------------------------------------------------

    def num_uncached(self, slot: int, length: int) -> int:
        """Positions of a sequence of `length` tokens that the prefill of the draft's cache still has to compute."""
        return length - 1 - self._num_cached[slot]

    def store_features(self, *, slot: int, start: int, aux_TF: torch.Tensor) -> None:
        """Store the target's features of positions start, start + 1, … of a sequence."""
        self.features_SLF[slot, start : start + len(aux_TF)] = aux_TF

    def forget(self, slot: int) -> None:
        """Drop what the slot holds: it starts a new request."""
        self._num_cached[slot] = 0

    def keep_prefix(self, slot: int, length: int) -> None:
        """Start a new request in the slot, whose first `length` tokens are those it holds already."""
        self._num_cached[slot] = min(self._num_cached[slot], max(0, length - 1))  # a position depends on the next token

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy the draft's keys and values of another slot, whose request begins with the same `length` tokens."""
        known, own = min(self._num_cached[source], length - 1), self._num_cached[slot]
        if known > own:
            self._cache.copy_prefix(source, slot, known, start=own)
            self._num_cached[slot] = known

    # -- what a pool of blocks holds (serve/engine/prefix_cache.py) ----------------------------------------------------

    @property
    def bytes_per_position(self) -> int:
        """Size of the draft's keys and values of a position."""
        config = self.draft.config
        return 2 * config.num_key_value_heads * config.head_dim * self._target.kv_dtype.itemsize

    def make_pool(self, num_places: int) -> None:
        """Make room for so many blocks of `KEY_BLOCK` positions.

        Since a position depends on the next token, which the next block has, each block begins a position earlier.
        """
        self._weights_of_place = [0] * num_places
        no_position_T = torch.zeros(0, dtype=torch.int64, device=self._tokens_SL.device)
        self._pool = [state_pool(each_TX[None], num_places) for each_TX in self._cache.read(0, no_position_T)]

    def keep_blocks(self, slot: int, places: Sequence[int], *, first: int) -> None:
        """Keep what the slot has of its blocks 0, 1, …; those from `first` on are new in their places."""
        for place in places[first:]:
            self._weights_of_place[place] = 0
        last_end = (self._num_cached[slot] + 1) // KEY_BLOCK
        blocks = [at for at in range(min(len(places), last_end)) if self._weights_of_place[places[at]] != self._weights]
        if blocks:
            which = torch.tensor([places[at] for at in blocks], device=self._tokens_SL.device)
            for pool_NPX, each_TX in zip(self._pool, self._cache.read(slot, self._positions(blocks)), strict=True):
                pool_NPX[which] = each_TX.view(len(blocks), *pool_NPX.shape[1:])
            for at in blocks:
                self._weights_of_place[places[at]] = self._weights

    def load_blocks(self, slot: int, places: Sequence[int]) -> None:
        """Copy blocks 0, 1, … to the slot, up to the first one that other weights have computed, or none."""
        usable = [weights == self._weights for weights in map(self._weights_of_place.__getitem__, places)]
        end = usable.index(False) if False in usable else len(usable)
        known, blocks = KEY_BLOCK * end - 1, range((self._num_cached[slot] + 1) // KEY_BLOCK, end)
        if known > self._num_cached[slot]:
            which = torch.tensor([places[at] for at in blocks], device=self._tokens_SL.device)
            keys_TGQE, values_TGD = (pool_NPX[which].flatten(0, 1) for pool_NPX in self._pool)
            self._cache.write(slot, self._positions(blocks), keys_TGQE, values_TGD)
            self._num_cached[slot] = known

    def _positions(self, blocks: Sequence[int]) -> torch.Tensor:
        """The positions of these blocks [T]; the first one of a slot has position 0 twice."""
        start_C = KEY_BLOCK * torch.tensor(blocks, device=self._tokens_SL.device) - 1
        return (start_C[:, None] + torch.arange(KEY_BLOCK, device=start_C.device)).clamp_min(0).flatten()

    # -- proposing -----------------------------------------------------------------------------------------------------

    def propose(self, inputs: DraftInputs, *, num_steps: int, noise: ColumnDraws | None = None) -> Drafted:
        """Draft a chain of `num_steps` tokens for each sequence."""
        if self.is_native:
            return self._draft_levels(inputs, noise=noise, num_levels=num_steps)
        hidden_BH = self.prefill(inputs)
        slots_B = torch.tensor(inputs.slots, device=self._tokens_SL.device)
        starts_B = torch.tensor(inputs.lengths, device=slots_B.device) - 1
        tokens: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for step in range(num_steps):
            if step:
                hidden_BH = self.forward(tokens[-1][:, None], hidden_BH[:, None], slots_B, starts_B + step - 1)[:, 0]
            normed_BH = self.draft.norm(hidden_BH)  # once for both heads
            tokens.append(self._choose(self.draft.lm_head(normed_BH).float(), noise, step))
            values.append(self.draft.value_head(normed_BH).squeeze(-1))
        return Drafted(torch.stack(tokens, dim=1).tolist(), None, torch.stack(values).tolist())

    def _choose(self, logits_BD: torch.Tensor, noise: ColumnDraws | None, step: int) -> torch.Tensor:
        """The token of one step of a chain [B]."""
        ids_D = self._runtime_draft.target_id_D
        if noise is not None:
            device = logits_BD.device
            temperature_B1 = torch.tensor(noise.temperatures, dtype=torch.float32, device=device)[:, None]
            key_B, position_B = (torch.tensor(each, device=device) for each in (noise.keys, noise.positions))
            is_drawn_B1 = temperature_B1 > 0
            logits_BD = logits_BD / torch.where(is_drawn_B1, temperature_B1, 1.0)
            logits_BD = logits_BD + gumbel(key_B, position_B + step, ids_D) * is_drawn_B1
        return ids_D[logits_BD.argmax(-1)]

    def propose_weighed(
        self,
        inputs: DraftInputs,
        *,
        num_steps: int,
        num_nodes: int,
        num_siblings: int,
        weighing: Weighing,
        noise: ColumnDraws | None = None,
    ) -> Drafted:
        """Draft chains of up to `num_steps` tokens, and propose of them, and of up to `num_siblings` other likely
        tokens beside each, what is worth its column, up to `num_nodes`. Needs `is_native`.
        """
        return self._draft_levels(
            inputs,
            noise=noise,
            num_levels=num_steps,
            num_siblings=num_siblings,
            num_nodes=num_nodes,
            weighing=weighing,
        )

    def _draft_levels(self, inputs: DraftInputs, *, noise: ColumnDraws | None, **levels: Any) -> Drafted:
        """Draft levels in one native call; see `DraftSteps`."""
        steps = self._runtime_draft.steps
        assert steps is not None
        starts = self._prefill_all_but_last_pass(inputs)
        cache, tables = self._cache, (self.features_SLF, self._tokens_SL)
        rows = DraftRows(inputs.slots, starts, [length - 1 for length in inputs.lengths], noise)
        return steps(DraftSources(cache.keys_SGCQPE, cache.values_SGMDE, *tables), rows, **levels)

    # -- prefill of the draft's cache ----------------------------------------------------------------------------------

    def prefill(self, inputs: DraftInputs) -> torch.Tensor:
        """Compute all committed positions that the draft's cache lacks. Returns the last hidden states [B, H]."""
        starts = self._prefill_all_but_last_pass(inputs)
        counts = [length - 1 - start for length, start in zip(inputs.lengths, starts, strict=True)]
        # A sequence of one token has no position yet: its result is arbitrary, and is computed again next time.
        hidden_BTH = self._run_committed(inputs.slots, starts, max(1, *counts))
        device = hidden_BTH.device
        return hidden_BTH[torch.arange(len(counts), device=device), torch.tensor(counts, device=device) - 1]

    def catch_up(self, slot: int, length: int, *, most: int) -> int:
        """Prefill at most `most` positions of a sequence of `length` tokens; returns how many, when they are done."""
        count = min(most, self.num_uncached(slot, length) - 1)
        for start in range(self._num_cached[slot], self._num_cached[slot] + count, _PREFILL_CHUNK_TOKENS):
            end = min(start + _PREFILL_CHUNK_TOKENS, self._num_cached[slot] + count)
            self._write_committed(slot, start, end - start)
        self._num_cached[slot] += max(0, count)
        self.features_SLF[slot, 0, 0].item()  # waits for a GPU, so that this can be timed
        return max(0, count)

    def _prefill_all_but_last_pass(self, inputs: DraftInputs) -> list[int]:
        """Prefill up to the last pass, one over all sequences that the caller runs. Returns where that pass starts."""
        # Without native steps that pass computes equally many positions of every sequence, so they must also fit into
        # the slot of the longest one.
        last_pass, starts = max(1, min(_LAST_PASS_TOKENS, self._capacity - max(inputs.lengths))), []
        for slot, length in zip(inputs.slots, inputs.lengths, strict=True):
            while length - 1 - self._num_cached[slot] > last_pass:
                count = min(_PREFILL_CHUNK_TOKENS, length - 2 - self._num_cached[slot])
                self._write_committed(slot, self._num_cached[slot], count)
                self._num_cached[slot] += count
            starts.append(self._num_cached[slot])
            self._num_cached[slot] = length - 1
        return starts

    def _run_committed(self, slots: list[int], starts: list[int], count: int) -> torch.Tensor:
        """Run `count` positions of each sequence from the target's features; those past its end are computed again."""
        tokens_BT, hidden_BTH, slots_B, starts_B = self._committed(slots, starts, count)
        return self.forward(tokens_BT, hidden_BTH, slots_B, starts_B)

    def _write_committed(self, slot: int, start: int, count: int) -> None:
        """Keys and values of `count` positions alone, for nothing is proposed from there: two fifths of a pass."""
        tokens_BT, hidden_BTH, slots_B, starts_B = self._committed([slot], [start], count)
        embeds_BTH = self._target.embedding(tokens_BT)
        if self._runtime_draft.decoder is not None:
            self._runtime_draft.decoder(
                hidden_BTH[0].contiguous(),
                keys=self._cache.keys_SGCQPE,
                values=self._cache.values_SGMDE,
                slots_B=slots_B,
                starts_B=starts_B,
                queries=count,
                embeds_NH=embeds_BTH[0].contiguous(),
                only_cache=True,
            )
            return
        positions_BT = starts_B[:, None] + torch.arange(count, device=starts_B.device)
        key, value = self.draft.project_kv(embeds_BTH, hidden_BTH, positions_BT)
        KVCacheView(self._cache, slots_B=slots_B, starts_B=starts_B).write(0, key, value)

    def _committed(
        self, slots: list[int], starts: list[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layer's inputs at committed positions: next tokens, hidden states, slots and starts."""
        slots_B, starts_B = (torch.tensor(each, device=self._tokens_SL.device) for each in (slots, starts))
        positions_BT = starts_B[:, None] + torch.arange(count, device=slots_B.device)
        features_BTF = self.features_SLF[slots_B[:, None], positions_BT]
        if uses_kernels(slots_B.device):
            features_BTF = features_BTF.float()
        tokens_BT = self._tokens_SL[slots_B[:, None], positions_BT + 1]
        return tokens_BT, self.draft.combine_hidden_states(features_BTF), slots_B, starts_B

    def forward(
        self,
        tokens_BT: torch.Tensor,
        hidden_BTH: torch.Tensor,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
    ) -> torch.Tensor:
        """One pass of the draft's layer. `tokens_BT`: the token after each position. Returns hidden [B, T, H]."""
        B, T = tokens_BT.shape
        embeds_BTH = self._target.embedding(tokens_BT)
        if self._runtime_draft.decoder is not None:
            stream_NH, _, _ = self._runtime_draft.decoder(
                hidden_BTH.reshape(B * T, -1).clone(),
                keys=self._cache.keys_SGCQPE,
                values=self._cache.values_SGMDE,
                slots_B=slots_B,
                starts_B=starts_B,
                queries=T,
                embeds_NH=embeds_BTH.reshape(B * T, -1).contiguous(),
            )
            return stream_NH.view(B, T, -1)
        positions_BT = starts_B[:, None] + torch.arange(T, device=starts_B.device)
        query, key, value = self.draft.project_qkv(embeds_BTH, hidden_BTH, positions_BT)
        view = KVCacheView(self._cache, slots_B=slots_B, starts_B=starts_B)
        attended = view.attend(0, query, key, value, scale=self.draft.config.head_dim**-0.5)
        return self.draft.complete_layer(attended.reshape(B, T, -1), hidden_BTH)
