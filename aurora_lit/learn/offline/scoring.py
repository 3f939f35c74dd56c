"""Accepted length as a live server would have had it with another draft, from recorded traces alone.

A greedy or seeded answer does not depend on the draft, so its tokens are known, and from every root in it the draft's
proposals are accepted as far as they equal them. Walking from root to root as rounds do gives exactly the rounds of a
server that proposes `num_steps` tokens in every round (engine.adaptive and engine.lookup off); traces keep states in
bf16, so only a near tie between two tokens may fall the other way. With the
ratio test a token that was committed came from an accepted proposal with chance min(1, q/p), so the walk has chances
in the place of outcomes, and what it gives is exact on average.

Two limits: of a request in several segments, a later one knows only the overlap before it; and a round that reaches
beyond a request's recorded end does not count, as in `bench acceptance`.
What is left out: learning (learn/offline/replay.py).

Shapes: K draft steps, T positions, H hidden, N scored positions, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aurora_lit.learn.data.batches import collate
from aurora_lit.learn.data.labelled_trace import first_taught
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.policy import draft_index
from aurora_lit.modules.losses.unroll import shift
from aurora_lit.traces.record import Trace


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What a draft would have been worth on a segment; fractions where acceptance is a matter of chance."""

    count: float = 0.0
    tokens: float = 0.0
    """Emitted by those rounds, the corrected or bonus token included."""

    def __add__(self, other: Rounds) -> Rounds:
        return Rounds(count=self.count + other.count, tokens=self.tokens + other.tokens)

    @property
    def accepted_length(self) -> float:
        """Tokens a round; 1 where there was none."""
        return self.tokens / self.count if self.count else 1.0


class RoundScorer:
    """Scores a stream of segments, in their order, with the draft that `module` has at the time.

    >>> scorer = RoundScorer(module, ends, batch_positions=4096)
    >>> scorer.score(traces)[0].accepted_length
    """

    def __init__(self, module: DraftModule, ends: TargetHead, *, batch_positions: int) -> None:
        """batch_positions: of one draft pass, padding included; a longer segment is a pass of its own."""
        self.module, self._ends = module, ends
        self._batch_positions = batch_positions
        self._open: dict[str, tuple[int, dict[int, float]]] = {}
        """By request: where its next segment's answer begins, and roots before or behind that which wait for it, with
        the chance that a round begins there; places in the request."""

    @torch.no_grad()
    def score(self, traces: Sequence[Trace]) -> list[Rounds]:
        """Rounds of each segment; nothing of the traces is changed or kept."""
        chances: dict[int, Tensor] = {}
        for batch in _pack(traces, self._batch_positions):
            chances |= zip(batch, self._accept_chances([traces[i] for i in batch]), strict=True)
        return [self._walk(trace, chances[i]) for i, trace in enumerate(traces)]

    def _accept_chances(self, traces: Sequence[Trace]) -> Iterator[Tensor]:
        """For each trace, by root: the chance that proposal i is accepted if all before it are [K, T]."""
        module, device = self.module, self._ends.head_VH.device
        unread = [replace(trace, lse_T=torch.zeros(len(trace.token_ids_T))) for trace in traces]  # not looked at
        batch = collate(unread, with_prompt=[False] * len(traces)).to(device)
        # Roots that waited lie up to K before the segment's own first one; the last token has no known successor.
        scored_B = [slice(max(0, first_taught(t) - module.num_steps), len(t.token_ids_T) - 1) for t in traces]
        wanted_BT = torch.zeros(batch.token_ids_BT.shape, dtype=torch.bool)
        for row, scored in enumerate(scored_B):
            wanted_BT[row, scored] = True
        hidden_KBTH = module.unroll(batch, wanted_BT.to(device))
        for row, (trace, scored) in enumerate(zip(traces, scored_B, strict=True)):
            accept_KT = torch.zeros(len(hidden_KBTH), len(trace.token_ids_T))
            if scored.start < scored.stop:
                accept_KT[:, scored] = self._accepted(trace, hidden_KBTH[:, row, scored], scored)
            yield torch.cat([shift(accept_KT[None, step], -step) for step in range(len(accept_KT))])

    def _accepted(self, trace: Trace, hidden_KNH: Tensor, scored: slice) -> Tensor:
        """Chance that the proposal for the token behind each position is accepted, by draft step [K, N]."""
        draft = self.module.draft
        logits_KND = draft.logits(hidden_KNH)
        token_N = trace.token_ids_T[scored.start + 1 : scored.stop + 1].long()
        if trace.verify != "free":
            return (draft.draft_token_ids[logits_KND.argmax(-1)].cpu() == token_N).float()
        token_N = token_N.to(logits_KND.device)
        index_N = draft_index(token_N, draft)
        logq_KND = (logits_KND.float() / trace.temperature).log_softmax(-1)
        logq_KN = logq_KND.gather(-1, index_N.expand(len(logq_KND), -1)[..., None])[..., 0]
        last_NH = trace.last_TH[scored].to(self._ends.head_VH.device)
        lse_N = self._ends.read(last_NH, temperature=trace.temperature).tempered_lse_N.to(last_NH.device)
        head_NH = self.module.head_VdH[index_N].float()
        logit_N = self.module.finish.of_tokens((last_NH.float() * head_NH).sum(-1), index_N)
        logp_N = logit_N / trace.temperature - lse_N
        return ((logq_KN - logp_N).clamp(max=0).exp() * draft.t2d[token_N]).cpu()

    def _roots_of(self, trace: Trace) -> dict[int, float]:
        """Where in the segment rounds may begin, and with which chance: at what waited for it, else at the answer."""
        next_start, waiting = self._open.get(trace.request_id, (-1, {}))
        if next_start != trace.first_position + trace.answer_start:  # the first segment, or one got lost
            waiting = {}
        inside = {place - trace.first_position: chance for place, chance in waiting.items()}
        # A root needs a token before it, or the draft has nothing to go by.
        return {max(1, root): chance for root, chance in inside.items()} or {max(1, first_taught(trace)): 1.0}

    def _walk(self, trace: Trace, accept_KT: Tensor) -> Rounds:
        """Go from root to root; those too near the end wait for the next segment."""
        waiting = self._roots_of(trace)
        last = len(trace.token_ids_T) - 1 - len(accept_KT)
        count = tokens = 0.0
        for root, accept_K in enumerate(accept_KT.T.tolist()):
            if root > last:
                break
            chance = waiting.pop(root, 0.0)
            if not chance:
                continue
            count += chance
            reached = chance
            for place, accept in enumerate([*accept_K, 0.0]):
                tokens += reached
                ended = reached * (1 - accept)
                waiting[root + 1 + place] = waiting.get(root + 1 + place, 0.0) + ended
                reached -= ended
        first = trace.first_position
        still = {first + root: chance for root, chance in waiting.items() if chance}
        self._open[trace.request_id] = (first + len(trace.token_ids_T), still)
        return Rounds(count=count, tokens=tokens)


def _pack(traces: Sequence[Trace], batch_positions: int) -> Iterator[list[int]]:
    """Indices of traces of like length together; one request's segments stay in their order, since walks come later."""
    batch: list[int] = []
    for index in sorted(range(len(traces)), key=lambda i: len(traces[i].token_ids_T)):
        if batch and len(traces[index].token_ids_T) * (len(batch) + 1) > batch_positions:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
