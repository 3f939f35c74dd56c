"""The processes (ranks) that share one target: their process groups, and the orders that rank 0 sends to the others.

Only rank 0 runs the engine. Before each operation that all ranks must take part in, it sends them an *order*; every
rank then runs the operation, so that their collectives match. Orders travel over a gloo group of their own, also on
GPUs; the tensors of a forward pass travel over Fabric's group (gloo on CPUs, NCCL on GPUs).

Leaves out what a rank does for an order (models/sharded_target.py) and what happens when a rank dies (serve/ranks.py).

    ranks = Ranks(rank=0, size=2, folder=run_folder, strategy="fsdp")    # in each process; waits for the others
    with ranks.order(Op.FORWARD, ids_BT, starts_B): ...                  # rank 0
    order = ranks.next_order()                                           # the other ranks, in a loop

A failure during an order, such as a lost rank, raises RankError. The group cannot be repaired: the process must exit.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from aurora_lit.errors import RankError

Strategy = Literal["fsdp", "tensor_parallel"]
Parallelize = Callable[[Any, DeviceMesh], Any]

_FILE_NAME = "ranks"
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""Name of the loopback interface, by sys.platform."""
_INLINE_WORDS = 1024
"""Size of an order's first message, in int64; the rest follows in a second message."""
_MAX_TENSORS, _MAX_DIMS = 6, 3
_HEADER_WORDS = 3 + _MAX_TENSORS * (1 + _MAX_DIMS)
_COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""Much longer than any forward pass. The server notices dead or stopped ranks itself (serve/ranks.py); this timeout
only ends ranks that got out of step."""
_IDLE_TIMEOUT = timedelta(days=365)
"""How long a rank waits for an order; an idle server sends none."""


def use_loopback() -> None:
    """Have the groups that this process joins from now on, all of one machine, be unreachable from the network.

    A choice that the environment makes in GLOO_SOCKET_IFNAME holds.
    """
    if (interface := _LOOPBACK.get(sys.platform)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


class Op(IntEnum):
    """The operation that an order asks for."""

    STOP = 0
    VERSION = 1
    """The draft that proposes from now on: its name, one character in each int64."""
    SLOTS = 2
    FORWARD = 3
    LOGITS = 4
    EMBED = 5
    COPY = 6
    BLOCKS = 7


@dataclass(frozen=True, kw_only=True)
class Order:
    """One operation for all ranks."""

    op: Op
    tensors: tuple[torch.Tensor, ...]
    """int64, on the CPU."""
    version: str
    """Name of the draft that proposes."""
    num_versions: int
    """Number of drafts announced so far."""


class Ranks:
    """This process's membership in the group of ranks, all on one machine."""

    def __init__(self, *, rank: int, size: int, folder: Path, strategy: Strategy, on_gpus: bool = False) -> None:
        """Join the group; returns when all ranks have joined.

        `folder` must be private to the ranks and not have been used for another group: they rendezvous through a file
        in it, so no port is needed and no other process can join. `on_gpus`: the device is the GPU with this rank's
        number, else the CPU.
        """
        self.rank, self.size = rank, size
        self.version = ""
        """Name of the draft that proposes, as last announced by rank 0."""
        self.num_versions = 0
        """Number of announcements so far. Every order carries it, and a rank with another count refuses the order."""
        self._lock = threading.RLock()
        self._broken = False
        self._parallelize: Parallelize | None = None
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        use_loopback()
        if on_gpus:
            torch.cuda.set_device(rank)
        store = dist.FileStore(str(folder / _FILE_NAME), size)  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT
        )
        self._control: Any = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        self.fabric = Fabric(
            accelerator="cuda" if on_gpus else "cpu",
            devices=size,
            strategy=ModelParallelStrategy(
                lambda model, mesh: self._parallelize(model, mesh),  # type: ignore[misc]
                data_parallel_size=size if strategy == "fsdp" else 1,
                tensor_parallel_size=1 if strategy == "fsdp" else size,
            ),
            plugins=[LightningEnvironment()],
        )
        self.fabric.launch()
        self.device = self.fabric.device

    def setup(self, model: nn.Module, parallelize: Parallelize) -> None:
        """Shard a model over the ranks with Fabric's strategy; `parallelize(model, mesh)` returns the sharded model."""
        self._parallelize = parallelize
        self.fabric.setup_module(model, move_to_device=False)

    def announce(self, version: str) -> None:
        """Announce to all ranks which draft proposes from now on; does nothing if it is the same as before."""
        if version != self.version:
            with self.order(Op.VERSION, torch.tensor([ord(character) for character in version], dtype=torch.int64)):
                self.version = version
                self.num_versions += 1

    @contextmanager
    def order(self, op: Op, *tensors: torch.Tensor) -> Iterator[None]:
        """Order `op` from the other ranks, then run this rank's part inside the block; one order at a time."""
        with self._lock:
            if self._broken:
                raise RankError(f"rank {self.rank} of {self.size} has lost the other ranks")
            try:
                self._send(op, tensors)
                yield
            except RuntimeError as error:
                self._broken = True
                raise RankError(f"the engine's processes cannot continue together: {error}") from error
            except BaseException:
                self._broken = True  # the other ranks may be in the middle of the operation
                raise

    def next_order(self) -> Order:
        """Wait for the next order and return it. Raises RankError if rank 0 is gone."""
        try:
            return self._receive()
        except RuntimeError as error:
            raise RankError(f"rank 0 of {self.size} is gone: {error}") from error

    def stop(self) -> None:
        """Order the other ranks to exit; does nothing if the group is already broken."""
        if not self._broken:
            with self.order(Op.STOP):
                self._broken = True

    # -- collectives of a forward pass -----------------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; bit-identical on every rank."""
        dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on every rank, in place."""
        dist.broadcast(tensor, 0)
        return tensor

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """On rank 0, the parts of all ranks, which have one shape; None on the others."""
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, parts, 0)
        return parts

    # -- orders as int64 messages ----------------------------------------------------------------------------------

    def _send(self, op: Op, tensors: tuple[torch.Tensor, ...]) -> None:
        assert self.rank == 0
        assert len(tensors) <= _MAX_TENSORS
        shapes = torch.zeros(_MAX_TENSORS, 1 + _MAX_DIMS, dtype=torch.int64)
        for i, tensor in enumerate(tensors):
            shapes[i, 0] = tensor.ndim
            shapes[i, 1 : 1 + tensor.ndim] = torch.tensor(tensor.shape)
        head = torch.tensor([op, self.num_versions, len(tensors)])
        words = torch.cat([head, shapes.flatten(), *(tensor.flatten().cpu() for tensor in tensors)])
        first = torch.zeros(_INLINE_WORDS, dtype=torch.int64)
        first[: len(words)] = words[:_INLINE_WORDS]
        dist.broadcast(first, 0, group=self._control)
        if len(words) > _INLINE_WORDS:
            dist.broadcast(words[_INLINE_WORDS:].clone(), 0, group=self._control)

    def _receive(self) -> Order:
        words = torch.zeros(_INLINE_WORDS, dtype=torch.int64)
        dist.broadcast(words, 0, group=self._control)
        op, versions, count = words[:3].tolist()
        if versions != self.num_versions:
            raise RankError(f"rank {self.rank} has counted {self.num_versions} drafts, rank 0 has announced {versions}")
        shapes = [row[1 : 1 + row[0]] for row in words[3:_HEADER_WORDS].view(_MAX_TENSORS, -1)[:count].tolist()]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        missing = _HEADER_WORDS + sum(sizes) - _INLINE_WORDS
        if missing > 0:
            rest = torch.zeros(missing, dtype=torch.int64)
            dist.broadcast(rest, 0, group=self._control)
            words = torch.cat([words, rest])
        parts = torch.split(words[_HEADER_WORDS : _HEADER_WORDS + sum(sizes)], sizes)
        tensors = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        if op == Op.VERSION:
            self.version = "".join(map(chr, tensors[0].tolist()))
            self.num_versions += 1
        return Order(op=Op(op), tensors=tensors, version=self.version, num_versions=self.num_versions)
