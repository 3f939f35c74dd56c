"""The target: any `AutoModelForCausalLM`, run over our KV cache, with the hidden states that a draft reads.

No model code is copied. Attention goes through transformers' attention interface (attention.py), and hooks before three
decoder layers record the auxiliary hidden states.

Leaves out: where a model comes from (source.py), the cache (kv_cache.py), which models can be run so (target_check.py),
and what is done with the logits (modules/sampling/choice.py).

Shapes: B sequences, T positions, N positions of a flat batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.kernels.decoder import Decoder
from aurora_lit.kernels.packed_linear import PackedLinear, pack_model
from aurora_lit.kernels.target_pass import TargetPass
from aurora_lit.models.attention import ATTENTION_NAME, KVCacheView, register_attention
from aurora_lit.models.fused_layers import embedding_table, fuse_target
from aurora_lit.models.kv_cache import KVCache, head_dim_of, kv_heads_of
from aurora_lit.models.source import UNQUANTISED, check_names, loading_error, unreadable_weights
from aurora_lit.models.target_check import check_target, probe_states
from aurora_lit.modules.draft.logit_transform import LogitTransform
from aurora_lit.modules.sampling.choice import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")


def aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's three layers (low, middle, high): indices into transformers' `hidden_states`."""
    last = num_layers - 1
    return min(2, last), min(num_layers // 2, last), max(num_layers - 3, 0)


def model_dtype(precision: str, device: torch.device = CPU) -> torch.dtype:
    """Type of a model's keys and values, and of weights that are not packed, for a setting of target.precision.

    `auto` is fp32 on CPUs where torch has no oneDNN (Macs) and there are no kernels: torch then multiplies bf16 in a
    plain loop, so that a prompt takes ten times as long as in fp32.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    slow_bf16 = device.type == "cpu" and not has_onednn and native.library() is None
    return torch.float32 if precision == "fp32" or (precision == "auto" and slow_bf16) else torch.bfloat16


def decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """A model's list of decoder layers. Raises SourceError if there is none."""
    base = model.base_model
    for module in getattr(base, "language_model", base).modules():  # a vision tower may have as many layers
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise SourceError(f"target.source: {type(model).__name__} has no list of {num_layers} decoder layers to read from")


class Target(nn.Module):
    """A causal language model whose forward pass also returns the hidden states that a draft reads.

    >>> target = Target.load(folder, precision="fp32")
    >>> kv_cache = target.make_kv_cache(num_slots=1, capacity=64)
    >>> zero_B = torch.tensor([0])
    >>> aux_BT3H, last_BTH = target(ids_BT, kv_cache=kv_cache, slots_B=zero_B, starts_B=zero_B)
    >>> logits_BTV = target.logits(last_BTH)
    """

    def __init__(self, model: PreTrainedModel, *, kv_dtype: torch.dtype | None = None) -> None:
        """`kv_dtype`: type of keys and values in the cache; by default the model's own."""
        super().__init__()
        self.kv_dtype = kv_dtype or model.dtype
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        self.model: PreTrainedModel = model.requires_grad_(False)
        model.train(False)
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = kv_heads_of(config)
        self.head_dim: int = head_dim_of(config)
        self.rope = _rope_parameters(config)
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 20)
        if self.rope.get("rope_type") == "longrope":
            # Once one sequence is longer than this, longrope rotates every sequence of the batch differently.
            self.max_positions = self.rope["original_max_position_embeddings"]
        self.logit_factor = 1.0
        softcap: float | None = getattr(config, "final_logit_softcapping", None)
        bias: torch.Tensor | None = getattr(self.head, "bias", None)
        self.logit_transform = LogitTransform(bias_V=None if bias is None else bias.detach().float(), softcap=softcap)
        self.aux_layer_ids = aux_layer_ids(self.num_layers)
        self.end_of_text_ids = _end_of_text_ids(model)
        self._forward: Any = model.base_model
        self._decoder: Decoder | None = None
        self._aux_hidden: dict[int, torch.Tensor] = {}  # by layer, in the current forward pass
        layers = decoder_layers(model, self.num_layers)
        for layer_id in sorted(set(self.aux_layer_ids)):
            layers[layer_id].register_forward_pre_hook(self._make_aux_hook(layer_id), with_kwargs=True)

    @classmethod
    def load(cls, folder: Path, *, precision: str, device: torch.device = CPU) -> Target:
        """Load a model folder. `precision`: one of fp32, bf16, int8, int4, auto (see `pack_model`).

        With native kernels, linear layers are packed for them and only their weights have that precision. Without,
        and on other devices than the CPU, the whole model is fp32 or bf16. Raises SourceError.
        """
        from transformers import AutoModelForCausalLM  # takes seconds, and a packed target needs none of it

        packing = device.type == "cpu" and native.library() is not None
        dtype = model_dtype(precision, device)
        if precision in ("int8", "int4") and device.type != "cpu":
            raise SourceError(f"target.precision={precision} runs on the CPU only; set engine.device=cpu, or use bf16")
        if not packing and precision in ("int8", "int4"):
            reason, remedy, _ = native.absence() or native.Absence("they are not in use", "see `aurora-lit doctor`")
            raise SourceError(f"target.precision={precision} needs the native kernels: {reason}; {remedy}, or use bf16")
        if (unreadable := unreadable_weights(folder)) is not None:
            raise SourceError(f"target.source: {folder} {unreadable}; {UNQUANTISED}")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32 if packing else dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # families and quantisers raise exceptions of all kinds
            raise loading_error(folder, error) from error
        model, loading = loaded
        check_names(folder, missing=loading["missing_keys"], unread=loading["unexpected_keys"])
        if packing:
            pack_model(model, precision=precision, head=model.get_output_embeddings())
        target = cls(model.to(device), kv_dtype=dtype)
        target.check()
        if packing:
            target.fuse_layers()
        return target

    def check(self) -> None:
        """Compare this wrapper with the model's own forward pass, and find its logit factor (`check_target`).

        Raises SourceError if they do not agree.
        """
        check_target(self)

    @torch.no_grad()
    def fuse_layers(self) -> bool:
        """Run all decoder layers as one native call from now on, if its results agree with the model's own."""
        decoder = fuse_target(self.model, self.aux_layer_ids)
        if decoder is None:
            return False
        expected = probe_states(self)
        self._decoder = decoder
        # Of the root mean square. Rounding only; but the last bit of an input may decide how it is rounded to 8 bits.
        tolerance = 1e-4 if self.kv_dtype == torch.float32 else 0.2
        for num_prompts in (0, 2):
            for ours, own in zip(probe_states(self, num_prompts=num_prompts), expected, strict=True):
                if not float((ours - own).norm()) <= tolerance * float(own.norm()):  # true for NaN too
                    self._decoder = None
                    return False
        return True

    def make_kv_cache(self, *, num_slots: int, capacity: int) -> KVCache:
        """Allocate a KV cache with this model's layers, heads and type; `capacity` in positions."""
        return KVCache(
            num_layers=self.num_layers,
            num_slots=num_slots,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.kv_dtype,
            device=self.device,
        )

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T new tokens of each sequence, which follow the `starts_B` positions already in its slot.

        `parents_BT`, if `supports_trees`: the tokens form a tree (see `Decoder`); `commit_tree_path` then keeps one
        path. `num_prompts`: the last so many sequences read their prompts, the others decode (`has_prompt_arithmetic`).

        Returns the auxiliary hidden states [B, T, 3H] and the last hidden state [B, T, H] after the final norm.
        """
        if self._decoder is not None:
            batch = {"queries": ids_BT.shape[1], "slots_B": slots_B, "starts_B": starts_B, "parents_BC": parents_BT}
            batch["num_prompts"] = num_prompts
            aux_NF, last_NH = self._run_fused(ids_BT.flatten(), kv_cache, **batch)
            return aux_NF.view(*ids_BT.shape, -1), last_NH.view(*ids_BT.shape, -1)
        assert parents_BT is None, "only fused layers support trees"
        positions_BT = starts_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        positions_BT = positions_BT.clamp_max(self.max_positions - 1)  # proposals beyond a learned table are never kept
        view = KVCacheView(kv_cache, slots_B=slots_B, starts_B=starts_B)
        return self.run_layers(input_ids=ids_BT, position_ids=positions_BT, kv_cache_view=view)

    def forward_ragged(
        self,
        ids_N: torch.Tensor,
        *,
        widths: Sequence[int],
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, for sequences with query lengths `widths`, whose tokens are concatenated in `ids_N`.

        Needs `supports_trees`. Gives the same bits as `forward` with the largest width for every sequence; returns
        [N, 3H] and [N, H]. `parents_BT`: of the sequences that decode.
        """
        begins_R = torch.tensor([0, *itertools.accumulate(widths)])
        batch = {"queries": max(widths), "slots_B": slots_B, "starts_B": starts_B, "parents_BC": parents_BT}
        return self._run_fused(ids_N, kv_cache, begins_R=begins_R, num_prompts=num_prompts, **batch)

    def make_pass(
        self, kv_cache: KVCache, *, aux_SLF: torch.Tensor | None, last_SLH: torch.Tensor | None
    ) -> TargetPass | None:
        """`forward_ragged` and `choose` in one native call; None where they are not all native.

        `aux_SLF`, `last_SLH`: where states are stored too (see `TargetPass`).
        """
        head, table = self._choosing_head, embedding_table(self.embedding)
        if self._decoder is None or head is None or table is None:
            return None
        return TargetPass(
            self._decoder,
            embedding=table,
            head=head,
            keys=kv_cache.keys_SGCQPE,
            values=kv_cache.values_SGMDE,
            aux_SLF=aux_SLF,
            last_SLH=last_SLH,
        )

    @property
    def has_prompt_arithmetic(self) -> bool:
        """True if positions of prompts are computed faster than decoding ones, and rounded differently.

        Keys and values of generated tokens then cannot stand in for those that a prompt with the same tokens would get.
        """
        return self._decoder is not None and self._decoder.has_prompt_arithmetic

    @property
    def supports_trees(self) -> bool:
        """True if a forward pass accepts a tree of tokens, and sequences of different query lengths.

        Only fused layers do: other layers would need an attention mask for each model family.
        """
        return self._decoder is not None

    @property
    def decoder(self) -> Decoder | None:
        """The fused decoder layers, or None if the model's own forward pass runs."""
        return self._decoder

    def commit_tree_path(self, *, kv_cache: KVCache, slot: int, froms: Sequence[int], tos: Sequence[int]) -> None:
        """Move a slot's keys and values from the tree's columns to the positions of the committed tokens, one by one.

        `froms`, `tos`: positions in the cache.
        """
        assert self._decoder is not None
        self._decoder.move(kv_cache.keys_SGCQPE, kv_cache.values_SGMDE, slot=slot, froms=froms, tos=tos)

    def copy_prefix(self, *, kv_cache: KVCache, source: int, slot: int, length: int, start: int) -> None:
        """Copy the first `length` positions of slot `source` to `slot`, which has the first `start` of them."""
        kv_cache.copy_prefix(source, slot, length, start=start)

    def compile_forward(self) -> None:
        """Use `torch.compile` on the model's own forward pass, with dynamic shapes, instead of fused layers."""
        self._forward, self._decoder = torch.compile(self.model.base_model, dynamic=True), None

    def forward_uncached(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run whole sequences without a KV cache; returns as `forward` does."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.run_layers(input_ids=ids_BT, position_ids=positions_BT)

    def run_layers(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model's own decoder layers with `inputs` as transformers names them; returns as `forward` does."""
        last_BTH = self._forward(**inputs, use_cache=False).last_hidden_state
        if self.logit_factor != 1.0:
            last_BTH = last_BTH * self.logit_factor
        aux_BT3H = torch.cat([self._aux_hidden[layer_id] for layer_id in self.aux_layer_ids], dim=-1)
        self._aux_hidden.clear()
        return aux_BT3H, last_BTH

    def logits(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, fp32."""
        return self.logit_transform.apply_softcap(self.head(last_BTH).float())

    def greedy_tokens(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit at each position [B, T]; the kernels do not store the other logits."""
        head = self._choosing_head
        return self.logits(last_BTH).argmax(-1) if head is None else head.argmax(last_BTH)

    def choose(
        self,
        last_NH: torch.Tensor,
        *,
        temperature_N: torch.Tensor,
        key_N: torch.Tensor,
        position_N: torch.Tensor,
        dense_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's own token at each position, greedy or drawn; the kernels do not store the logits it needs.

        Arguments and results are those of `PackedLinear.choose`, for logits: tokens int64 [N], and logits fp32 [D, V]
        of the positions that `dense_N` numbers, whose tokens are arbitrary.
        """
        draws = {"temperature_N": temperature_N, "key_N": key_N, "position_N": position_N}
        if (head := self._choosing_head) is not None:
            return head.choose(last_NH, **draws, dense_N=dense_N)
        logits_NV = self.logits(last_NH)
        if dense_N is None:
            return choose(logits_NV, **draws), logits_NV[:0]
        dense_rows = (dense_N >= 0).nonzero()[:, 0]
        dense_DV = logits_NV.new_empty(len(dense_rows), logits_NV.shape[1])
        dense_DV[dense_N[dense_rows]] = logits_NV[dense_rows]
        return choose(logits_NV, **draws), dense_DV

    def logsumexp(self, last_NH: torch.Tensor, *, chunk: int = 64) -> torch.Tensor:
        """Log-sum-exp of the logits at each position, fp32 [N]; holds the logits of `chunk` positions at a time."""
        last_NH = last_NH.to(self.model.device, self.model.dtype)
        return torch.cat([self.logits(rows).logsumexp(-1).cpu() for rows in torch.split(last_NH, chunk)])

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head's weight for some tokens, fp32 [len(token_ids), H]; without the `logit_transform`."""
        if isinstance(self.head, PackedLinear):
            return self.head.rows(token_ids)
        weight = self.head.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()[token_ids.to(weight.device)].float()

    def embedding_rows(self) -> torch.Tensor:
        """The input embedding as one table, fp32 [V, H]; includes the scaling of families that scale it (Gemma)."""
        rows: torch.Tensor = self.embedding(torch.arange(self.vocab_size, device=self.device))
        return rows.detach().float()

    @property
    def device(self) -> torch.device:
        """Where the target runs."""
        return self.model.device

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert isinstance(head, nn.Module)
        return head

    @property
    def _choosing_head(self) -> PackedLinear | None:
        """The head, if its kernels can choose tokens without storing logits."""
        head = self.head
        return head if isinstance(head, PackedLinear) and self.logit_transform.is_identity else None

    @property
    def embedding(self) -> nn.Module:
        """The input embedding, which the draft shares."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        return embedding

    def _run_fused(self, ids_N: torch.Tensor, kv_cache: KVCache, **batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._decoder is not None
        batch = {"keys": kv_cache.keys_SGCQPE, "values": kv_cache.values_SGMDE, **batch}
        _, last_NH, aux_NF = self._decoder(self.embedding(ids_N).float(), **batch)
        assert aux_NF is not None
        return aux_NF, last_NH

    def _make_aux_hook(self, layer_id: int) -> Any:
        def record_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._aux_hidden[layer_id] = args[0] if args else kwargs["hidden_states"]

        return record_input


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


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embedding; of the full-attention layers if kinds of layers differ (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full
