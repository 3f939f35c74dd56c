"""Named tensors in one file, with a record of what they were made from.

    write(path, tensors, facts=facts, key=key)
    facts, tensors = read(path, key=key)            # or mapped=True; CacheError: damaged, or made from something else

It is a safetensors file whose tensors begin at multiples of 64 bytes. The key names everything that determines the
content, so a file with another key is refused. So is one whose SHA-256 is wrong. To run a target, its file is read
straight into huge pages: a forward pass reads every weight, and page cache is not on huge pages. Mapped, only the rows
that are used take memory, which is enough for training a draft.

Leaves out what the tensors are (models/native_target.py).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from aurora_lit.durable import sync
from aurora_lit.errors import CacheError
from aurora_lit.kernels import huge_pages

_ALIGNMENT = 64
_CHUNK_BYTES = 4 << 20
_MAX_HEADER_BYTES = 64 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
"""Element types by their names in a safetensors header."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NO_DIGEST = "0" * 64
"""In place of the digest in the header that the digest is of."""


def write(path: Path, tensors: Mapping[str, torch.Tensor], *, facts: Mapping[str, Any], key: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors of the types fp32, bf16 and uint8; the name appears when all is on disk.

    `facts`: anything that JSON holds, returned by `read`. Raises OSError.
    """
    entries: dict[str, Any] = {}
    pieces: list[torch.Tensor] = []
    end = 0

    def add(name: str, tensor: torch.Tensor, dtype: str, shape: list[int]) -> None:
        nonlocal end
        pieces.append(tensor)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + tensor.numel()]}
        end += tensor.numel()

    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        add(name, raw, _NAMES[tensor.dtype], list(tensor.shape))
        if padding := -end % _ALIGNMENT:
            add(f"padding.{len(entries)}", torch.zeros(padding, dtype=torch.uint8), "U8", [padding])

    made_of = json.dumps({"facts": facts, "key": key})
    header = _header(entries, made_of, digest=_NO_DIGEST)
    digest = hashlib.sha256(header)
    for piece in pieces:
        digest.update(piece.numpy().data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(_header(entries, made_of, digest=digest.hexdigest()))
            for piece in pieces:
                file.write(piece.numpy().data)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, *, key: Mapping[str, str], mapped: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts, and the tensors, on huge pages or mapped. Raises FileNotFoundError and CacheError."""
    try:
        with path.open("rb", buffering=0) as file:
            return _read(file, key, mapped=mapped)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header makes json and torch fail in many ways
        raise CacheError(f"{path} is not used: {error}") from error


def _read(file: FileIO, key: Mapping[str, str], *, mapped: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > min(size, _MAX_HEADER_BYTES):
        raise ValueError("it has no header")
    text = file.read(length)
    entries: dict[str, Any] = json.loads(text)
    metadata: dict[str, str] = entries.pop("__metadata__")
    made_of = json.loads(metadata["aurora-lit"])
    if changed := {name for name, _ in made_of["key"].items() ^ key.items()}:
        raise ValueError(f"it was made from something else ({', '.join(sorted(changed))} changed)")
    num_bytes = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != 8 + length + num_bytes:
        raise ValueError("its size is wrong")
    digest = hashlib.sha256(start + text.replace(metadata["sha256"].encode(), _NO_DIGEST.encode(), 1))
    if mapped:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = torch.frombuffer(whole, dtype=torch.uint8)[8 + length :]
    else:
        data = huge_pages.empty(num_bytes, torch.uint8)
        unread = data.numpy().data
        while unread:
            count = file.readinto(unread[:_CHUNK_BYTES])
            if not count:
                raise ValueError("it ends early")
            digest.update(unread[:count])
            unread = unread[count:]
    if digest.hexdigest() != metadata["sha256"]:
        raise ValueError("its SHA-256 is wrong")
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return made_of["facts"], tensors


def _header(entries: Mapping[str, Any], made_of: str, *, digest: str) -> bytes:
    """The file's first bytes, up to the data: the length of a JSON text, and that text."""
    text = json.dumps({"__metadata__": {"sha256": digest, "aurora-lit": made_of}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
