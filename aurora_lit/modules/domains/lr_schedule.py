"""The domain-aware learning-rate schedule: a high rate for domains that are new to the draft, a low one for known ones.

Every domain has a heat h in [0, 1], an estimate of how much is left to learn in it: its novelty when it was founded,
times exp(−tokens learned in it since / decay_tokens). A shift raises a domain's heat to the shift's novelty and never
lowers it; a domain that returns has the heat that it left with. The heat of a step is the mean over the domains of the
last few steps' live traffic, and the learning rate is

    base_lr · backoff · min(1, (step + 1) / warmup_steps) · (min_lr_factor + (1 − min_lr_factor) · heat)

So two interleaved domains cool separately, and replay cools its domain without changing the rate. backoff starts at 1
and is halved when several drafts in a row are rejected by the gate, which indicates that the rate is too high. It is at
least the heat of what is new when heat is raised: rejected drafts tell nothing about other traffic.

Leaves out which domains there are and when traffic shifts (modules/domains/detector.py).

    schedule = DomainAwareLR(optimizer, warmup_steps=8, min_lr_factor=0.2, decay_tokens=20_000)
    schedule.shift_to("code")                   # changes state only; the next step() applies it
    schedule.raise_heat("code", 0.9)
    schedule.count_tokens({"code": 900, "chat": 100}, live={"code": 500})
    schedule.step()

Like any scheduler it is saved by `state_dict`, of plain numbers and strings. With several processes, all of them must
make the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

WARMUP_STEPS = 8
"""Optimiser steps in which the rate of a learner rises: at first, after a rollback, and when learning goes back to the
served draft."""
MIN_LR_FACTOR = 0.2
"""A learner's factor at heat 0."""
DECAY_TOKENS = 20_000
"""Tokens that a learner learns in a domain, replay included, after which its heat is 1/e."""
_TRAFFIC_STEPS = 4
"""Memory of the traffic's shares, in steps: a single batch has few requests."""
_MIN_BACKOFF = 1 / 8
"""In steady traffic of which nothing is left to learn, drafts are refused for ever; what changes in it without a shift
is still learned then."""
_SETTINGS = ("base_lrs", "warmup_steps", "min_lr_factor", "decay_tokens")
MAX_DOMAINS = 256
"""Domains whose heat is remembered. Beyond them, the one that was not learned from for longest is forgotten."""


class DomainAwareLR(LRScheduler):
    """See the file's docstring. The rate depends on base_lrs and the schedule's state, not on the previous rate."""

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int, min_lr_factor: float, decay_tokens: float) -> None:
        """min_lr_factor: factor at heat 0. decay_tokens: learned tokens in which a domain's heat falls to 1/e."""
        self.warmup_steps, self.min_lr_factor, self.decay_tokens = warmup_steps, min_lr_factor, decay_tokens
        self.raised_heat: dict[str, float] = {}
        """Each domain's heat when it was last raised, in the order in which domains were last learned from."""
        self.tokens_since: dict[str, float] = {}
        """Tokens learned in each domain since then."""
        self.live_share: dict[str, float] = {}
        """Share of each domain in the live traffic of the last steps."""
        self.backoff = 1.0
        super().__init__(optimizer)

    def heat_of(self, domain: str) -> float:
        """The heat of a domain, 0 to 1; 1 for an unknown one."""
        return self.raised_heat.get(domain, 1.0) * math.exp(-self.tokens_since.get(domain, 0.0) / self.decay_tokens)

    @property
    def heat(self) -> float:
        """Mean heat of the live traffic; 1 before the first step."""
        total = sum(self.live_share.values())
        weighted = sum(share * self.heat_of(domain) for domain, share in self.live_share.items())
        return weighted / total if total else 1.0

    @property
    def factor(self) -> float:
        """The learning rate divided by base_lr."""
        warmup = min(1.0, (self.last_epoch + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.backoff * warmup * (self.min_lr_factor + (1 - self.min_lr_factor) * self.heat)

    def raise_heat(self, domain: str, novelty: float) -> None:
        """Raise a domain's heat to a novelty in [0, 1], unless it is higher already."""
        if domain not in self.raised_heat or novelty > self.heat_of(domain):
            self.raised_heat[domain], self.tokens_since[domain] = min(1.0, novelty), 0.0
            self.backoff = max(self.backoff, self.raised_heat[domain])

    def shift_to(self, domain: str) -> None:
        """Note that traffic has shifted to a domain: earlier traffic no longer counts for the rate."""
        self.live_share = {domain: 1.0}

    def count_tokens(self, tokens: Mapping[str, float], *, live: Mapping[str, float]) -> None:
        """Count the tokens that a step learns from, by domain; call before `step`. `live`: those of live traffic."""
        for domain, count in tokens.items():
            self.raised_heat[domain] = self.raised_heat.pop(domain, 1.0)
            self.tokens_since[domain] = self.tokens_since.get(domain, 0.0) + count
        for domain in list(self.raised_heat)[: max(0, len(self.raised_heat) - MAX_DOMAINS)]:
            del self.raised_heat[domain], self.tokens_since[domain]
        total = sum(live.values())
        if total > 0:
            rate = 1 / _TRAFFIC_STEPS if self.live_share else 1.0
            kept = {domain: share * (1 - rate) for domain, share in self.live_share.items() if share > 1e-4}
            self.live_share = {
                domain: kept.get(domain, 0.0) + rate * live.get(domain, 0.0) / total
                for domain in sorted(kept.keys() | live.keys())
            }

    def back_off(self) -> None:
        """Halve the rate from the next step on."""
        self.backoff = max(_MIN_BACKOFF, self.backoff / 2)

    def recover(self) -> None:
        """Double the rate from the next step on, up to what it is without back-off."""
        self.backoff = min(1.0, self.backoff * 2)

    def continue_from(self, other: DomainAwareLR) -> None:
        """Copy another schedule's heat, shares and back-off; the warm-up starts anew."""
        self.raised_heat, self.tokens_since = dict(other.raised_heat), dict(other.tokens_since)
        self.live_share = dict(other.live_share)
        self.backoff = other.backoff

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; the settings stay those of this object.

        The rate is that of before, which a shift since the last step has not changed yet, unless its base has changed.
        """
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in _SETTINGS})
        if list(state_dict["base_lrs"]) != list(self.base_lrs):
            self._last_lr = self.get_lr()
        for group, base_lr, lr in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base_lr, lr

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group."""
        return [base_lr * self.factor for base_lr in self.base_lrs]
