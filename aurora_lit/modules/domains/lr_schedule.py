"""The domain-aware learning-rate schedule: high where there is much left to learn, low where there is little.

Every domain has a heat h = min(1, novelty when it came) · exp(-tokens learned in it since / decay_tokens). A shift
raises a domain's heat to the shift's novelty, never lowers it; a domain that comes back has the heat that it left with.
A step's heat is the mean over the domains of the last few steps' live traffic, and the rate is

    base_lr · backoff · min(1, (step + 1) / warmup_steps) · (min_lr_factor + (1 - min_lr_factor) · heat)

so two interleaved domains cool apart, and replay cools its domain without setting the rate. backoff is 1 until drafts
are refused one after the other, which says that the rate is too high for what is left to gain. The same heat says how
much to explore, to keep the draft's entropy, and to replay (`DomainSignal`). What is left out: who finds domains and
shifts (modules/domains/detector.py).

    schedule = DomainAwareLR(optimizer, warmup_steps=8, min_lr_factor=0.3, decay_tokens=100_000)
    schedule.came("code")                       # state only; the next step() applies it
    schedule.raise_heat("code", 0.9)
    schedule.learned({"code": 900, "chat": 100}, traffic={"code": 500})
    schedule.step()

Like any scheduler it is saved by `state_dict`, of plain numbers and strings. Over several processes, tell all of them
the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_TRAFFIC_STEPS = 4
"""Memory of the traffic's shares, in steps: a single batch holds few requests."""
_LEAST_BACKOFF = 1 / 64
MAX_DOMAINS = 256
"""Domains whose heat is remembered; beyond them, the one not learned from for longest is forgotten."""


class DomainAwareLR(LRScheduler):
    """See the file's docstring. Its rate depends on base_lrs and its state alone, not on the rate before."""

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int, min_lr_factor: float, decay_tokens: float) -> None:
        """min_lr_factor: factor where nothing is left to learn. decay_tokens: tokens in which a domain's heat falls to 1/e."""
        self.warmup_steps, self.min_lr_factor, self.decay_tokens = warmup_steps, min_lr_factor, decay_tokens
        self.heat_then: dict[str, float] = {}
        """Heat of each domain when it was last raised; the one learned from last stands last."""
        self.tokens_since: dict[str, float] = {}
        """Tokens learned in it since then."""
        self.share: dict[str, float] = {}
        """Of each domain in the live traffic of the last steps."""
        self.backoff = 1.0
        """What refused drafts have left of the rate."""
        super().__init__(optimizer)

    def heat_of(self, domain: str) -> float:
        """What is left to learn in a domain, 0 to 1; 1 for one never heard of."""
        return self.heat_then.get(domain, 1.0) * math.exp(-self.tokens_since.get(domain, 0.0) / self.decay_tokens)

    @property
    def heat(self) -> float:
        """Of what is being learned from; 1 before anything is."""
        total = sum(self.share.values())
        return sum(share * self.heat_of(domain) for domain, share in self.share.items()) / total if total else 1.0

    @property
    def factor(self) -> float:
        """By which the base rate is multiplied."""
        warm = min(1.0, (self.last_epoch + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.backoff * warm * (self.min_lr_factor + (1 - self.min_lr_factor) * self.heat)

    def raise_heat(self, domain: str, novelty: float) -> None:
        """So much (0 to 1) of a domain is new to the draft, if not more anyway."""
        if domain not in self.heat_then or novelty > self.heat_of(domain):
            self.heat_then[domain], self.tokens_since[domain] = min(1.0, novelty), 0.0

    def came(self, domain: str) -> None:
        """Traffic has shifted to a domain: what came before no longer counts for the rate."""
        self.share = {domain: 1.0}

    def learned(self, tokens: Mapping[str, float], *, traffic: Mapping[str, float]) -> None:
        """Tokens by domain that a step learns from, and those of them that are live; call before `step`."""
        for domain, count in tokens.items():
            self.heat_then[domain] = self.heat_then.pop(domain, 1.0)
            self.tokens_since[domain] = self.tokens_since.get(domain, 0.0) + count
        for domain in list(self.heat_then)[: max(0, len(self.heat_then) - MAX_DOMAINS)]:
            del self.heat_then[domain], self.tokens_since[domain]
        total = sum(traffic.values())
        if total > 0:
            rate = 1 / _TRAFFIC_STEPS if self.share else 1.0
            kept = {domain: share * (1 - rate) for domain, share in self.share.items() if share > 1e-4}
            self.share = {
                domain: kept.get(domain, 0.0) + rate * traffic.get(domain, 0.0) / total
                for domain in sorted(kept.keys() | traffic.keys())
            }

    def back_off(self) -> None:
        """Half the rate from the next step on."""
        self.backoff = max(_LEAST_BACKOFF, self.backoff / 2)

    def recover(self) -> None:
        """Twice the rate, up to what it was at first."""
        self.backoff = min(1.0, self.backoff * 2)

    def continue_from(self, other: DomainAwareLR) -> None:
        """Know what another schedule knows of domains; the warm-up begins anew."""
        self.heat_then, self.tokens_since = dict(other.heat_then), dict(other.tokens_since)
        self.share = dict(other.share)
        self.backoff = other.backoff

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the optimizer's groups."""
        return [base_lr * self.factor for base_lr in self.base_lrs]


@dataclass(frozen=True, kw_only=True)
class DomainSignal:
    """What a heat asks of serving and of the loss."""

    explore_share: float
    """Share of drafted rounds that should explore."""
    explore_temperature: float
    entropy_weight: float
    replay_share: float
    """Share of a batch that comes from the reservoir."""


@dataclass(frozen=True, kw_only=True)
class SignalRange:
    """The signal with nothing left to learn, and with everything; between them it is linear in heat."""

    cold: DomainSignal
    hot: DomainSignal

    def at(self, heat: float) -> DomainSignal:
        """The signal at a heat, 0 to 1."""
        return DomainSignal(
            **{name: cold + heat * (getattr(self.hot, name) - cold) for name, cold in vars(self.cold).items()}
        )
