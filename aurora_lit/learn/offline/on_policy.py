"""The rounds that another draft would have had along a recorded answer, as a live server would have recorded them.

A greedy answer does not depend on the draft. So any draft can propose along it, root to root, and what it draws is
accepted as far as it equals the recorded tokens; these rounds are its own, on-policy: with the log-probabilities that
it drew with, exploring in a share of them. The target's distribution at every proposal that was tested is known from
the trace, since a tested proposal stands behind accepted ones.

Two limits. Proposals behind a round's first rejection are left out: no one tested them, what they led to is not in the
trace, and a policy learns nothing there (their S_t is 0, modules/losses/ppo.py). And a round that could reach beyond the
recorded end is left out, as in learn/offline/scoring.py. Requests that are not greedy keep the rounds they have: seeded and
sampled proposals teach a policy behind rejections too.

Shapes: K draft steps, B rows, T positions, H hidden, N chains that nothing has ended yet, D draft vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aurora_lit.learn.data.batches import collate
from aurora_lit.learn.data.labelled_trace import first_taught
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.traces.record import SOURCE_DRAFT, Trace

_SEGMENTS_KNOWN = 1024
"""Segments whose followers' roots are remembered."""


@dataclass(kw_only=True)
class _Chains:
    """What was proposed from every root of some traces, as far as it was accepted, and the rejected one behind that."""

    accepted_BT: Tensor
    explored_BT: Tensor
    proposal_KBT: Tensor
    logprob_KBT: Tensor


@dataclass(kw_only=True)
class Reproposer:
    """Proposes with the draft that `module` has at the time; its num_steps is the number of proposals a round.

    >>> reproposer = Reproposer(module=module, explore_share=0.05)
    >>> reproposer.repropose(traces, version=3)[0].behaviour_logprob_RK
    """

    module: DraftModule
    explore_share: float = 0.0
    """Of rounds that draw their proposals; the others take the draft's first choice."""
    explore_temperature: float = 1.0
    seed: int = 0
    batch_positions: int = 4096
    """Of one draft pass, padding included; a longer trace is a pass of its own."""
    _next_root: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)
    """By request and first new position of a segment: where in the request that segment's first round begins."""

    def __post_init__(self) -> None:
        """Exploring draws from a generator of its own."""
        self._generator = torch.Generator().manual_seed(self.seed)

    @torch.no_grad()
    def repropose(self, traces: Sequence[Trace], *, version: int) -> list[Trace]:
        """The same traces with this draft's rounds, said to be of `version`; those that are not greedy as they are.

        A request's segments must come in their order.
        """
        found = list(traces)
        greedy = [i for i, trace in enumerate(traces) if trace.verify == "greedy"]
        chains: dict[int, tuple[_Chains, int]] = {}
        for batch in _pack([len(traces[i].token_ids_T) for i in greedy], self.batch_positions):
            places = [greedy[i] for i in batch]
            proposed = self._propose([traces[i] for i in places])
            chains |= {place: (proposed, row) for row, place in enumerate(places)}
        for place in greedy:  # in their order, also where a request has several
            found[place] = self._walk(traces[place], *chains[place], version=version)
        return found

    def _propose(self, traces: Sequence[Trace]) -> _Chains:
        """Propose from every root at once: which of them begin rounds is known only then."""
        module, K = self.module, self.module.num_steps
        draft, device = module.draft, module.embedding_VH.device
        unread = [replace(trace, lse_T=torch.zeros(len(trace.token_ids_T))) for trace in traces]  # not looked at
        batch = collate(unread, with_prompt=[False] * len(traces)).to(device)
        tokens_BT = batch.token_ids_BT
        B, T = tokens_BT.shape
        root_BT = torch.zeros(B, T, dtype=torch.bool)
        for row, trace in enumerate(traces):
            root_BT[row, max(1, first_taught(trace) - K) : max(1, len(trace.token_ids_T) - K)] = True
        wanted_BT = root_BT.clone()
        for step in range(1, K):
            wanted_BT[:, step:] |= root_BT[:, : T - step]
        hidden_KBTH = module.unroll(batch, wanted_BT.to(device))
        chains = _Chains(
            accepted_BT=torch.zeros(B, T, dtype=torch.int64),
            explored_BT=torch.rand(B, T, generator=self._generator) < self.explore_share,
            proposal_KBT=torch.full((K, B, T), -1),
            logprob_KBT=torch.full((K, B, T), float("nan")),
        )
        row_N, root_N = (index.to(device) for index in root_BT.nonzero(as_tuple=True))
        ids_D = draft.draft_token_ids
        for step in range(K):
            # While all before it were accepted, the chain holds the recorded tokens: it is the one that `unroll` ran.
            logits_ND = draft.logits(hidden_KBTH[step, row_N, root_N + step])
            choice_N = _first_choice(logits_ND)
            logprob_N = torch.zeros(len(choice_N))
            explored_N = chains.explored_BT[row_N.cpu(), root_N.cpu()]
            if explored_N.any():
                logq_ED = (logits_ND[explored_N.to(device)].float() / self.explore_temperature).log_softmax(-1).cpu()
                drawn_E = torch.multinomial(logq_ED.exp(), 1, generator=self._generator)
                choice_N[explored_N.to(device)] = drawn_E[:, 0].to(device)
                logprob_N[explored_N] = logq_ED.gather(1, drawn_E)[:, 0]
            proposal_N = ids_D[choice_N]
            index = (row_N.cpu(), root_N.cpu())
            chains.proposal_KBT[step][index] = proposal_N.cpu()
            chains.logprob_KBT[step][index] = logprob_N
            hit_N = proposal_N == tokens_BT[row_N, root_N + 1 + step]
            row_N, root_N = row_N[hit_N], root_N[hit_N]
            chains.accepted_BT[row_N.cpu(), root_N.cpu()] += 1
            if not len(row_N):
                break
        return chains

    def _walk(self, trace: Trace, chains: _Chains, row: int, *, version: int) -> Trace:
        """Go from root to root; the one too near the end waits for the request's next segment."""
        K = len(chains.proposal_KBT)
        first = trace.first_position
        # Without a segment before it, the first round begins at the prompt's last token.
        segment = (trace.request_id, first + trace.answer_start)
        root = max(1, self._next_root.get(segment, first + first_taught(trace)) - first)
        accepted_T = chains.accepted_BT[row].tolist()
        roots = []
        while root < len(trace.token_ids_T) - K:
            roots.append(root)
            root += 1 + accepted_T[root]
        self._next_root[trace.request_id, first + len(trace.token_ids_T)] = first + root
        if len(self._next_root) > _SEGMENTS_KNOWN:
            self._next_root.popitem(last=False)
        root_R = torch.tensor(roots, dtype=torch.int64)
        accepted_R = chains.accepted_BT[row, root_R]
        proposed_R = (accepted_R + 1).clamp_max(K)
        explored_R = chains.explored_BT[row, root_R]
        widest = int(proposed_R.max()) if roots else 0
        return replace(
            trace,
            round_root_R=root_R.int(),
            round_version_R=torch.full_like(root_R, version, dtype=torch.int32),
            num_proposed_R=proposed_R.int(),
            num_accepted_R=accepted_R.int(),
            source_R=torch.full_like(root_R, SOURCE_DRAFT, dtype=torch.uint8),
            explored_R=explored_R,
            draft_temperature_R=torch.where(explored_R, self.explore_temperature, 1.0),
            proposal_RK=chains.proposal_KBT[:widest, row, root_R].T.int(),
            behaviour_logprob_RK=chains.logprob_KBT[:widest, row, root_R].T,
            rejected_last_NH=trace.last_TH[:0],
        )


def _first_choice(logits_ND: Tensor) -> Tensor:
    """argmax, in two passes of which the long one is vectorised; a fifth of the time of all goes into the plain one."""
    N, D = logits_ND.shape
    if D % 64:
        return logits_ND.argmax(-1)
    parts_NP = logits_ND.view(N, -1, 64)
    part_N = parts_NP.amax(-1).argmax(-1)
    return part_N * 64 + parts_NP[torch.arange(N, device=part_N.device), part_N].argmax(-1)


def _pack(lengths: Sequence[int], batch_positions: int) -> Iterator[list[int]]:
    """Indices of traces of like length together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > batch_positions:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
