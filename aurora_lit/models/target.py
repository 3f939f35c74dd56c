"""The target: any `AutoModelForCausalLM`, read at three layers and attending through our own slots.

No model code is copied: attention is handed to our slots (models/attention.py), and the three auxiliary hidden states
are taken by hooks in front of decoder layers. What is left out: where a model comes from (models/source.py), the cache
(models/slots.py), and what is done with logits (modules/sampling/verification.py).

Shapes: B rows, T positions, N rows of a flat batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.kernels.decoder import Decoder
from aurora_lit.kernels.packed_linear import PackedLinear, pack_model
from aurora_lit.models.attention import ATTENTION_NAME
from aurora_lit.models.fused_layers import fuse
from aurora_lit.models.layers import aux_layer_ids, decoder_layers, rope_parameters
from aurora_lit.models.slots import KVSlots, SlotView
from aurora_lit.modules.draft.logit_transform import LogitTransform


class Target(nn.Module):
    """A causal language model whose forward pass also returns what a draft needs.

    >>> target = Target.load(folder, precision="fp32")
    >>> slots = target.make_slots(num_slots=1, capacity=64)
    >>> aux_BT3H, last_BTH = target(ids_BT, slots=slots, slots_B=torch.tensor([0]), starts_B=torch.tensor([0]))
    >>> logits_BTV = target.logits(last_BTH)
    """

    def __init__(self, model: PreTrainedModel, *, kv_dtype: torch.dtype | None = None) -> None:
        """`kv_dtype`: of the slots; the model's own when left out."""
        super().__init__()
        self.kv_dtype = kv_dtype or model.dtype
        model.set_attn_implementation(ATTENTION_NAME)
        self.model: PreTrainedModel = model.requires_grad_(False)
        model.train(False)
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rope = rope_parameters(config)
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 20)
        if self.rope.get("rope_type") == "longrope":
            # Beyond these, every row of a batch is rotated otherwise as soon as one row is that long.
            self.max_positions = self.rope["original_max_position_embeddings"]
        self.logit_factor = 1.0
        softcap: float | None = getattr(config, "final_logit_softcapping", None)
        bias: torch.Tensor | None = getattr(self.head, "bias", None)
        self.finish = LogitTransform(bias_V=None if bias is None else bias.detach().float(), softcap=softcap)
        self.aux_layer_ids = aux_layer_ids(self.num_layers)
        self._forward: Any = model.base_model
        self._decoder: Decoder | None = None
        self._taps: dict[int, torch.Tensor] = {}
        layers = decoder_layers(model, self.num_layers)
        for layer_id in sorted(set(self.aux_layer_ids)):
            layers[layer_id].register_forward_pre_hook(self._make_tap(layer_id), with_kwargs=True)

    @classmethod
    def load(cls, folder: Path, *, precision: str) -> Target:
        """Load a model folder. `precision`: as `pack_model` has it.

        Where the native kernels can be had, linear layers are packed for them and only their weights are in that
        precision; elsewhere the whole model is, fp32 or bf16. Raises SourceError.
        """
        packing = native.library() is not None
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        if not packing and precision in ("int8", "int4"):
            remedy = "install a C++ compiler (apt-get install g++), or use bf16"
            raise SourceError(f"target.precision: {precision} needs the native kernels; {remedy}")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32 if packing else dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise SourceError(f"target.source: {folder} is not a loadable causal language model: {error}") from error
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            raise SourceError(f"target.source: {folder} lacks weights ({', '.join(missing[:3])} …); copy it again")
        if packing:
            pack_model(model, precision=precision, head=model.get_output_embeddings())
        target = cls(model, kv_dtype=dtype)
        target.check()
        if packing:
            target.fuse_layers()
        return target

    @torch.no_grad()
    def check(self) -> None:
        """Run the model once, find the factor of its logits (Cohere, Granite); SourceError if it would not be itself.

        Namely where a layer's attention does not go through slots, or logits are made in a way unknown here.
        """
        kind = type(self.model).__name__
        probe = self._probe()
        view = SlotView(self.make_slots(num_slots=2, capacity=4), slots_B=probe["slots_B"], starts_B=probe["starts_B"])
        try:
            wanted_BTV = self.model(input_ids=probe["ids_BT"], use_cache=False).logits.double()
            self._run(input_ids=probe["ids_BT"], slot_view=view)
            found_BTV = self.logits(self.read(probe["ids_BT"])[1]).double()
        except SourceError:
            raise
        except Exception as error:  # whatever a family does that this file does not know of
            raise SourceError(
                f"target.source: a {kind} cannot be run over slots ({error!r}); choose another model"
            ) from error
        if missing := sorted(set(range(self.num_layers)) - view.written):
            raise SourceError(
                f"target.source: in {len(missing)} of {self.num_layers} layers a {kind} does not attend through "
                "transformers' attention interface, or not at all; choose a model whose layers all do"
            )
        factor = float((wanted_BTV * found_BTV).sum() / found_BTV.square().sum())
        if abs(factor - 1) > 1e-3:  # else rounding
            self.logit_factor = factor
            found_BTV = self.logits(self.read(probe["ids_BT"])[1]).double()
        if float((wanted_BTV - found_BTV).abs().max()) > 1e-2 * float(wanted_BTV.abs().max()):
            raise SourceError(
                f"target.source: a {kind} makes its logits in a way that is not known here; choose another model"
            )

    @torch.no_grad()
    def fuse_layers(self) -> bool:
        """Run the decoder layers as one native call from now on, if it gives what the model itself gives."""
        decoder = fuse(self.model, self.aux_layer_ids)
        if decoder is None:
            return False
        probe = self._probe()
        wanted = self.forward(**probe, slots=self.make_slots(num_slots=2, capacity=4))
        self._decoder = decoder
        found = self.forward(**probe, slots=self.make_slots(num_slots=2, capacity=4))
        tolerance = 1e-4 if self.kv_dtype == torch.float32 else 5e-2  # of the largest value: rounding, no more
        for ours, own in zip(found, wanted, strict=True):
            if float((ours - own).abs().max()) > tolerance * float(own.abs().max()):
                self._decoder = None
        return self._decoder is not None

    def make_slots(self, *, num_slots: int, capacity: int) -> KVSlots:
        """Allocate a cache that fits this model."""
        return KVSlots(
            num_layers=self.num_layers,
            num_slots=num_slots,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.kv_dtype,
            device=self.model.device,
        )

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        slots: KVSlots,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T new tokens of each row, which follow `starts_B` positions already in its slot.

        `parents_BT`, where `can_branch`: the tokens form a tree (kernels/decoder.py); `keep_path` then keeps a path.
        Returns the auxiliary hidden states [B, T, 3H] and the last hidden state [B, T, H] (after the final norm).
        """
        if self._decoder is not None:
            where = {"queries": ids_BT.shape[1], "slots_B": slots_B, "starts_B": starts_B, "parents_BC": parents_BT}
            aux_NF, last_NH = self._run_fused(ids_BT.flatten(), slots, **where)
            return aux_NF.view(*ids_BT.shape, -1), last_NH.view(*ids_BT.shape, -1)
        assert parents_BT is None, "only fused layers branch"
        positions_BT = starts_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        positions_BT = positions_BT.clamp_max(self.max_positions - 1)  # proposals past a learned table are never kept
        view = SlotView(slots, slots_B=slots_B, starts_B=starts_B)
        return self._run(input_ids=ids_BT, position_ids=positions_BT, slot_view=view)

    def forward_ragged(
        self,
        ids_N: torch.Tensor,
        *,
        widths: Sequence[int],
        slots: KVSlots,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, where `can_branch`, for rows of `widths` tokens that lie one behind the other in `ids_N`.

        T is the largest width. The same bits as with all rows that wide; returns [N, 3H] and [N, H].
        """
        begins_R = torch.tensor([0, *itertools.accumulate(widths)])
        where = {"queries": max(widths), "slots_B": slots_B, "starts_B": starts_B, "parents_BC": parents_BT}
        return self._run_fused(ids_N, slots, begins_R=begins_R, **where)

    @property
    def can_branch(self) -> bool:
        """Whether a pass may take a tree of tokens, and rows of different widths.

        Only fused layers do: others would need a mask a family.
        """
        return self._decoder is not None

    def keep_path(self, *, slots: KVSlots, slots_M: torch.Tensor, from_M: torch.Tensor, to_M: torch.Tensor) -> None:
        """Move keys and values of tree columns to the positions that their tokens were committed at, in this order."""
        assert self._decoder is not None
        held = {"keys": slots.keys_SGCDP, "values": slots.values_SGLD}
        self._decoder.move(**held, slots_M=slots_M, from_M=from_M, to_M=to_M)

    def copy_beginning(self, *, slots: KVSlots, source: int, slot: int, length: int) -> None:
        """Let a slot begin with the first `length` positions of another."""
        slots.copy(source, slot, length)

    def compile_forward(self) -> None:
        """Have torch compile the model's own forward pass, in place of our fused layers; shapes are dynamic."""
        self._forward, self._decoder = torch.compile(self.model.base_model, dynamic=True), None

    def read(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run whole sequences from their start, without a cache; returns as `forward` does."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self._run(input_ids=ids_BT, position_ids=positions_BT)

    def logits(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, fp32."""
        return self.finish.capped(self.head(last_BTH).float())

    def likeliest(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """The token of the largest logit at each position [B, T]; kernels find it without keeping the others."""
        if isinstance(self.head, PackedLinear) and self.finish.is_identity:
            return self.head.argmax(last_BTH)
        return self.logits(last_BTH).argmax(-1)

    def logsumexp(self, last_NH: torch.Tensor, *, chunk: int = 64) -> torch.Tensor:
        """Log-sum-exp of the logits of each row, fp32, without holding all logits at once."""
        return torch.cat([self.logits(rows).logsumexp(-1) for rows in torch.split(last_NH, chunk)])

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head's weight for some tokens, fp32 [len(token_ids), H]; `finish` has what comes after it."""
        if isinstance(self.head, PackedLinear):
            return self.head.rows(token_ids)
        weight = self.head.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()[token_ids.to(weight.device)].float()

    def embedding_rows(self) -> torch.Tensor:
        """The input embedding as one table, fp32 [V, H]; scaled models (Gemma) included."""
        rows: torch.Tensor = self.embedding(torch.arange(self.vocab_size, device=self.model.device))
        return rows.detach().float()

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert isinstance(head, nn.Module)
        return head

    @property
    def embedding(self) -> nn.Module:
        """The input embedding, which the draft shares."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        return embedding

    def _run_fused(self, ids_N: torch.Tensor, slots: KVSlots, **where: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._decoder is not None
        where = {"keys": slots.keys_SGCDP, "values": slots.values_SGLD, **where}
        _, last_NH, aux_N3H = self._decoder(self.embedding(ids_N).float(), **where)
        assert aux_N3H is not None
        return aux_N3H.flatten(1), last_NH

    def _run(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        last_BTH = self._forward(**inputs, use_cache=False).last_hidden_state
        if self.logit_factor != 1.0:
            last_BTH = last_BTH * self.logit_factor
        aux_BT3H = torch.cat([self._taps[layer_id] for layer_id in self.aux_layer_ids], dim=-1)
        self._taps.clear()
        return aux_BT3H, last_BTH

    def _probe(self) -> dict[str, torch.Tensor]:
        """Two short rows for a cache of two slots."""
        device = self.model.device
        return {
            "ids_BT": torch.arange(1, 9, device=device).remainder(self.vocab_size).view(2, 4),
            "slots_B": torch.tensor([1, 0], device=device),
            "starts_B": torch.tensor([0, 0], device=device),
        }

    def _make_tap(self, layer_id: int) -> Any:
        def tap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._taps[layer_id] = args[0] if args else kwargs["hidden_states"]

        return tap
