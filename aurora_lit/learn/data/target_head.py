"""The target without its layers: input embedding and output head, which is all that training a draft needs of it.

Leaves out loading the target (models/loading.py).

Shapes: N rows, C rows of a chunk, D draft vocabulary, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_lit.learn.training_precision import training_dtype
from aurora_lit.models.interface import WholeTarget, head_rows
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.sampling.distribution import GREEDY_BELOW


class TargetHead:
    """Embedding, head and shape of a target whose layers are no longer needed.

    Both stay as the target has them. Packed ones may be mapped files (`load_target(…, mapped=True)`), of which training
    reads few rows.

    >>> target_head = TargetHead(load_target(folder, precision="bf16"))
    >>> target_head.log_sum_exp(last_NH, temperature=0.7)
    """

    def __init__(self, target: WholeTarget) -> None:
        self.vocab_size, self.hidden_size = target.vocab_size, target.hidden_size
        self.aux_layer_ids = target.aux_layer_ids
        self.logit_transform = target.logit_transform
        self._head, self._embedding, self._hidden_dtype = target.head, target.embedding, target.hidden_dtype
        self._device = target.device
        self._dtype = torch.float32 if target.kv_dtype == torch.float32 else training_dtype()
        self._rows: tuple[Tensor, Tensor] | None = None

    def rows(self, ids_D: Tensor) -> Tensor:
        """The head's rows of a draft vocabulary [D, H]; for the same one as last time the same tensor."""
        if self._rows is None or not (self._rows[0].device == ids_D.device and torch.equal(self._rows[0], ids_D)):
            self._rows = ids_D, head_rows(self._head, ids_D.to(self._device)).to(ids_D.device, self._dtype)
        return self._rows[1]

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] as the target's layers receive them [..., H], on the ids' device."""
        embeds: Tensor = self._embedding(ids.to(self._device))
        return embeds.to(ids.device, self._dtype)

    def install_head(self, module: DraftModule) -> None:
        """Give a module the head's rows of the vocabulary that its draft has now."""
        ids_D = module.draft.draft_token_ids
        module.head_VdH = self.rows(ids_D)
        module.logit_transform = self.logit_transform.select(ids_D)

    @torch.no_grad()
    def log_sum_exp(self, last_NH: Tensor, *, temperature: float = 0.0, chunk: int = 64) -> Tensor:
        """Of the logits divided by the temperature, over the whole vocabulary [N], fp32 on the CPU; 0: divided by 1.

        last_NH: the target's last hidden states. chunk: positions computed together, few enough that their logits
        [chunk, V] stay in the processor's cache. Each chunk reads the whole head, so one call with many rows is much
        cheaper than many with few.
        """
        lse_N = torch.empty(len(last_NH))
        divisor = temperature if temperature >= GREEDY_BELOW else 1.0
        for start in range(0, len(last_NH), chunk):
            rows = slice(start, start + chunk)
            last_CH = last_NH[rows].to(self._device, self._hidden_dtype)
            logits_CV = self.logit_transform.apply_softcap(self._head(last_CH).float())
            lse_N[rows] = (logits_CV if divisor == 1 else logits_CV / divisor).logsumexp(-1).cpu()
        return lse_N
