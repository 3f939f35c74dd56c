"""The speculative engine: continuous batching over slots, one `round` at a time.

    round = admit → prefill a chunk → propose k tokens per sequence → forward over k + 1 → verify → commit

Whatever the draft proposes, what is committed has exactly the distribution of plain decoding
(modules/sampling/verification.py); the draft decides only how fast. Left out: text and stop strings
(serve/sequences/detokenizer.py), HTTP, how many tokens are proposed (serve/speculation/planner.py,
serve/speculation/ngram_planner.py), and the draft's own work (serve/speculation/drafter.py).

A request's life: submit → waiting → prefilling (a chunk per round) → decoding → finished, or cancelled at any point.

Shapes: B sequences of a batch, K proposals of the sequence with most, T = K + 1 columns, N columns computed in all,
V vocabulary, S slots, L capacity of a slot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from aurora_lit.errors import RequestError
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.sampling.distribution import LogitOptions, token_logprobs
from aurora_lit.modules.sampling.proposals import Proposals
from aurora_lit.modules.sampling.tree import common_prefix_length
from aurora_lit.modules.sampling.verification import VerificationResult, verify, verify_by_equality
from aurora_lit.request import Output, Request
from aurora_lit.serve.engine.options import EngineOptions
from aurora_lit.serve.engine.prefill import Prefill
from aurora_lit.serve.engine.target_runner import ForwardOutput, TargetRunner, query_lengths_of
from aurora_lit.serve.sequences.ngram_index import NgramIndex
from aurora_lit.serve.sequences.observer import RoundObserver, notify_round
from aurora_lit.serve.sequences.sequence import (
    EngineStats,
    RunningSequence,
    VerifiedTokens,
    token_history,
    verified_tokens,
)
from aurora_lit.serve.sequences.slot_allocator import SlotAllocator
from aurora_lit.serve.speculation.calibration import calibration_steps
from aurora_lit.serve.speculation.drafter import Drafter
from aurora_lit.serve.speculation.kept_costs import KeptCosts
from aurora_lit.serve.speculation.ngram_planner import NgramPlanner
from aurora_lit.serve.speculation.planner import SpeculationPlanner
from aurora_lit.serve.speculation.proposer import Proposer
from aurora_lit.serve.speculation.runtime_draft import RuntimeDraft

_DONE = object()


class Engine:
    """Serves requests over a fixed number of slots.

    >>> engine = Engine(target, draft, EngineOptions(eos_token_ids=ids, max_batch_size=8, …))
    >>> engine.submit(Request(request_id="a", prompt_ids=ids, params=SamplingParams(max_tokens=16, temperature=0.0)))
    >>> while engine.has_work:
    ...     for output in engine.round(): ...
    """

    def __init__(
        self,
        target: Target,
        draft: Eagle3Draft | None,
        options: EngineOptions,
        *,
        draft_version: str = "",
        observer: RoundObserver | None = None,
        kept_costs: KeptCosts | None = None,
    ) -> None:
        """Allocate the slots, prepare the draft and calibrate. Without draft and lookup: plain decoding.

        `kept_costs`: used instead of calibrating if they exist, otherwise made; see `refine_costs`.

        `draft_version`: name of the draft's version, for outputs and traces. `observer`: records rounds. Raises
        CheckpointError if the draft computes values that are not finite.
        """
        self.eos_token_ids, self.max_seq_len = options.eos_token_ids, options.max_seq_len
        self.vocab_size = target.vocab_size
        self.slot_capacity = options.slot_capacity
        self.draft_version = draft_version
        self.stats = EngineStats()
        self._target, self._observer, self._device = target, observer, target.device
        self._uses_lookup = options.lookup_tokens > 0
        self._waiting: deque[Request] = deque()
        self._decoding: list[RunningSequence] = []
        self._logit_sequences: list[RunningSequence] = []
        """Those that `_logit_options` were made for."""
        self._logit_options = LogitOptions.from_params([])

        self._tokens_SL = torch.zeros(
            options.max_batch_size, self.slot_capacity + 1, dtype=torch.int64, device=self._device
        )
        """Committed tokens."""
        kv_cache = target.make_kv_cache(num_slots=options.max_batch_size, capacity=self.slot_capacity)
        self._drafter: Drafter | None = None
        if draft is not None and options.max_draft_tokens:
            self._drafter = Drafter(draft, target, tokens_SL=self._tokens_SL, capacity=self.slot_capacity)
        self._runner = TargetRunner(target, kv_cache=kv_cache, drafter=self._drafter, observer=observer)
        self._allocator = SlotAllocator(
            self._tokens_SL,
            prefix_cache=options.prefix_cache,
            has_observer=observer is not None,
            has_prompt_arithmetic=target.has_prompt_arithmetic,
        )
        self._prefill = Prefill(
            target,
            self._runner,
            self._allocator,
            tokens_SL=self._tokens_SL,
            chunk_tokens=options.prefill_chunk_tokens,
            adaptive=options.adaptive,
            stats=self.stats,
        )
        self._kept_costs = kept_costs
        self._refinement: Iterator[None] = iter(())
        """Steps of a calibration that checks the kept costs."""
        self.planner = self._make_planner(options)
        self.proposer = self._make_proposer(options)
        if observer is not None:
            observer.attach(tokens_SL=self._tokens_SL, aux_SLF=self._drafter.features_SLF if self._drafter else None)
        if options.adaptive and (self._drafter or self._uses_lookup):
            steps = calibration_steps(
                self.planner, target, self._drafter, kv_cache=kv_cache, max_batch_size=options.max_batch_size
            )
            if kept_costs is not None and kept_costs.load_into(self.planner):
                self._refinement = steps
            else:
                deque(steps, maxlen=0)  # all of them
                if kept_costs is not None:
                    kept_costs.save(self.planner)

    def _make_planner(self, options: EngineOptions) -> SpeculationPlanner:
        supports_trees = self._drafter is not None and self._drafter.supports_trees and self._target.supports_trees
        return SpeculationPlanner(
            max_draft_tokens=options.max_draft_tokens if self._drafter else 0,
            max_lookup_tokens=options.lookup_tokens,
            adaptive=options.adaptive,
            tree_tokens=options.tree_tokens if supports_trees else 0,
        )

    def _make_proposer(self, options: EngineOptions) -> Proposer:
        ngram_planner = NgramPlanner(self.planner, max_tokens=options.lookup_tokens) if self._uses_lookup else None
        return Proposer(
            self._drafter,
            self.planner,
            ngram_planner=ngram_planner,
            device=self._device,
            explore_share=options.explore_share,
            explore_temperature=options.explore_temperature,
            explore_seed=options.explore_seed,
            record_logprobs=self._observer is not None,
        )

    @property
    def has_work(self) -> bool:
        """True if any request is waiting or running."""
        return bool(self._waiting or self._prefill.sequences or self._decoding)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._prefill.sequences) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if its prompt is empty or too long."""
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

    def refine_costs(self) -> bool:
        """Time one operation of the kept costs again, while the slots are still empty; False if there is none left.

        For idle moments after the start. The first request ends it; from then on rounds keep the costs up to date.
        """
        if self.has_work or self.stats.prompt_tokens:
            self._refinement = iter(())
        elif next(self._refinement, _DONE) is not _DONE:
            return True
        elif self._kept_costs is not None:
            self._kept_costs.save(self.planner)
            self._kept_costs = None
        return False

    def cancel(self, request_id: str) -> None:
        """End a request in any state and free its slot. An unknown id is ignored."""
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        for sequence in [*self._prefill.sequences, *self._decoding]:
            if sequence.request.request_id == request_id:
                self._release(sequence)

    def swap_draft(self, draft: Eagle3Draft | RuntimeDraft, *, version: str, recompute: bool = False) -> None:
        """Propose with another draft from the next round on (see `Drafter.swap`).

        Raises ValueError if the engine was created without a draft, and CheckpointError if an unprepared draft computes
        values that are not finite.
        """
        if self._drafter is None:
            raise ValueError("this engine was created without a draft, so there is none to swap")
        self._drafter.swap(draft, recompute=recompute)
        self.planner.reset_for_new_draft([*self._prefill.sequences, *self._decoding])
        self.draft_version = version

    @torch.no_grad()
    def round(self) -> list[Output]:
        """Run one round for everything that is submitted. Returns what each decoding request received."""
        self._admit()
        num_decoding = len(self._decoding)
        round_s = self.planner.target_cost(num_decoding, 1)
        self._decoding += self._prefill.run(num_decoding=num_decoding, round_s=round_s)
        sequences = list(self._decoding)
        if not sequences:
            return []
        self.stats.rounds += 1
        argmax_only = self._update_logit_options(sequences)
        ragged = argmax_only and self._target.supports_trees

        proposals = self.proposer.propose(sequences, ragged=ragged)
        query_lengths = query_lengths_of(proposals) if ragged else None
        ids_BT = self._input_ids(sequences, proposals)

        started = time.perf_counter()
        forward_output = self._runner.forward(
            sequences, ids_BT, parents_BT=proposals.parent_BT, query_lengths=query_lengths
        )
        result, logits_BTV = self._verify(sequences, proposals, forward_output, argmax_only=argmax_only)
        self._runner.store(sequences, forward_output, result)
        verified = verified_tokens(proposals, result)
        outputs = [
            self._commit(sequence, tokens, None if logits_BTV is None else logits_BTV[b])
            for b, (sequence, tokens) in enumerate(zip(sequences, verified, strict=True))
        ]
        self.planner.observe_target(len(sequences), len(forward_output.last_NH), time.perf_counter() - started)

        if proposals.parent_BK is not None:
            self.planner.observe_trees(verified, outputs)
        if self._observer:
            self._notify(self._observer, sequences, outputs, proposals, forward_output)
        for sequence, output in zip(sequences, outputs, strict=True):
            if output.finish_reason is not None:
                self._release(sequence)
        return outputs

    # -- the steps of a round, in order --------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give free slots to waiting requests, oldest first; a prefix of the prompt that the slot holds is kept."""
        while self._waiting and self._allocator.num_free:
            request = self._waiting.popleft()
            slot, num_cached = self._allocator.allocate(request)
            length = len(request.prompt_ids)
            self._tokens_SL[slot, :length] = torch.tensor(request.prompt_ids)
            if self._drafter:
                self._drafter.keep_prefix(slot, num_cached)
            sequence = RunningSequence(
                request=request,
                slot=slot,
                acceptance_rate=self.planner.mean_rate,
                prompt_length=length,
                length=length,
                prefilled=num_cached,
            )
            self._allocator.assign(sequence)
            if self._uses_lookup:
                sequence.ngrams = NgramIndex(request.prompt_ids)
            if request.params.prompt_logprobs is not None:
                sequence.prompt_logprobs.append(None)
            self._prefill.sequences.append(sequence)
            self.stats.prompt_tokens += length
            self.stats.cached_tokens += num_cached
            self.stats.opted_out += not request.store

    def _update_logit_options(self, sequences: list[RunningSequence]) -> bool:
        """Rebuild the batch's options if the batch changed. True if only the argmax of the logits is needed."""
        if sequences != self._logit_sequences:
            self._logit_sequences = sequences
            self._logit_options = LogitOptions.from_params(
                [sequence.params for sequence in sequences], device=self._device
            )
        return self._logit_options.uses_raw_argmax and all(sequence.params.logprobs is None for sequence in sequences)

    def _input_ids(self, sequences: list[RunningSequence], proposals: Proposals) -> torch.Tensor:
        """The target's input [B, T]: each sequence's last committed token, then its proposals."""
        last_B1 = torch.stack([self._tokens_SL[sequence.slot, sequence.length - 1] for sequence in sequences])[:, None]
        return torch.cat([last_B1, proposals.token_BK], dim=1)

    def _verify(
        self,
        sequences: list[RunningSequence],
        proposals: Proposals,
        forward_output: ForwardOutput,
        *,
        argmax_only: bool,
    ) -> tuple[VerificationResult, torch.Tensor | None]:
        """Which proposals the target accepts; and its logits [B, T, V], unless only their argmax is needed."""
        if argmax_only:
            token_N = self._target.greedy_tokens(forward_output.last_NH)
            return verify_by_equality(token_N[forward_output.index_BT], proposals=proposals), None
        logits_BTV = self._target.logits(forward_output.by_column(forward_output.last_NH))
        result = verify(
            logits_BTV,
            options=self._logit_options,
            proposals=proposals,
            uniform_BT=torch.rand(logits_BTV.shape[:2], dtype=torch.float64, device=self._device),
            history=token_history(sequences, self._logit_options, self._tokens_SL),
            vocabulary=self._drafter.vocabulary if self._drafter else None,
        )
        return result, logits_BTV

    def _commit(self, sequence: RunningSequence, verified: VerifiedTokens, logits_TV: torch.Tensor | None) -> Output:
        """Append a sequence's new tokens, up to where the request ends."""
        tokens, reason = sequence.cut_at_end(
            verified.tokens, eos_token_ids=self.eos_token_ids, max_seq_len=self.max_seq_len
        )
        logprobs = None
        if sequence.params.logprobs is not None:
            assert logits_TV is not None
            logprobs = token_logprobs(logits_TV[verified.columns], token_ids=tokens, num_top=sequence.params.logprobs)
        proposed, accepted = verified.num_proposed, min(len(verified.tokens) - 1, len(tokens))
        chain_proposed = len(verified.first_choices)
        chain_accepted = min(accepted, common_prefix_length(verified.first_choices, tokens))
        end = sequence.length + len(tokens)
        self._tokens_SL[sequence.slot, sequence.length : end] = torch.tensor(tokens, dtype=torch.int64)
        first = sequence.length == sequence.prompt_length
        sequence.length = end
        self.proposer.observe(sequence, proposed=chain_proposed, accepted=chain_accepted, finished=reason is not None)
        if self._uses_lookup:
            sequence.ngrams.extend(tokens)
        self.stats.count(generated=len(tokens), proposed=proposed, accepted=accepted, explored=sequence.is_exploring)
        if proposed and not sequence.uses_lookup:
            sequence.draft_versions[self.draft_version] = None
        return Output(
            request_id=sequence.request.request_id,
            token_ids=tuple(tokens),
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
            num_proposed=proposed,
            num_accepted=accepted,
            chain_in_tree=None if proposed == chain_proposed else (chain_proposed, chain_accepted),
            finish_reason=reason,
            explored=sequence.is_exploring,
            from_lookup=sequence.uses_lookup,
            draft_versions=tuple(sequence.draft_versions),
        )

    def _notify(
        self,
        observer: RoundObserver,
        sequences: list[RunningSequence],
        outputs: list[Output],
        proposals: Proposals,
        forward_output: ForwardOutput,
    ) -> None:
        notify_round(
            observer,
            sequences,
            outputs,
            proposals=proposals,
            last_BTH=forward_output.by_column(forward_output.last_NH),
            version=self.draft_version,
            explore_temperature=self.proposer.explore_temperature,
        )

    def _release(self, sequence: RunningSequence) -> None:
        """Free the slot of a request that finished or was cancelled."""
        decoding = sequence in self._decoding
        (self._decoding if decoding else self._prefill.sequences).remove(sequence)
        self._allocator.free(sequence.slot)
        if self._observer and decoding and sequence.request.store:
            self._observer.on_finish(sequence)
