"""A target that is any `AutoModelForCausalLM`, run by transformers' own code over our KV cache.

No model code is copied. Attention goes through transformers' attention interface (attention.py), and hooks before three
decoder layers record the auxiliary hidden states.

Leaves out: reading a model (loading.py), which models can be run so (target_check.py), and the families whose layers
run in native calls (native_target.py).

Shapes: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aurora_lit.errors import SourceError
from aurora_lit.models.attention import ATTENTION_NAME, KVCacheView, register_attention
from aurora_lit.models.interface import WholeTarget
from aurora_lit.models.kv_cache import KVCache, head_dim_of, kv_heads_of
from aurora_lit.modules.draft.logit_transform import LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's three layers (low, middle, high): indices into transformers' `hidden_states`."""
    last = num_layers - 1
    return min(2, last), min(num_layers // 2, last), max(num_layers - 3, 0)


def decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """A model's list of decoder layers. Raises SourceError if there is none."""
    base = model.base_model
    for module in getattr(base, "language_model", base).modules():  # a vision tower may have as many layers
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise SourceError(f"target.source: {type(model).__name__} has no list of {num_layers} decoder layers to read from")


class TorchTarget(WholeTarget):
    """A transformers model; `check_target` says whether it is computed correctly.

    >>> target = TorchTarget(AutoModelForCausalLM.from_pretrained(folder))
    >>> aux_BT3H, last_BTH = target.forward_uncached(ids_BT)
    """

    def __init__(
        self, model: PreTrainedModel, *, kv_dtype: torch.dtype | None = None, num_kv_heads: int | None = None
    ) -> None:
        """`kv_dtype`: type of keys and values in the cache; by default the model's own. `num_kv_heads`: the heads that
        this process has of a sharded model; by default all.
        """
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        model.requires_grad_(False).train(False)
        config = model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)  # kinds of layers may differ (Gemma 3)
        max_positions: int = getattr(config, "max_position_embeddings", 1 << 20)
        if rope.get("rope_type") == "longrope":
            # Once one sequence is longer than this, longrope rotates every sequence of the batch differently.
            max_positions = rope["original_max_position_embeddings"]
        bias: torch.Tensor | None = getattr(_head(model), "bias", None)
        super().__init__(
            {
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "num_layers": config.num_hidden_layers,
                "num_kv_heads": num_kv_heads or kv_heads_of(config),
                "head_dim": head_dim_of(config),
                "rope": rope,
                "max_positions": max_positions,
                "aux_layer_ids": aux_layer_ids(config.num_hidden_layers),
                "end_of_text_ids": _end_of_text_ids(model),
                "kv_dtype": kv_dtype or model.dtype,
                "hidden_dtype": model.dtype,
                "logit_transform": LogitTransform(
                    bias_V=None if bias is None else bias.detach().float(),
                    softcap=getattr(config, "final_logit_softcapping", None),
                ),
            }
        )
        self.model: PreTrainedModel = model
        self.logit_factor = 1.0
        """Of families that scale their logits (`check_target` finds it); hidden states are multiplied by it."""
        self.why_not_native: str | None = None
        """Why no `NativeTarget` runs this model, where kernels might; None: nobody tried, or one does."""
        self._forward: Any = model.base_model
        self._aux_hidden: dict[int, torch.Tensor] = {}  # by layer, in the current forward pass
        layers = decoder_layers(model, self.num_layers)
        for layer_id in sorted(set(self.aux_layer_ids)):
            layers[layer_id].register_forward_pre_hook(self._make_aux_hook(layer_id), with_kwargs=True)

    @property
    def in_torch(self) -> TorchTarget:
        """Itself; see `NativeTarget.in_torch`."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the target runs."""
        return self.model.device

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        return _head(self.model)

    @property
    def embedding(self) -> nn.Module:
        """The input embedding, which the draft shares."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        return embedding

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Target.forward`; prompts are computed as all else."""
        positions_BT = starts_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        positions_BT = positions_BT.clamp_max(self.max_positions - 1)  # proposals beyond a learned table are never kept
        view = KVCacheView(kv_cache, slots_B=slots_B, starts_B=starts_B)
        return self.run_layers(input_ids=ids_BT, position_ids=positions_BT, kv_cache_view=view)

    def forward_uncached(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run whole sequences without a KV cache; returns as `forward` does."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.run_layers(input_ids=ids_BT, position_ids=positions_BT)

    def run_layers(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the decoder layers with `inputs` as transformers names them; returns as `forward` does."""
        last_BTH = self._forward(**inputs, use_cache=False).last_hidden_state
        if self.logit_factor != 1.0:
            last_BTH = last_BTH * self.logit_factor
        aux_BT3H = torch.cat([self._aux_hidden[layer_id] for layer_id in self.aux_layer_ids], dim=-1)
        self._aux_hidden.clear()
        return aux_BT3H, last_BTH

    def compile_forward(self) -> None:
        """Use `torch.compile` on the forward pass from now on, with dynamic shapes."""
        self._forward = torch.compile(self.model.base_model, dynamic=True)

    def _make_aux_hook(self, layer_id: int) -> Any:
        def record_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._aux_hidden[layer_id] = args[0] if args else kwargs["hidden_states"]

        return record_input


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(head, nn.Module)
    return head


def _end_of_text_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text by the model's generation config. Raises SourceError."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    try:
        return frozenset(int(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"target.source: eos_token_id={ids!r} in generation_config.json of {model.name_or_path} is neither a "
            "token's id nor a list of them; correct it"
        ) from error
