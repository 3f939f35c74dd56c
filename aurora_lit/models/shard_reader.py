"""Who holds which part of a weight, and reading just that part from a model's safetensors files.

What is left out: which weights are cut, and how they work together (models/partition.py).

Shapes: E experts, I intermediate, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from aurora_lit.errors import SourceError

_FUSED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$")
_EXPERT_NAMES = {
    "gate_up_proj": (("mlp", ("gate_proj", "up_proj")), ("block_sparse_moe", ("w1", "w3"))),
    "down_proj": (("mlp", ("down_proj",)), ("block_sparse_moe", ("w2",))),
}
"""How files name what transformers holds as one tensor [E, I, H]: the layer's part, and the matrices laid together."""


def split(total: int, parts: int, *, unit: int = 1, shares: Sequence[float] | None = None) -> list[slice]:
    """Cut `total` into neighbouring parts of whole units, as near to `shares` of it as can be (None: equal ones).

    Where equal parts are not to be had the last are larger: rank 0 holds the first, and has the engine to run beside.
    Raises ValueError when a part would be empty.
    """
    units = total // unit
    if units * unit != total or units < parts:
        raise ValueError(f"{total} cannot be cut into {parts} parts of whole {unit}s")
    if shares is None:
        bounds = [units * part // parts for part in range(parts + 1)]
    else:
        wanted = [round(units * sum(shares[:part]) / sum(shares)) for part in range(parts + 1)]
        bounds = [min(max(bound, part), units - (parts - part)) for part, bound in enumerate(wanted)]
    return [slice(unit * start, unit * stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


class ShardReader:
    """Parts of the weights in a model folder, by the names of transformers' parameters.

    >>> with ShardReader(folder, dtype=torch.float32, base_prefix="model") as reader:
    ...     reader.read("model.layers.0.mlp.gate_proj.weight", slice(0, 768))
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, base_prefix: str) -> None:
        """`base_prefix`: of the model without its head; files of such models lack it."""
        self._folder, self._dtype, self._prefix = folder, dtype, f"{base_prefix}."
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> ShardReader:
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths:
            raise SourceError(f"target.source: {self._folder} holds no safetensors files; sharding reads nothing else")
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """The part of a parameter that `index` cuts out (one slice a dimension, from the first; none is all of it).

        Only that part is read from the disk. A last slice may reach past the end: rows of zeros stand there then.
        Raises SourceError when the files lack it.
        """
        fused = _FUSED.match(name)
        if fused is not None and self._find(name) is None:
            return self._read_experts(name, fused[1], fused[2], index)
        found = self._find(name)
        if found is None:
            raise self._missing(name)
        return self._part(found, index)

    def read_gate_up(self, name: str, rows: slice) -> torch.Tensor:
        """The same rows of gate and up of every expert, laid together: [E, 2·rows, H]."""
        whole = slice(None)
        if self._find(name) is None:
            fused = _FUSED.match(name)
            assert fused is not None
            return self._read_experts(name, fused[1], fused[2], (whole, rows))
        found = self._find(name)
        half = found.get_shape()[1] // 2
        up = slice(half + rows.start, half + rows.stop)
        return torch.cat([self._part(found, (whole, rows)), self._part(found, (whole, up))], dim=1)

    def _find(self, name: str) -> Any:
        short = name.removeprefix(self._prefix)
        for known in (name, short, name.replace(".mlp.", ".block_sparse_moe.")):
            if known in self._files:
                return self._files[known].get_slice(known)
        return None

    def _read_experts(self, name: str, layer: str, kind: str, index: tuple[slice, ...]) -> torch.Tensor:
        """Experts that lie one by one, laid together as transformers holds them."""
        for part, matrices in _EXPERT_NAMES[kind]:
            expert = 0
            experts: list[list[Any]] = []
            while self._find(f"{layer}.{part}.experts.{expert}.{matrices[0]}.weight") is not None:
                experts.append([self._find(f"{layer}.{part}.experts.{expert}.{each}.weight") for each in matrices])
                expert += 1
            if experts:
                chosen, inner = (index[0] if index else slice(None)), index[1:]
                return torch.stack([torch.cat([self._part(m, inner) for m in ms]) for ms in experts[chosen]])
        raise self._missing(name)

    def _part(self, found: Any, index: tuple[slice, ...]) -> torch.Tensor:
        shape = found.get_shape()
        inside = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=False))
        part: torch.Tensor = found[inside] if inside else found[:]
        part = part.to(self._dtype)
        if index and index[0].stop is not None and index[0].stop > shape[0]:
            missing = index[0].stop - max(shape[0], index[0].start)
            part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        return part

    def _missing(self, name: str) -> SourceError:
        return SourceError(
            f"target.source: {self._folder} lacks the weight {name}, or lays it out in a way that sharding does not "
            "know; use engine.strategy=single, or save the model again with transformers' save_pretrained"
        )
