"""A training state comes back as it was written, is written whole or not at all, and is never unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_lit.learn.data.training_state import from_bytes, read_state, to_bytes, write_state


def a_state() -> dict[str, Any]:
    """Types, shapes and nesting as optimisers, detectors and drafts have them."""
    return {
        "module": {
            "weight": torch.arange(6.0).view(2, 3).T,
            "ids": torch.arange(3),
            "mask": torch.tensor([True, False]),
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"lr": 1e-3, "params": [0, 1]}]},
        "half": [torch.tensor([1.5, -2.0], dtype=torch.bfloat16), torch.zeros(0, 4)],
        "plain": {"none": None, "text": "é", "flag": True, "number": 1 / 3, "infinite": float("inf"), "": {}},
    }


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def test_a_state_comes_back_with_its_types_keys_and_order(tmp_path: Path) -> None:
    assert_same(a_state(), from_bytes(to_bytes(a_state())))
    write_state(tmp_path / "state.safetensors", a_state())
    assert_same(a_state(), read_state(tmp_path / "state.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_only_its_owner_can_read_a_state_as_it_tells_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, a_state())
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)  # of an older release
    write_state(path, a_state())
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_not_a_whole_state_is_refused_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, path = to_bytes(a_state()), tmp_path / "state"
    for data in (b"", b"no state", whole[:7], whole[:60], whole[: len(whole) // 2], whole[:-1], pickle.dumps(1)):
        with pytest.raises(ValueError, match="not the state of a training"):
            from_bytes(data)
        path.write_bytes(data)
        assert read_state(path) is None
    caplog.clear()
    assert read_state(tmp_path / "missing") is None
    assert not caplog.text
    (tmp_path / "unreadable").mkdir()
    assert read_state(tmp_path / "unreadable") is None
    assert "unreadable is not used: [Errno 21] Is a directory" in caplog.text


def test_a_write_that_fails_leaves_the_last_state_and_one_that_was_killed_is_swept_up(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"steps": 1})
    (tmp_path / ".state.tmp").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match=".state.tmp"):
        write_state(path, {"steps": 2})
    (tmp_path / ".state.tmp").rmdir()
    (tmp_path / ".state.tmp").write_bytes(b"half")
    assert read_state(path) == {"steps": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
