"""Reads one rank's shard of each weight from safetensors files or a GGUF file, and computes how a dimension is divided.

Leaves out: which weights are partitioned, and how they are used (partition.py).

Shapes: E experts, I intermediate size, H hidden size.
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
from aurora_lit.models.gguf import gguf_in
from aurora_lit.models.gguf_model import GgufWeights
from aurora_lit.models.source import UNQUANTISED

_UNQUANTISED_TYPES = ("BF16", "F16", "F32", "F64")
_STACKED_EXPERTS = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$")
_EXPERT_MATRICES = {
    "gate_up_proj": (("mlp", ("gate_proj", "up_proj")), ("block_sparse_moe", ("w1", "w3"))),
    "down_proj": (("mlp", ("down_proj",)), ("block_sparse_moe", ("w2",))),
}
"""Names in files of what transformers holds as one tensor [E, I, H]: the module, and the matrices to concatenate."""


def partition_slices(total: int, parts: int, *, unit: int = 1, shares: Sequence[float] | None = None) -> list[slice]:
    """Divide `total` into consecutive parts of whole units, in proportion to `shares` (None: equally).

    If it cannot be divided equally, the last parts are larger: rank 0 holds the first part and also runs the engine.
    Raises ValueError if a part would be empty.
    """
    units = total // unit
    if units * unit != total or units < parts:
        raise ValueError(f"{total} cannot be divided into {parts} parts in multiples of {unit}")
    if shares is None:
        bounds = [units * part // parts for part in range(parts + 1)]
    else:
        wanted = [round(units * sum(shares[:part]) / sum(shares)) for part in range(parts + 1)]
        bounds = [min(max(bound, part), units - (parts - part)) for part, bound in enumerate(wanted)]
    return [slice(unit * start, unit * stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


class ShardReader:
    """Reads parts of the weights in a model folder, by the names of transformers' parameters.

    >>> with ShardReader(folder, dtype=torch.float32, base_prefix="model") as reader:
    ...     reader.read("model.layers.0.mlp.gate_proj.weight", slice(0, 768))
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, base_prefix: str) -> None:
        """`base_prefix`: prefix of the model without its head; files that were saved without a head lack it."""
        self._folder, self._dtype, self._prefix = folder, dtype, f"{base_prefix}."
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> ShardReader:
        if gguf_in(self._folder) is not None:
            weights = GgufWeights.of(self._folder)
            self._files.update(dict.fromkeys(weights.tensors, weights))
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths and not self._files:
            raise SourceError(
                f"target.source: {self._folder} has neither safetensors files nor a GGUF file; sharding reads no others"
            )
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, *index: slice) -> torch.Tensor:
        """The part of a parameter given by `index`: one slice for each dimension from the first; none: all of it.

        Only that part is read from disk. The first slice may extend past the end; the part is then padded with rows of
        zeros. Raises SourceError if the files lack the parameter, or if it is quantised.
        """
        stored = self._find(name)
        stacked = _STACKED_EXPERTS.match(name)
        if stored is None and stacked is not None:
            return self._read_experts(name, stacked[1], stacked[2], index)
        if stored is None:
            raise self._missing(name)
        return self._part(stored, index)

    def read_gate_up(self, name: str, rows: slice) -> torch.Tensor:
        """The same rows of the gate and up matrices of every expert, concatenated: [E, 2·rows, H]."""
        whole = slice(None)
        stored = self._find(name)
        if stored is None:
            stacked = _STACKED_EXPERTS.match(name)
            if stacked is None:
                raise self._missing(name)
            return self._read_experts(name, stacked[1], stacked[2], (whole, rows))
        half = stored.get_shape()[1] // 2
        up = slice(half + rows.start, half + rows.stop)
        return torch.cat([self._part(stored, (whole, rows)), self._part(stored, (whole, up))], dim=1)

    def read_exact(self, name: str) -> torch.Tensor | None:
        """All of a tensor in the type in which it is stored; None if the files lack it."""
        stored = self._find(name)
        whole: torch.Tensor | None = None if stored is None else stored[:]
        return whole

    def has(self, name: str) -> bool:
        """True if the files hold this tensor."""
        return self._find(name) is not None

    def _find(self, name: str) -> Any:
        """A handle that reads slices of the stored tensor, under any of its known names; None if the files lack it."""
        short = name.removeprefix(self._prefix)
        for known in (name, short, name.replace(".mlp.", ".block_sparse_moe.")):
            if known in self._files:
                return self._files[known].get_slice(known)
        return None

    def _read_experts(self, name: str, layer: str, kind: str, index: tuple[slice, ...]) -> torch.Tensor:
        """Experts that files store one by one, stacked as transformers holds them."""
        for module, matrices in _EXPERT_MATRICES[kind]:
            expert = 0
            experts: list[list[Any]] = []
            while self._find(f"{layer}.{module}.experts.{expert}.{matrices[0]}.weight") is not None:
                experts.append([self._find(f"{layer}.{module}.experts.{expert}.{each}.weight") for each in matrices])
                expert += 1
            if experts:
                chosen, inner = (index[0] if index else slice(None)), index[1:]
                return torch.stack([torch.cat([self._part(m, inner) for m in ms]) for ms in experts[chosen]])
        raise self._missing(name)

    def _part(self, stored: Any, index: tuple[slice, ...]) -> torch.Tensor:
        if stored.get_dtype() not in _UNQUANTISED_TYPES:
            raise SourceError(
                f"target.source: {self._folder} has weights that are quantised ({stored.get_dtype()}); {UNQUANTISED}"
            )
        shape = stored.get_shape()
        inside = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=False))
        part: torch.Tensor = stored[inside] if inside else stored[:]
        part = part.to(self._dtype)
        if index and index[0].stop is not None and index[0].stop > shape[0]:
            missing = index[0].stop - max(shape[0], index[0].start)
            part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        return part

    def _missing(self, name: str) -> SourceError:
        return SourceError(
            f"target.source: {self._folder} lacks the weight {name}, or stores it in a layout that sharding does not "
            "support; use engine.strategy=single, or save the model again with transformers' save_pretrained"
        )
