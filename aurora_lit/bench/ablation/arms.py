"""The arms of an ablation: what each leaves out of the learner that the settings describe.

static        the starting draft
kl            KL on live tokens and nothing else, as in online distillation (Liu et al., arXiv 2310.07177): no domains,
              no replay, no gate, no averaging, a constant rate: 0.3 of learn.learning_rate, which averaging allows
lk            the same with the acceptance loss
ppo           the same with the policy loss alone
full          what the settings say
full-without-detector, full-without-replay, full-without-ppo, full-without-gate, full-without-averaging,
full-without-vocabulary
full-uniform  traces of a batch are drawn at random, not by what they can teach

What is left out: running them (bench/ablation/run.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError

_Changes = dict[str, dict[str, Any]]
"""To the settings, by section."""

STATIC = "static"
_NO_PPO: _Changes = {"learn": {"ppo_weight": 0.0}, "engine": {"explore_share": 0.0}, "schedule": {"explore_share": 0.0}}
_NO_DETECTOR: _Changes = {"domain": {"detect": False}}
_NO_REPLAY: _Changes = {"learn": {"replay_share": 0.0}}
_NO_AVERAGING: _Changes = {"learn": {"ema_decay": 0.0}}
_BARE: list[_Changes] = [_NO_DETECTOR, _NO_REPLAY, _NO_AVERAGING, {"schedule": {"min_lr_factor": 1.0}}]
_BARE_RATE = 0.3


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One learner."""

    name: str
    changes: Sequence[_Changes] = ()
    rate_factor: float = 1.0
    """Of learn.learning_rate."""
    gated: bool = True
    """A draft serves only if the gate lets it pass."""

    def settings(self, config: AuroraConfig, *, seed: int) -> AuroraConfig:
        """Of this arm."""
        learn = {"seed": seed, "learning_rate": config.learn.learning_rate * self.rate_factor}
        for change in [*self.changes, {"learn": learn}]:
            config = replace(
                config, **{name: replace(getattr(config, name), **fields) for name, fields in change.items()}
            )
        return config


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name=STATIC, changes=[_NO_PPO]),
        Arm(name="kl", changes=[*_BARE, _NO_PPO, {"learn": {"base_loss": "kl"}}], rate_factor=_BARE_RATE, gated=False),
        Arm(name="lk", changes=[*_BARE, _NO_PPO], rate_factor=_BARE_RATE, gated=False),
        Arm(name="ppo", changes=[*_BARE, {"learn": {"base_loss": "none"}}], rate_factor=_BARE_RATE, gated=False),
        Arm(name="full"),
        Arm(name="full-without-detector", changes=[_NO_DETECTOR]),
        Arm(name="full-without-replay", changes=[_NO_REPLAY]),
        Arm(name="full-without-ppo", changes=[_NO_PPO]),
        Arm(name="full-without-gate", gated=False),
        Arm(name="full-without-averaging", changes=[_NO_AVERAGING]),
        Arm(name="full-without-vocabulary", changes=[{"learn": {"adapt_vocabulary": False}}]),
        Arm(name="full-uniform", changes=[{"learn": {"trace_selection": "uniform"}}]),
    )
}


def arms_of(names: Sequence[str]) -> list[Arm]:
    """Raises ConfigError for a name that is none."""
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"--arms {name}: there is no such arm; use some of {','.join(ARMS)}")
    return [ARMS[name] for name in dict.fromkeys(names)]
