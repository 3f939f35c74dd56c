"""Assigns each request to a domain, learned online from the target's hidden states, and detects shifts of the traffic.

A request's embedding is a mean of the target's auxiliary hidden states over its prompt
(modules/domains/centroids.py). A cluster of embeddings is a domain. Requests outside all clusters have the domain
UNKNOWN. A label that the client gave takes precedence.

Leaves out the clustering (modules/domains/clusters.py), the statistical tests (modules/domains/shifts.py), and how
learning responds (modules/domains/lr_schedule.py).

    detector = DomainDetector()
    assignment = detector.assign(trace)         # assignment.domain: "auto-3", or the client's "code"

Shapes: E embedding (three hidden states side by side).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aurora_lit.modules.domains.centroids import AUTO_PREFIX, RECENCY, UNKNOWN, Centroids, client_label, pool_prompt
from aurora_lit.modules.domains.clusters import MAX_CLUSTERS, NOVELTY_THRESHOLD, ClusterAssignment, OnlineClusters
from aurora_lit.modules.domains.shifts import AcceptanceDropDetector, MixShiftDetector
from aurora_lit.request import Source
from aurora_lit.traces.record import Trace

_NEW_FOR_REQUESTS = 64
"""A shift to a domain that was founded within so many requests is a shift to something new."""
_MIN_SEEN = 32
"""Positions of a prompt's end that decide its domain where its beginning was not seen: with so few, nine of ten prompts
are named as by all (docs/results/domains.md)."""
_REMEMBERED_REQUESTS = 1024
"""Requests whose domain is remembered, for their later trace segments."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A change of the traffic."""

    cause: str
    """"mix": the mix of domains changed. "acceptance": a domain's acceptance rate dropped."""
    domain: str
    """The domain whose share grew most, or whose acceptance rate dropped."""
    novelty: float
    """0 to 1, how new the traffic is to the draft: 0 for a known domain that returns; for a drop of acceptance, its
    size as a share of the mean."""


@dataclass(frozen=True, kw_only=True)
class DomainAssignment:
    """The domain of one trace."""

    domain: str
    founded_novelty: float = 0.0
    """Above 0 if this request founded its domain: the domain's distance to everything seen before, at most 1."""
    shift: Shift | None = None
    """The shift that was detected with this request."""
    merged: tuple[str, str] | None = None
    """A domain that went into another one to make room for this request's, and that one."""


@dataclass(kw_only=True)
class _Domain:
    """A domain's record, without its centroid."""

    founded_at: int
    """Number of requests before it."""
    novelty: float
    """At its founding."""
    acceptance: AcceptanceDropDetector = field(default_factory=AcceptanceDropDetector)


class DomainDetector:
    """See the file's docstring."""

    def __init__(self, *, max_domains: int = MAX_CLUSTERS, novelty_threshold: float = NOVELTY_THRESHOLD) -> None:
        """novelty_threshold: distance (1 − cosine) to every domain beyond which a request is an outlier."""
        self._clusters = OnlineClusters(max_clusters=max_domains, novelty_threshold=novelty_threshold)
        self._domains: dict[str, _Domain] = {}
        self._mix = MixShiftDetector()
        self._tested: deque[tuple[str, Tensor]] = deque()
        """The label, or UNKNOWN, and the embedding of each request in `_mix`."""
        self._domain_of_request: OrderedDict[str, str] = OrderedDict()
        self._num_requests = 0
        self._next_id = 1
        self.num_shifts = 0

    @property
    def domains(self) -> dict[str, float]:
        """Share of each domain in the latest requests."""
        shares = self._mix.shares
        return {name: shares.get(name, 0.0) for name in self._domains}

    @property
    def unknown_share(self) -> float:
        """Share of the latest requests without a domain."""
        return self._mix.shares.get(UNKNOWN, 0.0)

    @property
    def num_requests(self) -> int:
        """Requests with a prompt so far, those before a restart included."""
        return self._num_requests

    @property
    def num_founded(self) -> int:
        """Domains founded since this object was made."""
        return self._clusters.num_founded

    def reserve_names(self, names: Iterable[str]) -> None:
        """Give new domains higher numbers than these names have, which may be missing in a state saved earlier."""
        numbers = [name.removeprefix(AUTO_PREFIX) for name in names if name.startswith(AUTO_PREFIX)]
        self._next_id = max([self._next_id, *(1 + int(number) for number in numbers if number.isdecimal())])

    def centroids(self) -> Centroids | None:
        """The domains as they are now, for assigning requests elsewhere; None while there are none."""
        return self._clusters.centroids()

    def assign(self, trace: Trace) -> DomainAssignment:
        """The domain of a trace. The detector learns from a request's first segment; later ones have its domain."""
        x_E = prompt_embedding(trace)
        if x_E is None:
            # Of a request of whose prompt too little was seen, such as one behind another server's prefix cache.
            label = client_label(trace.domain)
            label = label if label in self._domains else UNKNOWN
            return DomainAssignment(domain=self._domain_of_request.get(trace.request_id, label))
        cluster = self._assign_cluster(trace, x_E)
        name = cluster.name or UNKNOWN
        self._num_requests += 1
        self._domain_of_request[trace.request_id] = name
        if len(self._domain_of_request) > _REMEMBERED_REQUESTS:
            self._domain_of_request.popitem(last=False)
        shift = self._detect_shift(name, trace, x_E)
        self.num_shifts += shift is not None
        return DomainAssignment(
            domain=name,
            founded_novelty=cluster.founded_novelty,
            shift=shift,
            merged=cluster.merged,
        )

    def _assign_cluster(self, trace: Trace, x_E: Tensor) -> ClusterAssignment:
        new_name = f"{AUTO_PREFIX}{self._next_id}"
        cluster = self._clusters.assign(x_E, new_name=new_name, fixed_name=client_label(trace.domain) or None)
        if cluster.merged is not None:
            removed, kept = cluster.merged
            del self._domains[removed]
            for request_id, name in self._domain_of_request.items():
                if name == removed:
                    self._domain_of_request[request_id] = kept
        if cluster.name is not None and cluster.founded_novelty:
            self._next_id += cluster.name == new_name
            self._domains[cluster.name] = _Domain(founded_at=self._num_requests, novelty=cluster.founded_novelty)
            self._name_anew()
        return cluster

    def _detect_shift(self, name: str, trace: Trace, x_E: Tensor) -> Shift | None:
        self._mix.add(name)
        self._tested.append((client_label(trace.domain), x_E))
        self._forget_untested()
        if self._mix.has_changed:
            grown = self._mix.start_anew()
            self._forget_untested()
            for domain in self._domains.values():
                domain.acceptance.start_anew()
            return Shift(cause="mix", domain=grown, novelty=self._novelty_of_shift_to(grown))
        rate = acceptance_rate(trace)
        if name == UNKNOWN or rate is None:
            return None
        drop = self._domains[name].acceptance.update(rate)
        return Shift(cause="acceptance", domain=name, novelty=drop) if drop else None

    def _forget_untested(self) -> None:
        while len(self._tested) > len(self._mix.domains):
            self._tested.popleft()

    def _name_anew(self) -> None:
        """Give all requests of the mix the domains that they would have now.

        Otherwise a domain that is founded, or merged, while traffic stays the same would look like new traffic.
        """
        if not self._tested:
            return
        names = self._clusters.names_of(torch.stack([x_E for _, x_E in self._tested]))
        labels = (label if label in self._domains else UNKNOWN for label, _ in self._tested)
        self._mix.domains = [label or name or UNKNOWN for label, name in zip(labels, names, strict=True)]

    def _novelty_of_shift_to(self, name: str) -> float:
        if name == UNKNOWN:  # many requests that belong to no cluster
            return 1.0
        domain = self._domains[name]
        return domain.novelty if self._num_requests - domain.founded_at <= _NEW_FOR_REQUESTS else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain numbers and strings. "recency" tells of which mean of prompts the embeddings are."""
        return {
            "recency": RECENCY,
            "clusters": self._clusters.state_dict(),
            "mix": list(self._mix.domains),
            "tested_labels": [label for label, _ in self._tested],
            "tested": torch.stack([x_E for _, x_E in self._tested]) if self._tested else torch.zeros(0, 0),
            "domain_of_request": dict(self._domain_of_request),
            "num_requests": self._num_requests,
            "next_id": self._next_id,
            "num_shifts": self.num_shifts,
            "domains": {
                name: {**vars(domain), "acceptance": domain.acceptance.state_dict()}
                for name, domain in self._domains.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, whose "recency" must be RECENCY."""
        self._clusters.load_state_dict(state["clusters"])
        self._mix.domains = list(state["mix"])
        self._tested = deque(zip(state["tested_labels"], state["tested"], strict=True))
        self._domain_of_request = OrderedDict(state["domain_of_request"])
        self._num_requests, self._next_id = state["num_requests"], state["next_id"]
        self.num_shifts = state["num_shifts"]
        self._domains = {}
        for name, of_domain in state["domains"].items():
            domain = _Domain(founded_at=of_domain["founded_at"], novelty=of_domain["novelty"])
            domain.acceptance.load_state_dict(of_domain["acceptance"])
            self._domains[name] = domain


def prompt_embedding(trace: Trace) -> Tensor | None:
    """The embedding of a trace's prompt [E], fp32 (`pool_prompt`).

    None if that has none, in later segments, and where only few of its last positions were seen.
    """
    if trace.first_position:
        is_first = trace.first_position + trace.answer_start == trace.prompt_length
        if not is_first or trace.answer_start < _MIN_SEEN:
            return None
    return pool_prompt(trace.aux_T3H, trace.answer_start)


def acceptance_rate(trace: Trace) -> float | None:
    """Share of accepted ones among the draft's verified proposals; None if there are none.

    Proposals after a rejected one are not verified: how many there are depends on how busy the server is. In a replay,
    rounds of the draft that was recorded have a version below 0: they say nothing of the draft that is served.
    """
    is_drafted_R = (trace.source_R == Source.DRAFT) & (trace.round_version_R >= 0)
    proposed_R, accepted_R = trace.num_proposed_R[is_drafted_R], trace.num_accepted_R[is_drafted_R]
    accepted, rejected = int(accepted_R.sum()), int((accepted_R < proposed_R).sum())
    return accepted / (accepted + rejected) if accepted + rejected else None
