"""In which numbers a draft is trained: bf16, or fp32 on a processor that multiplies fp32 faster.

Processors without instructions for bf16 (Intel before AMX and AVX-512 BF16, AMD before Zen 4) compute a product in bf16
by converting it: one thread of a Xeon without them computes 28 GFLOP a second, and 123 in fp32. What decides is a
product of the shape that training has, timed once a process. `one_process_fabric` is the Fabric that computes so.
"""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

TrainingPrecision = Literal["bf16-mixed", "32-true"]
_NAMES_OF_FP32 = ("32-true", "32")
"""What `fabric run --precision` calls it."""
NAMES_OF_PRECISIONS = ("bf16-mixed", "bf16", *_NAMES_OF_FP32)
"""What `fabric run --precision` may say."""
_SHAPE = (256, 576, 1152)
"""Rows, inputs and outputs of the product that is timed."""
_REPEATS = 5
_CLEARLY = 0.7
"""fp32 is chosen if it takes at most this share of the time: near a tie bf16 needs less memory."""


@cache
def training_precision() -> TrainingPrecision:
    """Fabric's precision for training in this process: what `fabric run --precision` says, else what suits the machine.

    On CUDA GPUs that is bf16-mixed. The first call takes 0.1 s. Processes that learn together are told by the first
    one, or by `fabric run`: timed in each, it may come out differently.
    """
    if (said := os.environ.get("LT_PRECISION")) is not None:
        return "32-true" if said in _NAMES_OF_FP32 else "bf16-mixed"
    if torch.cuda.is_available():
        return "bf16-mixed"
    return faster_precision(fp32_s=_product_s(torch.float32), bf16_s=_product_s(torch.bfloat16))


def faster_precision(*, fp32_s: float, bf16_s: float) -> TrainingPrecision:
    """The precision for a machine on which a product takes so many seconds."""
    return "32-true" if fp32_s < _CLEARLY * bf16_s else "bf16-mixed"


def training_dtype() -> torch.dtype:
    """Of weights that are multiplied but not trained, such as the target's head."""
    return torch.float32 if training_precision() == "32-true" else torch.bfloat16


def one_process_fabric() -> Fabric:
    """The Fabric of learning in one process: on the CUDA GPU if there is one, in `training_precision`.

    Fabric by itself would take a Mac's GPU, which torch's SparseAdam does not support, and whose time the budget does
    not count. The environment is named because Fabric would otherwise take any process in a SLURM job for one of the
    job's tasks.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return Fabric(accelerator=accelerator, devices=1, precision=training_precision(), plugins=[LightningEnvironment()])


def _product_s(dtype: torch.dtype) -> float:
    """Seconds of one product: the shortest of a few, after one that is not counted."""
    rows, inputs, outputs = _SHAPE
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    return min(times[1:])
