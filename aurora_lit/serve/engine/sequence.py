"""A running sequence as the engine keeps it.

Left out: the slots themselves (models/kv_cache.py), who gets one (serve/engine/slot_allocator.py), and what a round
computes for it (serve/engine/round_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from aurora_lit.grammars.matcher import Grammar
from aurora_lit.kernels.suffix_index import Place
from aurora_lit.modules.sampling.distribution import has_options, is_greedy
from aurora_lit.request import Request, SamplingParams, TokenLogprob


@dataclass
class VerifiedDrafts:
    """How many proposals of the draft a sequence had verified and accepted; older ones count less."""

    accepted: float = 0.0
    proposed: float = 0.0

    def add(self, accepted: bool, *, decay: float) -> None:
        """Add one proposal."""
        self.accepted = decay * self.accepted + accepted
        self.proposed = decay * self.proposed + 1.0


@dataclass(kw_only=True, eq=False)
class RunningSequence:
    """A request that holds a slot: first prefilling, then decoding."""

    request: Request
    slot: int
    prompt_length: int
    length: int
    """Committed tokens. While decoding, the target has computed all of them but the last."""
    last_token: int = 0
    """The last committed one."""
    verified_drafts: VerifiedDrafts = field(default_factory=VerifiedDrafts)
    fruitless_look_ups: int = 0
    """Look-ups since the last one that found copies."""
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the output."""
    prefilled: int = 0
    """Prompt tokens that the target has computed, or that were copied."""
    num_reused: int = 0
    """Prompt tokens that were in the slot already or copied to it, so not computed."""
    searched_for_prefix: bool = False
    """False: a prefix of the prompt may be elsewhere that the slot does not have (serve/engine/prefill.py)."""
    draft_versions: dict[str, None] = field(default_factory=dict)
    """Draft versions that have proposed for it, in order (an ordered set)."""
    memory_part: int = 0
    """What it may read of the traffic memory, and writes to when it ends (serve/speculation/sources/memory.py); 0:
    nothing."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    domain: str = ""
    """The client's label, else what the prompt was assigned; "" before it has been read, and for outliers."""
    grammar: Grammar | None = None
    """What the output is restricted to; None: nothing."""
    temperature: float = field(init=False)
    """The request's sampling temperature; 0: greedy."""
    always_needs_logits: bool = field(init=False)
    """True if it `needs_logits` until its end, with a grammar or without."""
    prediction: torch.Tensor | None = field(init=False)
    """The request's, int64 on the CPU; None: it has none."""
    place: Place = field(init=False)
    """Where the answer was in its prediction, or else in its prompt, as far as it repeats it."""
    noise_key: int = field(init=False)
    """Decides which tokens are drawn (modules/sampling/noise.py): the request's seed, or its secret."""

    def __post_init__(self) -> None:
        params, predicted = self.request.params, self.request.prediction_ids
        self.prediction = torch.tensor(predicted) if predicted else None
        self.place = Place(0, self.prompt_length) if predicted else Place()
        self.temperature = 0.0 if is_greedy(params) else params.temperature
        self.noise_key = _as_int64(self.request.noise_key if params.seed is None else params.seed)
        self.always_needs_logits = params.logprobs is not None or has_options(params)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys, values and hidden states are in the slot."""
        return self.length - 1 if self.prefilled == self.prompt_length - 1 else self.prefilled

    @property
    def needs_logits(self) -> bool:
        """True if the target's choice takes more than its logits and the temperature.

        That is with penalties, a bias, top-k, top-p or min-p, a grammar, with log-probabilities, and while it may not
        end yet.
        """
        return (
            self.always_needs_logits
            or self.grammar is not None
            or self.length - self.prompt_length < self.params.min_tokens
        )

    @property
    def speculates(self) -> bool:
        """False: nothing may be proposed, as the request says or since its grammar takes no proposals."""
        return self.params.speculate and (self.grammar is None or self.grammar.takes_proposals)

    @property
    def num_remaining(self) -> int:
        """Tokens that `max_tokens` still allows."""
        most = self.params.max_tokens
        assert most is not None, "filled in before a request is submitted"
        return most - self.length + self.prompt_length

    @property
    def params(self) -> SamplingParams:
        """How the request is decoded."""
        return self.request.params

    def cut_at_end(self, tokens: list[int], *, max_seq_len: int) -> tuple[list[int], str | None]:
        """New tokens up to the end of the request, and the finish reason; None: it goes on."""
        room = min(self.num_remaining, max_seq_len - self.length)
        tokens = tokens[: max(0, room)]
        for i, token in enumerate(tokens):
            if token in self.end_tokens:
                return tokens[: i + 1], "stop"
        return tokens, "length" if len(tokens) == room or room <= 0 else None


def _as_int64(number: int) -> int:
    """Any integer, wrapped around to 64 bits."""
    folded = number % 2**64
    return folded - 2**64 if folded >= 2**63 else folded
