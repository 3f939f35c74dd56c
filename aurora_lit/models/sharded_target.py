"""A target that several processes hold together, behind the interface of one: the engine on rank 0 notices nothing.

Each pass on rank 0 is an order to the others, who run the same pass over their part, with key-value slots of their own:
of their heads under tensor_parallel, of all under fsdp. What a pass returns on the others is dropped.
What is left out: the orders' way (distributed.py), how a model is cut (models/partition.py), a rank's process
(serve/ranks.py).

Shapes: B rows, T positions, N = B·T, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from aurora_lit.distributed import Op, Order, Ranks, Strategy
from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.models.partition import Cutter, local_heads
from aurora_lit.models.shard_reader import ShardReader
from aurora_lit.models.slots import KVSlots
from aurora_lit.models.target import Target


class ShardedTarget(Target):
    """One rank's part; rank 0 uses it like any target, the others `follow`.

    >>> target = ShardedTarget.load_part(folder, precision="fp32", strategy="tensor_parallel", ranks=ranks)
    >>> if ranks.rank: target.follow()                    # until rank 0 says stop
    """

    def __init__(
        self, model: PreTrainedModel, ranks: Ranks, *, kv_dtype: torch.dtype, hidden_dtype: torch.dtype, kv_heads: int
    ) -> None:
        """`hidden_dtype`: of the hidden states between ranks; `kv_heads`: those of this rank."""
        super().__init__(model, kv_dtype=kv_dtype)
        self.num_kv_heads = kv_heads
        self.ranks = ranks
        self._hidden_dtype = hidden_dtype
        self._all_slots: list[KVSlots] = []
        self._together = False
        """Whether all ranks call the same methods by themselves, so that no orders are needed."""

    @classmethod
    def load_part(cls, folder: Path, *, precision: str, strategy: Strategy, ranks: Ranks) -> ShardedTarget:
        """Read this rank's part of a model folder; all ranks call it. Raises SourceError or ConfigError.

        Precisions are those of `Target.load` where the native kernels run (tensor_parallel on CPUs); elsewhere bf16
        is that of weights and activations.
        """
        assert precision in ("fp32", "bf16", "auto"), "weights in groups are not cut"
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        packing = strategy == "tensor_parallel" and ranks.device.type == "cpu" and native.library() is not None
        kept = torch.float32 if packing else dtype
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with init_empty_weights(include_buffers=False):  # rotary tables and the like are computed as ever
                model = AutoModelForCausalLM.from_config(config, dtype=kept)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise SourceError(f"target.source: {folder} is not a loadable causal language model: {error}") from error
        text = config.get_text_config()
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if strategy == "tensor_parallel":
            heads = local_heads(text, rank=ranks.rank, size=ranks.size)
            kv_heads = heads.stop - heads.start
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        with ShardReader(folder, dtype=kept, base_prefix=model.base_model_prefix) as reader:
            cutter = Cutter(model, ranks, reader, pack=dtype if packing else None)
            ranks.setup(model, cutter.fully_sharded if strategy == "fsdp" else cutter.tensor_parallel)
        target = cls(model, ranks, kv_dtype=dtype, hidden_dtype=kept, kv_heads=kv_heads)
        target.check()
        return target

    def check(self) -> None:
        """As `Target.check`; all ranks call it, and each judges the logits of its rows of the vocabulary."""
        self._together = True
        super().check()
        self._together = False

    # -- what rank 0's engine calls --------------------------------------------------------------------------------

    def make_slots(self, *, num_slots: int, capacity: int) -> KVSlots:
        """Allocate a cache on every rank."""
        if self._together:
            return super().make_slots(num_slots=num_slots, capacity=capacity)
        with self.ranks.order(Op.SLOTS, torch.tensor([num_slots, capacity])):
            return self._make_slots(num_slots, capacity)

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        slots: KVSlots,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        parents_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Target.forward`, on every rank; proposals do not branch here."""
        assert parents_BT is None
        place = next(i for i, each in enumerate(self._all_slots) if each is slots)
        with self.ranks.order(Op.FORWARD, torch.tensor([place]), ids_BT, slots_B, starts_B):
            return super().forward(ids_BT, slots=slots, slots_B=slots_B, starts_B=starts_B)

    def copy_beginning(self, *, slots: KVSlots, source: int, slot: int, length: int) -> None:
        """As `Target.copy_beginning`, on every rank."""
        place = next(i for i, each in enumerate(self._all_slots) if each is slots)
        with self.ranks.order(Op.COPY, torch.tensor([place, source, slot, length])):
            slots.copy(source, slot, length)

    def logits(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """As `Target.logits`; each rank computes those of its rows of the vocabulary."""
        if self._together:
            return super().logits(last_BTH)
        last_NH = last_BTH.reshape(-1, self.hidden_size).to(self._hidden_dtype).contiguous()
        with self.ranks.order(Op.LOGITS, torch.tensor([len(last_NH)])):
            logits_NV = self._logits(last_NH)
        assert logits_NV is not None
        return self.finish.capped(logits_NV).view(*last_BTH.shape[:-1], -1)

    def likeliest(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """As `Target.likeliest`; the head is spread."""
        return self.logits(last_BTH).argmax(-1)

    @property
    def embedding(self) -> nn.Module:
        """Looks up on all ranks; for a draft's step. fp32 on CPUs, which the draft's kernels take."""
        return _Lookup(self._embed)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Not to be had: they are spread."""
        raise AssertionError("a sharded target's head lies in no one place; load it unsharded")

    def read(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Not for a sharded target, which serves only."""
        assert self._together, "a sharded target does not read; load it unsharded"
        return super().read(ids_BT)

    # -- what the other ranks do -----------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, *, after: Callable[[Order], None] = lambda order: None) -> None:
        """Do what rank 0 orders until it says stop; `after` runs behind each order. Raises RankError."""
        while True:
            order = self.ranks.next_order()
            tensors = [tensor.to(self.ranks.device) for tensor in order.tensors]
            match order.op:
                case Op.STOP:
                    return
                case Op.SLOTS:
                    self._make_slots(*order.tensors[0].tolist())
                case Op.FORWARD:
                    place, ids_BT, slots_B, starts_B = tensors
                    slots = self._all_slots[int(place)]
                    super().forward(ids_BT, slots=slots, slots_B=slots_B, starts_B=starts_B)
                case Op.COPY:
                    place, source, slot, length = order.tensors[0].tolist()
                    self._all_slots[place].copy(source, slot, length)
                case Op.LOGITS:
                    size = (int(tensors[0]), self.hidden_size)
                    self._logits(torch.empty(size, dtype=self._hidden_dtype, device=self.ranks.device))
                case Op.EMBED:
                    super().embedding(tensors[0])
            after(order)

    def _make_slots(self, num_slots: int, capacity: int) -> KVSlots:
        self._all_slots.append(super().make_slots(num_slots=num_slots, capacity=capacity))
        return self._all_slots[-1]

    def _logits(self, last_NH: torch.Tensor) -> torch.Tensor | None:
        parts = self.ranks.gather(self.head(self.ranks.from_first(last_NH)).float())
        return None if parts is None else torch.cat(parts, dim=-1)[:, : self.vocab_size]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with self.ranks.order(Op.EMBED, ids):
            embeds: torch.Tensor = super().embedding(ids)
            return embeds.float() if embeds.device.type == "cpu" and native.library() is not None else embeds


class _Lookup(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._function(ids)
