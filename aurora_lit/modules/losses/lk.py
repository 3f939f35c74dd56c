"""How well a draft distribution q is accepted by the target distribution p: closed forms, and the loss made of them.

`acceptance_rate`, `expected_accepted_length` and `lk_loss` are the readable definitions. `fused_lk_loss` is `lk_loss`
from hidden states, with its gradients written out by hand, so that no [N, D] tensor of logits outlives a chunk of rows.

Left out: sampling and verification (modules/sampling/verification.py), the networks, the weights of unrolled steps (the caller's).

Shapes: N rows (positions), K unrolled draft steps, D reduced draft vocabulary, H draft hidden, G target hidden,
C rows of one chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aurora_lit.kernels import lk_loss as native_lk
from aurora_lit.modules.draft.logit_transform import LINEAR, LogitTransform

KL_DECAY = 3.0  # λ = exp(−KL_DECAY · α): KL leads while the draft is poor, acceptance when it is good


@dataclass(frozen=True, kw_only=True)
class LKStats:
    """What the loss saw of each row; no gradient. Shape [N], or [K, N] where the hidden states had steps."""

    alpha_N: Tensor  # acceptance rate Σ min(p, q)
    kl_N: Tensor  # KL over the draft vocabulary, see `lk_loss`
    top1_match_N: Tensor  # bool: the draft's first choice is the target's; false where that is outside the vocabulary
    kl_decay: float = KL_DECAY

    @property
    def loss_N(self) -> Tensor:
        """What `lk_loss` is for each row, with this decay."""
        kl_share = torch.exp(-self.kl_decay * self.alpha_N)
        return kl_share * self.kl_N + (1 - kl_share) * (1 - self.alpha_N)


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """α = Σ min(p, q) over the last dim: the chance that a proposal drawn from q passes min(1, p/q).

    Entries of p outside the draft vocabulary may be left out, since q is 0 there.
    """
    return torch.minimum(p, q).sum(-1)


def expected_accepted_length(alpha_K: Tensor) -> Tensor:
    """1 + Σ_t Π_{i≤t} α_i over the last dim: tokens a round emits, the corrected or bonus token included."""
    return 1 + alpha_K.cumprod(-1).sum(-1)


def lk_loss(p_D: Tensor, q_D: Tensor) -> Tensor:
    """λ·KL(p‖q) + (1 − λ)(1 − α) a row, with λ = exp(−3·stopgrad α); no reduction and no mask.

    p_D holds the target's probabilities of the draft vocabulary and may sum to s < 1; the mass outside is out of the
    draft's reach. KL here is Σ_D p·log(p/q), the part over the draft vocabulary: the true KL is infinite when s < 1.
    It differs from the KL of the renormalised p only by the factor s and the constant s·log s, so it may be negative,
    and its gradient by the draft's logits is s·q − p: rows that the draft can hardly serve pull less.
    """
    alpha = acceptance_rate(p_D, q_D)
    kl = (torch.xlogy(p_D, p_D) - p_D * q_D.clamp_min(torch.finfo(q_D.dtype).tiny).log()).sum(-1)
    kl_share = torch.exp(-KL_DECAY * alpha.detach())
    return kl_share * kl + (1 - kl_share) * (1 - alpha)


def fused_lk_loss(
    *,
    h_NH: Tensor,
    weight_DH: Tensor,
    row_weight_N: Tensor,
    target_h_NG: Tensor | None = None,
    target_weight_DG: Tensor | None = None,
    target_finish: LogitTransform = LINEAR,
    target_lse_N: Tensor | None = None,
    target_argmax_N: Tensor | None = None,
    p_ND: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk: int = 512,
    kl_decay: float = KL_DECAY,
) -> tuple[Tensor, LKStats]:
    """Σ_n w_n·lk_loss(p_n, softmax(h_n·Wᵀ)), with gradients for h_NH and weight_DH; the caller divides.

    The target is given by its last normed hidden state, its head's rows for the draft vocabulary and its log-sum-exp
    over the full vocabulary (p = exp(finish(target_h·target_weightᵀ) − lse)), or as p_ND. It gets no gradient.
    h may be [K, N, H] with row_weight [K, N]: K draft steps whose row n aims at the same target row n (weight 0 where a
    step has none). Then p is computed once for the K steps: a quarter of the matrix work less at K = 4.

    target_argmax_N: draft index of the target's first choice over the full vocabulary, −1 where it lies outside; used
    for top1_match_N only. Without it the target's first choice within the draft vocabulary stands in.
    matmul_dtype: what h and both weights are cast to for the matrix products (default: autocast's type if it is on,
    else that of h); softmax and loss are at least fp32.
    chunk: rows of logits alive at a time (K·C), so that they stay in the CPU's cache.
    kl_decay: of λ; 0 is KL alone.
    Rows of weight 0 must still be finite.
    """
    by_hidden = target_h_NG is not None and target_weight_DG is not None and target_lse_N is not None
    if by_hidden == (p_ND is not None):
        raise ValueError("give the target either as target_h_NG, target_weight_DG and target_lse_N, or as p_ND")
    device_type = h_NH.device.type
    if matmul_dtype is None:
        autocast = torch.is_autocast_enabled(device_type)
        matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else h_NH.dtype
    steps_shape = h_NH.shape[:-1]
    h_KNH = h_NH.reshape(-1, *h_NH.shape[-2:])
    weight_KN = row_weight_N.reshape(h_KNH.shape[:-1])
    with torch.autocast(device_type, enabled=False):
        loss, alpha, kl, match = _FusedLK.apply(  # type: ignore[no-untyped-call]
            h_KNH,
            weight_DH,
            weight_KN,
            (target_h_NG, target_weight_DG, target_lse_N, target_argmax_N, p_ND),
            target_finish,
            matmul_dtype,
            chunk,
            kl_decay,
        )
    stats = LKStats(
        alpha_N=alpha.reshape(steps_shape),
        kl_N=kl.reshape(steps_shape),
        top1_match_N=match.reshape(steps_shape),
        kl_decay=kl_decay,
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
        target: tuple[Tensor | None, ...],
        target_finish: LogitTransform,
        matmul_dtype: torch.dtype,
        chunk: int,
        kl_decay: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        target_h_NG, target_weight_DG, target_lse_N, target_argmax_N, p_ND = target
        K, N, H = h_KNH.shape
        D = weight_DH.shape[0]
        size = min(max(1, chunk // K), N)
        math_dtype = torch.promote_types(matmul_dtype, torch.float32)
        device = h_KNH.device
        need_h, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]

        h_mm = h_KNH.detach().to(matmul_dtype)
        weight_mm = weight_DH.detach().to(matmul_dtype)
        target_weight_mm = None if target_weight_DG is None else target_weight_DG.detach().to(matmul_dtype)
        row_weight_KN = row_weight_KN.detach().to(math_dtype)
        dh_KNH = torch.zeros_like(h_KNH) if need_h else None
        dweight_DH = torch.zeros(D, H, dtype=math_dtype, device=device) if need_weight else None
        dweight_chunk = torch.empty(D, H, dtype=matmul_dtype, device=device) if need_weight else None
        loss = torch.zeros((), dtype=math_dtype, device=device)
        alpha_KN = torch.empty(K, N, dtype=math_dtype, device=device)
        kl_KN = torch.empty_like(alpha_KN)
        match_KN = torch.empty(K, N, dtype=torch.bool, device=device)

        # Buffers of one chunk, reused: their pages stay in cache.
        in_one_pass = p_ND is None and native_lk.can_take(torch.empty(0, D, dtype=matmul_dtype, device=device))
        if in_one_pass:  # no fp32 buffers to keep in cache, and each chunk costs a pass over the head's gradient
            size = min(max(1, 8 * chunk // K), N)
        draft_mm = torch.empty(K, size, D, dtype=matmul_dtype, device=device)
        target_mm = torch.empty(size, D, dtype=matmul_dtype, device=device)
        z_full, q_full, grad_full = (torch.empty(K, size, D, dtype=math_dtype, device=device) for _ in range(3))
        log_p_full, p_full = (torch.empty(size, D, dtype=math_dtype, device=device) for _ in range(2))

        for start in range(0, N, size):
            rows = slice(start, min(start + size, N))
            C = rows.stop - start
            if size > C:  # the last chunk: contiguous views of the same memory
                draft_mm = draft_mm.view(-1)[: K * C * D].view(K, C, D)
                z_full, q_full, grad_full = (b.view(-1)[: K * C * D].view(K, C, D) for b in (z_full, q_full, grad_full))
            if in_one_pass:
                assert target_h_NG is not None  # fused_lk_loss has checked
                assert target_weight_mm is not None
                assert target_lse_N is not None
                torch.mm(target_h_NG[rows].to(matmul_dtype), target_weight_mm.t(), out=target_mm[:C])
                if not target_finish.is_identity:
                    target_mm[:C] = target_finish(target_mm[:C].to(math_dtype))
                h_chunk = h_mm[:, rows].reshape(K * C, H)
                torch.mm(h_chunk, weight_mm.t(), out=draft_mm.view(K * C, D))
                loss_KC, alpha_KN[:, rows], kl_KN[:, rows], match_KN[:, rows] = native_lk.lk_rows(
                    draft_mm,
                    target_mm[:C],
                    target_lse_C=target_lse_N[rows],
                    weight_KC=row_weight_KN[:, rows],
                    top_C=None if target_argmax_N is None else target_argmax_N[rows],
                    decay=kl_decay,
                )
                loss += loss_KC.sum()
                if dh_KNH is not None:
                    dh_KNH[:, rows] = torch.mm(draft_mm.view(K * C, D), weight_mm).view(K, C, H)
                if dweight_DH is not None and dweight_chunk is not None:
                    dweight_DH.add_(torch.mm(draft_mm.view(K * C, D).t(), h_chunk, out=dweight_chunk))
                continue
            z, q, grad, log_p, p = z_full, q_full, grad_full, log_p_full[:C], p_full[:C]

            # The target: p, log p, and their dot product.
            if p_ND is not None:
                p.copy_(p_ND[rows])
                p_log_p_C = torch.xlogy(p, p).sum(-1)
            else:
                assert target_h_NG is not None  # fused_lk_loss has checked
                assert target_weight_mm is not None
                assert target_lse_N is not None
                torch.mm(target_h_NG[rows].to(matmul_dtype), target_weight_mm.t(), out=target_mm[:C])
                log_p.copy_(target_finish(target_mm[:C].to(math_dtype)))
                log_p.sub_(target_lse_N[rows, None])
                torch.exp(log_p, out=p)
                p_log_p_C = torch.linalg.vecdot(p, log_p)
            p_sum_C = p.sum(-1)
            top_p_C = p.argmax(-1) if target_argmax_N is None else target_argmax_N[rows]

            # The draft: q = softmax(z). log-sum-exp of z comes from q at its largest entry, which saves a pass.
            h_chunk = h_mm[:, rows].reshape(K * C, H)
            torch.mm(h_chunk, weight_mm.t(), out=draft_mm.view(K * C, D))
            z.copy_(draft_mm)
            torch.softmax(z, -1, out=q)
            top_q_KC = z.argmax(-1)
            lse_q_KC = (z.gather(-1, top_q_KC[..., None]) - q.gather(-1, top_q_KC[..., None]).log()).squeeze(-1)
            kl = p_log_p_C - torch.linalg.vecdot(p, z) + p_sum_C * lse_q_KC
            torch.minimum(q, p, out=z)  # z is free from here on
            alpha = z.sum(-1)
            torch.lt(q, p, out=grad)  # m = 1[q < p] as numbers
            q_below = torch.mul(q, grad, out=z).sum(-1)  # Σ m·q

            kl_share = torch.exp(-kl_decay * alpha)
            w = row_weight_KN[:, rows]
            loss += (w * (kl_share * kl + (1 - kl_share) * (1 - alpha))).sum()
            alpha_KN[:, rows], kl_KN[:, rows], match_KN[:, rows] = alpha, kl, top_q_KC == top_p_C
            if not (need_h or need_weight):
                continue

            # dz = λ(s·q − p) − (1 − λ)·q·(m − Σ m·q) = q·[λs + (1 − λ)(Σ m·q − m)] − λp
            alpha_part = w * (1 - kl_share)
            kl_part = w * kl_share
            grad.mul_(-alpha_part[..., None]).add_((kl_part * p_sum_C + alpha_part * q_below)[..., None]).mul_(q)
            grad.addcmul_(kl_part[..., None], p.expand_as(grad), value=-1)
            grad_mm = draft_mm.copy_(grad).view(K * C, D)
            if dh_KNH is not None:
                dh_KNH[:, rows] = torch.mm(grad_mm, weight_mm).view(K, C, H)
            if dweight_DH is not None and dweight_chunk is not None:
                dweight_DH.add_(torch.mm(grad_mm.t(), h_chunk, out=dweight_chunk))
        ctx.save_for_backward(dh_KNH, None if dweight_DH is None else dweight_DH.to(weight_DH.dtype))
        ctx.mark_non_differentiable(alpha_KN, kl_KN, match_KN)
        return loss, alpha_KN, kl_KN, match_KN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh_KNH, dweight_DH = ctx.saved_tensors
        scale = grads[0]
        dh = None if dh_KNH is None else dh_KNH * scale.to(dh_KNH.dtype)
        dweight = None if dweight_DH is None else dweight_DH * scale.to(dweight_DH.dtype)
        return dh, dweight, None, None, None, None, None, None
