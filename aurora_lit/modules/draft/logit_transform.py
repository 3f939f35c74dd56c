"""What a target's head does to the product of its weight and a hidden state: a bias (Phi), a soft cap (Gemma 2).

Left out: the product itself. Shapes: N rows, V tokens, whole vocabulary or part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """From weight · hidden to logits."""

    bias_V: Tensor | None = None
    """fp32. Added to each token's logit."""
    softcap: float | None = None
    """Logits become softcap · tanh(logit / softcap)."""

    @property
    def is_identity(self) -> bool:
        """Whether products are logits already."""
        return self.bias_V is None and self.softcap is None

    def __call__(self, products_NV: Tensor) -> Tensor:
        """Logits of all V tokens."""
        if self.bias_V is not None:
            products_NV = products_NV + self.bias_V.to(products_NV)
        return self.capped(products_NV)

    def of_tokens(self, products: Tensor, index: Tensor) -> Tensor:
        """Logits of one token each; `index` says which, in the order of V, in any shape."""
        if self.bias_V is not None:
            products = products + self.bias_V.to(products)[index]
        return self.capped(products)

    def capped(self, logits: Tensor) -> Tensor:
        """The soft cap alone."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def rows(self, token_ids: Tensor) -> LogitTransform:
        """The same for some tokens."""
        bias_V = self.bias_V
        return LogitTransform(
            bias_V=None if bias_V is None else bias_V[token_ids.to(bias_V.device)], softcap=self.softcap
        )


LINEAR = LogitTransform()
"""Most heads: the product is the logit."""
