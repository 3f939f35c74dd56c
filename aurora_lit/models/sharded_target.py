"""A target sharded over several processes behind the interface of any target, so that the engine needs no changes.

Each forward pass on rank 0 is an order to the other ranks, which run the same pass over their shard, with a KV cache of
their own: of their heads under tensor_parallel, of all heads under fsdp. What a pass returns on them is discarded.

Leaves out: how orders travel (distributed.py), how a model is partitioned (partition.py), and a rank's process
(serve/ranks.py).

Shapes: B sequences, T positions, N = B·T, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from aurora_lit.distributed import Op, Order, Ranks, Strategy
from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache, kv_heads_of
from aurora_lit.models.loading import model_dtype
from aurora_lit.models.partition import ModelPartitioner, kv_heads_of_rank
from aurora_lit.models.shard_reader import ShardReader
from aurora_lit.models.source import loading_error, read_model_config
from aurora_lit.models.target_check import check_target
from aurora_lit.models.torch_target import TorchTarget


class ShardedTarget(Target):
    """One rank's shard. Rank 0 uses it like any target; the other ranks call `run_worker_loop`.

    >>> target = read_shard(folder, precision="fp32", strategy="tensor_parallel", ranks=ranks)
    >>> if ranks.rank: target.run_worker_loop()           # returns when rank 0 stops
    """

    def __init__(self, shard: TorchTarget, ranks: Ranks, *, all_kv_heads: int) -> None:
        """`shard`: over this rank's part of the model, whose modules exchange what they compute with other ranks'.

        Its logits are those of its rows of the vocabulary. `all_kv_heads`: key-value heads of all ranks together.
        """
        super().__init__(shard.facts)
        self.shard, self.ranks, self._all_kv_heads = shard, ranks, all_kv_heads
        self._kv_caches: list[KVCache] = []

    # -- called by rank 0's engine ---------------------------------------------------------------------------------

    @property
    def all_kv_heads(self) -> int:
        """Key-value heads of all ranks together."""
        return self._all_kv_heads

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.shard.device

    @property
    def embedding(self) -> nn.Module:
        """Looks embeddings up on all ranks, for the draft. On CPUs they are fp32, which the draft's kernels need."""
        return _FunctionModule(self._embed)

    def make_kv_cache(self, *, num_slots: int, capacity: int, is_pool: bool = False) -> KVCache:
        """Allocate a KV cache on every rank."""
        with self.ranks.order(Op.SLOTS, torch.tensor([num_slots, capacity, is_pool])):
            return self._add_kv_cache(num_slots, capacity, is_pool)

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        kv_cache: KVCache,
        slots_B: torch.Tensor,
        starts_B: torch.Tensor,
        num_prompts: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Target.forward`, on every rank; prompts are computed as all else."""
        with self.ranks.order(Op.FORWARD, torch.tensor([self._index_of(kv_cache)]), ids_BT, slots_B, starts_B):
            return self.shard.forward(ids_BT, kv_cache=kv_cache, slots_B=slots_B, starts_B=starts_B)

    def copy_prefix(self, *, kv_cache: KVCache, source: int, slot: int, length: int, start: int) -> None:
        """As `Target.copy_prefix`, on every rank."""
        with self.ranks.order(Op.COPY, torch.tensor([self._index_of(kv_cache), source, slot, length, start])):
            kv_cache.copy_prefix(source, slot, length, start=start)

    def copy_blocks(
        self, *, kv_cache: KVCache, pool: KVCache, slot: int, first: int, places: Sequence[int], to_pool: bool
    ) -> None:
        """As `Target.copy_blocks`, on every rank."""
        where = [self._index_of(kv_cache), self._index_of(pool), slot, first, int(to_pool), *places]
        with self.ranks.order(Op.BLOCKS, torch.tensor(where)):
            kv_cache.copy_blocks(pool, slot=slot, first=first, places=places, to_pool=to_pool)

    def logits(self, last_BTH: torch.Tensor) -> torch.Tensor:
        """As `Target.logits`; each rank computes those of its rows of the vocabulary."""
        last_NH = last_BTH.reshape(-1, self.hidden_size).to(self.hidden_dtype).contiguous()
        with self.ranks.order(Op.LOGITS, torch.tensor([len(last_NH)])):
            logits_NV = self._gathered_logits(last_NH)
        assert logits_NV is not None
        return self.logit_transform.apply_softcap(logits_NV).view(*last_BTH.shape[:-1], -1)

    def _index_of(self, kv_cache: KVCache) -> int:
        return next(i for i, each in enumerate(self._kv_caches) if each is kv_cache)

    # -- run by the other ranks ------------------------------------------------------------------------------------

    @torch.no_grad()
    def run_worker_loop(self, *, after: Callable[[Order], None] = lambda order: None) -> None:
        """Execute rank 0's orders until it stops; calls `after` with each executed order. Raises RankError."""
        while True:
            order = self.ranks.next_order()
            tensors = [tensor.to(self.ranks.device) for tensor in order.tensors]
            match order.op:
                case Op.STOP:
                    return
                case Op.SLOTS:
                    self._add_kv_cache(*order.tensors[0].tolist())
                case Op.FORWARD:
                    index, ids_BT, slots_B, starts_B = tensors
                    kv_cache = self._kv_caches[int(index)]
                    self.shard.forward(ids_BT, kv_cache=kv_cache, slots_B=slots_B, starts_B=starts_B)
                case Op.COPY:
                    index, source, slot, length, start = order.tensors[0].tolist()
                    self._kv_caches[index].copy_prefix(source, slot, length, start=start)
                case Op.BLOCKS:
                    index, pool, slot, first, to_pool, *places = order.tensors[0].tolist()
                    where = {"slot": slot, "first": first, "places": places, "to_pool": bool(to_pool)}
                    self._kv_caches[index].copy_blocks(self._kv_caches[pool], **where)
                case Op.LOGITS:
                    size = (int(tensors[0]), self.hidden_size)
                    self._gathered_logits(torch.empty(size, dtype=self.hidden_dtype, device=self.ranks.device))
                case Op.EMBED:
                    self.shard.embedding(tensors[0])
            after(order)

    def _add_kv_cache(self, num_slots: int, capacity: int, is_pool: int) -> KVCache:
        made = self.shard.make_kv_cache(num_slots=num_slots, capacity=capacity, is_pool=bool(is_pool))
        self._kv_caches.append(made)
        return self._kv_caches[-1]

    def _gathered_logits(self, last_NH: torch.Tensor) -> torch.Tensor | None:
        """Logits [N, V] of rank 0's hidden states on rank 0, without the soft cap; None on the others."""
        parts = self.ranks.gather(self.shard.head(self.ranks.broadcast(last_NH)).float())
        return None if parts is None else torch.cat(parts, dim=-1)[:, : self.vocab_size]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        with self.ranks.order(Op.EMBED, ids):
            embeds: torch.Tensor = self.shard.embedding(ids)
            return embeds.float() if embeds.device.type == "cpu" and native.library() is not None else embeds


def read_shard(folder: Path, *, precision: str, strategy: Strategy, ranks: Ranks) -> ShardedTarget:
    """Read this rank's shard of a model folder, and check it; all ranks call it. Raises SourceError or ConfigError.

    Where the native kernels run (tensor_parallel on CPUs), precision is that of `load_target`; elsewhere bf16 applies
    to weights and activations.
    """
    assert precision in ("fp32", "bf16", "auto"), "grouped formats are not partitioned"
    dtype = model_dtype(precision, ranks.device)
    packing = strategy == "tensor_parallel" and ranks.device.type == "cpu" and native.library() is not None
    loaded_dtype = torch.float32 if packing else dtype
    config = read_model_config(folder)
    try:
        with init_empty_weights(include_buffers=False):  # buffers, such as rotary tables, are computed as usual
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=loaded_dtype, trust_remote_code=False
            )
    except Exception as error:  # as in loading.py
        raise loading_error(folder, error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise SourceError(
            f"target.source: {folder} holds quantised weights, which a sharded target does not read; name a folder "
            "with weights in bf16, fp16 or fp32"
        )
    text = config.get_text_config()
    kv_heads = total = kv_heads_of(text)
    if strategy == "tensor_parallel":
        heads = kv_heads_of_rank(text, rank=ranks.rank, size=ranks.size)
        kv_heads = heads.stop - heads.start
    else:
        total *= ranks.size
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    weight_format = WeightFormat.of_dtype(dtype) if packing else None
    with ShardReader(folder, dtype=loaded_dtype, base_prefix=model.base_model_prefix) as reader:
        partitioner = ModelPartitioner(model, ranks, reader, weight_format=weight_format)
        ranks.setup(model, partitioner.apply_fsdp if strategy == "fsdp" else partitioner.apply_tensor_parallel)
    shard = TorchTarget(model, kv_dtype=dtype, num_kv_heads=kv_heads)
    check_target(shard, compares_attention=False)  # a rank has some heads only, and some rows of the vocabulary
    return ShardedTarget(shard, ranks, all_kv_heads=total)


class _FunctionModule(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._function(ids)
