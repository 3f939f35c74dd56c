"""How a target's LM head turns products into logits: a bias (Phi), a soft cap (Gemma 2), or nothing (most models).

A product is the inner product of a row of the head's weight with a hidden state. Leaves out that product itself.

Shapes: N positions, V tokens, the whole vocabulary or a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """From products to logits: logit = softcap · tanh((product + bias) / softcap)."""

    bias_V: Tensor | None = None
    """fp32. None: no bias."""
    softcap: float | None = None
    """None: no cap."""

    @property
    def is_identity(self) -> bool:
        """True if products are logits already."""
        return self.bias_V is None and self.softcap is None

    def __call__(self, products_NV: Tensor) -> Tensor:
        """Logits of all V tokens."""
        if self.bias_V is not None:
            products_NV = products_NV + self.bias_V.to(products_NV)
        return self.apply_softcap(products_NV)

    def apply_softcap(self, logits: Tensor) -> Tensor:
        """The soft cap alone; the logits themselves if there is none."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def select(self, token_ids: Tensor) -> LogitTransform:
        """The transform of some tokens, for a part of the vocabulary."""
        bias_V = self.bias_V
        return LogitTransform(
            bias_V=None if bias_V is None else bias_V[token_ids.to(bias_V.device)], softcap=self.softcap
        )


IDENTITY = LogitTransform()
"""Products are logits."""
