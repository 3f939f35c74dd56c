"""The accepted length that a live server would have had with another draft, computed from recorded traces alone.

A greedy or seeded answer does not depend on the draft. So its tokens are known, and from every root in it the draft's
proposals are accepted as far as they equal those tokens. Going from root to root as rounds do gives exactly the rounds
of a server that proposes `num_steps` tokens in every round (engine.adaptive and engine.lookup off). Traces store states
in bf16, so a near tie between two tokens may be broken differently. Under the ratio test, a committed token came from
an accepted proposal with probability min(1, q/p): rounds then have probabilities instead of outcomes, and their totals
are exact in expectation.

Two limits: a later segment of a request knows only the overlap before it, and a round that reaches beyond a request's
recorded end does not count, as in `bench acceptance`. Leaves out learning (learn/offline/replay.py).

Shapes: K draft steps, T positions, H hidden, N scored positions, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aurora_lit.learn.data.collate import collate, group_by_length
from aurora_lit.learn.data.labelled_trace import first_trained_position
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.policy import draft_index
from aurora_lit.modules.losses.unroll import shift_positions
from aurora_lit.traces.record import Trace


@dataclass(frozen=True, kw_only=True)
class RoundTotals:
    """Rounds of a draft on a segment and the tokens they emit; expected values under the ratio test."""

    count: float = 0.0
    tokens: float = 0.0
    """Tokens emitted by these rounds, the corrected or bonus token included."""

    def __add__(self, other: RoundTotals) -> RoundTotals:
        return RoundTotals(count=self.count + other.count, tokens=self.tokens + other.tokens)

    @property
    def accepted_length(self) -> float:
        """Tokens a round; 1 without rounds."""
        return self.tokens / self.count if self.count else 1.0


class RoundScorer:
    """Scores segments in their order, with the weights that the module's draft has at the time.

    >>> scorer = RoundScorer(module, target_head, batch_positions=4096)
    >>> scorer.score(traces)[0].accepted_length
    """

    def __init__(self, module: DraftModule, target_head: TargetHead, *, batch_positions: int) -> None:
        """batch_positions: of one forward pass, padding included; a longer segment is a pass of its own."""
        self.module, self._target_head = module, target_head
        self._batch_positions = batch_positions
        self._open: dict[str, tuple[int, dict[int, float]]] = {}
        """By request: where its next segment's answer begins, and the roots left for that segment, each with the
        probability that a round begins there. All are positions in the request."""

    @torch.no_grad()
    def score(self, traces: Sequence[Trace]) -> list[RoundTotals]:
        """The rounds of each segment. Segments of one request must come in their order."""
        probabilities: dict[int, Tensor] = {}
        lengths = [len(trace.token_ids_T) for trace in traces]
        for group in group_by_length(lengths, self._batch_positions):
            probabilities |= zip(group, self._accept_probabilities([traces[i] for i in group]), strict=True)
        return [self._walk(trace, probabilities[i]) for i, trace in enumerate(traces)]

    def _accept_probabilities(self, traces: Sequence[Trace]) -> Iterator[Tensor]:
        """For each trace, by root: the probability that proposal i is accepted if all before it are [K, T]."""
        module, device = self.module, self._target_head.head_VH.device
        unlabelled = [replace(trace, lse_T=torch.zeros(len(trace.token_ids_T))) for trace in traces]  # lse is not used
        batch = collate(unlabelled, with_prompt=[False] * len(traces)).to(device)
        # Roots left by the segment before may lie up to K before the first one; the last token's successor is unknown.
        scored_B = [slice(max(0, first_trained_position(t) - module.num_steps), len(t.token_ids_T) - 1) for t in traces]
        wanted_BT = torch.zeros(batch.token_ids_BT.shape, dtype=torch.bool)
        for row, scored in enumerate(scored_B):
            wanted_BT[row, scored] = True
        hidden_KBTH = module.unroll(batch, wanted_BT.to(device))
        for row, (trace, scored) in enumerate(zip(traces, scored_B, strict=True)):
            accept_KT = torch.zeros(len(hidden_KBTH), len(trace.token_ids_T))
            if scored.start < scored.stop:
                accept_KT[:, scored] = self._accepted(trace, hidden_KBTH[:, row, scored], scored)
            yield torch.cat([shift_positions(accept_KT[None, step], -step) for step in range(len(accept_KT))])

    def _accepted(self, trace: Trace, hidden_KNH: Tensor, scored: slice) -> Tensor:
        """Probability that the proposal for the token after each position is accepted, by draft step [K, N]."""
        draft = self.module.draft
        logits_KND = draft.compute_logits(hidden_KNH)
        token_N = trace.token_ids_T[scored.start + 1 : scored.stop + 1].long()
        if trace.verify != "free":
            return (draft.draft_token_ids[logits_KND.argmax(-1)].cpu() == token_N).float()
        token_N = token_N.to(logits_KND.device)
        index_N = draft_index(token_N, draft)
        logq_KND = (logits_KND.float() / trace.temperature).log_softmax(-1)
        logq_KN = logq_KND.gather(-1, index_N.expand(len(logq_KND), -1)[..., None])[..., 0]
        last_NH = trace.last_TH[scored].to(self._target_head.head_VH.device)
        lse_N = self._target_head.evaluate(last_NH, temperature=trace.temperature).tempered_lse_N.to(last_NH.device)
        head_NH = self.module.head_VdH[index_N].float()
        logit_N = self.module.logit_transform.at_tokens((last_NH.float() * head_NH).sum(-1), index_N)
        logp_N = logit_N / trace.temperature - lse_N
        return ((logq_KN - logp_N).clamp(max=0).exp() * draft.t2d[token_N]).cpu()

    def _roots_of(self, trace: Trace) -> dict[int, float]:
        """Where in the segment rounds begin, with probabilities: at roots left for it, else before the answer."""
        next_start, left = self._open.get(trace.request_id, (-1, {}))
        if next_start != trace.first_position + trace.answer_start:  # the first segment, or one was lost
            left = {}
        if not left:
            left = {trace.first_position + first_trained_position(trace): 1.0}
        # The draft needs a token before the root, so a root is at least 1.
        return {max(1, position - trace.first_position): probability for position, probability in left.items()}

    def _walk(self, trace: Trace, accept_KT: Tensor) -> RoundTotals:
        """Go from root to root; roots too near the end are left for the next segment."""
        pending = self._roots_of(trace)
        last = len(trace.token_ids_T) - 1 - len(accept_KT)
        count = tokens = 0.0
        for root, accept_K in enumerate(accept_KT.T.tolist()):
            if root > last:
                break
            probability = pending.pop(root, 0.0)
            if not probability:
                continue
            count += probability
            reached = probability
            for step, accept in enumerate([*accept_K, 0.0]):
                tokens += reached
                ended = reached * (1 - accept)
                pending[root + 1 + step] = pending.get(root + 1 + step, 0.0) + ended
                reached -= ended
        first = trace.first_position
        left = {first + root: probability for root, probability in pending.items() if probability}
        self._open[trace.request_id] = (first + len(trace.token_ids_T), left)
        return RoundTotals(count=count, tokens=tokens)
