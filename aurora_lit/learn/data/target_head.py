"""The target without its layers: input embedding and output head, which is all that training a draft needs of it.

Leaves out loading the target (models/loading.py).

Shapes: N rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aurora_lit.learn.training_precision import training_dtype
from aurora_lit.models.interface import WholeTarget
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.sampling.distribution import GREEDY_BELOW


class TargetHead(nn.Module):
    """Embedding, head and shape of a target whose layers are no longer needed.

    >>> target_head = TargetHead(load_target(folder, precision="bf16"))
    >>> target_head.log_sum_exp(last_NH, temperature=0.7)
    """

    embedding_VH: Tensor
    head_VH: Tensor

    def __init__(self, target: WholeTarget) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = target.vocab_size, target.hidden_size
        self.aux_layer_ids = target.aux_layer_ids
        self.logit_transform = target.logit_transform
        dtype = torch.float32 if target.kv_dtype == torch.float32 else training_dtype()
        head_VH = target.head_rows(torch.arange(target.vocab_size)).to(dtype)
        embedding_VH = target.embedding_rows().to(dtype)
        self.register_buffer("head_VH", head_VH)
        # Many targets have one matrix for both.
        self.register_buffer("embedding_VH", head_VH if torch.equal(embedding_VH, head_VH) else embedding_VH)
        self._rows: tuple[Tensor, Tensor] | None = None

    def rows(self, ids_D: Tensor) -> Tensor:
        """The head's rows of a draft vocabulary [D, H]; for the same one as last time the same tensor."""
        ids_D = ids_D.to(self.head_VH.device)
        if self._rows is None or not (self._rows[0].device == ids_D.device and torch.equal(self._rows[0], ids_D)):
            self._rows = ids_D, self.head_VH[ids_D]
        return self._rows[1]

    def install_head(self, module: DraftModule) -> None:
        """Give a module the head's rows of the vocabulary that its draft has now."""
        ids_D = module.draft.draft_token_ids.to(self.head_VH.device)
        module.head_VdH = self.rows(ids_D).to(module.embedding_VH.device)
        module.logit_transform = self.logit_transform.select(ids_D)

    @torch.no_grad()
    def log_sum_exp(self, last_NH: Tensor, *, temperature: float, chunk: int = 64) -> Tensor:
        """Of the logits divided by the temperature, over the whole vocabulary [N], fp32 on the CPU; 0: divided by 1.

        last_NH: the target's last hidden states. chunk: positions computed together, few enough that their logits
        [chunk, V] stay in the processor's cache. Each chunk reads the whole head, so one call with many rows is much
        cheaper than many with few.
        """
        lse_N, device = torch.empty(len(last_NH)), self.head_VH.device
        divisor = temperature if temperature >= GREEDY_BELOW else 1.0
        for start in range(0, len(last_NH), chunk):
            rows = slice(start, start + chunk)
            last_CH = last_NH[rows].to(device, self.head_VH.dtype)
            logits_CV = self.logit_transform((last_CH @ self.head_VH.T).float())
            lse_N[rows] = (logits_CV if divisor == 1 else logits_CV / divisor).logsumexp(-1).cpu()
        return lse_N
