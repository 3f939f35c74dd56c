"""How a packed linear layer stores its weight: the formats that the kernels multiply, by name.

Leaves out: the layout in memory (quantization.py, csrc/) and the choice of a format (packed_linear.py).
"""

from __future__ import annotations

import enum

import torch


class WeightFormat(enum.Enum):
    """The value is the ending of the kernels' names in csrc/kernels.cpp; of the first four also `target.precision`."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8_GROUPED = "int8"
    """8 bits with an fp16 scale for every 32 inputs of an output, as llama.cpp's Q8_0; inputs are rounded to 8 bits."""
    INT4_GROUPED = "int4"
    """4 bits with an fp16 scale and minimum for every 32 inputs of an output, as Q4_1; inputs are rounded to 8 bits."""
    INT8_PER_OUTPUT = "int8_per_output"
    """8 bits with one fp32 scale for each output; needs AMX tiles (`native.has_int8_tiles`)."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix
        """`value` as a plain attribute, which is faster to read in every call of a kernel."""

    @classmethod
    def of_dtype(cls, dtype: torch.dtype) -> WeightFormat:
        """The unquantised format of this type. Raises KeyError for other types than fp32 and bf16."""
        return {torch.float32: cls.FP32, torch.bfloat16: cls.BF16}[dtype]

    @property
    def storage_dtype(self) -> torch.dtype:
        """Element type of the packed tensor; quantised formats are bytes, with scales and weights interleaved."""
        return {WeightFormat.FP32: torch.float32, WeightFormat.BF16: torch.bfloat16}.get(self, torch.uint8)

    @property
    def grouped_bits(self) -> int | None:
        """Bits of a weight in the grouped formats, otherwise None."""
        return {WeightFormat.INT8_GROUPED: 8, WeightFormat.INT4_GROUPED: 4}.get(self)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of keys and values in the cache that decoder layers of this format use."""
        return torch.float32 if self is WeightFormat.FP32 else torch.bfloat16
