"""Drafting for a batch: the draft's own cache, catching up with the target, and the chain of proposals.

Lifecycle of a row here: the engine stores the target's features of every position it runs (`remember`); nothing is
computed from them until proposals are wanted. Then `propose` first brings the draft's cache up to the last committed
token, from true features, and chains on from there with the draft's own. What the chain wrote is overwritten by the
next catching up, so rejection needs no work.

What is left out: trees (serve/speculation/draft_tree.py), how many proposals (serve/speculation/planner.py) and their verification
(modules/sampling/verification.py).

Shapes: B rows, T positions, K proposals, H hidden, Vd draft vocabulary, S slots, L capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from aurora_lit.kernels.decoder import MAX_DEPTH
from aurora_lit.kernels.draft_steps import DraftSteps
from aurora_lit.models.slots import KVSlots, SlotView
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.modules.sampling.verification import DraftVocabulary, Proposals, propose
from aurora_lit.serve.speculation.runtime_draft import RuntimeDraft, on_kernels, prepare_draft

_CATCH_UP_TOKENS = 256
"""Positions a single forward pass of the draft takes when a row is far behind."""


@dataclass(frozen=True, kw_only=True)
class DraftInputs:
    """The rows to draft for."""

    slots_B: torch.Tensor
    """int64."""
    lengths: list[int]
    """Committed tokens of each row, the last of which the target has not run yet."""


class Drafter:
    """A draft with a cache of its own, over the same slots as the target's.

    `tokens_SL` is the engine's table of committed tokens by slot and position.
    """

    def __init__(self, draft: Draft, target: Target, *, tokens_SL: torch.Tensor, capacity: int) -> None:
        self._target = target
        self._capacity = capacity
        self._tokens_SL = tokens_SL
        self._features_SLF = torch.zeros(
            len(tokens_SL), capacity, 3 * target.hidden_size, dtype=target.kv_dtype, device=tokens_SL.device
        )
        self._done = [0] * len(tokens_SL)  # draft positions of each slot computed from true features
        self._fitted = self.fit(draft)
        self._cache = self._make_cache()

    @property
    def draft(self) -> Draft:
        """The one that proposes now."""
        return self._fitted.draft

    @property
    def vocabulary(self) -> DraftVocabulary:
        """Its vocabulary."""
        return self._fitted.vocabulary

    def fit(self, draft: Draft) -> RuntimeDraft:
        """Make a draft ready to be swapped in; from any thread. Raises CheckpointError."""
        return prepare_draft(draft, self._target, capacity=self._capacity)

    def swap(self, draft: Draft | RuntimeDraft, *, recompute: bool = False) -> None:
        """Propose with another draft from now on; running requests go on. One that is not fitted yet is fitted here.

        Keys and values that the old weights made stay in use unless `recompute`, which has each running request's next
        proposals compute them all again from the kept features: a long round, worth it when the old weights were bad.
        Between neighbouring versions it is worth nothing (SmolLM2-135M, eight steps apart: 1.166 tokens accepted a
        round against 1.165). Output never depends on it.
        """
        fitted = self.fit(draft) if isinstance(draft, Draft) else draft
        assert len(fitted.draft.cos_LD) >= self._capacity, "fitted for shorter sequences"
        before, after = self.draft.config, fitted.draft.config
        self._fitted = fitted
        if (before.num_key_value_heads, before.head_dim) != (after.num_key_value_heads, after.head_dim):
            self._cache, recompute = self._make_cache(), True
        if recompute:
            self._done = [0] * len(self._done)

    def _make_cache(self) -> KVSlots:
        config = self.draft.config
        return KVSlots(
            num_layers=1,
            num_slots=len(self._tokens_SL),
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            capacity=self._capacity,
            dtype=self._target.kv_dtype,
            device=self._tokens_SL.device,
        )

    @property
    def features_SLF(self) -> torch.Tensor:
        """The target's features as `remember` keeps them; true for every position the target has run and kept."""
        return self._features_SLF

    @property
    def can_branch(self) -> bool:
        """Whether `grow` can be had, and with it trees."""
        return self._fitted.steps is not None

    def behind(self, slot: int, length: int) -> int:
        """Committed positions that are still to be caught up with, of a row of that many tokens."""
        return length - 1 - self._done[slot]

    def remember(self, *, slots_B: torch.Tensor, starts_B: torch.Tensor, aux_BT3H: torch.Tensor) -> None:
        """Keep the target's features of positions start, start + 1, … of each row."""
        for slot, start, aux_T3H in zip(slots_B.tolist(), starts_B.tolist(), aux_BT3H, strict=True):
            self._features_SLF[slot, start : start + len(aux_T3H)] = aux_T3H

    def forget(self, slot: int) -> None:
        """The slot starts a new request."""
        self._done[slot] = 0

    def keep_beginning(self, slot: int, length: int) -> None:
        """The slot starts a new request whose first `length` tokens are those it holds."""
        self._done[slot] = min(self._done[slot], max(0, length - 1))  # a position has seen the token behind it

    def copy_beginning(self, source: int, slot: int, length: int) -> None:
        """The slot's request begins with the first `length` tokens of another slot's."""
        self._features_SLF[slot, :length] = self._features_SLF[source, :length]
        self._done[slot] = min(self._done[source], length - 1)
        self._cache.copy(source, slot, self._done[slot])

    def propose(
        self,
        rows: DraftInputs,
        *,
        options: LogitOptions,
        num_steps: int,
        uniform_BK: torch.Tensor,
        go_on: Callable[[int, torch.Tensor], bool],
    ) -> Proposals:
        """Draft up to `num_steps` tokens a row; before each further step `go_on(steps done, values_B)` may stop.

        `values_B` is the value head's prediction at the last step: tokens accepted from that proposal on.
        """
        if self.can_branch and options.is_argmax and num_steps <= MAX_DEPTH:
            steps, count = self.grow(rows, num_steps=num_steps, width=1, go_on=go_on)
            token_BK, _ = steps.proposals(count)
            return Proposals(token_BK=token_BK, num_B=torch.full_like(rows.slots_B, count), q_BKD=None)
        hidden_BH = self.catch_up(rows)
        starts_B = torch.tensor(rows.lengths, device=rows.slots_B.device) - 1
        tokens: list[torch.Tensor] = []
        distributions: list[torch.Tensor] = []
        while True:
            step = len(tokens)
            normed_BH = self.draft.norm(hidden_BH)  # once for both heads
            logits_BD = self.draft.lm_head(normed_BH)
            draft_id_B, q_BD = propose(logits_BD, options=options, uniform_B=uniform_BK[:, step])
            tokens.append(self.vocabulary.target_id_D[draft_id_B])
            if q_BD is not None:
                distributions.append(q_BD)
            if step + 1 == num_steps or not go_on(step + 1, self.draft.value_head(normed_BH).squeeze(-1)):
                break
            hidden_BH = self.run(tokens[-1][:, None], hidden_BH[:, None], rows.slots_B, starts_B + step)[:, 0]
        return Proposals(
            token_BK=torch.stack(tokens, dim=1),
            num_B=torch.full_like(rows.slots_B, len(tokens)),
            q_BKD=torch.stack(distributions, dim=1) if distributions else None,
        )

    def grow(
        self, rows: DraftInputs, *, num_steps: int, width: int, go_on: Callable[[int, torch.Tensor], bool]
    ) -> tuple[DraftSteps, int]:
        """Draft up to `num_steps` levels of at most `width` nodes without drawing, where `can_branch`; how many it was.

        Before each further level `go_on(levels done, outcome_B)` may stop (`DraftSteps.start` says what that is).
        """
        steps, levels = self._fitted.steps, 1
        assert steps is not None
        starts = self._nearly_catch_up(rows)
        outcome_B = steps.start(
            keys=self._cache.keys_SGCDP,
            values=self._cache.values_SGLD,
            features_SLF=self._features_SLF,
            tokens_SL=self._tokens_SL,
            slots_B=rows.slots_B,
            done=starts,
            ends=[length - 1 for length in rows.lengths],
            width=width,
        )
        while levels < num_steps and go_on(levels, outcome_B):
            outcome_B = steps.step()
            levels += 1
        return steps, levels

    def catch_up(self, rows: DraftInputs) -> torch.Tensor:
        """Run all committed positions the draft has not seen; returns the hidden state at each row's last [B, H]."""
        starts = self._nearly_catch_up(rows)
        counts = [length - 1 - start for length, start in zip(rows.lengths, starts, strict=True)]
        # A row of one token has no position yet: what it is given here is arbitrary, and computed again next time.
        hidden_BTH = self._run_committed(rows.slots_B, starts, max(1, *counts))
        return hidden_BTH[torch.arange(len(counts)), torch.tensor(counts) - 1]

    def _nearly_catch_up(self, rows: DraftInputs) -> list[int]:
        """Run what rows lack, but for what one pass of them all together takes: positions run until then.

        The caller runs that pass.
        """
        # Without native steps all rows of it are given as many positions, so these must fit behind the longest row.
        together, starts = min(_CATCH_UP_TOKENS // 8, self._capacity - max(rows.lengths)), []
        for slot, length in zip(rows.slots_B.tolist(), rows.lengths, strict=True):
            while length - 1 - self._done[slot] > together:
                count = min(_CATCH_UP_TOKENS, length - 2 - self._done[slot])
                self._run_committed(torch.tensor([slot]), [self._done[slot]], count)
                self._done[slot] += count
            starts.append(self._done[slot])
            self._done[slot] = length - 1
        return starts

    def _run_committed(self, slots_B: torch.Tensor, starts: list[int], count: int) -> torch.Tensor:
        """Run `count` positions a row from true features; what lies beyond a row's end is overwritten later."""
        starts_B = torch.tensor(starts, device=slots_B.device)
        positions_BT = starts_B[:, None] + torch.arange(count, device=slots_B.device)
        features_BTF = self._features_SLF[slots_B[:, None], positions_BT]
        if on_kernels(slots_B.device):
            features_BTF = features_BTF.float()
        tokens_BT = self._tokens_SL[slots_B[:, None], positions_BT + 1]
        return self.run(tokens_BT, self.draft.fuse(features_BTF), slots_B, starts_B)

    def run(
        self,
        tokens_BT: torch.Tensor,
        hidden_BTH: torch.Tensor,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
    ) -> torch.Tensor:
        """One pass of the draft layer; `tokens_BT` are the tokens after the positions; returns hidden [B, T, H]."""
        B, T = tokens_BT.shape
        embeds_BTH = self._target.embedding(tokens_BT)
        if self._fitted.decoder is not None:
            stream_NH, _, _ = self._fitted.decoder(
                hidden_BTH.reshape(B * T, -1).clone(),
                keys=self._cache.keys_SGCDP,
                values=self._cache.values_SGLD,
                slots_B=slots_B,
                starts_B=starts_B,
                queries=T,
                embeds_NH=embeds_BTH.reshape(B * T, -1).contiguous(),
            )
            return stream_NH.view(B, T, -1)
        positions_BT = starts_B[:, None] + torch.arange(T, device=starts_B.device)
        query, key, value = self.draft.project(embeds_BTH, hidden_BTH, positions_BT)
        view = SlotView(self._cache, slots_B=slots_B, starts_B=starts_B)
        attended = view.attend(0, query, key, value, scale=self.draft.config.head_dim**-0.5)
        return self.draft.finish(attended.reshape(B, T, -1), hidden_BTH)
