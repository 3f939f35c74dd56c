"""Builds, loads and calls the CPU kernels of skinny.cpp; says whether they can be used here.

The library is compiled once a machine with the system's C++ compiler and kept in the cache folder. It shares torch's
OpenMP threads. Without a compiler, or on a device other than the CPU, callers use torch's own operations instead.

Shapes: S slots, B rows, T positions, N query heads, G key-value heads, D head size, L slot capacity, C blocks of
P = KEY_BLOCK positions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from aurora_lit.kernels import group_quantization as grouped
from aurora_lit.kernels import huge_pages
from aurora_lit.kernels import row_quantization as row_scaled

_SOURCE = Path(__file__).parent / "csrc" / "skinny.cpp"
_SOURCES = (_SOURCE, *sorted(_SOURCE.parent.glob("*.hpp")))
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
"""By `target.precision`: the type that names how weights are stored; those of four bits lie two to a byte."""
BYTES = torch.int16
"""Stands for weights of eight bits with a scale an output, beside inputs of sixteen (kernels/row_quantization.py)."""
SUFFIXES = {BYTES: "bytes", **{dtype: name for name, dtype in STORAGE.items()}}
"""Of the kernels' names, by what weights and slots are stored in."""
KEY_BLOCK = 64
"""Positions whose keys lie together in a slot; as in attention.hpp."""
_ROUNDED_UP = 1.001
"""Times a norm that was computed in fp32: no less than the true one."""
_AT_ONCE = 4096
"""Outputs of a weight that are looked at together, whole blocks: all of a large head would take gigabytes."""
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17")


class AttentionShape(ctypes.Structure):
    """Sizes and strides as attention.hpp reads them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "queries", "heads", "kv_heads", "head_dim")),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in "qkv" for dim in ("row", "head", "token")),
        *((f"cache_{dim}_{tensor}", ctypes.c_int64) for tensor in "kv" for dim in ("row", "head")),
        ("scale", ctypes.c_float),
        ("begins", ctypes.c_void_p),
    )


def compiler() -> str | None:
    """The C++ compiler that would be used: `$CXX`, g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, compiled on first use; None where they cannot be had (`AURORA_LIT_NATIVE=0` says so too)."""
    if os.environ.get("AURORA_LIT_NATIVE") == "0":
        return None
    command = compiler()
    if command is None:
        return None
    try:
        return ctypes.CDLL(str(_build(command)))
    except (OSError, subprocess.CalledProcessError):
        return None


def has_vnni() -> bool:
    """Whether the processor multiplies weights of four and eight bits as fast as it reads them."""
    kernels = library()
    return kernels is not None and bool(kernels.aurora_has_vnni())


def has_byte_tiles() -> bool:
    """Whether weights can be stored as `BYTES`."""
    kernels = library()
    return kernels is not None and hasattr(kernels, "aurora_linear_bytes") and bool(kernels.aurora_uses_tiles())


def can_attend(query_BNTD: torch.Tensor, *, window: int | None, softcap: float | None) -> bool:
    """Whether `attend` covers this case."""
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
    keys_SGCDP: torch.Tensor,
    values_SGLD: torch.Tensor,
    slots_B: torch.Tensor,
    starts_B: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Write new keys and values behind `starts_B` in `slots_B` and attend causally; returns [B, T, N, D] fp32."""
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
        *keys_SGCDP.stride()[:2],
        *values_SGLD.stride()[:2],
        scale,
    )
    call = kernels.aurora_attention_fp32 if keys_SGCDP.dtype == torch.float32 else kernels.aurora_attention_bf16
    call(
        ctypes.byref(shape),
        _address(query_BNTD),
        _address(key_BGTD),
        _address(value_BGTD),
        _address(keys_SGCDP),
        _address(values_SGLD),
        _address(slots_B),
        _address(starts_B),
        _address(out_BTND),
    )
    return out_BTND


def pack(weight_OI: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Lay out a linear layer's weight [outputs, inputs] for `linear` as one of `SUFFIXES` (flat tensor)."""
    kernels = library()
    assert kernels is not None
    weight_OI = weight_OI.detach().float().contiguous()
    outputs, inputs = weight_OI.shape
    block = kernels.aurora_block()
    blocks = -(-outputs // block)
    if dtype == torch.float32:
        packed = huge_pages.empty(blocks * block * inputs, dtype)
        kernels.aurora_pack_fp32(_address(weight_OI), outputs, inputs, _address(packed))
    elif dtype in (*grouped.BITS, BYTES):
        if dtype == BYTES:
            parts = row_scaled.pack(*row_scaled.quantise(weight_OI), block=block)
        else:
            parts = grouped.pack(weight_OI, bits=grouped.BITS[dtype], block=block, group=kernels.aurora_group())
        packed = huge_pages.empty(parts.numel() // dtype.itemsize, dtype)
        packed.view(torch.uint8).copy_(parts)
    else:
        padded = -(-inputs // 32) * 32
        packed = huge_pages.empty(blocks * block * padded, dtype)
        kernels.aurora_pack_bf16(_address(weight_OI), outputs, inputs, padded, _address(packed))
    return packed


def loses_nothing(weight_OI: torch.Tensor, *, dtype: torch.dtype) -> bool:
    """Whether packing a weight in groups, as torch.int8 or torch.uint8, changes none of its numbers."""
    kernels = library()
    assert kernels is not None
    weight_OI = weight_OI.detach().float()
    return grouped.loses_nothing(weight_OI, bits=grouped.BITS[dtype], group=kernels.aurora_group())


def linear(x_NI: torch.Tensor, packed: torch.Tensor, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [N, inputs] fp32 times a packed weight, plus bias: [N, outputs] fp32."""
    kernels = library()
    assert kernels is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    y_NO = torch.empty(rows, outputs)
    call = getattr(kernels, f"aurora_linear_{SUFFIXES[packed.dtype]}")
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


class Screen(ctypes.Structure):
    """A coarse copy of a packed weight, which says where its largest outputs may be (screen.hpp)."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("copy", "errors", "norms"))

    @staticmethod
    def of(weight_OI: torch.Tensor, *, dtype: torch.dtype) -> Screen:
        """For a weight that is packed as `dtype`, where there are byte tiles."""
        kernels = library()
        assert kernels is not None
        screen, parts = Screen(), []
        for part_OI in torch.split(weight_OI, _AT_ONCE):
            seen_OI = stored(part_OI, dtype=dtype)
            quantised = row_scaled.quantise(seen_OI)
            norms = (norm_O * _ROUNDED_UP for norm_O in row_scaled.errors(seen_OI, *quantised))
            parts.append((row_scaled.pack(*quantised, block=kernels.aurora_block()), *norms))
        copies, errors, sizes = zip(*parts, strict=True)
        copy = torch.cat(copies, out=huge_pages.empty(sum(map(len, copies)), torch.uint8))
        screen.kept = (copy, torch.cat(errors), torch.cat(sizes))
        screen.copy, screen.errors, screen.norms = (tensor.data_ptr() for tensor in screen.kept)
        return screen


def stored(weight_OI: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """The numbers, in fp32, that a weight becomes by being packed."""
    weight_OI = weight_OI.detach().float()
    if dtype in grouped.BITS:
        kernels = library()
        assert kernels is not None
        return grouped.stored(weight_OI, bits=grouped.BITS[dtype], group=kernels.aurora_group())
    return weight_OI.to(dtype).float()


def argmax_linear(
    x_NI: torch.Tensor, packed: torch.Tensor, outputs: int, *, screen: Screen | None = None
) -> torch.Tensor:
    """Where each row of `linear`, without a bias, is largest: [N] int64; of equal outputs the first."""
    kernels = library()
    assert kernels is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    place_N = torch.empty(rows, dtype=torch.int64)
    screened = () if screen is None else (ctypes.byref(screen),)
    call = getattr(kernels, f"aurora_{'screened_' if screened else ''}argmax_{SUFFIXES[packed.dtype]}")
    call(
        _address(x_NI),
        ctypes.c_int64(x_NI.stride(0)),
        rows,
        _address(packed),
        inputs,
        outputs,
        _address(place_N),
        *screened,
    )
    return place_N


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _build(command: str) -> Path:
    """Compile unless the same source, flags, compiler and processor were compiled before."""
    version = subprocess.run([command, "--version"], check=True, capture_output=True).stdout
    threads = _torch_openmp()
    key = b"\0".join(
        (
            *(path.read_bytes() for path in _SOURCES),
            " ".join(_FLAGS).encode(),
            version,
            _processor().encode(),
            str(threads is None).encode(),
        )
    )
    folder = Path(os.environ.get("AURORA_LIT_CACHE", Path.home() / ".cache" / "aurora-lit")) / "kernels"
    path = folder / f"skinny-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if threads is not None:
        ctypes.CDLL(threads, mode=ctypes.RTLD_GLOBAL)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        obj, lib = Path(scratch) / "skinny.o", Path(scratch) / "skinny.so"
        subprocess.run([command, *_FLAGS, "-c", str(_SOURCE), "-o", str(obj)], check=True, capture_output=True)
        # Not linked against OpenMP where torch's runtime is loaded already: two runtimes would fight for the cores.
        link = [command, "-shared", str(obj), "-o", str(lib), *(["-fopenmp"] if threads is None else [])]
        subprocess.run(link, check=True, capture_output=True)
        os.replace(lib, path)
    return path


def _torch_openmp() -> str | None:
    """Path of the OpenMP runtime that torch has loaded, on Linux."""
    if sys.platform != "linux":
        return None
    torch.empty(1)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libgomp" in line:
            return line.split(maxsplit=5)[-1]
    return None


def _processor() -> str:
    """What -march=native depends on."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
