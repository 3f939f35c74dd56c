"""Whether `TorchTarget` can run a model over our KV cache, told on eight tokens before anything is served.

The wrapper relies on what transformers' families have in common: every layer attends through the attention interface, a
layer keeps keys and values from one pass to the next and nothing else, and logits are the head's output times a factor.
A family without one of these would answer wrongly, so it is refused.

Leaves out whether native layers agree with a model's own (`native_target`).

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aurora_lit.errors import SourceError
from aurora_lit.models.attention import ATTENTION_NAME, KVCacheView, attention_interface
from aurora_lit.models.interface import Target
from aurora_lit.models.torch_target import TorchTarget

_PROBE_NAME = "aurora_lit_mask_probe"
"""Name of the attention that compares masks with what it is told."""


@torch.no_grad()
def check_target(target: TorchTarget, *, compares_attention: bool = True) -> None:
    """Compare `target` with its model's own forward pass, and set its logit factor (Cohere, Granite).

    Where a layer has a window that only its mask has (PhiMoE), positions are limited to those that it does not affect.

    `compares_attention`: also with the model's own attention, which needs all of its heads in this process.

    Raises SourceError if a layer's attention does not use the KV cache, if hidden states are not of the size that the
    configuration says, if logits are not finite, if a layer keeps other states from one pass to the next, if the logits
    cannot be reproduced from the last hidden state, or if attention does more than the interface is told.
    """
    kind, ids_BT = type(target.model).__name__, _probe_inputs(target)["ids_BT"]
    try:
        missing = sorted(set(range(target.num_layers)) - _attended_layers(target))
        if not missing:
            in_passes_BTV = _logits_in_passes(target).double()
            expected_BTV = target.model(input_ids=ids_BT, use_cache=False).logits.double()
            attended_BTV = _logits_of_own_attention(target).double() if compares_attention else expected_BTV
            aux_BT3H, last_BTH = target.forward_uncached(ids_BT)
            ours_BTV = target.logits(last_BTH).double()
    except SourceError:
        raise
    except Exception as error:  # a family may fail in any way that this file does not know of
        raise SourceError(
            f"target.source: a {kind} cannot be run over the KV cache ({error!r}); choose another model"
        ) from error
    if missing:
        raise SourceError(
            f"target.source: in {len(missing)} of {target.num_layers} layers a {kind} does not attend through "
            "transformers' attention interface, or not at all; choose a model whose layers all do"
        )
    found, H = [list(aux_BT3H.shape), list(last_BTH.shape)], target.hidden_size
    if found != (wanted := [[*ids_BT.shape, 3 * H], [*ids_BT.shape, H]]):
        raise SourceError(
            f"target.source: a {kind} computes hidden states of shapes {found}, and hidden_size={H} means {wanted}, "
            "which is not supported; choose another model"
        )
    if not all(bool(each.isfinite().all()) for each in (in_passes_BTV, expected_BTV, attended_BTV, ours_BTV)):
        raise SourceError(
            f"target.source: a {kind} computes values that are NaN or infinite; copy or convert the weights again"
        )
    if _differ(in_passes_BTV, ours_BTV, begin=2, exact=target.kv_dtype == torch.float32):  # the second pass begins at 2
        raise SourceError(
            f"target.source: a {kind} keeps more than keys and values from one pass to the next (or computes two "
            "attentions in a layer), which is not supported; choose another model"
        )
    factor = float((expected_BTV * ours_BTV).sum() / ours_BTV.square().sum())
    if abs(factor - 1) > 1e-3:  # smaller differences are rounding
        target.logit_factor = factor
        ours_BTV = target.logits(target.forward_uncached(ids_BT)[1]).double()
    if float((expected_BTV - ours_BTV).abs().max()) > 1e-2 * float(expected_BTV.abs().max()):
        raise SourceError(
            f"target.source: a {kind} computes its logits in a way that is not supported; choose another model"
        )
    # The first position attends to itself alone.
    if _differ(expected_BTV, attended_BTV, begin=1, exact=target.kv_dtype == torch.float32):
        raise SourceError(
            f"target.source: a {kind} adds to its attention what transformers' attention interface is not told (a "
            "bias, a mask), which is not supported; choose another model"
        )
    target.max_positions = min([target.max_positions, *_windows_of_masks_alone(target)])


def probe_states(target: Target, *, num_prompts: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`target.forward` on two sequences of four tokens, the last `num_prompts` of which are prompts."""
    probe, kv_cache = _probe_inputs(target), target.make_kv_cache(num_slots=2, capacity=4)
    ids_BT = probe.pop("ids_BT")
    return target.forward(ids_BT, kv_cache=kv_cache, num_prompts=num_prompts, **probe)


def _probe_inputs(target: Target) -> dict[str, torch.Tensor]:
    """Two sequences of four tokens, for a cache of two slots."""
    device = target.device
    return {
        "ids_BT": torch.arange(1, 9, device=device).remainder(target.vocab_size).view(2, 4),
        "slots_B": torch.tensor([1, 0], device=device),
        "starts_B": torch.tensor([0, 0], device=device),
    }


def _attended_layers(target: TorchTarget) -> set[int]:
    """The layers whose attention used the KV cache in one pass."""
    probe, kv_cache = _probe_inputs(target), target.make_kv_cache(num_slots=2, capacity=4)
    view = KVCacheView(kv_cache, slots_B=probe["slots_B"], starts_B=probe["starts_B"])
    target.run_layers(input_ids=probe["ids_BT"], kv_cache_view=view)
    return view.attended_layers


def _logits_in_passes(target: TorchTarget) -> torch.Tensor:
    """The probe's logits [B, T, V] if its last two tokens come in passes of their own."""
    probe, kv_cache = _probe_inputs(target), target.make_kv_cache(num_slots=2, capacity=4)
    last = []
    for begin, end in ((0, 2), (2, 3), (3, 4)):
        ids_BT, starts_B = probe["ids_BT"][:, begin:end], probe["starts_B"] + begin
        last.append(target.forward(ids_BT, kv_cache=kv_cache, slots_B=probe["slots_B"], starts_B=starts_B)[1])
    return target.logits(torch.cat(last, dim=1))


def _logits_of_own_attention(target: TorchTarget) -> torch.Tensor:
    """The model's logits [B, T, V] by its own attention, which may add a bias or a mask of its own."""
    target.model.set_attn_implementation("eager")
    try:
        logits_BTV: torch.Tensor = target.model(input_ids=_probe_inputs(target)["ids_BT"], use_cache=False).logits
    finally:
        target.model.set_attn_implementation(ATTENTION_NAME)
    return logits_BTV


def _windows_of_masks_alone(target: TorchTarget) -> list[int]:
    """Sizes of windows, and of chunks, that the model's masks have and its attention is not told."""
    from transformers import AttentionInterface, AttentionMaskInterface

    found: list[int] = []

    def mask(*, local_size: int | None = None, **_: Any) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), local_size or 0)

    def attention(
        module: nn.Module,
        query_BNTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        window = 0 if attention_mask is None else int(attention_mask)
        if window and options.get("sliding_window") != window:
            found.append(window)
        return attention_interface(module, query_BNTD, key_BGTD, value_BGTD, None, **options)

    AttentionInterface.register(_PROBE_NAME, attention)
    AttentionMaskInterface.register(_PROBE_NAME, mask)
    target.model.set_attn_implementation(_PROBE_NAME)
    try:
        target.model(input_ids=_probe_inputs(target)["ids_BT"], use_cache=False)
    finally:
        target.model.set_attn_implementation(ATTENTION_NAME)
    return found


def _differ(ours_BTV: torch.Tensor, expected_BTV: torch.Tensor, *, begin: int, exact: bool) -> bool:
    """True if logits of differently rounded attention differ by more than rounding.

    With less than fp32 (not `exact`) they must differ at every position from `begin` on: rounding may choose other
    experts at some.
    """
    error_BT = (ours_BTV - expected_BTV).abs().amax(-1) / expected_BTV.abs().max()
    return bool((error_BT > 1e-2).any()) if exact else bool((error_BT[:, begin:] > 0.1).all())
