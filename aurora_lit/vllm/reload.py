"""Loads another draft into a running engine's draft model, between two of its steps.

vLLM keeps weights in forms of its own (packed for the CPU, fused and split over ranks), so they go through its loaders
again, layer by layer. What is loaded has been validated before (follower.py): a wrong shape would end the engine.

A draft without an embedding or a head of its own, or with one equal to the target's, uses the target's modules in
vLLM. So the embedding, which no published draft changes, is never loaded, and a shared head is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aurora_lit.drafts.checkpoint import read_tensors, without_identity
from aurora_lit.errors import AuroraError

_EMBEDDING = "embed_tokens"


def check_weights_are_own(runner: Any) -> None:
    """Raise AuroraError if the draft has a weight of the target: a new draft would overwrite it."""
    of_target = {_address(weight) for weight in runner.get_model().parameters()} - {0}
    named = runner.get_draft_model().named_parameters(remove_duplicate=False)
    shared = [name for name, weight in named if _EMBEDDING not in name and _address(weight) in of_target]
    if shared:
        raise AuroraError(
            f"{', '.join(shared)} of the draft is the target's own, since the draft that vLLM was started with has "
            "none or an equal one, and a new draft would overwrite it; start with one that has its own, such as those "
            "of `aurora-lit pretrain`"
        )


def load_into(runner: Any, folder: Path, *, last_good: Path) -> None:
    """Load the weights of a published version, this rank's part of them, into the runner's draft.

    If that fails half-way, those of `last_good` are loaded again before the error is raised, so that the next step
    finds a whole draft.
    """
    weights = _weights(folder)
    try:
        _load(runner, weights)
    except Exception as error:
        try:
            _load(runner, _weights(last_good))
        except Exception as again:
            raise AuroraError(
                f"{type(error).__name__}: {error}; {last_good.name} could not be loaded again either "
                f"({type(again).__name__}: {again}), so proposals come from a mixture of both until a draft is loaded"
            ) from error
        raise


def _load(runner: Any, weights: dict[str, Tensor]) -> None:
    """Load all layers; after an exception each layer has its old weights or its new ones."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model, config = runner.get_draft_model(), runner.vllm_config
    draft_config = config.speculative_config.draft_model_config
    with (
        set_current_vllm_config(config),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device(runner.device),
    ):
        initialize_layerwise_reload(model)
        try:
            model.load_weights(iter(weights.items()))
            finalize_layerwise_reload(model, draft_config)
        except Exception:
            for layer in model.modules():  # vLLM gives a layer its old tensors back only if nothing was loaded for it
                info = get_layerwise_info(layer)
                info.loaded_weights.clear()
                info.load_numel = 0
            finalize_layerwise_reload(model, draft_config)
            raise


def _weights(folder: Path) -> dict[str, Tensor]:
    tensors = without_identity(read_tensors(folder))
    return {name: tensor for name, tensor in tensors.items() if _EMBEDDING not in name}


def _address(weight: Tensor) -> int:
    """Where its storage begins; 0: it is empty, as on the CPU after a layer was packed."""
    return weight.untyped_storage().data_ptr()
