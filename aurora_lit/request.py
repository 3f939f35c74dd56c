"""Plain records that pass between the HTTP process, the loop and the engine.

What a client asked for (`Request`, `SamplingParams`) and what one engine round gave back (`Output`, `TokenLogprob`).
No behaviour and no torch: these records are pickled across LitServe's queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded; validated before it is built (serve/http/schema.py)."""

    max_tokens: int
    """New tokens at most."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Over prompt and output, as in transformers."""
    presence_penalty: float = 0.0
    """Over the output only."""
    frequency_penalty: float = 0.0
    """Over the output only."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    seed: int | None = None
    """Makes the sampled output repeatable in a fixed batch."""
    stop: tuple[str, ...] = ()
    """Stop strings: handled by serve/sequences/detokenizer.py, not by the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output besides the end-of-text tokens."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    logprobs: int | None = None
    """None: off; 0: the chosen token only; n: n alternatives too. Raw model log-probabilities, before temperature."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    speculate: bool = True
    """False: this request is decoded without the draft."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate; a client call with n choices becomes n of these."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    store: bool = True
    """False: the client wants nothing of it kept, so no trace is made."""
    domain: str = ""
    """The client's label for what this is about (`metadata.aurora_domain`); goes into the trace."""
    client: str = ""
    """Tells clients apart without saying who they are (serve/http/client_names.py); goes into the trace."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log-probability of one token and of its likeliest alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one round gave one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens; the end-of-text token is included as last when it ended the request."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One a new token."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Once, with the first output; the first entry is None."""
    num_proposed: int = 0
    """Draft tokens proposed in this round; of a tree all of them, of which one path at most can be accepted."""
    num_accepted: int = 0
    """Draft tokens accepted in this round."""
    chain_in_tree: tuple[int, int] | None = None
    """Of a tree: the length of its chain of first choices, and how much of it would have been accepted alone."""
    finish_reason: str | None = None
    """"stop" (end of text or stop token), "length", "error"; None while it runs."""
    error: str | None = None
    """What went wrong when finish_reason is "error"."""
    explored: bool = False
    """This round's proposals were drawn at the exploration's temperature."""
    looked_up: bool = False
    """This round's proposals were copied from earlier in the request."""
    draft_versions: tuple[str, ...] = ()
    """Draft versions that have proposed for the request so far, in the order they came."""

    @property
    def chain_proposed(self) -> int:
        """The draft's first choices: all proposals but for a tree."""
        return self.num_proposed if self.chain_in_tree is None else self.chain_in_tree[0]

    @property
    def chain_accepted(self) -> int:
        """What would have been accepted of these alone."""
        return self.num_accepted if self.chain_in_tree is None else self.chain_in_tree[1]
