"""The arms of an ablation: what is compared, each a change of the settings.

static        the starting draft, without learning and memory
memory        the same with the traffic memory
full          the learner with the settings unchanged, without memory
both          the settings unchanged: learner and memory
kl            KL on live tokens only, as in online distillation (Liu et al., arXiv 2310.07177): no domains, no replay,
              no gate, no averaging, and a constant rate of 0.3 learn.learning_rate (none of these lowers it)
lk            the same with the acceptance loss
ppo           the same with the policy loss only, and a tenth of the rounds exploring
full-without-detector, full-without-replay, full-without-gate: the learner without that part
full-with-averaging: a running average of the weights is tried and published
full-with-ppo a tenth of the rounds explores, and the policy loss learns from them
full-uniform  batches take a random choice of traces instead of the most informative ones

All arms copy from earlier in a request where engine.lookup says so, as a server does; only memory and both copy from
earlier requests. So memory against static, and both against full, tell what the memory is worth, and full against
static, and both against memory, what the learner is.

Leaves out running them (bench/ablation/run.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError

_Changes = dict[str, dict[str, Any]]
"""Changed settings by section and key."""

STATIC = "static"
_PPO: _Changes = {"engine": {"explore_share": 0.1}}
_NO_PPO: _Changes = {"learn": {"ppo_weight": 0.0}, "engine": {"explore_share": 0.0}, "schedule": {"explore_share": 0.0}}
_NO_DETECTOR: _Changes = {"domain": {"detect": False}}
_NO_REPLAY: _Changes = {"learn": {"replay_share": 0.0}}
_NO_AVERAGING: _Changes = {"learn": {"ema_decay": 0.0}}
_AVERAGING: _Changes = {"learn": {"ema_decay": 0.9}}
_NO_MEMORY: _Changes = {"memory": {"capacity_mb": 0}}
_ONLINE_ONLY: list[_Changes] = [_NO_DETECTOR, _NO_REPLAY, _NO_AVERAGING, {"schedule": {"min_lr_factor": 1.0}}]
_ONLINE_ONLY_RATE = 0.3


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of what is compared, as changes of the settings."""

    name: str
    changes: Sequence[_Changes] = ()
    rate_factor: float = 1.0
    """Factor of learn.learning_rate."""
    gated: bool = True
    """True if a draft is published only if it passes the gate."""
    learns: bool = True
    """False: the starting draft is served throughout."""
    remembers: bool = False
    """True if earlier answers are copied from."""

    def settings(self, config: AuroraConfig, *, seed: int) -> AuroraConfig:
        """The settings of this arm."""
        learn = {"seed": seed, "learning_rate": config.learn.learning_rate * self.rate_factor}
        for change in [*self.changes, {"learn": learn}, *([] if self.remembers else [_NO_MEMORY])]:
            config = replace(
                config, **{name: replace(getattr(config, name), **fields) for name, fields in change.items()}
            )
        return config


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name=STATIC, changes=[_NO_PPO], learns=False),
        Arm(name="memory", changes=[_NO_PPO], learns=False, remembers=True),
        Arm(
            name="kl",
            changes=[*_ONLINE_ONLY, _NO_PPO, {"learn": {"base_loss": "kl"}}],
            rate_factor=_ONLINE_ONLY_RATE,
            gated=False,
        ),
        Arm(name="lk", changes=[*_ONLINE_ONLY, _NO_PPO], rate_factor=_ONLINE_ONLY_RATE, gated=False),
        Arm(
            name="ppo",
            changes=[*_ONLINE_ONLY, _PPO, {"learn": {"base_loss": "none"}}],
            rate_factor=_ONLINE_ONLY_RATE,
            gated=False,
        ),
        Arm(name="full"),
        Arm(name="both", remembers=True),
        Arm(name="full-without-detector", changes=[_NO_DETECTOR]),
        Arm(name="full-without-replay", changes=[_NO_REPLAY]),
        Arm(name="full-with-ppo", changes=[_PPO]),
        Arm(name="full-without-gate", gated=False),
        Arm(name="full-with-averaging", changes=[_AVERAGING]),
        Arm(name="full-uniform", changes=[{"learn": {"trace_selection": "uniform"}}]),
    )
}


def arms_named(names: Sequence[str]) -> list[Arm]:
    """The arms with these names, each once. Raises ConfigError for an unknown name."""
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"--arms {name}: there is no such arm; use some of {','.join(ARMS)}")
    return [ARMS[name] for name in dict.fromkeys(names)]
