"""A sharded target mixes no devices: an engine and a follower of its orders on a device that refuses CPU tensors.

One rank holds all of the model and its collectives do nothing, so this shows where tensors are, not what ranks exchange
(test_sharding.py). The device is a fake one; a real GPU was never available to these tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import copies_in_python
from support.fake_device import fake_device
from support.tiny_models import VOCAB, make_engine, random_draft, request, run, save_model
from transformers import AutoModelForCausalLM

from aurora_lit.distributed import Op, Order, Ranks
from aurora_lit.kernels import native, suffix_index
from aurora_lit.models.loading import load_target
from aurora_lit.models.partition import VocabParallelEmbedding
from aurora_lit.models.sharded_target import ShardedTarget
from aurora_lit.models.target_check import check_target
from aurora_lit.models.torch_target import TorchTarget


class OneRank(Ranks):
    """A group of one: sums, broadcasts and gathers change nothing; orders are kept as their messages carry them."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device, self.version, self.num_versions = 0, 1, device, "", 0
        self.orders: list[Order] = []

    @contextmanager
    def order(self, op: Op, *tensors: torch.Tensor) -> Iterator[None]:
        sent = tuple(torch.cat([tensor.flatten().cpu()]).view(tensor.shape) for tensor in tensors)
        self.orders.append(Order(op=op, tensors=sent, version="", num_versions=0))
        yield

    def next_order(self) -> Order:
        return self.orders.pop(0)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        return [part]


def sharded(folder: Path, ranks: OneRank) -> ShardedTarget:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(ranks.device)
    embedding = model.get_input_embeddings()
    parallel = VocabParallelEmbedding(embedding, embedding.weight, first=0, ranks=ranks)
    model.set_input_embeddings(parallel)
    shard = TorchTarget(model, kv_dtype=torch.float32)
    check_target(shard)
    return ShardedTarget(shard, ranks, all_kv_heads=1)


@pytest.mark.process
def test_orders_are_carried_out_on_the_device_of_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(suffix_index, "look_up", copies_in_python.look_up)
    folder = save_model("llama", tmp_path, num_hidden_layers=3)
    whole = load_target(folder, precision="fp32")
    prefix = tuple(i % (VOCAB - 1) + 1 for i in range(20))
    requests = [
        request("first", (*prefix, 3), max_tokens=4),
        request("second", (*prefix, 4), max_tokens=4),  # copies the prefix from the first
        request("greedy", (5, 6, 7), max_tokens=8),
        request("seeded", (8, 9), temperature=0.8, seed=1, repetition_penalty=1.2),
        request("logprobs", (1, 2, 3, 4), logprobs=2, prompt_logprobs=1),
    ]
    draft = random_draft(whole)
    expected = run(make_engine(whole, random_draft(whole), max_batch_size=2, copied_tokens=6), requests)
    with fake_device() as device:
        leader, follower = OneRank(device), OneRank(device)
        target = sharded(folder, leader)
        answers = run(make_engine(target, draft, max_batch_size=2, copied_tokens=6), requests)
        assert {name: answer.token_ids for name, answer in answers.items()} == {
            name: answer.token_ids for name, answer in expected.items()
        }
        assert {order.op for order in leader.orders} == {Op.SLOTS, Op.FORWARD, Op.LOGITS, Op.EMBED, Op.COPY}
        assert {tensor.device.type for order in leader.orders for tensor in order.tensors} == {"cpu"}
        other = sharded(folder, follower)
        stop = Order(op=Op.STOP, tensors=(), version="", num_versions=0)
        follower.orders = [*leader.orders, stop]
        other.run_worker_loop()
        for ours, theirs in zip(target._kv_caches[0].values_SGMDE, other._kv_caches[0].values_SGMDE, strict=True):
            assert torch.equal(ours.cpu(), theirs.cpu())
