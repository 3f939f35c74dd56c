"""A device that is not there: its tensors are computed on the CPU, but mixing them with CPU tensors is an error.

It shows on any machine that code which claims to run on a GPU puts every tensor there. It is stricter than CUDA, which
also accepts indices on the CPU. It shows nothing about a real GPU's kernels, rounding, memory or speed.

    with fake_device() as device:
        x = torch.zeros(3, device=device)
        x + torch.ones(3)                   # RuntimeError: aten.add.Tensor mixes fakegpu:0 and cpu
        x[1:] = torch.ones(2)               # copying is allowed, as are CPU tensors without dimensions
        x.cpu(), x.tolist(), int(x.max())   # as on a GPU
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_NAME = "fakegpu"
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
"""The operations that take tensors from one device to another."""


@contextlib.contextmanager
def fake_device() -> Iterator[torch.device]:
    """The device, which exists inside the block."""
    _register()
    # torch.tensor(values, device=…) then makes a CPU tensor and copies it, which a mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield torch.device(_NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(_NAME)


class FakeDeviceTensor(torch.Tensor):
    """A tensor of the device; `raw` holds its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> FakeDeviceTensor:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        tensor: FakeDeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), **layout, device=torch.device(_NAME, 0), requires_grad=False
        )
        tensor.raw = raw
        return tensor

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values; its results are where it was asked for, else where its tensors are."""
    here, there = [], []
    args, kwargs = _raw(args, here, there), {name: _raw(value, here, there) for name, value in kwargs.items()}
    is_here = bool(here)
    if is_here and func not in _COPIES and any(tensor.dim() for tensor in there):
        raise RuntimeError(f"{func} mixes {_NAME}:0 and cpu")
    if func is _aten.copy_.default:
        is_here = any(args[0] is raw for raw in here)
    if kwargs.get("device") is not None:
        is_here = torch.device(kwargs["device"]).type == _NAME
        kwargs = {**kwargs, "device": "cpu"}
    result = func(*args, **kwargs)
    if not is_here or func is _aten._local_scalar_dense.default:
        return result
    return _here(result)


def _raw(value: Any, here: list[torch.Tensor], there: list[torch.Tensor]) -> Any:
    """The values of the device's tensors in it; notes the tensors of both devices. pytree takes ten times as long."""
    if isinstance(value, FakeDeviceTensor):
        here.append(value.raw)
        return value.raw
    if isinstance(value, torch.Tensor):
        there.append(value)
        return value
    return type(value)(_raw(each, here, there) for each in value) if type(value) in (list, tuple) else value


def _here(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return FakeDeviceTensor(result)
    return type(result)(map(_here, result)) if type(result) in (list, tuple) else result
