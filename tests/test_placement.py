"""Where a configuration's target and draft compute, on machines with no, one and several GPUs."""

import pytest

from aurora_lit import placement
from aurora_lit.cli.checks import check_devices
from aurora_lit.config import load_config
from aurora_lit.errors import ConfigError

SHARDED = ("engine.strategy=fsdp", "engine.devices=4")


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected", "why"),
    [
        (0, (), False, "on the CPU (there is no GPU)"),
        (1, (), False, "on the CPU (engine.strategy=single; engine.device=cuda would use a GPU in eager torch, never"),
        (1, ("engine.device=cpu",), False, "on the CPU (engine.device=cpu)"),
        (1, ("engine.device=cuda",), True, "on the GPU, in eager torch, never tested"),
        (1, ("target.precision=int4",), False, "on the CPU (target.precision=int4 needs it)"),
        (3, SHARDED, False, "on the CPU (engine.devices=4 is more than the 3 GPUs)"),
        (4, SHARDED, True, "on 4 GPUs"),
        (4, (*SHARDED, "engine.device=cpu"), False, "on the CPU (engine.device=cpu)"),
    ],
)
def test_where_a_configuration_computes(
    gpus: int, overrides: tuple[str, ...], expected: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "num_gpus", lambda: gpus)
    config = load_config(None, overrides)
    assert placement.uses_gpus(config) is expected
    assert why in placement.describe(config)
    check = check_devices(config)
    assert why in check.found, "doctor says so too"
    assert (check.state, "engine.device=cpu" in check.remedy) == (("warn", True) if expected else ("ok", False))


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (0, (), "1 GPUs are needed and torch sees 0; use engine.device=cpu"),
        (3, SHARDED, "4 GPUs are needed and torch sees 3"),
        (1, ("target.precision=int8",), "target.precision=int8 needs the CPU; use bf16"),
    ],
)
def test_a_gpu_that_is_demanded_and_cannot_be_used_is_refused(
    gpus: int, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "num_gpus", lambda: gpus)
    config = load_config(None, [*overrides, "engine.device=cuda"])
    for place in (placement.uses_gpus, placement.describe):
        with pytest.raises(ConfigError, match=message):
            place(config)
