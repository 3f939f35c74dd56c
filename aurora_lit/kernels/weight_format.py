"""How a packed linear layer stores its weight: the formats that the kernels multiply, by name.

Leaves out: the layout in memory (quantization.py, csrc/) and the choice of a format (packed_linear.py).
"""

from __future__ import annotations

import enum

import torch


class WeightFormat(enum.Enum):
    """The value is the ending of the kernels' names in csrc/kernels.cpp; `target.precision` names some of them.

    In the grouped formats, inputs are rounded to 8 bits with a scale for every 32 of them. A layer's matrices may have
    different ones of these.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    INT8_GROUPED = "int8"
    """8 bits with an fp16 scale for every 32 inputs of an output, as llama.cpp's Q8_0."""
    INT8_SPLIT = "int8_split"
    """The numbers of INT8_GROUPED, in an order from which tokens are chosen while half of them is read; for heads."""
    INT6_GROUPED = "int6"
    """6 bits with an fp16 scale for every 16 inputs of an output, as Q6_K."""
    INT5_GROUPED = "int5"
    """5 bits with an fp16 scale and minimum for every 32 inputs of an output, as Q5_1."""
    INT4_GROUPED = "int4"
    """4 bits with an fp16 scale and minimum for every 32 inputs of an output, as Q4_1."""
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
        return {
            WeightFormat.INT8_GROUPED: 8,
            WeightFormat.INT8_SPLIT: 8,
            WeightFormat.INT6_GROUPED: 6,
            WeightFormat.INT5_GROUPED: 5,
            WeightFormat.INT4_GROUPED: 4,
        }.get(self)

    @property
    def layers_suffix(self) -> str:
        """Ending of the names of the kernels that take whole layers; formats that have the same one can be mixed."""
        is_of_layers = self.grouped_bits is not None and self is not WeightFormat.INT8_SPLIT
        return "grouped" if is_of_layers else self.suffix

    @property
    def of_head(self) -> WeightFormat:
        """The format of a head with the same numbers."""
        return WeightFormat.INT8_SPLIT if self is WeightFormat.INT8_GROUPED else self

    @property
    def has_minima(self) -> bool:
        """True if a weight is scale · q + min, with q from 0; else it is scale · q, with q around 0."""
        return self in (WeightFormat.INT4_GROUPED, WeightFormat.INT5_GROUPED)

    @property
    def scale_inputs(self) -> int:
        """Inputs that share a scale in a grouped format."""
        return 16 if self is WeightFormat.INT6_GROUPED else 32

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of keys and values in the cache that decoder layers of this format use."""
        return torch.float32 if self is WeightFormat.FP32 else torch.bfloat16
