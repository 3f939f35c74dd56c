"""How learning responds to domains: assigns traces, and updates the schedules' heat.

It connects the detector (modules/domains/detector.py) with the schedules (modules/domains/lr_schedule.py), which hold
the rules.

    controller = DomainController(detector, warmup_steps=8, min_lr_factor=0.2, decay_tokens=20_000)
    schedules = controller.schedules_for(optimizers)
    trace = controller.assign_domain(trace)     # its domain is now the detector's
    controller.record_batch(batch)              # before the schedules' step()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from aurora_lit.modules.domains.centroids import RECENCY, UNKNOWN
from aurora_lit.modules.domains.clusters import MAX_CLUSTERS, UNUSED_REQUESTS
from aurora_lit.modules.domains.detector import DomainAssignment, DomainDetector, Shift
from aurora_lit.modules.domains.lr_schedule import DomainAwareLR
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.traces.record import Trace


class DomainController:
    """See the file's docstring."""

    def __init__(
        self,
        detector: DomainDetector | None,
        *,
        warmup_steps: int,
        min_lr_factor: float,
        decay_tokens: float,
        max_labels: int = MAX_CLUSTERS,
    ) -> None:
        """Arguments of the schedules are those of `DomainAwareLR`.

        Args:
            detector: None: domains are the clients' labels, and no shift is detected.
            warmup_steps: of the schedules.
            min_lr_factor: of the schedules.
            decay_tokens: of the schedules.
            max_labels: labels that are kept without a detector. A new one may take the place of one that has long been
                unused.
        """
        self.detector = detector
        self._labels: dict[str, int] = {}
        """The number of traces at each label's last one, in this order."""
        self._num_traces = 0
        self._max_labels = max_labels
        self.on_merge: Callable[[str, str], None] = lambda removed, kept: None
        """Called when a domain went into another one: what has its name has that one's from now on."""
        self.on_raised_heat: Callable[[], None] = lambda: None
        """Called when a domain was founded or traffic has shifted."""
        self.num_labels_dropped = 0
        """Traces whose label was not kept, since this object was made."""
        self._warmup_steps, self._min_lr_factor, self._decay_tokens = warmup_steps, min_lr_factor, decay_tokens
        self._schedules: list[DomainAwareLR] = []
        self.last_shift: Shift | None = None

    def schedules_for(self, optimizers: Sequence[Optimizer]) -> list[DomainAwareLR]:
        """Make the schedules of new optimizers. They replace the ones before and continue with their heat."""
        schedules = [
            DomainAwareLR(
                optimizer,
                warmup_steps=self._warmup_steps,
                min_lr_factor=self._min_lr_factor,
                decay_tokens=self._decay_tokens,
            )
            for optimizer in optimizers
        ]
        for schedule, before in zip(schedules, self._schedules, strict=False):
            schedule.continue_from(before)
        self._schedules = schedules
        return schedules

    def assign_domain(self, trace: Trace) -> Trace:
        """The trace with its domain. A new domain or a shift raises the schedules' heat."""
        is_new, label = trace.domain not in self._labels, self._known_label(trace.domain)
        assignment = DomainAssignment(domain=label, founded_novelty=float(is_new and label != UNKNOWN))
        if self.detector is not None:
            assignment = self.detector.assign(trace)
        if assignment.merged is not None:
            self.on_merge(*assignment.merged)
        self.num_labels_dropped += trace.domain not in (UNKNOWN, assignment.domain)
        if assignment.founded_novelty:
            self._raise_heat(assignment.domain, assignment.founded_novelty)
        shift = assignment.shift
        if shift is not None:
            self.last_shift = shift
            self._raise_heat(shift.domain, shift.novelty)
            if shift.cause == "mix":
                for schedule in self._schedules:
                    schedule.shift_to(shift.domain)
        return trace if assignment.domain == trace.domain else replace(trace, domain=assignment.domain)

    def record_batch(self, batch: OnlineBatch) -> None:
        """Count, in the schedules, the tokens of the batch that the next step learns from."""
        tokens: Counter[str] = Counter()
        live_tokens: Counter[str] = Counter()
        counts_B = (batch.traces.weight_BT > 0).sum(1).tolist()
        for domain, count, is_live in zip(batch.traces.domains, counts_B, batch.live_B.tolist(), strict=True):
            # Replay of what came before any domain was founded tells nothing about what the detector will not know.
            if is_live or domain != UNKNOWN or self.detector is None:
                tokens[domain] += count
            if is_live:
                live_tokens[domain] += count
        for schedule in self._schedules:
            schedule.count_tokens(tokens, live=live_tokens)

    @property
    def heat(self) -> float:
        """Mean heat of the live traffic, 0 to 1."""
        return self._schedules[0].heat

    @property
    def factor(self) -> float:
        """Factor of the learning rate."""
        return self._schedules[0].factor

    @property
    def num_shifts(self) -> int:
        """Shifts detected, those before a restart included."""
        return self.detector.num_shifts if self.detector is not None else 0

    def describe(self) -> str:
        """The latest requests' domains with their heat, the most frequent first: `auto-1 62% (heat 0.13), chat …`."""
        shares = self._schedules[0].live_share
        if self.detector is not None:
            shares = self.detector.domains | {UNKNOWN: self.detector.unknown_share}
        present = sorted(((share, name) for name, share in shares.items() if share >= 0.01), reverse=True)
        heat_of = self._schedules[0].heat_of
        return ", ".join(f"{name or 'unknown'} {share:.0%} (heat {heat_of(name):.2f})" for share, name in present)

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, or the known labels without one. Schedules are saved with their optimizers."""
        return self.detector.state_dict() if self.detector is not None else {"labels": list(self._labels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        With a detector, a state without one is ignored, and one whose embeddings are another mean of prompts, to which
        new ones are not comparable; without a detector, a state with one.
        """
        if self.detector is None:
            self._labels = dict.fromkeys(state.get("labels", ()), self._num_traces)
        elif state.get("recency") == RECENCY:
            self.detector.load_state_dict(state)

    def _known_label(self, label: str) -> str:
        """The label, if it is known or there is room for it, else UNKNOWN."""
        self._num_traces += 1
        if label == UNKNOWN:
            return UNKNOWN
        if label not in self._labels and len(self._labels) >= self._max_labels:
            oldest, used_at = next(iter(self._labels.items()))
            if self._num_traces - used_at <= UNUSED_REQUESTS:
                return UNKNOWN
            del self._labels[oldest]
        self._labels.pop(label, None)
        self._labels[label] = self._num_traces
        return label

    def _raise_heat(self, domain: str, novelty: float) -> None:
        for schedule in self._schedules:
            schedule.raise_heat(domain, novelty)
        self.on_raised_heat()
