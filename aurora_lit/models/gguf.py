"""Reads GGUF files: metadata, and the stored bytes of tensors by name.

    file = GgufFile(path)
    file.metadata["general.architecture"]
    rows = file.rows("blk.0.attn_q.weight", 0, 64)       # uint8 [64, bytes of a row]

Arrays in the metadata, such as the vocabulary, are only counted: the gguf package reads one of 150,000 tokens for 20
seconds. Tensors are read a few rows at a time and never mapped, so that they take no memory.

Leaves out: what the bytes mean (gguf_blocks.py), and which tensor is which parameter of a model (gguf_model.py).
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from aurora_lit.errors import SourceError

_STRUCTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""By the numbers of the types of metadata."""
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_LONGEST_HEADER_BYTES = 1 << 30


class TensorEntry(NamedTuple):
    """Where a tensor is in its file."""

    shape: tuple[int, ...]
    """In torch's order: outputs, inputs."""
    type: GGMLQuantizationType
    offset: int
    """In bytes from the beginning of the file."""

    @property
    def row_bytes(self) -> int:
        """Size of one output's weights in the file."""
        block_values, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(self.shape[-1] // block_values * block_bytes)


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a model folder whose weights are in one; None: they are in safetensors."""
    if any(folder.glob("*.safetensors")):
        return None
    return next(iter(sorted(folder.glob("*.gguf"))), None)


class GgufFile:
    """A GGUF file whose header has been read. Raises SourceError if it is none, or is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        """Of an array its length."""
        self.entries: dict[str, bytes] = {}
        """Each entry of the metadata as it is in the file."""
        self.tensors: dict[str, TensorEntry] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError, RecursionError) as error:
            raise self._damaged(f"its header cannot be read ({error!r})") from error

    def _damaged(self, reason: str) -> SourceError:
        return SourceError(f"target.source: {self.path} is no whole GGUF file: {reason}; copy or download it again")

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            header = _Header(file.read(min(size, 16 << 20)))
            if header.data[:4] != b"GGUF":
                raise self._damaged("it does not begin with GGUF")
            while True:
                try:
                    self._parse(header)
                    break
                except struct.error:
                    if len(header.data) >= min(size, _LONGEST_HEADER_BYTES):
                        raise
                    header = _Header(header.data + file.read(len(header.data)))
        ends = [entry.offset + prod(entry.shape[:-1]) * entry.row_bytes for entry in self.tensors.values()]
        if ends and max(ends) > size:
            raise self._damaged(f"it has {size} bytes of {max(ends)}")

    def _parse(self, header: _Header) -> None:
        version, num_tensors, num_entries = header.unpack("<4xIQQ")
        if version not in _VERSIONS:
            raise SourceError(f"target.source: {self.path} is of GGUF version {version}; convert it to version 3")
        for _ in range(num_entries):
            begin = header.position
            name = header.string()
            self.metadata[name] = header.value(header.unpack("<I")[0])
            self.entries[name] = header.data[begin : header.position]
        found = []
        for _ in range(num_tensors):
            name, (num_dimensions,) = header.string(), header.unpack("<I")
            *reversed_shape, type_number, offset = header.unpack(f"<{num_dimensions}QIQ")
            found.append((name, tuple(reversed_shape[::-1]), type_number, offset))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"its tensors begin at multiples of {alignment!r}")
        begin = -(-header.position // alignment) * alignment
        for name, shape, type_number, offset in found:
            if 0 in shape:
                raise self._damaged(f"{name} has no values")
            try:
                kind = GGMLQuantizationType(type_number)
            except ValueError as error:
                raise SourceError(
                    f"target.source: {name} in {self.path} is of type {type_number}, which is not known; name a file "
                    "in another quantisation, such as Q4_K_M or Q8_0"
                ) from error
            self.tensors[name] = TensorEntry(shape or (1,), kind, begin + offset)

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The bytes of a tensor's rows from `begin` to `end`, uint8 [rows, bytes of a row]; a vector is one row."""
        entry = self.tensors[name]
        total = prod(entry.shape[:-1])
        count = min(total if end is None else end, total) - begin
        data = np.empty(count * entry.row_bytes, np.uint8)
        unread = data.data
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + begin * entry.row_bytes)
            while unread:
                read = file.readinto(unread)
                if not read:
                    raise self._damaged("it has become shorter")
                unread = unread[read:]
        return data.reshape(count, entry.row_bytes)


class _Header:
    """The beginning of a file, read in its order; `struct.error` where it ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        return str(self.unpack(f"<{length}s")[0].decode())

    def value(self, kind: int) -> Any:
        """A value of the metadata; of an array its length."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(f"<{_STRUCTS[kind]}")[0]
        element, count = self.unpack("<IQ")
        if element in _STRUCTS:
            self.position += count * struct.calcsize(_STRUCTS[element])
        elif element == _STRING:
            self._skip_strings(count)
        else:
            for _ in range(count):
                self.value(element)
        if self.position > len(self.data):
            raise struct.error("an array is longer than the file")
        return count

    def _skip_strings(self, count: int) -> None:
        """Go past so many strings: a vocabulary and its merges are some 300,000."""
        data, position, length_at = self.data, self.position, struct.Struct("<Q").unpack_from
        for _ in range(count):
            position += 8 + length_at(data, position)[0]
        self.position = position
