"""A learner's state on disk: written whole over the last one, and none rather than a part when read.

What is left out: what a state holds (learn/online/learner.py).
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Safe on disk when this returns. Raises OSError, or RuntimeError, which is how torch reports a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by fabric.save: killed inside, it leaves a file of this size among the machine's temporary files.
    with _unfinished(path).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(_unfinished(path), path)


def read_state(path: Path) -> dict[str, Any] | None:
    """The last one written, on the CPU; None when there is none that can be read."""
    _unfinished(path).unlink(missing_ok=True)  # of a learner that was killed while it saved
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError):
        return None
    return state


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".tmp")
