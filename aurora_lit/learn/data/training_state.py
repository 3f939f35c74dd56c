"""The state of a training as bytes, and as a file that is written whole or not at all.

A state is nested dicts, lists and tuples of tensors and plain values (numbers, strings, booleans, None), as state_dict
methods return them. Tensors are stored as safetensors, the rest as JSON in the header, so nothing is ever unpickled.
Tuples are read back as lists. Leaves out what a state holds (learn/online/learner.py, learn/pretrain/trainer.py).

    write_state(path, {"module": module.state_dict(), "steps": 12})
    state = read_state(path)                    # None: there is no state that can be read
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from aurora_lit.durable import discard_unfinished, replace_file
from aurora_lit.traces.record import tensor_pieces

_STRUCTURE = "structure"
_log = logging.getLogger(__name__)


def to_bytes(state: dict[str, Any]) -> bytes:
    """The state as safetensors, with its structure and plain values as JSON in the metadata."""
    return b"".join(_pieces(state))


def from_bytes(data: bytes | memoryview) -> dict[str, Any]:
    """The state that `to_bytes` wrote, on the CPU. Raises ValueError for other bytes."""
    try:
        header = json.loads(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
        structure = json.loads(header["__metadata__"][_STRUCTURE])
        state: dict[str, Any] = _with_tensors(structure, safetensors.torch.load(bytes(data)))
    except Exception as error:  # noqa: BLE001  (malformed bytes make safetensors and json fail in many ways)
        raise ValueError(f"not the state of a training: {error!r}") from error
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state; it is durable on disk when this returns. Raises OSError; the state before it is intact then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # From the tensors' own memory: a state is as large as all else that learning holds. A learner's has mean states of
    # clients' prompts, so only its owner can read it.
    replace_file(path, *_pieces(state), mode=0o600)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state last written, on the CPU; None if there is none, or, with a warning, if it cannot be read."""
    discard_unfinished(path)  # left by a process that was killed while it wrote
    try:
        return from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("the state in %s is not used: %s", path, error)
        return None


def _pieces(state: dict[str, Any]) -> list[bytes | memoryview]:
    """The state as safetensors in pieces, with all but the tensors as metadata."""
    tensors: list[Tensor] = []
    structure = json.dumps(_without_tensors(state, tensors))
    return tensor_pieces({str(number): tensor for number, tensor in enumerate(tensors)}, {_STRUCTURE: structure})


def _without_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """The value as JSON can hold it: a tensor becomes {"tensor": its number}, a dict {"items": its pairs}.

    Pairs, since the keys of JSON objects are strings, and optimisers number their parameters.
    """
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"items": [[key, _without_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors) for item in value]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`."""
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _with_tensors(item, tensors) for key, item in value["items"]}
