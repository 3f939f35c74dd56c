"""Loads another draft into a running engine's draft model, between two of its steps.

vLLM keeps weights in forms of its own (packed for the CPU, fused and split over ranks), so they go through its loaders
again, layer by layer. What is loaded has been validated before (follower.py): a wrong shape would end the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aurora_lit.drafts.checkpoint import read_tensors


def load_into(runner: Any, folder: Path) -> None:
    """Load the weights of a published version, this rank's part of them, into the runner's draft."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = runner.get_draft_model(), runner.vllm_config
    weights = read_tensors(folder)
    with (
        set_current_vllm_config(config),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device(runner.device),
    ):
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights.items()))
        finalize_layerwise_reload(model, config.speculative_config.draft_model_config)
