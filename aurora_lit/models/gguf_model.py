"""A transformers model whose weights are read from a GGUF file, tensor by tensor.

    model = packed_model(folder, precision="auto")        # its linear layers packed; or the reason why they are not
    model = plain_model(folder, dtype=torch.bfloat16)     # as transformers would load it

Which tensor is which parameter, and what llama.cpp did to it (it permutes rows of queries and keys of Llama), is asked
of transformers. `packed_model` never holds a model's values: each tensor is packed a few rows at a time.

Leaves out: reading the file (gguf.py, gguf_blocks.py), and running the model (torch_target.py, native_target.py).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from aurora_lit.errors import SourceError
from aurora_lit.kernels import huge_pages, matmul, native, quantization
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear, head_format
from aurora_lit.kernels.quantization import Codes
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.families import family_of
from aurora_lit.models.gguf import GgufFile, gguf_in
from aurora_lit.models.gguf_blocks import FORMATS, TOLERANCE, codes, values
from aurora_lit.models.source import cache_root, check_names, read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PART_VALUES = 1 << 20
"""Values of a matrix that are read at a time; so few that torch does not divide work on their groups over threads."""
_ROWS_UNIT = 32
"""Rows are packed in multiples of a block of the kernels."""
_GROUP_INPUTS = 32
"""Of a matrix that is not quantised: the group that `TOLERANCE` refers to."""
_SHARD_BYTES = 1 << 30
_log = logging.getLogger(__name__)


class _NotHeldError(Exception):
    """A format does not hold a tensor within `TOLERANCE`."""


class GgufWeights:
    """The tensors of a GGUF file by the names of a model's parameters."""

    def __init__(self, model: PreTrainedModel, file: GgufFile) -> None:
        """`model`: may be without values. Raises SourceError if the file has tensors that the model has not."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.file = file
        config = model.config.get_text_config()
        self._parsed: dict[str, Any] = {"config": config.to_dict(), "tensors": {}}
        kind: Any = TENSOR_PROCESSORS.get(file.metadata["general.architecture"], TensorProcessor)
        self._processor: Any = kind(config=self._parsed["config"])
        self._parameters = _parameter_names(model, self._processor)
        self.tensors = {self._parameters[name]: name for name in file.tensors if name in self._parameters}
        """Names in the file by names of parameters."""
        if "rope_freqs.weight" in file.tensors:
            raise SourceError(
                f"target.source: {file.path} scales the frequencies of its rotary embedding (rope_freqs.weight), which "
                "is not read; name the model in safetensors"
            )

    @classmethod
    def of(cls, folder: Path) -> GgufWeights:
        """Those of a model folder. Raises SourceError."""
        path = gguf_in(folder)
        assert path is not None
        return cls(empty_model(folder, dtype=torch.float32), GgufFile(path))

    def get_slice(self, parameter: str) -> _Whole:
        """A parameter as safetensors gives it; it is read whole."""
        return _Whole(self.values(parameter))

    def values(self, parameter: str) -> Tensor:
        """A parameter's values, fp32."""
        name = self.tensors[parameter]
        return self._processed(name, values(self.file, name).numpy())

    def row_order(self, parameter: str) -> Tensor | None:
        """Which rows of the tensor in the file are the parameter's; None: all in their order."""
        rows = self.file.tensors[self.tensors[parameter]].shape[0]
        order = self._processed(self.tensors[parameter], np.arange(rows))
        return None if torch.equal(order, torch.arange(rows)) else order

    def state(self) -> dict[str, Tensor]:
        """All parameters, fp32."""
        found = {}
        for name in self.file.tensors:
            result = self._process(name, values(self.file, name).numpy())
            if result.name in self._parameters:
                found[self._parameters[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))
        return found | {name: torch.as_tensor(tensor) for name, tensor in self._parsed["tensors"].items()}

    def _processed(self, name: str, weights: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._process(name, weights).weights))

    def _process(self, name: str, weights: np.ndarray) -> Any:
        return self._processor.process(
            weights=weights, name=name, tensor_key_mapping=self._parameters, parsed_parameters=self._parsed
        )


class _Whole:
    """A parameter behind the interface of a slice of a safetensors file."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return list(self._values.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self._values[index].clone()


def _parameter_names(model: PreTrainedModel, processor: Any) -> dict[str, str]:
    """Names of a model's parameters by those of tensors in a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    config = model.config.get_text_config()
    architecture = next((each for each, name in MODEL_ARCH_NAMES.items() if name == config.model_type), None)
    if architecture is not None:
        names = get_tensor_name_map(architecture, config.num_hidden_layers)
        found = {}
        for parameter in model.state_dict():
            module, _, kind = processor.preprocess_name(parameter).rpartition(".")
            found[f"{names.get_name(module)}.{kind}"] = parameter
        if len(found) == len(model.state_dict()):
            return found
    slowly: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    return slowly  # of parameters that only parts of a model give their names


def empty_model(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a folder's configuration whose parameters have no values. Raises SourceError."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = read_model_config(folder)
    with init_empty_weights(include_buffers=False):  # buffers, such as rotary tables, are computed as usual
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.train(False)
    return model


def plain_model(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model as transformers would load it. Raises SourceError, and what transformers raises."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

    path = gguf_in(folder)
    assert path is not None
    file = GgufFile(path)
    if file.metadata["general.architecture"] in GGUF_ARCHS:  # which transformers reads in another way
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=dtype)
        return loaded
    model = empty_model(folder, dtype=dtype)
    state = {name: tensor.to(dtype) for name, tensor in GgufWeights(model, file).state().items()}
    loading = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    check_names(folder, missing=missing, unread=set(loading.unexpected_keys))
    return model


def packed_model(folder: Path, *, precision: str) -> PreTrainedModel | str:
    """A model with packed linear layers, embedding and head; or the reason why its family cannot be packed so.

    `precision`: fp32, bf16, int8, int4 or auto. With "auto" each matrix is in the format that holds the file's values
    within `TOLERANCE` in the fewest bits: its own codes, if possible. Layers are either all grouped or all in bf16 or
    all in fp32. The embedding has the file's values whatever the precision. Raises SourceError.
    """
    path = gguf_in(folder)
    assert path is not None
    config = read_model_config(folder)
    if isinstance(family := family_of(config.get_text_config()), str):
        return family
    model = empty_model(folder, dtype=torch.float32)
    weights = GgufWeights(model, GgufFile(path))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    names = {module: name for name, module in model.named_modules()}
    of_embedding = f"{names[embedding]}.weight"
    of_head = f"{names[head]}.weight"
    if of_head not in weights.tensors:
        of_head = of_embedding
    linears = {name: each for each, name in names.items() if type(each) is nn.Linear and each is not head}
    wanted = {name for name, _ in model.named_parameters()} - {f"{names[head]}.weight"} | {of_head}
    check_names(folder, missing=wanted - set(weights.tensors), unread=set())

    if precision == "auto" and not native.has_byte_products():
        precision = "bf16"
    layer_format = None if precision == "auto" else WeightFormat(precision)
    packed = _pack_alike(weights, [f"{name}.weight" for name in linears], layer_format)
    for name, linear in linears.items():
        layer = packed[f"{name}.weight"]
        if linear.bias is not None:
            layer.bias = weights.values(f"{name}.bias")
        model.set_submodule(name, layer)
    of_layers = None if layer_format is None else head_format(layer_format)
    new_head = _pack_alike(weights, [of_head], of_layers, as_head=True)[of_head]
    table = new_head
    if of_embedding != of_head or layer_format is not None:
        kept = WeightFormat.FP32 if precision == "fp32" else None
        table = _pack_alike(weights, [of_embedding], kept, as_head=of_embedding == of_head)[of_embedding]
        if of_embedding == of_head and table.weight_format is new_head.weight_format:
            table = new_head if torch.equal(table.packed, new_head.packed) else table
    model.set_output_embeddings(new_head)  # type: ignore[no-untyped-call]
    model.set_input_embeddings(PackedEmbedding(table))
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        vector = nn.Parameter(weights.values(name), requires_grad=False)
        assert parameter.shape == vector.shape
        setattr(model.get_submodule(module), attribute, vector)
    return model


def _pack_alike(
    weights: GgufWeights, parameters: list[str], weight_format: WeightFormat | None, *, as_head: bool = False
) -> dict[str, PackedLinear]:
    """Some matrices by their names. Without a format: each in a grouped one, else all in bf16, else all in fp32.

    `as_head`: in the format of a head with these numbers.
    """
    if weight_format is not None:
        return {name: _packed(weights, name, weight_format) for name in parameters}
    for each in (None, WeightFormat.BF16):
        try:
            return {name: _packed(weights, name, each, within=TOLERANCE, as_head=as_head) for name in parameters}
        except _NotHeldError as error:
            _log.debug("%s is not held in %s", error, "a grouped format" if each is None else each.value)
    return {name: _packed(weights, name, WeightFormat.FP32) for name in parameters}


def _packed(
    weights: GgufWeights,
    parameter: str,
    weight_format: WeightFormat | None,
    *,
    within: float | None = None,
    as_head: bool = False,
) -> PackedLinear:
    """A matrix in a format; None: in the grouped one that holds its codes. Raises _NotHeldError."""
    tensor = weights.tensors[parameter]
    entry, order = weights.file.tensors[tensor], weights.row_order(parameter)
    O, I = entry.shape  # noqa: E741
    rows = O if order is not None else max(_ROWS_UNIT, _PART_VALUES // I // _ROWS_UNIT * _ROWS_UNIT)
    begins = range(0, O, rows)
    if weight_format is None:
        weight_format = FORMATS.get(entry.type)
        if weight_format is None:
            raise _NotHeldError(parameter)
        weight_format = weight_format.of_head if as_head else weight_format
        parts: Iterator[Codes] = (_codes(weights.file, tensor, begin, begin + rows, order) for begin in begins)
        packed = matmul.pack_codes(parts, weight_format, (O, I))
        return PackedLinear.from_tensors({"weight": packed}, weight_format, (O, I))
    plain = (values(weights.file, tensor, begin, begin + rows) for begin in begins)
    ordered = (part_OI if order is None else part_OI[order] for part_OI in plain)
    if weight_format.grouped_bits is not None:
        parts = (quantization.quantize_grouped(part_OI, weight_format) for part_OI in ordered)
        packed = matmul.pack_codes(parts, weight_format, (O, I))
        return PackedLinear.from_tensors({"weight": packed}, weight_format, (O, I))
    pieces = []
    for part_OI in ordered:
        if within is not None and not _is_held(part_OI, weight_format, within):
            raise _NotHeldError(parameter)
        pieces.append(matmul.pack_weight(part_OI, weight_format))
    packed = pieces[0]
    if len(pieces) > 1:
        packed = torch.cat(pieces, out=huge_pages.empty(sum(map(len, pieces)), pieces[0].dtype))
    return PackedLinear.from_tensors({"weight": packed}, weight_format, (O, I))


def _codes(file: GgufFile, tensor: str, begin: int, end: int, order: Tensor | None) -> Codes:
    found = codes(file, tensor, begin, end)
    if found is None:
        raise _NotHeldError(tensor)
    if order is None:
        return found[0]
    return Codes(*(None if part is None else part[order] for part in found[0]))  # type: ignore[arg-type]


def _is_held(part_OI: Tensor, weight_format: WeightFormat, within: float) -> bool:
    """True if no value of some rows changes by more than `within` of the largest one in its group."""
    error_OI = (matmul.packed_values(part_OI, weight_format) - part_OI).abs()
    error_OGI, part_OGI = (
        nn.functional.pad(each, (0, -each.shape[1] % _GROUP_INPUTS)).view(len(each), -1, _GROUP_INPUTS)
        for each in (error_OI, part_OI.abs())
    )
    return bool((error_OGI.amax(-1) <= within * part_OGI.amax(-1)).all())


def in_safetensors(folder: Path) -> Path:
    """The folder, or one of the cache with the same model in safetensors, fp32: for programs that read nothing else."""
    if gguf_in(folder) is None:
        return folder
    out = cache_root() / "models" / f"{folder.name}--safetensors"
    if not out.exists():
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            for small in folder.iterdir():
                if small.suffix in (".json", ".jinja", ".model", ".txt"):
                    (partial / small.name).write_bytes(small.read_bytes())
            _write_safetensors(folder, partial)
            partial.rename(out)
        except (OSError, SafetensorError) as error:
            if not out.exists():  # else another process has made it meanwhile
                raise SourceError(
                    f"{out} cannot be written ({error}); free some space there, or set AURORA_LIT_CACHE to a "
                    "writable folder"
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_safetensors(folder: Path, out: Path) -> None:
    """Write the weights, about a gigabyte at a time."""
    from safetensors.torch import save_file

    weights = GgufWeights.of(folder)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def finish() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for parameter in weights.tensors:
        shard[parameter] = weights.values(parameter)
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            finish()
    if shard:
        finish()
    total = sum((out / name).stat().st_size for name in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
