"""The accepted length that a live server would have had with another draft, computed from recorded traces alone.

An answer does not depend on the draft. So its tokens are known, and from every root in it the draft's proposals are
accepted as far as they equal those tokens. Going from root to root as rounds do gives the rounds of a server that
proposes a chain of `num_steps` tokens in every round (engine.adaptive and engine.lookup off). Of
greedy answers they are exact, but traces store states in bf16, so a near tie between two tokens may be broken
differently. Of sampled answers the noise that drew the tokens is not recorded. But given that the target has drawn a
token, the draft with the same noise proposes it with a known probability (`acceptance_given_token`). Rounds then have
probabilities instead of outcomes, and their totals are exact in expectation, if p is the softmax of the target's logits
at the temperature (no top-k, top-p, min-p, penalties or bias).

Rounds may also hold copies (learn/offline/ngram_paths.py), in one tree with the draft's chain. Such a tree accepts as
many tokens as the better of both: if the recorded tokens follow L copies, and step i of the draft is accepted with
probability a_i after all before it, P(accepted >= j) is 1 for j <= L, else a_1 ⋯ a_j.

Two limits: a later segment of a request knows only the overlap before it, and a round that could reach beyond a
request's recorded end does not count, as in `bench acceptance`. Leaves out learning (learn/offline/loop.py).

Shapes: K draft steps, T positions, H hidden, N scored positions, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from aurora_lit.learn.data.collate import collate, group_by_length
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import first_trained_position
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.lk import acceptance_given_token
from aurora_lit.modules.losses.unroll import shift_positions
from aurora_lit.traces.record import Trace


@dataclass(frozen=True, kw_only=True)
class RoundTotals:
    """Rounds of a draft on a segment and the tokens they emit; expected values for sampled requests."""

    count: float = 0.0
    tokens: float = 0.0
    """Tokens emitted by these rounds, the target's own token of each included."""

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

    def __init__(
        self, module: DraftModule, target_head: TargetHead, *, batch_positions: int, reach: int | None = None
    ) -> None:
        """batch_positions: of one forward pass, padding included; a longer segment is a pass of its own.

        reach: most tokens that a round can accept, if copies are proposed too; None: the draft's steps.
        """
        self.module, self._target_head = module, target_head
        self._batch_positions = batch_positions
        self._reach = max(module.num_steps, reach or 0)
        self._walk = RoundWalk(reach=self._reach)

    def score(self, traces: Sequence[Trace]) -> list[RoundTotals]:
        """The rounds of each segment, without copies. Segments of one request must come in their order."""
        probabilities = self.accept_probabilities(traces)
        return [self._walk.walk(trace, each) for trace, each in zip(traces, probabilities, strict=True)]

    @torch.no_grad()
    def accept_probabilities(self, traces: Sequence[Trace]) -> list[Tensor]:
        """For each trace, by root: the probability that proposal i is accepted if all before it are [K, T]."""
        probabilities: dict[int, Tensor] = {}
        lengths = [len(trace.token_ids_T) for trace in traces]
        for group in group_by_length(lengths, self._batch_positions):
            probabilities |= zip(group, self._accept_probabilities([traces[i] for i in group]), strict=True)
        return [probabilities[i] for i in range(len(traces))]

    def _accept_probabilities(self, traces: Sequence[Trace]) -> Iterator[Tensor]:
        module, device = self.module, self.module.head_VdH.device
        batch = collate(traces, with_prompt=[False] * len(traces)).to(device)
        # Roots left by the segment before may lie so far before the first one; the last token's successor is unknown.
        scored_B = [slice(max(0, first_trained_position(t) - self._reach), len(t.token_ids_T) - 1) for t in traces]
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
        if trace.verify != "sampled":
            return (draft.draft_token_ids[logits_KND.argmax(-1)].cpu() == token_N).float()
        device = logits_KND.device
        last_NH = trace.last_TH[scored]
        lse_N = self._target_head.log_sum_exp(last_NH, temperature=trace.temperature)
        head_VdH = self.module.head_VdH
        logits_ND = self.module.logit_transform((last_NH.to(head_VdH) @ head_VdH.T).float()) / trace.temperature
        p_ND = (logits_ND - lse_N[:, None].to(device)).exp()
        token_N = token_N.to(device)
        index_N = draft.draft_index(token_N)
        accept_KN = torch.stack(
            [acceptance_given_token(p_ND, (x.float() / trace.temperature).softmax(-1), index_N) for x in logits_KND]
        )
        return (accept_KN * draft.t2d[token_N]).cpu()


class RoundWalk:
    """Goes from root to root through segments, in their order.

    >>> walk = RoundWalk(reach=3)
    >>> walk.walk(trace, accept_KT).accepted_length
    """

    def __init__(self, *, reach: int) -> None:
        """reach: most tokens that a round can accept; roots nearer to the end are left for the next segment."""
        self._reach = reach
        self._open: dict[str, tuple[int, dict[int, float]]] = {}
        """By request: where its next segment's answer begins, and the roots left for that segment, each with the
        probability that a round begins there. All are positions in the request."""

    def walk(self, trace: Trace, accept_KT: Tensor, copied_T: Sequence[int] | None = None) -> RoundTotals:
        """The rounds of a segment.

        accept_KT: by root, the probability that the draft's proposal i is accepted if all before it are. copied_T: by
        root, how many copied tokens are accepted; None: none are proposed.
        """
        pending = self._roots_of(trace)
        last = len(trace.token_ids_T) - 1 - self._reach
        count = tokens = 0.0
        for root, accept_K in enumerate(accept_KT.T.tolist()):
            if root > last:
                break
            probability = pending.pop(root, 0.0)
            if not probability:
                continue
            count += probability
            reached = probability
            steps = accept_K if copied_T is None else with_copied(accept_K, copied_T[root])
            for step, accept in enumerate([*steps, 0.0]):
                tokens += reached
                ended = reached * (1 - accept)
                pending[root + 1 + step] = pending.get(root + 1 + step, 0.0) + ended
                reached -= ended
        first = trace.first_position
        left = {first + root: probability for root, probability in pending.items() if probability}
        self._open[trace.request_id] = (first + len(trace.token_ids_T), left)
        return RoundTotals(count=count, tokens=tokens)

    def _roots_of(self, trace: Trace) -> dict[int, float]:
        """Where in the segment rounds begin, with probabilities: at roots left for it, else before the answer."""
        next_start, left = self._open.get(trace.request_id, (-1, {}))
        if next_start != trace.first_position + trace.answer_start:  # the first segment, or one was lost
            left = {}
        if not left:
            left = {trace.first_position + first_trained_position(trace): 1.0}
        # The draft needs a token before the root, so a root is at least 1.
        return {max(1, position - trace.first_position): probability for position, probability in left.items()}


def with_copied(accept_K: Sequence[float], copied: int) -> list[float]:
    """Probability that each place is accepted if all before it are, where the first `copied` ones are for certain.

    The draft reaches the place after them only if all its steps up to there are accepted.
    """
    if not copied:
        return list(accept_K)
    after = [prod(accept_K[: copied + 1]), *accept_K[copied + 1 :]] if copied < len(accept_K) else []
    return [1.0] * copied + after
