"""What an engine may ask of a target, and what learning may ask of one that is whole in its process.

Three kinds implement it side by side: `TorchTarget` (torch_target.py) runs any transformers model, `NativeTarget`
(native_target.py) the families of families.py in native calls, and `ShardedTarget` (sharded_target.py) a model that
several processes hold together.

Shapes: B sequences, T positions, N positions of a flat batch, H hidden size, V vocabulary, D positions with logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.target_pass import TargetPass
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.modules.draft.logit_transform import LogitTransform
from aurora_lit.modules.sampling.choice import choose

CPU = torch.device("cpu")


class Target(nn.Module, ABC):
    """A causal language model over a KV cache, whose forward pass also returns the hidden states that a draft reads.

    >>> target = load_target(folder, precision="fp32")
    >>> kv_cache = target.make_kv_cache(num_slots=1, capacity=64)
    >>> zero_B = torch.tensor([0])
    >>> aux_BT3H, last_BTH = target(ids_BT, kv_cache=kv_cache, slots_B=zero_B, starts_B=zero_B)
    >>> logits_BTV = target.logits(last_BTH)
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    """Key-value heads of this process."""
    head_dim: int
    rope: dict[str, Any]
    """Parameters of the rotary embedding, as transformers names them."""
    max_positions: int
    """Longest sequence."""
    aux_layer_ids: tuple[int, int, int]
    """Layers whose inputs are the auxiliary hidden states."""
    end_of_text_ids: frozenset[int]
    """The tokens that end a text by the model's generation config."""
    kv_dtype: torch.dtype
    """Of keys and values in the cache."""
    hidden_dtype: torch.dtype
    """Of hidden states."""
    logit_transform: LogitTransform
    """What is done with the outputs of the head's weight."""

    has_native_decoder = False
    """True if a forward pass accepts trees of tokens and sequences of different query lengths, as a `NativeTarget`'s.

    Other layers would need an attention mask for each family."""
    has_prompt_arithmetic = False
    """True if positions of prompts are computed faster than decoding ones, and rounded differently.

    Keys and values of generated tokens then cannot stand in for those that a prompt with the same tokens would get."""

    def __init__(self, facts: dict[str, Any]) -> None:
        """`facts`: a value for each attribute that this class declares."""
        super().__init__()
        for name in Target.__annotations__:
            setattr(self, name, facts[name])

    @property
    def facts(self) -> dict[str, Any]:
        """The attributes that this class declares, by name."""
        return {name: getattr(self, name) for name in Target.__annotations__}

    @property
    def all_kv_heads(self) -> int:
        """Key-value heads of all processes together."""
        return self.num_kv_heads

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the target runs."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Module:
        """The input embedding, which the draft shares."""

    def make_kv_cache(self, *, num_slots: int, capacity: int, is_pool: bool = False) -> KVCache:
        """Allocate a KV cache with this model's layers, heads and type; `capacity` in positions."""
        return KVCache(
            num_layers=self.num_layers,
            num_slots=num_slots,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.kv_dtype,
            device=self.device,
            is_pool=is_pool,
        )

    @abstractmethod
    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T new tokens of each sequence, which follow the `starts_B` positions already in its slot.

        `num_prompts`: the last so many sequences read their prompts, the others decode (`has_prompt_arithmetic`).

        Returns the auxiliary hidden states [B, T, 3H] and the last hidden state [B, T, H] after the final norm.
        """

    def make_pass(
        self, kv_cache: KVCache, *, aux_SLF: torch.Tensor | None, last_SLH: torch.Tensor | None
    ) -> TargetPass | None:
        """A round's forward pass and choice of tokens as one native call; None where they are not all native.

        `aux_SLF`, `last_SLH`: where states are stored too (see `TargetPass`).
        """
        return None

    def copy_prefix(self, *, kv_cache: KVCache, source: int, slot: int, length: int, start: int) -> None:
        """Copy the first `length` positions of slot `source` to `slot`, which has the first `start` of them."""
        kv_cache.copy_prefix(source, slot, length, start=start)

    def copy_blocks(
        self, *, kv_cache: KVCache, pool: KVCache, slot: int, first: int, places: Sequence[int], to_pool: bool
    ) -> None:
        """Copy blocks of a slot to a pool, or back from there (`KVCache.copy_blocks`)."""
        kv_cache.copy_blocks(pool, slot=slot, first=first, places=places, to_pool=to_pool)

    @abstractmethod
    def logits(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, fp32."""

    def greedy_tokens(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit at each position [B, T]."""
        return self.logits(last_BTH).argmax(-1)

    def choose(
        self,
        last_NH: torch.Tensor,
        *,
        temperature_N: torch.Tensor,
        key_N: torch.Tensor,
        position_N: torch.Tensor,
        dense_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's own token at each position, greedy or drawn.

        Arguments and results are those of `PackedLinear.choose`, for logits: tokens int64 [N], and logits fp32 [D, V]
        of the positions that `dense_N` numbers, whose tokens are arbitrary.
        """
        draws = {"temperature_N": temperature_N, "key_N": key_N, "position_N": position_N}
        logits_NV = self.logits(last_NH)
        if dense_N is None:
            return choose(logits_NV, **draws), logits_NV[:0]
        dense_rows = (dense_N >= 0).nonzero()[:, 0]
        dense_DV = logits_NV.new_empty(len(dense_rows), logits_NV.shape[1])
        dense_DV[dense_N[dense_rows]] = logits_NV[dense_rows]
        return choose(logits_NV, **draws), dense_DV


class WholeTarget(Target):
    """A target whose embedding and head are whole in this process: learning may ask for them too."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The output embedding."""

    @property
    def choosing_head(self) -> PackedLinear | None:
        """The head, if its kernels can choose tokens without storing logits."""
        head = self.head
        return head if isinstance(head, PackedLinear) and self.logit_transform.is_identity else None

    def logits(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, fp32."""
        return self.logit_transform.apply_softcap(self.head(last_BTH).float())

    def greedy_tokens(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit at each position [B, T]; the kernels do not store the other logits."""
        head = self.choosing_head
        return super().greedy_tokens(last_BTH) if head is None else head.argmax(last_BTH)

    def choose(
        self, last_NH: torch.Tensor, *, dense_N: torch.Tensor | None = None, **draws: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Target.choose`; the kernels do not store the logits that they need."""
        head = self.choosing_head
        if head is None:
            return super().choose(last_NH, **draws, dense_N=dense_N)
        return head.choose(last_NH, **draws, dense_N=dense_N)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head's weight for some tokens, fp32 [len(token_ids), H]; without the `logit_transform`."""
        return head_rows(self.head, token_ids)

    def embedding_rows(self) -> torch.Tensor:
        """The input embedding as one table, fp32 [V, H]; includes the scaling of families that scale it (Gemma)."""
        rows: torch.Tensor = self.embedding(torch.arange(self.vocab_size, device=self.device))
        return rows.detach().float()


def head_rows(head: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows of a head's weight for some tokens, fp32 [len(token_ids), H], where the head is."""
    if isinstance(head, PackedLinear):
        return head.rows(token_ids)
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()[token_ids.to(weight.device)].float()
