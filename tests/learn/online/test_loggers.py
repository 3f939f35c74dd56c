"""Where the learner's numbers go: a CSV file always, TensorBoard where one of its writers is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.fabric import Fabric
from lightning.fabric.loggers import tensorboard

from aurora_lit.config import AuroraConfig
from aurora_lit.learn.online.build import _loggers

WRITERS = ("tensorboard", "tensorboardX")
needs_a_writer = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, WRITERS)), reason="neither tensorboard nor tensorboardX is installed"
)


def log_one(folder: Path) -> Fabric:
    config = AuroraConfig()
    loggers = _loggers(replace(config, learn=replace(config.learn, logs=str(folder))))
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    fabric.log_dict({"loss": 0.5}, step=3)
    for logger in loggers:
        logger.finalize("success")
    return fabric


def csv_lines(folder: Path) -> list[str]:
    (path,) = folder.rglob("metrics.csv")
    return path.read_text().split()


def test_without_tensorboard_the_numbers_are_in_the_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(tensorboard, "_TENSORBOARDX_AVAILABLE", False)
    assert len(log_one(tmp_path).loggers) == 1
    assert csv_lines(tmp_path) == ["loss,step", "0.5,3"]


@needs_a_writer
def test_with_tensorboard_they_are_in_both(tmp_path: Path) -> None:
    assert len(log_one(tmp_path).loggers) == 2
    assert csv_lines(tmp_path) == ["loss,step", "0.5,3"]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
