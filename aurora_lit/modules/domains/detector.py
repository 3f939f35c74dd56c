"""Which domain a request belongs to, found online from what the target saw in its prompt; and when traffic shifts.

A request's embedding is the mean of the target's auxiliary hidden states over its prompt, without the first position,
which models use as a sink of attention and which would drown the rest. A cluster of them is a domain; requests that
belong to no cluster have the domain UNKNOWN. A label that the client gave wins over all this.

What is left out: clusters (modules/domains/clusters.py), what is called a shift (modules/domains/shifts.py), and what learning makes
of it (modules/domains/lr_schedule.py).

    detector = DomainDetector(max_domains=16, novelty=0.7)
    placement = detector.place(trace)                       # placement.domain: "auto-3", or the client's "code"

Shapes: E embedding (three hidden states side by side).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aurora_lit.modules.domains.clusters import Clusters, Found
from aurora_lit.modules.domains.shifts import AcceptanceWatch, MixWatch
from aurora_lit.traces.record import SOURCE_DRAFT, Trace

UNKNOWN = ""
"""The domain of odd requests, and of all before there are domains."""
_OWN = "auto-"
"""Begins the ids that are not labels; clients cannot use it."""
_FRESH_REQUESTS = 64
"""Requests after a domain's founding in which a shift to it is a shift to something new."""
_REQUESTS_KNOWN = 1024
"""Requests whose domain is remembered for their later segments."""
_TYPICAL = 0.15
"""By so large a share more of a domain's prompts must have a token."""
_TOKENS_KEPT = 512
"""Different tokens counted of a domain, at most twice this."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A change of traffic."""

    cause: str
    """"mix": other domains than before; "acceptance": a domain's proposals are accepted less than before."""
    domain: str
    """The one that came, or got worse."""
    novelty: float
    """0 to 1. How much of it is new to the draft: 0 for a known domain that is back; the drop's share of the mean."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the detector says of one trace."""

    domain: str
    distance: float = 0.0
    """1 - cosine to the nearest centroid; 2 when there is none, 0 for a trace without a prompt."""
    founded: float = 0.0
    """Novelty of the domain that this request founded: its distance to what was seen before, at most 1. 0: none."""
    shift: Shift | None = None


@dataclass(kw_only=True)
class _Domain:
    """What is known of a domain besides its centroid."""

    founded_at: int
    """Requests before it."""
    novelty: float
    """At its founding."""
    number: int = 0
    """Requests of it."""
    tokens: Counter[int] = field(default_factory=Counter)
    """In how many of its prompts a token stood; the rarest are forgotten."""
    acceptance: AcceptanceWatch = field(default_factory=AcceptanceWatch)


class DomainDetector:
    """See the file's docstring."""

    def __init__(self, *, max_domains: int, novelty: float) -> None:
        """novelty: distance (1 - cosine) to every known domain beyond which a request is odd."""
        self._clusters = Clusters(most=max_domains, novelty=novelty)
        self._domains: dict[str, _Domain] = {}
        self._mix = MixWatch()
        self._of_request: OrderedDict[str, str] = OrderedDict()
        self._number = 0
        self._next_id = 1
        self.num_shifts = 0

    @property
    def domains(self) -> dict[str, float]:
        """Share of each domain in the latest requests."""
        shares = self._mix.shares
        return {name: shares.get(name, 0.0) for name in self._domains}

    @property
    def num_requests(self) -> int:
        """Requests placed so far."""
        return self._number

    @property
    def unknown_share(self) -> float:
        """Share of requests without a domain."""
        return self._mix.shares.get(UNKNOWN, 0.0)

    def place(self, trace: Trace) -> Placement:
        """The domain of a trace. Only a request's first segment teaches the detector; later ones share its domain."""
        x_E = embed(trace)
        if x_E is None:
            return Placement(domain=self._of_request.get(trace.request_id, UNKNOWN))
        found = self._find(trace, x_E)
        name = found.name or UNKNOWN
        self._number += 1
        self._of_request[trace.request_id] = name
        if len(self._of_request) > _REQUESTS_KNOWN:
            self._of_request.popitem(last=False)
        shift = self._shift(name, trace)
        self.num_shifts += shift is not None
        return Placement(domain=name, distance=found.distance, founded=found.founded, shift=shift)

    def typical_tokens(self, name: str, count: int = 3) -> list[int]:
        """Token ids that stand in more of a domain's prompts than of others', the most typical first."""
        own, others = self._domains[name], [domain for key, domain in self._domains.items() if key != name]
        elsewhere: Counter[int] = Counter()
        for other in others:
            elsewhere.update(other.tokens)
        total = max(1, sum(other.number for other in others))
        score = {token: number / max(1, own.number) - elsewhere[token] / total for token, number in own.tokens.items()}
        typical = [token for token in score if score[token] > _TYPICAL]
        return sorted(typical, key=lambda token: (-score[token], token))[:count]

    def _find(self, trace: Trace, x_E: Tensor) -> Found:
        labelled = trace.domain != UNKNOWN and not trace.domain.startswith(_OWN)
        new_name = f"{_OWN}{self._next_id}"
        found = self._clusters.add(x_E, new_name=new_name, fixed_name=trace.domain if labelled else None)
        if found.merged is not None:
            gone, kept = found.merged
            self._domains[kept].number += self._domains[gone].number
            self._domains[kept].tokens.update(self._domains.pop(gone).tokens)
            self._mix.rename(gone, kept)
        if found.name is not None:
            if found.founded:
                self._next_id += found.name == new_name
                self._domains[found.name] = _Domain(founded_at=self._number, novelty=found.founded)
            domain = self._domains[found.name]
            domain.number += 1
            _count_tokens(domain.tokens, trace.token_ids_T[: trace.answer_start].tolist())
        return found

    def _shift(self, name: str, trace: Trace) -> Shift | None:
        came = self._mix.observe(name, num_domains=len(self._domains) + 1)
        if came is not None:
            return Shift(cause="mix", domain=came, novelty=self._novelty_of(came))
        rate = acceptance_rate(trace)
        if name == UNKNOWN or rate is None:
            return None
        drop = self._domains[name].acceptance.observe(rate)
        return Shift(cause="acceptance", domain=name, novelty=drop) if drop else None

    def _novelty_of(self, name: str) -> float:
        """Of a domain that traffic has shifted to; much that cannot be told apart is all new."""
        if name == UNKNOWN:
            return 1.0
        domain = self._domains[name]
        return domain.novelty if self._number - domain.founded_at <= _FRESH_REQUESTS else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain numbers and strings."""
        return {
            "clusters": self._clusters.state_dict(),
            "mix": self._mix.state_dict(),
            "of_request": dict(self._of_request),
            "number": self._number,
            "next_id": self._next_id,
            "num_shifts": self.num_shifts,
            "domains": {
                name: {**vars(domain), "tokens": dict(domain.tokens), "acceptance": domain.acceptance.state_dict()}
                for name, domain in self._domains.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._clusters.load_state_dict(state["clusters"])
        self._mix.load_state_dict(state["mix"])
        self._of_request = OrderedDict(state["of_request"])
        self._number, self._next_id, self.num_shifts = state["number"], state["next_id"], state["num_shifts"]
        self._domains = {}
        for name, plain in state["domains"].items():
            fields = {**plain, "tokens": Counter(plain["tokens"]), "acceptance": AcceptanceWatch()}
            self._domains[name] = _Domain(**fields)
            self._domains[name].acceptance.load_state_dict(plain["acceptance"])


def embed(trace: Trace) -> Tensor | None:
    """Mean auxiliary hidden state of the prompt [E], fp32; None where there is none behind the first position."""
    end = trace.answer_start
    if trace.first_position or end < 2:
        return None
    return trace.aux_T3H[1:end].float().mean(0)


def acceptance_rate(trace: Trace) -> float | None:
    """Share of the draft's proposals that were accepted, exploring rounds left out; None when it made none."""
    drafted_R = (trace.source_R == SOURCE_DRAFT) & ~trace.explored_R
    proposed = int(trace.num_proposed_R[drafted_R].sum())
    return int(trace.num_accepted_R[drafted_R].sum()) / proposed if proposed else None


def _count_tokens(tokens: Counter[int], ids: list[int]) -> None:
    tokens.update(set(ids))
    if len(tokens) > 2 * _TOKENS_KEPT:
        kept = tokens.most_common(_TOKENS_KEPT)
        tokens.clear()
        tokens.update(dict(kept))
