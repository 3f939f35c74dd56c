"""The rounds that another draft would have had along a recorded answer, as a live server would have recorded them.

A greedy answer does not depend on the draft. So any draft can propose along it, from root to root, and its proposals
are accepted as far as they equal the recorded tokens.

Copies may be proposed beside the draft's (learn/offline/ngram_paths.py). A round then accepts as many tokens as the
better of both, and the next one begins after them; what the trace holds are still the draft's proposals at these roots
and what would have been accepted of them alone.

Proposals after a round's first rejection are left out: they were not verified. And a round that could reach beyond the
recorded end is left out, as in learn/offline/scoring.py.

Sampled requests keep their recorded rounds: a trace does not hold the key of their noise, which other proposals would
need. They are labelled RECORDED_VERSION, since the versions of the server that recorded them are not the replay's; the
domain detector leaves them out.

Shapes: K draft steps, B rows, T positions, H hidden, N chains without a rejection so far, D draft vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aurora_lit.learn.data.collate import collate, group_by_length
from aurora_lit.learn.data.trace_parts import first_trained_position
from aurora_lit.learn.online.scores import first_choice
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.request import Source
from aurora_lit.traces.record import Trace

RECORDED_VERSION = -1
"""Version of rounds that were recorded: older than the starting draft, whose version is 0."""
_MAX_OPEN_SEGMENTS = 1024
"""Segments for whose successor the first root is remembered."""


@dataclass(kw_only=True)
class _Chains:
    """For every root of some traces: the accepted proposals, and the rejected one after them."""

    accepted_BT: Tensor
    """int64. Accepted proposals of the round with this root."""
    proposal_KBT: Tensor
    """int64 target ids; -1 after the first rejected proposal."""


@dataclass(kw_only=True)
class RoundSimulator:
    """Proposes with the weights that the module's draft has at the time, `module.num_steps` tokens a round.

    >>> simulator = RoundSimulator(module=module)
    >>> simulator.simulate_rounds(traces, version=3)[0].num_accepted_R
    """

    module: DraftModule
    reach: int = 0
    """Most tokens that a round can accept, if those are more than the module's steps: copies may be longer."""
    batch_positions: int = 4096
    """Positions of one forward pass, padding included; a longer trace is a pass of its own."""
    _next_root: OrderedDict[tuple[str, int], int] = field(default_factory=OrderedDict)
    """By request and first new position of a segment: the position in the request of that segment's first root."""

    @torch.no_grad()
    def simulate_rounds(
        self, traces: Sequence[Trace], *, version: int, copied: Sequence[Sequence[int]] | None = None
    ) -> list[Trace]:
        """The traces with this draft's rounds, labelled with `version`; those that are not greedy keep theirs.

        copied: for each trace, by root, how many copied tokens are accepted, at most `reach`; None: nothing is copied.
        Segments of one request must come in their order.
        """
        found = [
            replace(trace, round_version_R=torch.full_like(trace.round_version_R, RECORDED_VERSION)) for trace in traces
        ]
        greedy = [i for i, trace in enumerate(traces) if trace.verify == "greedy"]
        chains: dict[int, tuple[_Chains, int]] = {}
        for group in group_by_length([len(traces[i].token_ids_T) for i in greedy], self.batch_positions):
            indices = [greedy[i] for i in group]
            proposed = self._propose([traces[i] for i in indices])
            chains |= {index: (proposed, row) for row, index in enumerate(indices)}
        for index in greedy:  # in the given order, since a request's segments depend on each other
            copied_T = None if copied is None else copied[index]
            found[index] = self._walk(traces[index], *chains[index], version=version, copied_T=copied_T)
        return found

    def _propose(self, traces: Sequence[Trace]) -> _Chains:
        """Propose from every position at once, since the roots of rounds are known only afterwards."""
        module, K = self.module, self.module.num_steps
        draft, device = module.draft, module.head_VdH.device
        batch = collate(traces, with_prompt=[False] * len(traces)).to(device)
        tokens_BT = batch.token_ids_BT
        B, T = tokens_BT.shape
        root_BT = torch.zeros(B, T, dtype=torch.bool)
        reach = max(K, self.reach)
        for row, trace in enumerate(traces):
            root_BT[row, max(1, first_trained_position(trace) - reach) : max(1, len(trace.token_ids_T) - reach)] = True
        wanted_BT = root_BT.clone()
        for step in range(1, K):
            wanted_BT[:, step:] |= root_BT[:, : T - step]
        hidden_KBTH = module.unroll(batch, wanted_BT.to(device))
        chains = _Chains(
            accepted_BT=torch.zeros(B, T, dtype=torch.int64),
            proposal_KBT=torch.full((K, B, T), -1),
        )
        row_N, root_N = (index.to(device) for index in root_BT.nonzero(as_tuple=True))
        ids_D = draft.draft_token_ids
        for step in range(K):
            # While all proposals were accepted, the chain consists of the recorded tokens, on which `unroll` ran.
            proposal_N = ids_D[first_choice(draft.compute_logits(hidden_KBTH[step, row_N, root_N + step]))]
            chains.proposal_KBT[step][row_N.cpu(), root_N.cpu()] = proposal_N.cpu()
            hit_N = proposal_N == tokens_BT[row_N, root_N + 1 + step]
            row_N, root_N = row_N[hit_N], root_N[hit_N]
            chains.accepted_BT[row_N.cpu(), root_N.cpu()] += 1
            if not len(row_N):
                break
        return chains

    def _walk(self, trace: Trace, chains: _Chains, row: int, *, version: int, copied_T: Sequence[int] | None) -> Trace:
        """Go from root to root; a root too near the end is left for the request's next segment."""
        K = len(chains.proposal_KBT)
        first = trace.first_position
        # Without an earlier segment, the first root is the prompt's last token.
        segment = (trace.request_id, first + trace.answer_start)
        root = max(1, self._next_root.get(segment, first + first_trained_position(trace)) - first)
        accepted_T = chains.accepted_BT[row].tolist()
        roots = []
        while root < len(trace.token_ids_T) - max(K, self.reach):
            roots.append(root)
            root += 1 + max(accepted_T[root], 0 if copied_T is None else copied_T[root])
        self._next_root[trace.request_id, first + len(trace.token_ids_T)] = first + root
        if len(self._next_root) > _MAX_OPEN_SEGMENTS:
            self._next_root.popitem(last=False)
        root_R = torch.tensor(roots, dtype=torch.int64)
        accepted_R = chains.accepted_BT[row, root_R]
        proposed_R = (accepted_R + 1).clamp_max(K)
        widest = int(proposed_R.max()) if roots else 0
        return replace(
            trace,
            round_root_R=root_R.int(),
            round_version_R=torch.full_like(root_R, version, dtype=torch.int32),
            num_proposed_R=proposed_R.int(),
            num_accepted_R=accepted_R.int(),
            source_R=torch.full_like(root_R, Source.DRAFT, dtype=torch.uint8),
            proposal_RK=chains.proposal_KBT[:widest, row, root_R].T.int(),
        )
