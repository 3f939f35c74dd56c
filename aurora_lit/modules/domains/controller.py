"""How learning answers to domains: places traces, keeps the schedules' heat, and says what that asks for.

Joins the detector (modules/domains/detector.py) and the schedules (modules/domains/lr_schedule.py); has no rule of its own.

    steering = DomainController(detector, signals=signals, warmup_steps=8, min_lr_factor=0.3, decay_tokens=100_000)
    schedules = steering.schedules_for(optimizers)
    trace = steering.place(trace)               # its domain is now the detector's
    steering.learned(batch)                     # before the schedules' step()
    steering.signal.replay_share
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from aurora_lit.modules.domains.detector import UNKNOWN, DomainDetector, Placement, Shift
from aurora_lit.modules.domains.lr_schedule import DomainAwareLR, DomainSignal, SignalRange
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.traces.record import Trace


class DomainController:
    """See the file's docstring."""

    def __init__(
        self,
        detector: DomainDetector | None,
        *,
        signals: SignalRange,
        warmup_steps: int,
        min_lr_factor: float,
        decay_tokens: float,
        max_labels: int = 16,
    ) -> None:
        """`detector` None: domains are what clients call them, the first `max_labels` names that come, and no shift is
        noticed."""
        self.detector = detector
        self._labels: dict[str, None] = {}
        self._max_labels = max_labels
        self.num_labels_dropped = 0
        """Traces whose client's label was not kept, since this object was made."""
        self._signals = signals
        self._warmup_steps, self._min_lr_factor, self._decay_tokens = warmup_steps, min_lr_factor, decay_tokens
        self._schedules: list[DomainAwareLR] = []
        self.last_shift: Shift | None = None

    def schedules_for(self, optimizers: Sequence[Optimizer]) -> list[DomainAwareLR]:
        """Schedules for new optimizers, in the place of any before; what those knew of domains stays known."""
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

    def place(self, trace: Trace) -> Trace:
        """The trace with its domain; founding and shifts heat the schedules."""
        placement = Placement(domain=self._known_label(trace.domain))
        if self.detector is not None:
            placement = self.detector.place(trace)
        self.num_labels_dropped += trace.domain not in (UNKNOWN, placement.domain)
        if placement.founded:
            self._heat(placement.domain, placement.founded)
        if placement.shift is not None:
            self.last_shift = placement.shift
            self._heat(placement.shift.domain, placement.shift.novelty)
            if placement.shift.cause == "mix":
                for schedule in self._schedules:
                    schedule.came(placement.shift.domain)
        return trace if placement.domain == trace.domain else replace(trace, domain=placement.domain)

    def learned(self, batch: OnlineBatch) -> None:
        """Tell the schedules what the step that is being taken learns from."""
        tokens: Counter[str] = Counter()
        traffic: Counter[str] = Counter()
        counts_B = (batch.traces.weight_BT > 0).sum(1).tolist()
        for domain, count, live in zip(batch.traces.domains, counts_B, batch.live_B.tolist(), strict=True):
            tokens[domain] += count
            if live:
                traffic[domain] += count
        for schedule in self._schedules:
            schedule.learned(tokens, traffic=traffic)

    @property
    def heat(self) -> float:
        """What is left to learn of the traffic, 0 to 1."""
        return self._schedules[0].heat

    @property
    def factor(self) -> float:
        """Of the learning rate."""
        return self._schedules[0].factor

    @property
    def signal(self) -> DomainSignal:
        """What the heat asks for."""
        return self._signals.at(self.heat)

    @property
    def num_shifts(self) -> int:
        """Shifts noticed, before a restart too."""
        return self.detector.num_shifts if self.detector is not None else 0

    def describe(self) -> str:
        """The latest requests' domains and their heat, in words: `auto-1: def, return, int 62% (heat 0.13), chat …`."""
        shares = self._schedules[0].share
        if self.detector is not None:
            shares = self.detector.domains | {UNKNOWN: self.detector.unknown_share}
        present = sorted(((share, name) for name, share in shares.items() if share >= 0.01), reverse=True)
        heat_of = self._schedules[0].heat_of
        return ", ".join(f"{name or 'unknown'} {share:.0%} (heat {heat_of(name):.2f})" for share, name in present)

    def state_dict(self) -> dict[str, Any]:
        """The detector's, or the labels known without one; schedules are saved with their optimizers."""
        return self.detector.state_dict() if self.detector is not None else {"labels": list(self._labels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a detector takes nothing from a learner that had none."""
        if self.detector is None:
            self._labels = dict.fromkeys(state.get("labels", ()))
        elif "clusters" in state:
            self.detector.load_state_dict(state)

    def _known_label(self, label: str) -> str:
        """The label, while there is room for it."""
        if label != UNKNOWN and len(self._labels) < self._max_labels:
            self._labels.setdefault(label)
        return label if label in self._labels else UNKNOWN

    def _heat(self, domain: str, novelty: float) -> None:
        for schedule in self._schedules:
            schedule.raise_heat(domain, novelty)
