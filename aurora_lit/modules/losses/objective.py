"""The terms of the draft's loss: their weights, and what a step reports of them.

Leaves out computing them (modules/losses/draft_module.py).

Shapes: B traces, T positions, K steps, N = B·T rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from aurora_lit.modules.losses.lk import LKStats

BaseLoss = Literal["lk", "kl"]
""""lk": the LK loss. "kl": KL alone in its place."""


@dataclass(frozen=True, kw_only=True)
class OnlineWeights:
    """The online loss: LK(live) + β·LK(replay) + c_v·value."""

    base_loss: BaseLoss = "lk"
    ppo: bool = False
    """True: PPO takes the place of LK's 1 − α (modules/losses/ppo.py)."""
    replay_weight: float = 1.0
    """β."""
    fewest_live: int = 1
    """LK(live) is a sum over live positions divided by their number, or by this one if there are fewer, so that a few
    do not outweigh all that is replayed."""
    certain_survival: float = 1.0
    """A chain that is accepted so far with a smaller probability S goes on with the probability S / certain_survival,
    and then counts by certain_survival instead of S. 0: every chain goes on, and counts by S."""
    sampled_tokens: int = 2048
    """Tokens of the draft vocabulary over which a batch's loss is computed, about. As many as it has: all."""


@dataclass(frozen=True, kw_only=True)
class OnlineReport:
    """Loss and statistics of one batch, and each term of its loss; scalars.

    Rows of the statistics are target positions of each draft step.
    """

    loss: torch.Tensor
    """With gradient."""
    stats: LKStats
    """Shapes [K, N]; 0 for rows without weight."""
    mask_KBT: torch.Tensor
    """1 where the step has a target that counts, else 0."""
    lk_live: torch.Tensor
    """Mean over the live positions, however few."""
    lk_replay: torch.Tensor
    value_loss: torch.Tensor
    tested_K: torch.Tensor
    """As in `OnlineBatch`."""
    accepted_K: torch.Tensor
