"""The speculative engine: continuous batching over slots, one `round` at a time.

    round = admit → plan → run → judge → commit

- plan: each decoding sequence's row, its last token and what is proposed after it; and prompt chunks beside them
- run: one pass of the target over all rows
- judge: the target's own token at every column; proposals are accepted while they equal it
- commit: what was accepted, and the target's token after it

Every token of an output is one that the target has chosen itself, by its argmax or by a draw whose noise depends on the
request and the token's place alone (modules/sampling/). So whatever is proposed, outputs are those of plain decoding;
proposals decide only how fast. Left out: text and stop strings (serve/http/answer_stream.py), what is proposed
(serve/speculation/propose.py), and whether speculation pays (serve/speculation/floor.py).

A request's life: submit → waiting → prefilling (a chunk per round) → decoding → finished, or cancelled at any point.

Shapes: N columns of the decoding rows, T of one row, D of a row or rows whose logits are kept, S slots, L capacity of a
slot, V vocabulary.
"""

from __future__ import annotations

import time

import torch

from aurora_lit.config import copied_tokens
from aurora_lit.drafts.versions import version_number
from aurora_lit.errors import RequestError
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.models.interface import Target
from aurora_lit.modules.domains.centroids import DomainAssigner, client_label, pool_prompt
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Output, Request, SharedBy, Source
from aurora_lit.serve.engine.commit import Commit
from aurora_lit.serve.engine.prefill import MAX_ROUND_S, PREFILL_CHUNK_TOKENS, Prefill
from aurora_lit.serve.engine.prefix_cache import PrefixCache
from aurora_lit.serve.engine.round_plan import SIBLING_TOKENS, RoundPlan, RowOutcome, SpeculationLimits, judge
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.engine.slot_allocator import SlotAllocator, slot_capacity
from aurora_lit.serve.engine.target_runner import Columns, TargetRunner
from aurora_lit.serve.engine.thread_budget import ThreadBudget
from aurora_lit.serve.engine.token_choice import choose_tokens
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.engine.waiting_queue import WaitingQueue
from aurora_lit.serve.speculation.calibration import calibrate
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.floor import Allowed, RoundKind, SpeculationFloor
from aurora_lit.serve.speculation.propose import Proposer
from aurora_lit.serve.speculation.sources.draft import DraftSource
from aurora_lit.serve.speculation.sources.drafter import Drafter
from aurora_lit.serve.speculation.sources.grammar import decoding_row
from aurora_lit.serve.speculation.sources.memory import NO_MEMORY, TrafficMemory, can_remember
from aurora_lit.serve.speculation.sources.ngram import MAX_PADDED_COPIES, NgramSource, can_look_up
from aurora_lit.serve.speculation.sources.runtime_draft import RuntimeDraft
from aurora_lit.serve.speculation.weigh import Weigher
from aurora_lit.settings import EngineSettings, MemorySettings


class Engine:
    """Serves requests over a fixed number of slots.

    >>> engine = Engine(target, draft, EngineSettings(max_batch_size=8), eos_token_ids=ids)
    >>> engine.submit(Request(request_id="a", prompt_ids=ids, params=SamplingParams(max_tokens=16, temperature=0.0)))
    >>> while engine.has_work:
    ...     for output in engine.round(): ...
    """

    def __init__(
        self,
        target: Target,
        draft: Eagle3Draft | None,
        settings: EngineSettings,
        *,
        eos_token_ids: frozenset[int],
        memory: MemorySettings = NO_MEMORY,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        max_round_s: float = MAX_ROUND_S,
        draft_version: str = "",
        observer: TraceRecorder | None = None,
        grammars: GrammarCompiler | None = None,
        threads: ThreadBudget | None = None,
    ) -> None:
        """Allocate the slots, prepare the draft and calibrate. Without draft and copies: plain decoding.

        Of the settings only `max_seq_len`, and of the rest `eos_token_ids`, the tokens that end every output except
        with `ignore_eos`, affect the output of a request; everything else affects speed and traces. Not used here are
        settings of threads and devices, which the target has.

        `memory`: as config.py resolves it (`resolved_memory`); its scope is that of prefixes and grammars too.
        `draft_version`: name of the draft's version, for outputs and traces. `observer`: records rounds. `grammars`: of
        structured outputs; None: they are refused. `threads`: of rounds; None: those that are set.
        Raises CheckpointError if the draft computes values that are not finite.
        """
        slots, capacity = settings.max_batch_size, slot_capacity(settings, memory)
        self.eos_token_ids, self.max_seq_len, self.slot_capacity = eos_token_ids, settings.max_seq_len, capacity
        self.target, self.vocab_size = target, target.vocab_size
        """Other engines in this process may share the target."""
        self.draft_version, self._draft_number = draft_version, version_number(draft_version)
        self.assigner: DomainAssigner | None = None
        """Assigns domains to requests without a label; may be replaced between two rounds."""
        self.counters = EngineCounters()
        self._observer, self._threads = observer, threads
        assert memory.scope in ("domain", "client"), "resolved by config.py"
        shared_by: SharedBy = "client" if memory.scope == "client" else "domain"
        self._waiting = WaitingQueue(grammars, eos_token_ids=eos_token_ids, shared_by=shared_by)
        self._decoding: list[RunningSequence] = []

        self._tokens_SL = torch.zeros(slots, capacity + 1, dtype=torch.int64, device=target.device)
        """Committed tokens."""
        kv_cache = target.make_kv_cache(num_slots=slots, capacity=capacity)
        self._drafter: Drafter | None = None
        if draft is not None and settings.speculate:
            self._drafter = Drafter(draft, target, tokens_SL=self._tokens_SL, capacity=capacity)
        if observer is not None:
            observer.attach(tokens_SL=self._tokens_SL, aux_SLF=self._drafter.features_SLF if self._drafter else None)
        self._runner = TargetRunner(target, kv_cache=kv_cache, drafter=self._drafter, observer=observer)
        features = [self._drafter.features_SLF] if self._drafter else []
        self.prefix_cache: PrefixCache | None = None
        """None: every prompt is computed in full."""
        if settings.prefix_cache_mb:
            self.prefix_cache = PrefixCache(
                target,
                kv_cache,
                drafter=self._drafter,
                states=[*features, *(observer.prompt_states if observer else [])],
                capacity_bytes=settings.prefix_cache_mb << 20,
            )
        self._allocator = SlotAllocator(
            self._tokens_SL,
            prefix_cache=self.prefix_cache,
            shared_by=shared_by,
            has_prompt_arithmetic=target.has_prompt_arithmetic,
        )
        self._prefill = Prefill(
            target,
            self._runner,
            self._allocator,
            prefix_cache=self.prefix_cache,
            chunk_tokens=prefill_chunk_tokens,
            max_round_s=max_round_s,
            counters=self.counters,
        )

        self.costs = Costs(ragged=target.has_native_decoder)
        self._updates_costs = True
        """False: rounds do not have the machine to themselves now, so their times are not measurements of costs."""
        limits = self._limits(settings, memory)
        weigher = Weigher(limits, self.costs)
        self.memory: TrafficMemory | None = None
        """None: there is no traffic memory."""
        if settings.speculate and memory.capacity_mb and can_remember(target.device):
            self.memory = TrafficMemory(memory.capacity_mb << 20, shared_by=shared_by, counters=self.counters)
        self.proposer = Proposer(
            weigher,
            ngram=NgramSource(tokens_SL=self._tokens_SL, memory=self.memory, looks_up=settings.lookup),
            draft=DraftSource(self._drafter, weigher, max_catch_up_s=max_round_s),
        )
        self._commit = Commit(
            self._tokens_SL, max_seq_len=self.max_seq_len, proposer=self.proposer, counters=self.counters
        )

        adapts = settings.adaptive and (self._drafter is not None or limits.copied_tokens > 0)
        self.floor = SpeculationFloor() if adapts else None
        timed = (self.costs, limits, target, self._drafter)
        self._calibration = calibrate(*timed, kv_cache=kv_cache, max_batch_size=slots) if adapts else iter(())
        while next(self._calibration, False):
            pass

    def _limits(self, settings: EngineSettings, memory: MemorySettings) -> SpeculationLimits:
        """The most that a round proposes for a sequence. Chains are weighed where native steps and trees allow it."""
        drafter = self._drafter
        copied = copied_tokens(settings, memory) if can_look_up() else 0
        if not self.target.has_native_decoder:
            copied = min(copied, MAX_PADDED_COPIES)
        weighs = drafter is not None and drafter.is_native and self.target.has_native_decoder and settings.adaptive
        return SpeculationLimits(
            draft_tokens=settings.max_draft_tokens if drafter else 0,
            copied_tokens=copied,
            sibling_tokens=SIBLING_TOKENS if weighs else 0,
            adaptive=settings.adaptive,
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
        """Queue a request. Raises RequestError if its prompt is empty, too long or has tokens unknown to the target."""
        length = len(request.prompt_ids)
        if not length:
            raise RequestError("the prompt has no tokens; send at least one", param="prompt")
        if length + 1 > self.max_seq_len:
            raise RequestError(
                f"the prompt has {length} tokens, this model's maximum context length is {self.max_seq_len} tokens; "
                "shorten it or raise engine.max_seq_len",
                param="prompt",
                code="context_length_exceeded",
            )
        for param, ids in (("prompt", request.prompt_ids), ("prediction", request.prediction_ids)):
            if (most := max(ids, default=0)) >= self.target.vocab_size:
                raise RequestError(f"the target has no token {most}; leave it out", param=param)
        self._waiting.append(request)

    def refine_costs(self) -> bool:
        """Time one more operation while no request has come yet; False if none is left to time."""
        if self.has_work or self.counters.prompt_tokens:
            self._calibration = iter(())
        return next(self._calibration, None) is not None

    def cancel(self, request_id: str) -> None:
        """End a request in any state and free its slot. An unknown id is ignored."""
        self._waiting.remove(request_id)
        for sequence in [*self._prefill.sequences, *self._decoding]:
            if sequence.request.request_id == request_id:
                self._release(sequence)
        self._give_back_threads()

    def swap_draft(self, draft: Eagle3Draft | RuntimeDraft, *, version: str, recompute: bool = False) -> None:
        """Propose with another draft from the next round on (see `Drafter.swap`).

        Raises ValueError if the engine was created without a draft, and CheckpointError if an unprepared draft computes
        values that are not finite.
        """
        if self._drafter is None:
            raise ValueError("this engine was created without a draft, so there is none to swap")
        self._drafter.swap(draft, recompute=recompute)
        self.proposer.draft.rates.forget([*self._prefill.sequences, *self._decoding])
        if self.floor is not None:
            self.floor.forgive()
        self.draft_version, self._draft_number = version, version_number(version)

    def round(self) -> list[Output]:
        """Run one round for everything that is submitted. Returns what each decoding request received."""
        if self._threads is not None:
            self._updates_costs = self._threads.before_round()
        try:
            return self._round()
        finally:
            self._give_back_threads()

    @torch.no_grad()
    def _round(self) -> list[Output]:
        refused = self._admit()
        started = time.perf_counter()  # what a prompt takes that leaves its slot is not a round's
        plan = self._plan()
        if not (plan.decoding or plan.prompts):
            self._begin_decoding()  # their prompts were copied whole
            if not self.num_running:
                self._waiting.wait_for_grammar()
            return refused
        if self._threads is not None:
            self._threads.begin_pass()
        columns = self._runner.run(plan)
        if self._threads is not None:
            self._threads.end_pass()
        outcomes, logits_DV = self._judge(plan, columns)
        outputs = []
        for index, (row, outcome) in enumerate(zip(plan.decoding, outcomes, strict=True)):
            self._runner.store_decoding(row, columns, index, outcome.columns)
            output = self._commit(row, outcome, logits_DV.get(index), draft_version=self.draft_version)
            outputs.append(output)
            if self._observer and row.sequence.request.store:
                self._observer.on_round(row, output, version=self._draft_number)
        self._prefill.complete(plan.prompts, columns, first=len(plan.decoding))
        seconds = time.perf_counter() - started  # what the end of a request takes is not a round's
        for row, output in zip(plan.decoding, outputs, strict=True):
            if output.finish_reason is not None:
                self._release(row.sequence)
        self._account(plan, outputs, seconds)
        self._begin_decoding()
        return [*refused, *outputs]

    # -- the steps of a round, in order --------------------------------------------------------------------------------

    def _admit(self) -> list[Output]:
        """Give free slots to waiting requests, oldest first; a prefix of the prompt that the slot holds is kept.

        Those whose grammars are still being compiled wait on. Returns what is said to those whose grammars cannot be,
        which need no slot.
        """
        refused: list[Output] = []
        for ready in self._waiting.take(self._allocator.num_free):
            request = ready.request
            if ready.error is not None:
                refused.append(_failed(request, ready.error))
                continue
            slot, num_cached = self._allocator.allocate(request)
            length = len(request.prompt_ids)
            self._tokens_SL[slot, :length] = torch.tensor(request.prompt_ids)
            if self._drafter:
                self._drafter.keep_prefix(slot, num_cached)
            sequence = RunningSequence(
                request=request,
                slot=slot,
                prompt_length=length,
                length=length,
                last_token=request.prompt_ids[-1],
                prefilled=num_cached,
                num_reused=num_cached,
                end_tokens=ready.end_tokens,
                grammar=ready.grammar,
            )
            if request.params.prompt_logprobs is not None:
                sequence.prompt_logprobs.append(None)
            self._allocator.assign(sequence)
            self._prefill.sequences.append(sequence)
            self.counters.prompt_tokens += length
            self.counters.looked_up_tokens += length if self._allocator.looks_up(request) else 0
            self.counters.cached_tokens += num_cached
        return refused

    def _plan(self) -> RoundPlan:
        """The rows of this round."""
        sequences = self._decoding
        allowed = self._may_speculate(sequences)
        proposed = self.proposer.propose(sequences, copies=allowed.copies, drafts=allowed.drafts)
        decoding = [
            decoding_row(sequence, sequence.last_token, proposal)
            for sequence, proposal in zip(sequences, proposed.proposals, strict=True)
        ]
        expected_s = self.costs.round_s(len(decoding), [len(row.proposal.tokens) for row in decoding])
        prompts = self._prefill.plan(
            num_decoding=len(decoding),
            round_s=expected_s + proposed.drafting_s,
            updates_costs=self._updates_costs,
        )
        return RoundPlan(
            decoding,
            prompts,
            expected_s=expected_s,
            proposed=proposed,
            copied_prefix=self._prefill.has_copied,
            wants_speculation=any(sequence.speculates for sequence in sequences),
        )

    def _may_speculate(self, sequences: list[RunningSequence]) -> Allowed:
        """Whether to copy, and whether to draft: not where that has not paid lately, and neither while prompts wait,
        whose time proposals would take.
        """
        if not sequences or self.floor is None:
            return Allowed(bool(sequences), bool(sequences))
        if self._prefill.sequences:
            return Allowed(False, False)
        return self.floor.allows(RoundKind.of(sequences, threads=torch.get_num_threads()))

    def _judge(self, plan: RoundPlan, columns: Columns) -> tuple[list[RowOutcome], dict[int, torch.Tensor]]:
        """What each decoding row has come to; and the target's logits [T, V] of rows that ask for log-probabilities."""
        rows = plan.decoding
        if not rows:
            return [], {}
        own_tokens = columns.own_tokens
        logits: dict[int, torch.Tensor] = {}
        if own_tokens is None:
            last_NH = columns.states.last_NH[: plan.num_decoding_columns]
            own_tokens, logits = choose_tokens(self.target, rows, last_NH, tokens_SL=self._tokens_SL)
        outcomes, begin = [], 0
        for row in rows:
            end = begin + 1 + len(row.proposal.tokens)
            outcomes.append(judge(row.proposal, own_tokens[begin:end]))
            begin = end
        return outcomes, logits

    def _account(self, plan: RoundPlan, outputs: list[Output], seconds: float) -> None:
        """Learn from what the round took."""
        num_prompt_tokens, drafting_s, rows = plan.num_prompt_tokens, plan.proposed.drafting_s, plan.decoding
        if rows:
            self.counters.count_round(plan.name)
        if num_prompt_tokens:
            self._prefill.observe(num_prompt_tokens, seconds - drafting_s - plan.expected_s)
        if num_prompt_tokens or plan.copied_prefix:
            return
        self.counters.round_us += int(seconds * 1e6)
        self.counters.predicted_round_us += int((plan.expected_s + drafting_s) * 1e6)
        tokens = sum(len(output.token_ids) for output in outputs)
        if self._updates_costs:
            self.proposer.weigher.observe(len(rows), tokens=tokens, seconds=seconds)
            self.costs.observe_round(len(rows), [len(row.proposal.tokens) for row in rows], seconds - drafting_s)
        if self.floor is None:
            return
        kind = RoundKind.of([row.sequence for row in rows], threads=torch.get_num_threads())
        # What grammars force costs nothing to propose, and is no merit of copies or of the draft.
        if any(row.proposal.source is Source.GRAMMAR for row in rows):
            self.floor.pass_untimed(kind)
        elif not plan.wants_speculation:
            self.floor.observe_unasked(kind, seconds=seconds - plan.proposed.all_s)
        else:
            proposed = any(row.proposal.tokens for row in rows)
            self.floor.observe(kind, seconds=seconds, tokens=tokens, proposed=proposed, proposing=plan.proposed)
            self.counters.compared_us = int(self.floor.compared_s * 1e6)
            self.counters.compared_plain_us = int(self.floor.compared_plain_s * 1e6)

    def _begin_decoding(self) -> None:
        """Let sequences decode whose prompts have been read. Their domain is known now."""
        for sequence in self._prefill.take_ready():
            sequence.domain = client_label(sequence.request.domain) or self._assign_domain(sequence)
            if self.memory is not None:
                self.memory.open(sequence)
            self._decoding.append(sequence)

    def _assign_domain(self, sequence: RunningSequence) -> str:
        """What the prompt is assigned; "" without published domains, or without a drafter to keep hidden states."""
        if self.assigner is None or self._drafter is None:
            return ""
        x_E = pool_prompt(self._drafter.features_SLF[sequence.slot], sequence.prompt_length)
        return "" if x_E is None else self.assigner.assign(x_E.cpu())

    def _give_back_threads(self) -> None:
        """If no request is left."""
        if self._threads is not None and not self.has_work:
            self._threads.give_back()

    def _release(self, sequence: RunningSequence) -> None:
        """Free the slot of a request that finished or was cancelled."""
        decoding = sequence in self._decoding
        if decoding and self.memory is not None:
            self.memory.remember(sequence, self._tokens_SL[sequence.slot])
        (self._decoding if decoding else self._prefill.sequences).remove(sequence)
        self._allocator.free(sequence.slot)
        if self._observer and decoding and sequence.request.store:
            self._observer.on_finish(sequence)


def _failed(request: Request, error: str) -> Output:
    """The only output of a request that cannot be run."""
    return Output(request_id=request.request_id, token_ids=(), finish_reason="error", error=error)
