"""The records that HTTP process, engine worker and engine exchange.

`Request` and `SamplingParams` say what a client asked for; `Output` and `TokenLogprob` hold what one engine round
produced for a request. They are plain data without torch, which msgpack carries between processes.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

MAX_DOMAIN_CHARACTERS = 64
"""Longest label of a domain. Labels are printable."""


class Source(IntEnum):
    """Where a token of an answer came from: it is the target's own, or an accepted proposal of one of the others.

    Counters are indexed by it, and a trace stores it for each round.
    """

    TARGET = 0
    """Of a round's proposals: there were none."""
    DRAFT = 1
    NGRAM = 2
    """Copied from earlier in the same request, or from its prediction (n-gram lookup)."""
    MEMORY = 3
    """From the traffic memory alone."""
    GRAMMAR = 4
    """The request's grammar allowed nothing else."""

    @property
    def label(self) -> str:
        """Its name in metrics, reports and answers. What grammars force has always been counted with n-gram lookup."""
        return "lookup" if self in (Source.NGRAM, Source.GRAMMAR) else self.name.lower()


RequestKind = Literal["chat", "completion", "fim", "edit"]
"""What a request asks for: an answer to a conversation, the continuation of a text, what fills a hole in a file, or a
text whose likely new form the client sends along (`prediction`)."""
PLANS = ("plain", *dict.fromkeys(source.label for source in Source if source > Source.DRAFT), "chain", "tree")
"""What a round proposes, counted apart: nothing; what one of the sources proposes without the draft; or the draft's, as
a chain or as a tree with siblings or copies beside it. Of a round whose sequences differ the last of these counts."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must be: exactly one of these (names and meaning are vLLM's, but for `begins_with`)."""

    json: str | Mapping[str, Any] | None = None
    """A JSON schema."""
    regex: str | None = None
    """An expression that matches the whole output."""
    choice: tuple[str, ...] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A context-free grammar, in llguidance's Lark dialect or in GBNF."""
    json_object: bool | None = None
    """True: any JSON object."""
    begins_with: str | None = None
    """A text; whatever follows it is free."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. Values are validated before (serve/http/schema.py)."""

    max_tokens: int | None = 16
    """Maximum number of new tokens; the default is that of text completions. None: the rest of the context, which the
    engine has to be told as a number (serve/http/tokenize.py fills it in)."""
    n: int = 1
    """Answers to a prompt (`aurora_lit.LLM`). Each is a request of its own, so that the engine does not look at it."""
    temperature: float = 1.0
    """0: greedy decoding."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities add up to at least this."""
    min_p: float = 0.0
    """Drop tokens whose probability is below this fraction of the most likely token's."""
    repetition_penalty: float = 1.0
    """Applied to tokens of prompt and output, as in transformers; 1: none."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Maps token ids to what is added to their logits."""
    seed: int | None = None
    """Makes sampled output reproducible."""
    min_tokens: int = 0
    """So many tokens are generated before any that ends the output; stop strings count only after them."""
    stop: tuple[str, ...] = ()
    """Stop strings; serve/http/answer_stream.py handles them, not the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output besides the end-of-text tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the token that ended the output, in the text."""
    skip_special_tokens: bool = True
    """False: the text has special tokens too."""
    ignore_eos: bool = False
    """Continue after an end-of-text token."""
    logprobs: int | None = None
    """None: off; 0: of the chosen token only; n: also of the n most likely tokens. Log-probabilities are the model's,
    before temperature."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    speculate: bool = True
    """False: plain decoding for this request."""
    structured_outputs: StructuredOutputsParams | None = None
    """None: any output. Other tokens than those that it allows have no probability, before all options above; the
    log-probabilities are the model's all the same."""


SharedBy = Literal["domain", "client"]
"""Whose requests may reuse what was computed for one: those of all clients, or of its own client."""


class Scope(NamedTuple):
    """Requests of one scope share prefixes, remembered answers and compiled grammars.

    It is compared as it is, not by a hash, so that no two can be confused; only files that are kept are named by one
    (serve/speculation/sources/kept_answers.py).
    """

    client: str
    """Pseudonym of the only client; "": all clients share."""
    salt: str
    """The `cache_salt` that all its requests have; "": they have none."""


class Client(NamedTuple):
    """Who sent a request: pseudonyms (serve/http/routes.py), "" if nothing is known."""

    name: str = ""
    """Whose prefixes and answers it may reuse where a client has its own."""
    source: str = ""
    """Whose share of what is learned it takes: the name, or the address that all names of an untrusted client have."""


UNKNOWN_CLIENT = Client()


class _OfClient(Protocol):
    @property
    def client(self) -> str: ...


_T = TypeVar("_T", bound=_OfClient)


def oldest_of_busiest(items: Collection[_T]) -> _T:
    """Of items from old to new, the oldest one of the client that has most of them: it is the next to make room."""
    ((busiest, _),) = Counter(each.client for each in items).most_common(1)
    return next(each for each in items if each.client == busiest)


def by_turns(items: Iterable[_T]) -> list[_T]:
    """The first item of each client, then the second of each, and so on."""
    counts: Counter[str] = Counter()
    turns: list[tuple[int, _T]] = []
    for each in items:
        counts[each.client] += 1
        turns.append((counts[each.client], each))
    return [each for _, each in sorted(turns, key=lambda turn: turn[0])]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate; a client's call with n choices becomes n requests."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    prediction_ids: tuple[int, ...] = ()
    """What the answer will probably repeat, with differences: proposed from the first token on, and nothing else. It is
    no part of the prompt, and never kept."""
    store: bool = True
    """False: the client opted out of storage. No trace is made, and nothing that was computed for it is reused."""
    domain: str = ""
    """The client's label for the kind of traffic (`metadata.aurora_domain`); part of the trace."""
    client: Client = UNKNOWN_CLIENT
    """Its `source` is part of the trace."""
    cache_salt: str = ""
    """The client's secret that confines what is reused for this request to requests with the same salt (`Scope`). "":
    shared with all requests without a salt. No part of the trace."""
    call: str = ""
    """What all choices of one call have in common, and no other request has; they always share their prompt's prefix.
    "": it is the only one."""
    noise_key: int = field(default_factory=lambda: secrets.randbits(63))
    """A secret that stands in for the seed where a request has none: it decides which tokens are drawn."""

    def scope(self, shared_by: SharedBy) -> Scope | None:
        """Whose results it may read; it may add to them with `store` only, which the writer checks. None: nobody's.

        Shared by a client, a request of an unknown client has none: what one such client wrote, another would read.
        """
        if shared_by == "client" and not self.client.name:
            return None
        return Scope(client=self.client.name if shared_by == "client" else "", salt=self.cache_salt)


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log-probability of one token and of the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one round produced for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, including the end-of-text token if it ended the request."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry for each new token."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One entry for each prompt token, with the first output only; the first entry is None."""
    num_proposed: int = 0
    """Tokens proposed in this round; for a tree all its nodes, of which at most one path can be accepted."""
    num_accepted: int = 0
    """Proposed tokens accepted in this round."""
    is_first: bool = False
    """True for the first output of its request."""
    first_choices: tuple[int, int] | None = None
    """Where more was proposed than a chain of first choices, such as a tree, or copies after the draft's: the length of
    that chain, and how much of it would have been accepted if only it had been proposed. None: nothing else was."""
    tested_choices: tuple[int, int] | None = None
    """Of a round for which a chain was drafted and weighed: of how many of its first choices, proposed or not, the
    answer tells whether they were right, and how many were. None: of other rounds."""
    finish_reason: str | None = None
    """"stop" (end of text or stop token), "length" or "error"; None while the request runs."""
    error: str | None = None
    """The reason if finish_reason is "error"."""
    only_copied: bool = False
    """True if this round's proposals were all copied, from earlier in the request or from the traffic memory."""
    accepted_from: tuple[Source, ...] = ()
    """For each accepted token, which come first in `token_ids`, what proposed it."""
    draft_versions: tuple[str, ...] = ()
    """Draft versions that have proposed for the request so far, in order of first use."""
    domain: str = ""
    """The domain that the request is served as: its label, else what its prompt was assigned; "" without one."""
    num_cached_tokens: int = 0
    """Tokens of its prompt that were not computed, because the prefix cache had them."""

    @property
    def chain_proposed(self) -> int:
        """Length of the chain of first choices: the draft's, if it proposed."""
        return self.num_proposed if self.first_choices is None else self.first_choices[0]

    @property
    def chain_accepted(self) -> int:
        """How many of these would have been accepted if only they had been proposed."""
        return self.num_accepted if self.first_choices is None else self.first_choices[1]
