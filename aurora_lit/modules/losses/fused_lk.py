"""The LK loss from hidden states, with hand-written gradients, so that no [N, D] tensor of logits outlives a chunk.

`fused_lk_loss` equals `lk_loss` (modules/losses/lk.py) of the softmax of the logits, summed over rows, or for PPO the
same with `ppo_loss` (modules/losses/ppo.py) in the place of 1 − α.

Shapes: N rows (positions), K unrolled draft steps, D reduced draft vocabulary, H draft hidden size, G target hidden
size, C rows of one chunk, M = K·C, R ranges of q_old.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aurora_lit.kernels import lk_loss as lk_kernel
from aurora_lit.modules.draft.logit_transform import IDENTITY, LogitTransform
from aurora_lit.modules.losses.lk import KL_DECAY, LKStats
from aurora_lit.modules.losses.ppo import Q_RANGES, advantage, is_stopped, overlap_credit, stopped_mass
from aurora_lit.modules.losses.token_sample import TokenSample

_CHUNK_ROWS = 512
"""Rows of logits (K·C) that exist at a time, so that they stay in the CPU's cache."""
_KERNEL_CHUNK_FACTOR = 8
"""The native kernel takes larger chunks: it has no fp32 buffers to keep in cache, and every chunk adds a pass over the
weight's gradient."""


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """What the target would have chosen from in every row: p = exp(transform(h · weightᵀ) − lse), without gradient."""

    h_NG: Tensor
    """Its last hidden states."""
    weight_DG: Tensor
    """The rows of its head for the tokens of the draft's head."""
    logit_transform: LogitTransform = IDENTITY
    """For the same tokens."""
    lse_N: Tensor | None = None
    """Log-sum-exp of its logits over its whole vocabulary. None: that over the given tokens, so that p is its
    distribution within them."""
    sample: TokenSample | None = None
    """What the tokens are a sample of; None: they are the draft's whole vocabulary."""

    def lse(self, rows: slice, logits_CD: Tensor) -> Tensor:
        """The log-sum-exp of some rows [C]; `logits_CD`: their logits, as the loss takes them."""
        if self.lse_N is not None:
            return self.lse_N[rows]
        return logits_CD.to(torch.promote_types(logits_CD.dtype, torch.float32)).logsumexp(-1)


@dataclass(frozen=True, kw_only=True)
class OldRows:
    """The draft's q of every row when its position was first used: q_old = softmax(h · weightᵀ), without gradient."""

    h_NH: Tensor
    """Its normed hidden states."""
    weight_DH: Tensor
    """Its head."""


def fused_lk_loss(
    *,
    h_NH: Tensor,
    weight_DH: Tensor,
    row_weight_N: Tensor,
    target: TargetRows,
    kl_decay: float = KL_DECAY,
    gain_N: Tensor | None = None,
    old: OldRows | None = None,
) -> tuple[Tensor, LKStats]:
    """Σ_n w_n · lk_loss(p_n, softmax(h_n·Wᵀ)), differentiable by h_NH and weight_DH; the caller divides.

    Matrix products have autocast's dtype if it is on, else that of h; softmax and loss are at least fp32.

    Args:
        h_NH: the draft's normed hidden states [N, H], or [K, N, H] for K draft steps whose row n has the same target
            row n. With steps, p is computed once for all: a quarter of the target's matrix products at K = 4.
        weight_DH: the draft's head.
        row_weight_N: w of every row [N], or [K, N]; 0 where a step has no target. Rows of weight 0 must be finite.
        target: of the N rows.
        kl_decay: of λ; 0 is KL alone.
        gain_N: PPO's 1 + V_{t+1}, by which 1 − α is multiplied, as `row_weight_N`; None: 1.
        old: for PPO on positions that are used again, without draft steps in `h_NH`. The value of the loss is as
            without it.

    Returns:
        The weighted sum, and statistics of every row.
    """
    device_type = h_NH.device.type
    autocast = torch.is_autocast_enabled(device_type)
    matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else h_NH.dtype
    steps_shape = h_NH.shape[:-1]
    h_KNH = h_NH.reshape(-1, *h_NH.shape[-2:])
    weight_KN = row_weight_N.reshape(h_KNH.shape[:-1])
    with torch.autocast(device_type, enabled=False):
        gain_KN = torch.ones_like(weight_KN) if gain_N is None else gain_N.reshape(weight_KN.shape)
        loss, alpha, kl, match, stopped = _FusedLK.apply(  # type: ignore[no-untyped-call]
            h_KNH, weight_DH, weight_KN, gain_KN, target, old, matmul_dtype, kl_decay
        )
    stats = LKStats(
        alpha_N=alpha.reshape(steps_shape),
        kl_N=kl.reshape(steps_shape),
        top1_match_N=match.reshape(steps_shape),
        kl_decay=kl_decay,
        stopped_R2=stopped,
    )
    return loss, stats


class _FusedLK(torch.autograd.Function):
    """Forward computes loss and gradients chunk by chunk; backward only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        h_KNH: Tensor,
        weight_DH: Tensor,
        row_weight_KN: Tensor,
        gain_KN: Tensor,
        target: TargetRows,
        old: OldRows | None,
        matmul_dtype: torch.dtype,
        kl_decay: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        chunked = _ChunkedPass(
            h_KNH,
            weight_DH,
            row_weight_KN,
            gain_KN,
            target,
            old,
            needs_dh=ctx.needs_input_grad[0],
            needs_dweight=ctx.needs_input_grad[1],
            matmul_dtype=matmul_dtype,
            kl_decay=kl_decay,
        )
        chunked.run()
        dweight_DH = chunked.dweight_DH
        ctx.save_for_backward(chunked.dh_KNH, None if dweight_DH is None else dweight_DH.to(weight_DH.dtype))
        found = (chunked.alpha_KN, chunked.kl_KN, chunked.match_KN, chunked.stopped_R2)
        ctx.mark_non_differentiable(*found)
        return chunked.loss, *found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh_KNH, dweight_DH = ctx.saved_tensors
        scale = grads[0]
        dh = None if dh_KNH is None else dh_KNH * scale.to(dh_KNH.dtype)
        dweight = None if dweight_DH is None else dweight_DH * scale.to(dweight_DH.dtype)
        return dh, dweight, None, None, None, None, None, None


class _ChunkedPass:
    """One pass over all rows in chunks, by the native kernel or by torch. `run` fills the public tensors.

    The buffers of a chunk are reused by all chunks, so that their pages stay in cache.
    """

    def __init__(
        self,
        h_KNH: Tensor,
        weight_DH: Tensor,
        row_weight_KN: Tensor,
        gain_KN: Tensor,
        target: TargetRows,
        old: OldRows | None,
        *,
        needs_dh: bool,
        needs_dweight: bool,
        matmul_dtype: torch.dtype,
        kl_decay: float,
    ) -> None:
        K, N, H = h_KNH.shape
        D, device = weight_DH.shape[0], h_KNH.device
        math_dtype = torch.promote_types(matmul_dtype, torch.float32)
        self._target, self._old, self._kl_decay, self._math_dtype = target, old, kl_decay, math_dtype
        assert old is None or K == 1
        self._h_KNH = h_KNH.detach().to(matmul_dtype)
        self._weight_DH = weight_DH.detach().to(matmul_dtype)
        self._target_weight_DG = target.weight_DG.detach().to(matmul_dtype)
        self._row_weight_KN, self._gain_KN = (each.detach().to(math_dtype) for each in (row_weight_KN, gain_KN))

        self.loss = torch.zeros((), dtype=math_dtype, device=device)
        self.alpha_KN = torch.empty(K, N, dtype=math_dtype, device=device)
        self.kl_KN = torch.empty_like(self.alpha_KN)
        self.match_KN = torch.empty(K, N, dtype=torch.bool, device=device)
        self.stopped_R2 = torch.zeros(len(Q_RANGES), 2, dtype=math_dtype, device=device)
        self.dh_KNH = torch.zeros_like(h_KNH) if needs_dh else None
        self.dweight_DH = torch.zeros(D, H, dtype=math_dtype, device=device) if needs_dweight else None
        self._dweight_of_chunk_DH = torch.empty(D, H, dtype=matmul_dtype, device=device) if needs_dweight else None

        is_supported = lk_kernel.is_supported(torch.empty(0, D, dtype=matmul_dtype, device=device))
        self._uses_kernel = is_supported and old is None
        rows = _KERNEL_CHUNK_FACTOR * _CHUNK_ROWS if self._uses_kernel else _CHUNK_ROWS
        self._max_rows = size = min(max(1, rows // K), N)
        self._draft_KCD = torch.empty(K, size, D, dtype=matmul_dtype, device=device)
        self._target_CD = torch.empty(size, D, dtype=matmul_dtype, device=device)
        if not self._uses_kernel:
            self._z_KCD = torch.empty(K, size, D, dtype=math_dtype, device=device)
            self._q_KCD, self._dz_KCD = torch.empty_like(self._z_KCD), torch.empty_like(self._z_KCD)
            self._p_CD = torch.empty(size, D, dtype=math_dtype, device=device)
            self._log_p_CD = torch.empty_like(self._p_CD)

    def run(self) -> None:
        """All rows."""
        num_rows = self._h_KNH.shape[1]
        for start in range(0, num_rows, self._max_rows):
            rows = slice(start, min(start + self._max_rows, num_rows))
            if self._uses_kernel:
                self._run_kernel(rows)
            else:
                self._run_torch(rows)

    def _run_kernel(self, rows: slice) -> None:
        target_CD = self._multiply_target(rows)
        if not self._target.logit_transform.is_identity:
            target_CD.copy_(self._target.logit_transform(target_CD.to(self._math_dtype)))
        if self._target.sample is not None:
            self._target.sample.raise_logits(target_CD)
        h_MH, draft_KCD = self._multiply_draft(rows)
        loss_KC, self.alpha_KN[:, rows], self.kl_KN[:, rows], self.match_KN[:, rows] = lk_kernel.lk_loss_and_gradient(
            draft_KCD,
            target_CD,
            target_lse_C=self._target.lse(rows, target_CD),
            weight_KC=self._row_weight_KN[:, rows],
            gain_KC=self._gain_KN[:, rows],
            decay=self._kl_decay,
        )
        self.loss += loss_KC.sum()
        self._add_gradients(rows, h_MH, draft_KCD)  # which the kernel has made the logits' gradient

    def _run_torch(self, rows: slice) -> None:
        p_CD, p_log_p_C = self._target_distribution(rows)
        p_sum_C = p_CD.sum(-1)
        top_p_C = p_CD.argmax(-1)

        # q = softmax(z). The log-sum-exp of z follows from q at its largest entry, which saves a pass.
        h_MH, draft_KCD = self._multiply_draft(rows)
        z_KCD, q_KCD = self._of_chunk(self._z_KCD, rows), self._of_chunk(self._q_KCD, rows)
        dz_KCD = self._of_chunk(self._dz_KCD, rows)
        z_KCD.copy_(draft_KCD)
        torch.softmax(z_KCD, -1, out=q_KCD)
        top_KC1 = z_KCD.argmax(-1, keepdim=True)
        lse_q_KC = (z_KCD.gather(-1, top_KC1) - q_KCD.gather(-1, top_KC1).log()).squeeze(-1)
        kl_KC = p_log_p_C - torch.linalg.vecdot(p_CD, z_KCD) + p_sum_C * lse_q_KC
        alpha_KC = torch.minimum(q_KCD, p_CD, out=z_KCD).sum(-1)  # z is a free buffer from here on
        m_KCD = torch.lt(q_KCD, p_CD, out=dz_KCD)  # m = 1[q < p] as floats
        q_below_KC = torch.mul(q_KCD, m_KCD, out=z_KCD).sum(-1)  # Σ m·q

        kl_share_KC = torch.exp(-self._kl_decay * alpha_KC)
        weight_KC = self._row_weight_KN[:, rows]
        alpha_part_KC = weight_KC * (1 - kl_share_KC) * self._gain_KN[:, rows]
        kl_part_KC = weight_KC * kl_share_KC
        self.loss += (kl_part_KC * kl_KC + alpha_part_KC * (1 - alpha_KC)).sum()
        self.alpha_KN[:, rows], self.kl_KN[:, rows] = alpha_KC, kl_KC
        self.match_KN[:, rows] = top_KC1.squeeze(-1) == top_p_C
        if self.dh_KNH is None and self.dweight_DH is None:
            return

        # dz = λ(s·q − p) − (1 − λ)·q·(m − Σ m·q) = q·[λs + (1 − λ)(Σ m·q − m)] − λp, times the row's weight.
        if self._old is not None:
            m_KCD, q_below_KC = self._clipped_credit(self._old, rows, p_CD, q_KCD)
        dz_KCD.mul_(-alpha_part_KC[..., None])
        dz_KCD.add_((kl_part_KC * p_sum_C + alpha_part_KC * q_below_KC)[..., None]).mul_(q_KCD)
        dz_KCD.addcmul_(kl_part_KC[..., None], p_CD.expand_as(dz_KCD), value=-1)
        self._add_gradients(rows, h_MH, draft_KCD.copy_(dz_KCD))

    def _clipped_credit(self, old: OldRows, rows: slice, p_CD: Tensor, q_KCD: Tensor) -> tuple[Tensor, Tensor]:
        """What takes the place of m and Σ m·q for PPO: each token's advantage, 0 where it is stopped, in m's buffer.

        The gain is part of the loss's weight, so A is without it here.
        """
        logits_CD = old.h_NH[rows].to(self._weight_DH.dtype) @ old.weight_DH.to(self._weight_DH.dtype).t()
        if self._target.sample is not None:
            self._target.sample.raise_logits(logits_CD)
        q_old_CD = logits_CD.to(self._math_dtype).softmax(-1)
        advantage_CD = advantage(overlap_credit(p_CD, q_old_CD), q_old_CD, torch.ones_like(q_old_CD[:, 0]))
        stopped_CD = is_stopped(q_KCD[0], q_old_CD, advantage_CD)
        counted_C1 = self._row_weight_KN[0, rows, None] > 0
        self.stopped_R2 += stopped_mass(p_CD * counted_C1, q_old_CD, stopped_CD)
        m_KCD = self._of_chunk(self._dz_KCD, rows)
        m_KCD[0] = advantage_CD.masked_fill_(stopped_CD, 0.0)
        return m_KCD, (m_KCD * q_KCD).sum(-1)

    def _target_distribution(self, rows: slice) -> tuple[Tensor, Tensor]:
        """p [C, D] and Σ p·log p [C]."""
        C = rows.stop - rows.start
        p_CD, log_p_CD = self._p_CD[:C], self._log_p_CD[:C]
        log_p_CD.copy_(self._target.logit_transform(self._multiply_target(rows).to(self._math_dtype)))
        if self._target.sample is not None:
            self._target.sample.raise_logits(log_p_CD)
        log_p_CD.sub_(self._target.lse(rows, log_p_CD)[:, None])
        torch.exp(log_p_CD, out=p_CD)
        return p_CD, torch.linalg.vecdot(p_CD, log_p_CD)

    def _multiply_target(self, rows: slice) -> Tensor:
        """Products of the target's head with the chunk's hidden states [C, D] in the buffer, before the transform."""
        target_CD = self._target_CD[: rows.stop - rows.start]
        return torch.mm(self._target.h_NG[rows].to(target_CD.dtype), self._target_weight_DG.t(), out=target_CD)

    def _multiply_draft(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The chunk's hidden states [K·C, H], and its logits [K, C, D] in the buffer."""
        draft_KCD = self._of_chunk(self._draft_KCD, rows)
        h_MH = self._h_KNH[:, rows].reshape(-1, self._h_KNH.shape[2])
        torch.mm(h_MH, self._weight_DH.t(), out=draft_KCD.view(len(h_MH), -1))
        if self._target.sample is not None:
            self._target.sample.raise_logits(draft_KCD)
        return h_MH, draft_KCD

    def _add_gradients(self, rows: slice, h_MH: Tensor, dz_KCD: Tensor) -> None:
        dz_MD = dz_KCD.view(len(h_MH), -1)
        if self.dh_KNH is not None:
            self.dh_KNH[:, rows] = torch.mm(dz_MD, self._weight_DH).view(*dz_KCD.shape[:2], -1)
        if self.dweight_DH is not None and self._dweight_of_chunk_DH is not None:
            self.dweight_DH.add_(torch.mm(dz_MD.t(), h_MH, out=self._dweight_of_chunk_DH))

    def _of_chunk(self, buffer_KCD: Tensor, rows: slice) -> Tensor:
        """The buffer for a chunk of these rows: of the last chunk, which may be smaller, its contiguous beginning."""
        K, size, D = buffer_KCD.shape
        C = rows.stop - rows.start
        return buffer_KCD if size == C else buffer_KCD.view(-1)[: K * C * D].view(K, C, D)
