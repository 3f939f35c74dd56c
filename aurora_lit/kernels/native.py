"""Loads the CPU kernels of csrc/kernels.cpp, says what they can do on this processor, and calls attention.

The library shares torch's OpenMP threads. Without a compiler, or on devices other than the CPU, callers use torch's own
operations instead.

Leaves out: compiling the library (build.py), matrix products with packed weights (matmul.py), and whole decoder layers
(decoder.py).

Shapes: S slots, B sequences, T positions, N query heads (of a batch of inputs: rows), G key-value heads, D head size,
C blocks of P = KEY_BLOCK positions, E values stored together, Q = D / E, M = slot capacity / E.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from aurora_lit.kernels.build import ClangError, built_library, compiler, first_errors, kept_library

KEY_BLOCK = 64
"""Positions whose keys are stored together in a slot; KEY_BLOCK in attention_shape.hpp."""
COST = (
    "Without them everything is computed in torch: slower, without n-gram lookup and without the traffic memory, and "
    "target.precision int8 and int4 are refused."
)
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


def compute_alone() -> None:
    """Have the calling thread compute without others from now on; for every thread beside the one that runs rounds.

    OpenMP gives each thread that computes with others a team of its own. Once the teams together have more threads than
    there are processors, libgomp's no longer spin where they wait for each other but sleep, those of rounds too, even
    if the other team has nothing to do: on two processors a round then took 2.2 times as long.
    """
    torch.get_num_threads()  # torch sets a new thread's number when it is first asked, which may not come afterwards
    kernels = library()
    if kernels is not None:
        kernels.aurora_compute_alone()
    # MKL has a number of its own, which is OpenMP's no longer once torch has set it.
    with contextlib.suppress(OSError, AttributeError):  # another system, or a torch without MKL
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local(1)


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
    if sys.platform == "darwin" and not os.environ.get("CXX"):
        # g++ is Apple's clang there, or offers in a dialog to install it, in each process that calls it.
        return Absence("they are not built on macOS", "run it on Linux, such as in a container")
    command = compiler()
    another = "name another compiler in CXX"
    try:
        path = kept_library() if command is None else built_library(command)
    except subprocess.CalledProcessError as error:
        needs = "it must support -march=native, OpenMP and C++17"
        return Absence(f"{command} failed: {first_errors(error)}", f"repair the compiler ({needs}), or {another}")
    except ClangError:
        remedy = "install GNU's g++ (apt-get install g++), and let CXX name it"
        return Absence(f"{command} is clang++, whose OpenMP is another than g++'s", remedy)
    except OSError as error:
        return Absence(f"they cannot be built ({error})", f"set AURORA_LIT_CACHE to a writable folder, or {another}")
    if path is None:
        return Absence("no C++ compiler was found ($CXX, g++)", "install one (apt-get install g++)")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        remedy = f"delete {path} and start again, {another}" if command else "install a C++ compiler, such as g++"
        elsewhere = "set AURORA_LIT_CACHE to a folder from which code may be loaded"
        return Absence(f"they cannot be loaded ({error})", f"{remedy}, or {elsewhere}")


def build_digest() -> str:
    """Names what the loaded kernels were built from: sources, compiler, processor (build.py); empty without kernels."""
    kernels = library()
    return "" if kernels is None else Path(kernels._name).stem


def has_byte_products() -> bool:
    """True if the processor multiplies grouped weights of 8 and 4 bits as fast as it reads them."""
    kernels = library()
    return kernels is not None and bool(kernels.aurora_has_byte_products())


def has_int8_tiles() -> bool:
    """True if the processor has the AMX tiles that INT8_PER_OUTPUT needs."""
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


def can_attend(query_BNTD: torch.Tensor) -> bool:
    """True if `attend` supports these queries."""
    return (
        query_BNTD.dtype == torch.float32
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
        address(query_BNTD),
        address(key_BGTD),
        address(value_BGTD),
        address(keys_SGCQPE),
        address(values_SGMDE),
        address(slots_B),
        address(starts_B),
        address(out_BTND),
    )
    return out_BTND


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Of a tensor's first element, for the kernels; the caller keeps the tensor alive."""
    return ctypes.c_void_p(tensor.data_ptr())
