"""Training computes in what this processor multiplies faster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.accelerators.mps import MPSAccelerator

from aurora_lit.learn import training_precision as training_precision_module
from aurora_lit.learn.online.data_parallel import launch_fabric
from aurora_lit.learn.training_precision import (
    faster_precision,
    one_process_fabric,
    training_dtype,
    training_precision,
)
from aurora_lit.settings import LearnSettings


@pytest.mark.parametrize(
    ("fp32_ms", "bf16_ms", "expected"),
    [
        (2.6, 12.0, "32-true"),  # a Xeon without instructions for bf16
        (2.6, 1.4, "bf16-mixed"),
        (2.6, 2.7, "bf16-mixed"),  # as fast: bf16 needs less memory
    ],
)
def test_fp32_only_where_it_is_clearly_faster(fp32_ms: float, bf16_ms: float, expected: str) -> None:
    assert faster_precision(fp32_s=fp32_ms, bf16_s=bf16_ms) == expected


def test_what_is_multiplied_has_the_type_that_training_computes_in() -> None:
    is_fp32 = training_precision() == "32-true"
    assert training_dtype() == (torch.float32 if is_fp32 else torch.bfloat16)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The precision is not known, and a product cannot be timed."""
    monkeypatch.delattr(training_precision_module, "_product_s")
    training_precision.cache_clear()
    yield
    training_precision.cache_clear()


@pytest.mark.parametrize(
    ("said", "precision"),
    [("bf16-mixed", "bf16-mixed"), ("bf16", "bf16-mixed"), ("32-true", "32-true"), ("32", "32-true")],
)
@pytest.mark.usefixtures("untimed")
def test_what_fabric_run_was_told_holds(said: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_PRECISION", said)
    assert training_precision() == precision


def test_a_process_in_a_job_of_several_slurm_tasks_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a batch script with `#SBATCH --ntasks=4`, which starts the command once."""
    for name, value in {"JOB_NAME": "serve", "NTASKS": "4", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    fabric = one_process_fabric()
    assert (fabric.world_size, fabric.global_rank) == (1, 0)


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a Mac: torch and Fabric see an accelerator, which is no CUDA GPU."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    training_precision.cache_clear()


@pytest.mark.usefixtures("apple_gpu")
def test_an_apple_gpu_whose_optimiser_cannot_learn_is_left_alone(tmp_path: Path) -> None:
    """torch's SparseAdam does not support MPS; and the budget counts the processor's time."""
    for fabric in (one_process_fabric(), launch_fabric(LearnSettings(), tmp_path)):
        assert fabric.device == torch.device("cpu")


@pytest.mark.usefixtures("untimed", "apple_gpu")
def test_beside_an_apple_gpu_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 9.0}
    monkeypatch.setattr(training_precision_module, "_product_s", seconds.__getitem__, raising=False)
    assert training_precision() == "32-true"
