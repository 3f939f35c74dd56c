"""The published domains come back as they were written, replace each other whole, and are refused if they are bad."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from aurora_lit import durable
from aurora_lit.drafts.centroid_file import (
    CENTROIDS_NAME,
    published_names,
    published_version,
    read_centroids,
    write_centroids,
)
from aurora_lit.errors import CheckpointError
from aurora_lit.modules.domains.centroids import Centroids

TARGET = SimpleNamespace(vocab_size=11, hidden_size=8, aux_layer_ids=(1, 2, 3))
SIZE = 24


def some_centroids(**changes: Any) -> Centroids:
    torch.manual_seed(0)
    made = Centroids(
        names=("auto-1", "häßlich 🌍"),
        centroid_DE=torch.randn(2, SIZE),
        mean_E=torch.randn(SIZE),
        variance_E=torch.rand(SIZE),
        common=1.5,
        novelty_threshold=0.7,
    )
    return replace(made, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "live" / CENTROIDS_NAME


def test_domains_come_back_as_they_were_written(path: Path) -> None:
    written = some_centroids()
    write_centroids(path, written, version=12, target=TARGET)
    read, version = read_centroids(path, TARGET)
    assert (read.names, read.common, read.novelty_threshold, version) == (written.names, 1.5, 0.7, 12)
    for name in ("centroid_DE", "mean_E", "variance_E"):
        torch.testing.assert_close(getattr(read, name), getattr(written, name), atol=0, rtol=0)
    assert [each.name for each in path.parent.iterdir()] == [CENTROIDS_NAME]
    assert published_version(path) == 12
    assert tuple(published_names(path)) == written.names


def test_only_its_owner_may_read_the_file(path: Path) -> None:
    """Centroids of young domains are means of few prompts."""
    write_centroids(path, some_centroids(), version=1, target=TARGET)
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_readable_file_nothing_was_published(path: Path) -> None:
    assert published_version(path) == 0
    path.parent.mkdir()
    path.write_bytes(b"no tensors")
    assert published_version(path) == 0
    assert published_names(path) == []


@pytest.mark.parametrize("step", ["write", "sync", "replace"])
def test_a_failure_at_any_step_leaves_the_file_before(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_centroids(path, some_centroids(), version=1, target=TARGET)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr(durable, "open", full, raising=False)
    elif step == "sync":
        monkeypatch.setattr(durable, "sync", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_centroids(path, some_centroids(), version=2, target=TARGET)
    assert read_centroids(path, TARGET)[1] == 1
    assert [each.name for each in path.parent.iterdir()] == [CENTROIDS_NAME]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"names": ("a", "a")}, "2 domains, or two of one name"),
        ({"names": ("a",)}, "centroids has shape"),
        ({"names": ("a", "")}, "name is invalid"),
        ({"names": ("a", "b\nc")}, "name is invalid"),
        ({"names": ("a", "x" * 65)}, "name is invalid"),
        ({"names": (), "centroid_DE": torch.zeros(0, SIZE)}, "0 domains"),
        ({"names": tuple(f"d{n}" for n in range(32)), "centroid_DE": torch.zeros(32, SIZE)}, "32 domains"),
        ({"mean_E": torch.full((SIZE,), float("nan"))}, "mean holds NaN"),
        ({"variance_E": torch.full((SIZE,), float("inf"))}, "variance holds NaN or infinite"),
        ({"variance_E": torch.full((SIZE,), -1.0)}, "a variance is negative"),
        ({"mean_E": torch.zeros(SIZE + 1)}, "mean has shape"),
        ({"novelty_threshold": float("nan")}, "novelty_threshold is nan"),
    ],
)
def test_bad_values_are_refused_with_a_reason(path: Path, changes: dict[str, Any], reason: str) -> None:
    write_centroids(path, some_centroids(**changes), version=1, target=TARGET)
    with pytest.raises(CheckpointError, match=reason):
        read_centroids(path, TARGET)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format": "2"}, "its format is 2, and this version reads 3"),  # centroids of means over whole prompts
        ({"common": "-1.0"}, "its common is -1.0"),
        ({"common": "nan"}, "its common is nan"),
        ({"format": None}, "its format is None"),
        ({"version": "0"}, "its version is 0"),
        ({"version": "one"}, "missing or invalid"),
        ({"names": "["}, "missing or invalid"),
        ({"names": '{"a": 1, "b": 2}'}, "name is invalid"),
        ({"names": None}, "missing or invalid"),
    ],
)
def test_other_metadata_is_refused_with_a_reason(path: Path, metadata: dict[str, str | None], reason: str) -> None:
    write_centroids(path, some_centroids(), version=1, target=TARGET)
    rewrite(path, metadata=metadata)
    with pytest.raises(CheckpointError, match=reason):
        read_centroids(path, TARGET)


def test_domains_of_another_target_are_refused(path: Path) -> None:
    write_centroids(path, some_centroids(), version=1, target=TARGET)
    for changes in ({"vocab_size": 12}, {"hidden_size": 16}, {"aux_layer_ids": (1, 2, 4)}):
        with pytest.raises(CheckpointError, match="it is of a target"):
            read_centroids(path, SimpleNamespace(**{**vars(TARGET), **changes}))


def test_other_tensors_types_and_sizes_are_refused(path: Path) -> None:
    write_centroids(path, some_centroids(), version=1, target=TARGET)
    whole = path.read_bytes()
    rewrite(path, tensors={"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="it has the tensors"):
        read_centroids(path, TARGET)
    rewrite(path, tensors={"more": None, "mean": torch.zeros(SIZE, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match="mean is torch.float64"):
        read_centroids(path, TARGET)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_centroids(path, TARGET)
    path.write_bytes(whole + bytes(1 << 20))
    with pytest.raises(CheckpointError, match="it is larger than"):
        read_centroids(path, TARGET)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_centroids(path, TARGET)


def rewrite(
    path: Path, *, metadata: dict[str, str | None] | None = None, tensors: dict[str, torch.Tensor | None] | None = None
) -> None:
    """Change parts of a file; None removes one."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    changed_metadata = {**header["__metadata__"], **(metadata or {})}
    changed_tensors = {**safetensors.torch.load(content), **(tensors or {})}
    path.write_bytes(
        safetensors.torch.save(
            {name: tensor for name, tensor in changed_tensors.items() if tensor is not None},
            {name: text for name, text in changed_metadata.items() if text is not None},
        )
    )
