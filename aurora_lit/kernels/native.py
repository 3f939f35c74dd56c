"""Loads and calls the CPU kernels of csrc/kernels.cpp: attention over the KV cache, and products with packed weights.

The library shares torch's OpenMP threads. Without a compiler, or on devices other than the CPU, callers use torch's own
operations instead.

Leaves out: compiling the library (build.py), and whole decoder layers (decoder.py).

Shapes: S slots, B sequences, T positions, N query heads (of a batch of inputs: rows), G key-value heads, D head size,
C blocks of P = KEY_BLOCK positions, E values stored together, Q = D / E, M = slot capacity / E, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from aurora_lit.kernels import huge_pages, quantization
from aurora_lit.kernels.build import built_library, compiler, first_errors
from aurora_lit.kernels.weight_format import WeightFormat

KEY_BLOCK = 64
"""Positions whose keys are stored together in a slot; KEY_BLOCK in attention_shape.hpp."""
_NORM_MARGIN = 1.001
"""Factor that makes a norm computed in fp32 no smaller than the exact one."""
_SCREEN_CHUNK = 4096
"""Outputs that are quantised at a time, whole blocks: a large head at once would take gigabytes."""


COST = "Without them everything is computed in torch: slower, and target.precision int8 and int4 are refused."
_log = logging.getLogger(__name__)


class AttentionShape(ctypes.Structure):
    """Sizes and strides; AttentionShape in attention_shape.hpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "queries", "heads", "kv_heads", "head_dim")),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in "qkv" for dim in ("row", "head", "token")),
        *((f"cache_{dim}_{tensor}", ctypes.c_int64) for tensor in "kv" for dim in ("row", "head")),
        ("scale", ctypes.c_float),
        ("begins", ctypes.c_void_p),
        ("num_prompts", ctypes.c_int64),
        ("pair", ctypes.c_int64),
    )


class Absence(NamedTuple):
    """Why there are no kernels."""

    reason: str
    remedy: str
    is_choice: bool = False
    """True if the environment turned them off."""


def library() -> ctypes.CDLL | None:
    """The loaded kernels, compiled on first use; None if they cannot be built or `AURORA_LIT_NATIVE=0` is set."""
    loaded = _load()
    return loaded if isinstance(loaded, ctypes.CDLL) else None


def absence() -> Absence | None:
    """Why `library` is None; None if there is a library."""
    loaded = _load()
    return loaded if isinstance(loaded, Absence) else None


@functools.cache
def warn_if_absent() -> None:
    """Log that there are no kernels, what that costs, and what to do; once, and not if that was chosen."""
    if (absent := absence()) is not None and not absent.is_choice:
        _log.warning(
            "The native kernels are not in use: %s. %s To change that: %s.", absent.reason, COST, absent.remedy
        )


@functools.cache
def _load() -> ctypes.CDLL | Absence:
    if os.environ.get("AURORA_LIT_NATIVE") == "0":
        return Absence("AURORA_LIT_NATIVE=0", "unset AURORA_LIT_NATIVE", is_choice=True)
    command = compiler()
    if command is None:
        return Absence("no C++ compiler was found ($CXX, g++, clang++)", "install one (apt-get install g++)")
    another = "name another compiler in CXX"
    try:
        path = built_library(command)
    except subprocess.CalledProcessError as error:
        needs = "it must support -march=native, OpenMP and C++17"
        return Absence(f"{command} failed: {first_errors(error)}", f"repair the compiler ({needs}), or {another}")
    except OSError as error:
        return Absence(f"they cannot be built ({error})", f"set AURORA_LIT_CACHE to a writable folder, or {another}")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return Absence(f"they cannot be loaded ({error})", f"delete {path} and start again, or {another}")


def build_digest() -> str:
    """Names what the loaded kernels were built from: sources, compiler, processor (build.py); empty without kernels."""
    kernels = library()
    return "" if kernels is None else Path(kernels._name).stem


def has_vnni() -> bool:
    """True if the processor multiplies grouped weights of 8 and 4 bits as fast as it reads them."""
    kernels = library()
    return kernels is not None and bool(kernels.aurora_has_vnni())


def has_int8_tiles() -> bool:
    """True if the processor has the AMX tiles that INT8_PER_OUTPUT and `Screen` need."""
    kernels = library()
    if kernels is None or not hasattr(kernels, "aurora_linear_int8_per_output"):
        return False
    return bool(kernels.aurora_uses_tiles())


# -- attention -----------------------------------------------------------------------------------------------------


def cache_pair(dtype: torch.dtype, head_dim: int) -> int:
    """Values that the KV cache stores together, so that `attend` can use matrix tiles if there are any: 2, or 1."""
    kernels = library()
    fits = dtype == torch.bfloat16 and head_dim % 32 == 0
    return 2 if fits and kernels is not None and kernels.aurora_uses_tiles() else 1


def can_attend(query_BNTD: torch.Tensor, *, window: int | None, softcap: float | None) -> bool:
    """True if `attend` supports these queries and options."""
    return (
        window is None
        and softcap is None
        and query_BNTD.dtype == torch.float32
        and query_BNTD.device.type == "cpu"
        and query_BNTD.shape[-1] % 32 == 0
        and library() is not None
    )


def attend(
    query_BNTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    keys_SGCQPE: torch.Tensor,
    values_SGMDE: torch.Tensor,
    slots_B: torch.Tensor,
    starts_B: torch.Tensor,
    *,
    scale: float,
    num_prompts: int = 0,
) -> torch.Tensor:
    """Write new keys and values to `slots_B` after `starts_B` positions, attend causally; [B, T, N, D] fp32.

    `num_prompts`: the last so many sequences read prompts, which may be added up in another order.
    """
    kernels = library()
    assert kernels is not None
    B, N, T, D = query_BNTD.shape
    if query_BNTD.stride(3) != 1:
        query_BNTD = query_BNTD.contiguous()
    if key_BGTD.stride(3) != 1:
        key_BGTD = key_BGTD.contiguous()
    if value_BGTD.stride(3) != 1:
        value_BGTD = value_BGTD.contiguous()
    out_BTND = torch.empty(B, T, N, D)
    shape = AttentionShape(
        B,
        T,
        N,
        key_BGTD.shape[1],
        D,
        *query_BNTD.stride()[:3],
        *key_BGTD.stride()[:3],
        *value_BGTD.stride()[:3],
        *keys_SGCQPE.stride()[:2],
        *values_SGMDE.stride()[:2],
        scale,
    )
    shape.pair, shape.num_prompts = keys_SGCQPE.shape[-1], num_prompts
    call = kernels.aurora_attention_fp32 if keys_SGCQPE.dtype == torch.float32 else kernels.aurora_attention_bf16
    call(
        ctypes.byref(shape),
        _address(query_BNTD),
        _address(key_BGTD),
        _address(value_BGTD),
        _address(keys_SGCQPE),
        _address(values_SGMDE),
        _address(slots_B),
        _address(starts_B),
        _address(out_BTND),
    )
    return out_BTND


# -- packing weights -----------------------------------------------------------------------------------------------


def pack_weight(weight_OI: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """Lay out a linear layer's weight for `linear`; a flat tensor of the format's `storage_dtype`."""
    kernels = library()
    assert kernels is not None
    weight_OI = weight_OI.detach().float().contiguous()
    outputs, inputs = weight_OI.shape
    block = kernels.aurora_block()
    blocks = -(-outputs // block)
    if weight_format is WeightFormat.FP32:
        packed = huge_pages.empty(blocks * block * inputs, torch.float32)
        kernels.aurora_pack_fp32(_address(weight_OI), outputs, inputs, _address(packed))
        return packed
    if weight_format is WeightFormat.BF16:
        padded = -(-inputs // 32) * 32
        packed = huge_pages.empty(blocks * block * padded, torch.bfloat16)
        kernels.aurora_pack_bf16(_address(weight_OI), outputs, inputs, padded, _address(packed))
        return packed
    if weight_format is WeightFormat.INT8_PER_OUTPUT:
        contents = quantization.pack_per_output(*quantization.quantize_per_output(weight_OI), block=block)
    else:
        bits = weight_format.grouped_bits
        assert bits is not None
        contents = quantization.pack_grouped(weight_OI, bits=bits, block=block, group=kernels.aurora_group())
    return huge_pages.empty(contents.numel(), torch.uint8).copy_(contents)


def packed_values(weight_OI: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """The values, in fp32, that a weight has after packing; not for INT8_PER_OUTPUT."""
    weight_OI = weight_OI.detach().float()
    if (bits := weight_format.grouped_bits) is not None:
        kernels = library()
        assert kernels is not None
        return quantization.dequantized_grouped(weight_OI, bits=bits, group=kernels.aurora_group())
    return weight_OI.to(weight_format.storage_dtype).float()


def is_lossless(weight_OI: torch.Tensor, weight_format: WeightFormat) -> bool:
    """True if packing a weight in this grouped format changes none of its values."""
    kernels = library()
    assert kernels is not None
    bits = weight_format.grouped_bits
    assert bits is not None
    return quantization.is_lossless_grouped(weight_OI.detach().float(), bits=bits, group=kernels.aurora_group())


class Screen(ctypes.Structure):
    """A coarse copy of a packed weight, from which `argmax_linear` bounds every output; Screen in screen.hpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("copy", "errors", "norms"))

    @staticmethod
    def of(weight_OI: torch.Tensor, weight_format: WeightFormat) -> Screen:
        """For a weight that is packed in this format; needs `has_int8_tiles`."""
        kernels = library()
        assert kernels is not None
        parts = []
        for part_OI in torch.split(weight_OI, _SCREEN_CHUNK):
            values_OI = packed_values(part_OI, weight_format)
            quantized = quantization.quantize_per_output(values_OI)
            norms = (norm_O * _NORM_MARGIN for norm_O in quantization.per_output_error_norms(values_OI, *quantized))
            parts.append((quantization.pack_per_output(*quantized, block=kernels.aurora_block()), *norms))
        copies, errors, norms_O = zip(*parts, strict=True)
        copy = torch.cat(copies, out=huge_pages.empty(sum(map(len, copies)), torch.uint8))
        return Screen.from_tensors(copy, torch.cat(errors), torch.cat(norms_O))

    @staticmethod
    def from_tensors(copy: torch.Tensor, errors: torch.Tensor, norms: torch.Tensor) -> Screen:
        """The screen whose `tensors` these are."""
        screen = Screen()
        screen.tensors = (copy, errors, norms)  # kept alive while the kernels read them
        screen.copy, screen.errors, screen.norms = (tensor.data_ptr() for tensor in screen.tensors)
        return screen


class RowTable(ctypes.Structure):
    """A table that the kernels read row by row: its address, and a function that reads a row; RowTable in rows.hpp."""

    _fields_ = (("data", ctypes.c_void_p), ("read", ctypes.c_void_p))

    @staticmethod
    def of(table: torch.Tensor, weight_format: WeightFormat | None) -> RowTable:
        """`weight_format`: of a packed weight; None for rows of fp32. The caller keeps the tensor alive."""
        reader = getattr(library(), f"aurora_row_{'plain' if weight_format is None else weight_format.suffix}")
        return RowTable(table.data_ptr(), ctypes.cast(reader, ctypes.c_void_p))


def read_rows(
    packed: torch.Tensor, weight_format: WeightFormat, indices: torch.Tensor, *, outputs: int, inputs: int
) -> torch.Tensor:
    """Rows of a packed weight, with exactly the values that `linear` multiplies by: [*indices.shape, inputs] fp32.

    Raises IndexError for an index outside 0 … `outputs` - 1.
    """
    kernels = library()
    assert kernels is not None
    indices = indices.long().contiguous()
    rows = torch.empty(*indices.shape, inputs)
    shape, count = (ctypes.c_int64(outputs), ctypes.c_int64(inputs)), ctypes.c_int64(indices.numel())
    call = getattr(kernels, f"aurora_rows_{weight_format.suffix}")
    if not call(_address(packed), *shape, _address(indices), count, _address(rows)):
        raise IndexError(f"an index of {indices.tolist()} is no row of a weight of {outputs} rows")
    return rows


# -- products ------------------------------------------------------------------------------------------------------


def linear(
    x_NI: torch.Tensor, packed: torch.Tensor, weight_format: WeightFormat, outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [N, I] fp32 times a packed weight, plus bias: [N, O] fp32."""
    kernels = library()
    assert kernels is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    y_NO = torch.empty(rows, outputs)
    call = getattr(kernels, f"aurora_linear_{weight_format.suffix}")
    call(
        _address(x_NI),
        ctypes.c_int64(x_NI.stride(0)),
        rows,
        _address(packed),
        inputs,
        outputs,
        _address(y_NO),
        None if bias is None else _address(bias),
    )
    return y_NO


def argmax_linear(
    x_NI: torch.Tensor,
    packed: torch.Tensor,
    weight_format: WeightFormat,
    outputs: int,
    *,
    screen: Screen | None = None,
) -> torch.Tensor:
    """Index of the largest output of `linear` without a bias, for each row: [N] int64; the first of equal outputs."""
    kernels = library()
    assert kernels is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    index_N = torch.empty(rows, dtype=torch.int64)
    screened = () if screen is None else (ctypes.byref(screen),)
    call = getattr(kernels, f"aurora_{'screened_' if screened else ''}argmax_{weight_format.suffix}")
    call(
        _address(x_NI),
        ctypes.c_int64(x_NI.stride(0)),
        rows,
        _address(packed),
        inputs,
        outputs,
        _address(index_N),
        *screened,
    )
    return index_N


class _Draws(ctypes.Structure):
    """Draws in choose.hpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("temperatures", "keys", "positions", "dense", "dense_logits", "tokens")
    )


def choose_linear(
    x_NI: torch.Tensor,
    packed: torch.Tensor,
    weight_format: WeightFormat,
    outputs: int,
    *,
    temperature_N: torch.Tensor,
    key_N: torch.Tensor,
    position_N: torch.Tensor,
    dense_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of `linear` without a bias for each row; the arguments and results of `PackedLinear.choose`."""
    kernels = library()
    assert kernels is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    assert temperature_N.shape == key_N.shape == position_N.shape == (rows,)
    index_N = torch.empty(rows, dtype=torch.int64)
    num_dense = 0
    if dense_N is not None:
        assert dense_N.shape == (rows,)
        dense_N = dense_N.long().contiguous()
        num_dense = int(dense_N.max()) + 1 if rows else 0
    dense_logits_DO = torch.empty(num_dense, outputs)
    given = [temperature_N.float().contiguous(), key_N.long().contiguous(), position_N.long().contiguous()]
    draws = _Draws(
        *(tensor.data_ptr() for tensor in given),
        None if dense_N is None else dense_N.data_ptr(),
        dense_logits_DO.data_ptr(),
        index_N.data_ptr(),
    )
    call = getattr(kernels, f"aurora_choose_{weight_format.suffix}")
    stride = ctypes.c_int64(x_NI.stride(0))
    call(_address(x_NI), stride, rows, _address(packed), inputs, outputs, ctypes.byref(draws))
    return index_N, dense_logits_DO


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
