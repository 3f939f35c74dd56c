"""Training computes in what this processor multiplies faster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aurora_lit.learn import training_precision as training_precision_module
from aurora_lit.learn.training_precision import (
    faster_precision,
    one_process_fabric,
    training_dtype,
    training_precision,
)


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
