"""A target that is loaded from a file of its packed weights, without transformers and without fp32 weights.

    target = load_target(folder, precision="int4", cache_dir=cache)     # in a second or less from the second time on

The first time the model is loaded as always (target.py): read as fp32, packed, compared with its own forward pass. If
its layers are fused, everything that its forward pass reads is then written to a file of the cache. The file is not
used if anything has changed that determines its content: the source, the precision, our code, the kernels, the
processor, the libraries. What was proved when it was written therefore still holds, and outputs are equal bit for bit.

Leaves out the file's format (packed_file.py). A model whose layers are not fused, or that is small, has no such file.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aurora_lit.durable import changed_at
from aurora_lit.errors import AuroraError, CacheError
from aurora_lit.kernels import matmul, native
from aurora_lit.kernels.decoder import LayerWeights
from aurora_lit.kernels.packed_linear import TENSOR_NAMES, PackedEmbedding, PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models import packed_file
from aurora_lit.models.fused_layers import decoder_parts, make_decoder
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.logit_transform import LogitTransform

_SMALLEST_BYTES = 64 << 20
"""Smaller sources are packed as fast as a file is read."""
_KEPT_FILES = 2
"""Files of one source and precision that stay in the cache, the newest: two versions of the code can share it."""
_ABANDONED_AFTER_S = 3600
"""A file that is not finished after this time is of a process that was killed; writing takes seconds."""
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100 << 20
"""safetensors reads no longer ones."""
_FACTS = (
    *("vocab_size", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "rope", "max_positions"),
    "logit_factor",
)
_NORMS = ("norm_attention", "norm_mlp")
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_TABLES = ("final_norm", "frequencies_F")
_CODE = (*Path(native.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.py"))
_log = logging.getLogger(__name__)


def load_target(folder: Path, *, precision: str, cache_dir: Path) -> Target:
    """A target for serving: from its packed file if there is one that fits, otherwise from the model folder.

    In the second case the file is written, if it can be. Raises SourceError.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if native.library() is None or size < _SMALLEST_BYTES:
        return Target.load(folder, precision=precision)
    key = packed_key(folder, precision=precision)
    path = packed_path(folder, key=key, cache_dir=cache_dir)
    try:
        return PackedTarget.read(path, key=key)
    except FileNotFoundError:
        pass
    except CacheError as error:
        _log.warning("%s; it is made again", error)
    target = Target.load(folder, precision=precision)
    if not target.supports_trees:  # its layers are not fused
        return target
    try:
        write_packed(target, path, key=key)
        _remove_older(path)
        packed = PackedTarget.read(path, key=key)
    except (OSError, CacheError) as error:
        _log.warning("the packed weights are not kept, so that every start packs them: %s", error)
        return target
    del target
    gc.collect()  # the model refers to itself
    return packed


def packed_path(folder: Path, *, key: Mapping[str, str], cache_dir: Path) -> Path:
    """The file for a model folder. Versions of the code or of the machine have names of their own."""
    source = hashlib.sha256(f"{folder.resolve()} {key['precision']}".encode()).hexdigest()[:16]
    version = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    return cache_dir / "packed" / f"{source}-{version}.safetensors"


def packed_key(folder: Path, *, precision: str) -> dict[str, str]:
    """Everything that determines a packed file's content, by what it is.

    Files of weights are identified by name, size, time of change and the beginning of each tensor: to read them whole
    would take as long as loading, and some tools give every file the same time.
    """
    source, code = hashlib.sha256(), hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            status = path.stat()
            source.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            for part in _sample(path):
                source.update(part)
        elif path.name in ("config.json", "generation_config.json"):
            source.update(path.read_bytes())
    for path in sorted(_CODE):
        code.update(path.read_bytes())
    return {
        "precision": precision,
        "source": source.hexdigest(),
        "code": code.hexdigest(),
        "kernels": native.build_digest(),
        "libraries": f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}",
    }


def safetensors_digest(folder: Path) -> str:
    """Digest of a sample of the weights, or traces, in a folder. A copy of the folder has the same one.

    Raises AuroraError if there are none: all such folders would have the same digest.
    """
    digest, paths = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    if not paths:
        raise AuroraError(f"{folder} holds no *.safetensors file; name the folder that does")
    for path in paths:
        for part in _sample(path):
            digest.update(part)
    return digest.hexdigest()


def _sample(path: Path) -> Iterator[bytes]:
    """A safetensors file's header, and the beginning of each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _MAX_HEADER_BYTES))
        yield header
        try:
            begins = [entry["data_offsets"][0] for name, entry in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):  # loading it will say what is wrong
            return
        for begin in begins:
            yield os.pread(file.fileno(), _SAMPLE_BYTES, 8 + length + begin)


def write_packed(target: Target, path: Path, *, key: Mapping[str, str]) -> None:
    """Write a target whose layers are fused. Raises OSError."""
    parts = decoder_parts(target.model)
    assert parts is not None
    assert target.supports_trees
    linears = {"head": _packed_head(target)}
    tensors: dict[str, torch.Tensor] = {name: parts.pop(name).float() for name in _TABLES}
    for index, layer in enumerate(parts.pop("layers")):
        linears |= {f"{index}.{name}": getattr(layer, name) for name in _MATRICES}
        tensors |= {f"{index}.{name}": getattr(layer, name) for name in _NORMS}
    embedding = exact_table(target)
    if embedding is not None:
        linears["embedding"] = embedding
    if target.logit_transform.bias_V is not None:
        tensors["logit_bias"] = target.logit_transform.bias_V
    for name, linear in linears.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in linear.tensors().items()}
    facts = {
        **{name: getattr(target, name) for name in _FACTS},
        "aux_layer_ids": target.aux_layer_ids,
        "end_of_text_ids": sorted(target.end_of_text_ids),
        "softcap": target.logit_transform.softcap,
        "kv_dtype": WeightFormat.of_dtype(target.kv_dtype).value,
        "decoder": parts,
        "linears": {
            name: [each.weight_format.value, each.out_features, each.in_features] for name, each in linears.items()
        },
    }
    packed_file.write(path, tensors, facts=facts, key=key)


def exact_table(target: Target) -> PackedLinear | None:
    """The embedding in the fewest bits that change none of its values; None: the head has these values already."""
    rows_VH = target.embedding_rows()
    if torch.equal(_packed_head(target).rows(torch.arange(len(rows_VH))), rows_VH):
        return None
    formats = [WeightFormat.INT4_GROUPED, WeightFormat.INT8_GROUPED, WeightFormat.BF16, WeightFormat.FP32]
    fewest = next(each for each in formats if torch.equal(matmul.packed_values(rows_VH, each), rows_VH))
    table = nn.Linear(rows_VH.shape[1], len(rows_VH), bias=False, device="meta")
    table.weight = nn.Parameter(rows_VH, requires_grad=False)
    return PackedLinear(table, fewest)


class PackedTarget(Target):
    """A target over packed weights only: it runs over a KV cache, and there is no transformers model in it.

    So it lacks `model`, `check`, `fuse_layers`, `compile_forward` and `forward_uncached`.
    """

    def __init__(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """What `write_packed` wrote."""
        nn.Module.__init__(self)
        for name in _FACTS:
            setattr(self, name, facts[name])
        self.aux_layer_ids = tuple(facts["aux_layer_ids"])
        self.end_of_text_ids = frozenset(facts["end_of_text_ids"])
        self.kv_dtype = WeightFormat(facts["kv_dtype"]).storage_dtype
        bias_V = tensors.get("logit_bias")
        if bias_V is not None:
            bias_V = bias_V.clone()  # learners keep it, and a view would keep all weights
        self.logit_transform = LogitTransform(bias_V=bias_V, softcap=facts["softcap"])
        linears = {}
        for name, (weight_format, *shape) in facts["linears"].items():
            parts = {part: tensors[f"{name}.{part}"] for part in TENSOR_NAMES if f"{name}.{part}" in tensors}
            linears[name] = PackedLinear.from_tensors(parts, WeightFormat(weight_format), shape)
        layers = []
        for index in range(self.num_layers):
            weights: dict[str, Any] = {name: tensors[f"{index}.{name}"] for name in _NORMS}
            weights |= {name: linears[f"{index}.{name}"] for name in _MATRICES}
            layers.append(LayerWeights(norm_embeds=None, **weights))
        tables: dict[str, Any] = {name: tensors[name] for name in _TABLES}
        self._decoder = make_decoder(layers=layers, **tables, **facts["decoder"], aux_layer_ids=self.aux_layer_ids)
        self._head = linears["head"]
        self._embedding = PackedEmbedding(linears.get("embedding", self._head))

    @classmethod
    def read(cls, path: Path, *, key: Mapping[str, str]) -> PackedTarget:
        """Load a packed file. Raises FileNotFoundError and CacheError."""
        facts, tensors = packed_file.read(path, key=key)
        return cls(facts, tensors)

    @property
    def device(self) -> torch.device:
        """Where the kernels run."""
        return torch.device("cpu")

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        return self._head

    @property
    def embedding(self) -> nn.Module:
        """The input embedding: a table of its own, or the rows of the head."""
        return self._embedding


def _packed_head(target: Target) -> PackedLinear:
    head = target.head
    assert isinstance(head, PackedLinear)
    return head


def _remove_older(path: Path) -> None:
    """Delete all but the newest files of a source, and what killed processes left of them."""
    source, _ = path.stem.split("-")
    files = sorted(path.parent.glob(f"{source}-*.safetensors"), key=changed_at)
    abandoned_before = time.time() - _ABANDONED_AFTER_S
    unfinished = path.parent.glob(f".{source}-*.safetensors.*")
    for old in [*files[:-_KEPT_FILES], *(each for each in unfinished if changed_at(each) < abandoned_before)]:
        old.unlink(missing_ok=True)
