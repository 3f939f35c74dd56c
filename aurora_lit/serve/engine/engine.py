"""The speculative engine: continuous batching over slots, one `round` at a time.

    round = admit -> prefill a chunk -> propose k tokens a row -> one target pass over k + 1 -> accept -> commit

Whatever the draft proposes, what is committed has exactly the law of plain decoding (modules/sampling/verification.py); the draft
decides only how fast. What is left out: text and stop strings (serve/sequences/detokenizer.py), HTTP, how many tokens to draft
(serve/speculation/planner.py), the draft's own work (serve/speculation/drafter.py).

A request's life: submit -> waiting -> prefilling (a chunk a round) -> decoding -> finished, or cancelled anywhere.

Shapes: B rows of a batch, T = K + 1 positions, K proposals, V vocabulary, S slots, L capacity.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from aurora_lit.errors import RequestError
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.modules.sampling.tree import common_prefix
from aurora_lit.modules.sampling.verification import Proposals, Verdict, token_logprobs, verify, verify_matching
from aurora_lit.request import Output, Request
from aurora_lit.serve.engine.prefill import Prefill
from aurora_lit.serve.engine.target_runner import ForwardOutput, TargetRunner, widths_of
from aurora_lit.serve.sequences.ngram_index import NgramIndex
from aurora_lit.serve.sequences.observer import RoundObserver, tell
from aurora_lit.serve.sequences.sequence import EngineStats, RunningSequence, VerifiedTokens, history_of, judge
from aurora_lit.serve.sequences.slot_allocator import SlotAllocator
from aurora_lit.serve.speculation.calibration import calibrate
from aurora_lit.serve.speculation.draft_tree import slot_capacity
from aurora_lit.serve.speculation.drafter import Drafter
from aurora_lit.serve.speculation.ngram_planner import NgramPlanner
from aurora_lit.serve.speculation.planner import SpeculationPlanner
from aurora_lit.serve.speculation.proposer import Proposer
from aurora_lit.serve.speculation.runtime_draft import RuntimeDraft


class Engine:
    """Serves requests over a fixed number of slots.

    >>> engine.submit(Request(request_id="a", prompt_ids=ids, params=SamplingParams(max_tokens=16, temperature=0.0)))
    >>> while engine.has_work:
    ...     for output in engine.round(): ...
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        *,
        eos_token_ids: frozenset[int],
        max_batch_size: int,
        max_seq_len: int,
        max_draft_tokens: int = 4,
        tree_tokens: int = 0,
        prefill_chunk_tokens: int = 256,
        prefix_cache: bool = True,
        adaptive: bool = True,
        lookup_tokens: int = 0,
        draft_version: str = "",
        observer: RoundObserver | None = None,
        explore_share: float = 0.0,
        explore_temperature: float = 1.0,
        explore_seed: int = 0,
    ) -> None:
        """No `draft`, no `lookup_tokens`: plain decoding. `max_seq_len` counts a request's prompt and output tokens."""
        self.eos_token_ids, self.max_seq_len = eos_token_ids, max_seq_len
        self.vocab_size = target.vocab_size
        self.draft_version = draft_version
        self.stats = EngineStats()
        self._target = target
        self._observer = observer
        widest = {"max_draft_tokens": max_draft_tokens, "tree_tokens": tree_tokens, "lookup_tokens": lookup_tokens}
        capacity = slot_capacity(max_seq_len=max_seq_len, **widest)
        self._device = target.model.device
        self._tokens_SL = torch.zeros(max_batch_size, capacity + 1, dtype=torch.int64, device=self._device)
        slots = target.make_slots(num_slots=max_batch_size, capacity=capacity)
        self._waiting: deque[Request] = deque()
        self._decoding: list[RunningSequence] = []
        self._drafter: Drafter | None = None
        if draft is not None and max_draft_tokens:
            self._drafter = Drafter(draft, target, tokens_SL=self._tokens_SL, capacity=capacity)
        self._lookup = lookup_tokens > 0
        self._passes = TargetRunner(target, slots=slots, drafter=self._drafter, observer=observer)
        self._table = SlotAllocator(self._tokens_SL, share=prefix_cache, tracing=observer is not None)
        self._prefill = Prefill(
            target,
            self._passes,
            self._table,
            tokens_SL=self._tokens_SL,
            chunk_tokens=prefill_chunk_tokens,
            adaptive=adaptive,
            stats=self.stats,
        )
        can_branch = self._drafter is not None and self._drafter.can_branch and target.can_branch
        self.policy = SpeculationPlanner(
            max_draft_tokens=max_draft_tokens if self._drafter else 0,
            max_proposals=lookup_tokens,
            adaptive=adaptive,
            tree_tokens=tree_tokens if can_branch else 0,
        )
        self.proposer = Proposer(
            self._drafter,
            self.policy,
            copying=NgramPlanner(self.policy, most=lookup_tokens) if lookup_tokens else None,
            device=self._device,
            explore_share=explore_share,
            explore_temperature=explore_temperature,
            explore_seed=explore_seed,
            log_probabilities=observer is not None,
        )
        if observer is not None:
            observer.attach(tokens_SL=self._tokens_SL, aux_SLF=self._drafter.features_SLF if self._drafter else None)
        self._options_rows: list[RunningSequence] = []
        self._options = LogitOptions.of([])
        if adaptive and (self._drafter or self._lookup):
            calibrate(self.policy, target, self._drafter, slots=slots, max_rows=max_batch_size)

    @property
    def has_work(self) -> bool:
        """Whether a round would do anything."""
        return bool(self._waiting or self._prefill.rows or self._decoding)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._prefill.rows) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it cannot fit."""
        length = len(request.prompt_ids)
        if not length:
            raise RequestError("the prompt has no tokens; send at least one", param="prompt")
        if length + 1 > self.max_seq_len:
            raise RequestError(
                f"the prompt has {length} tokens and engine.max_seq_len is {self.max_seq_len}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request where it is and free its slot; an unknown id is ignored."""
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        for row in [*self._prefill.rows, *self._decoding]:
            if row.request.request_id == request_id:
                self._release(row)

    def swap_draft(self, draft: Draft | RuntimeDraft, *, version: str, recompute: bool = False) -> None:
        """Propose with another draft from the next round on (serve/speculation/drafter.py). Needs an engine with a draft."""
        if self._drafter is None:
            raise ValueError("this engine was made without a draft, so there is none to swap")
        self._drafter.swap(draft, recompute=recompute)
        self.policy.start_over([*self._prefill.rows, *self._decoding])
        self.draft_version = version

    @torch.no_grad()
    def round(self) -> list[Output]:
        """One round for everything that runs; what each request got."""
        self._admit()
        others = len(self._decoding)
        self._decoding += self._prefill.run(num_decoding=others, round_s=self.policy.target_cost(others, 1))
        rows = list(self._decoding)
        if not rows:
            return []
        self.stats.rounds += 1
        if rows != self._options_rows:
            self._options_rows = rows
            self._options = LogitOptions.of([row.params for row in rows], device=self._device)
        argmax = self._options.is_argmax and all(row.params.logprobs is None for row in rows)
        ragged = argmax and self._target.can_branch
        proposals = self.proposer.propose(rows, ragged=ragged)
        return self._verify(rows, proposals, argmax=argmax, widths=widths_of(proposals) if ragged else None)

    def _admit(self) -> None:
        """Give free slots to those who wait longest; what a slot still holds of a prompt is not read again."""
        while self._waiting and self._table.num_free:
            request = self._waiting.popleft()
            slot, shared = self._table.take(request)
            length = len(request.prompt_ids)
            self._tokens_SL[slot, :length] = torch.tensor(request.prompt_ids)
            if self._drafter:
                self._drafter.keep_beginning(slot, shared)
            row = RunningSequence(
                request=request,
                slot=slot,
                rate=self.policy.mean_rate,
                prompt_length=length,
                length=length,
                prefilled=shared,
            )
            self._table.seat(row)
            if self._lookup:
                row.ngrams = NgramIndex(request.prompt_ids)
            if request.params.prompt_logprobs is not None:
                row.prompt_logprobs.append(None)
            self._prefill.rows.append(row)
            self.stats.prompt_tokens += length
            self.stats.cached_tokens += shared
            self.stats.opted_out += not request.store

    # -- draft and verify ------------------------------------------------------------------------------------------

    def _verify(
        self, rows: list[RunningSequence], proposals: Proposals, *, argmax: bool, widths: list[int] | None
    ) -> list[Output]:
        """One target pass over each row's last token and its proposals, then accept and commit.

        `argmax`: all that is wanted is which logits are largest; `widths`: as `TargetRunner.run` takes them.
        """
        last_tokens_B1 = torch.stack([self._tokens_SL[row.slot, row.length - 1] for row in rows])[:, None]
        ids_BT = torch.cat([last_tokens_B1, proposals.token_BK], dim=1)
        started = time.perf_counter()
        computed = self._passes.run(rows, ids_BT, parents_BT=proposals.parent_BT, widths=widths)
        verdict, logits_BTV = self._judge(rows, proposals, computed, argmax=argmax)
        self._passes.keep(rows, computed, verdict)
        judged = judge(proposals, verdict)
        outputs = [
            self._commit(row, of_row, None if logits_BTV is None else logits_BTV[b])
            for b, (row, of_row) in enumerate(zip(rows, judged, strict=True))
        ]
        self.policy.observe_target(len(rows), len(computed.last_NH), time.perf_counter() - started)
        if proposals.parent_BK is not None:
            self.policy.observe_trees(judged, outputs)
        if self._observer:
            tell(
                self._observer,
                rows,
                outputs,
                proposals=proposals,
                last_BTH=computed.of_columns(computed.last_NH),
                version=self.draft_version,
                explore_temperature=self.proposer.explore_temperature,
            )
        for row, output in zip(rows, outputs, strict=True):
            if output.finish_reason is not None:
                self._release(row)
        return outputs

    def _judge(
        self, rows: list[RunningSequence], proposals: Proposals, computed: ForwardOutput, *, argmax: bool
    ) -> tuple[Verdict, torch.Tensor | None]:
        """What the target says of the proposals; and its logits, unless all that is wanted is which are largest."""
        if argmax:
            token_N = self._target.likeliest(computed.last_NH)
            return verify_matching(token_N[computed.place_BT], proposals=proposals), None
        logits_BTV = self._target.logits(computed.of_columns(computed.last_NH))
        verdict = verify(
            logits_BTV,
            options=self._options,
            proposals=proposals,
            uniform_BT=torch.rand(logits_BTV.shape[:2], dtype=torch.float64, device=self._device),
            history=history_of(rows, self._options, self._tokens_SL),
            vocabulary=self._drafter.vocabulary if self._drafter else None,
        )
        return verdict, logits_BTV

    def _commit(self, row: RunningSequence, judged: VerifiedTokens, logits_TV: torch.Tensor | None) -> Output:
        """Append a row's new tokens up to where it ends, and say what it got."""
        tokens, reason = row.cut_at_end(judged.tokens, eos_token_ids=self.eos_token_ids, max_seq_len=self.max_seq_len)
        logprobs = None
        if row.params.logprobs is not None:
            assert logits_TV is not None
            logprobs = token_logprobs(logits_TV[judged.columns], token_ids=tokens, num_top=row.params.logprobs)
        proposed, accepted = judged.num_proposed, min(len(judged.tokens) - 1, len(tokens))
        chain_proposed = len(judged.first_choices)
        chain_accepted = min(accepted, common_prefix(judged.first_choices, tokens))
        end = row.length + len(tokens)
        self._tokens_SL[row.slot, row.length : end] = torch.tensor(tokens, dtype=torch.int64)
        first = row.length == row.prompt_length
        row.length = end
        self.proposer.observe(row, proposed=chain_proposed, accepted=chain_accepted, cut=reason is not None)
        if self._lookup:
            row.ngrams.extend(tokens)
        self.stats.count(generated=len(tokens), proposed=proposed, accepted=accepted, explored=row.explored)
        if proposed and not row.looked_up:
            row.versions[self.draft_version] = None
        return Output(
            request_id=row.request.request_id,
            token_ids=tuple(tokens),
            logprobs=logprobs,
            prompt_logprobs=tuple(row.prompt_logprobs) if first and row.prompt_logprobs else None,
            num_proposed=proposed,
            num_accepted=accepted,
            chain_in_tree=None if proposed == chain_proposed else (chain_proposed, chain_accepted),
            finish_reason=reason,
            explored=row.explored,
            looked_up=row.looked_up,
            draft_versions=tuple(row.versions),
        )

    def _release(self, row: RunningSequence) -> None:
        decoding = row in self._decoding
        (self._decoding if decoding else self._prefill.rows).remove(row)
        self._table.give_back(row.slot)
        if self._observer and decoding and row.request.store:
            self._observer.on_finish(row)
