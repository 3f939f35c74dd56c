"""Where target and draft compute: on GPUs, one for each of `engine.devices` processes, or on the CPU.

On a GPU everything is computed in eager torch. It was tested on a fake device only (tests/support/fake_device.py): what
a real GPU's rounding, memory and speed make of it is not known. `engine.device: auto` therefore uses GPUs for the
sharded strategies alone, which are made for them. A learner chooses its device itself.
"""

from __future__ import annotations

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError


def uses_gpus(config: AuroraConfig) -> bool:
    """True if target and draft compute on GPUs. Raises ConfigError if engine.device=cuda cannot be fulfilled."""
    engine, precision = config.engine, config.target.precision
    if engine.device == "cpu":
        return False
    is_demanded, on_cpu_only = engine.device == "cuda", precision in ("int8", "int4")
    if is_demanded and on_cpu_only:
        raise ConfigError(
            f"engine.device=cuda: target.precision={precision} needs the CPU; use bf16, or engine.device=cpu"
        )
    gpus = num_gpus()
    if is_demanded and gpus < engine.devices:
        raise ConfigError(
            f"engine.device=cuda: {engine.devices} GPUs are needed and torch sees {gpus}; use engine.device=cpu, or "
            "install a driver and a CUDA build of torch"
        )
    return is_demanded or (engine.strategy != "single" and gpus >= engine.devices and not on_cpu_only)


def num_gpus() -> int:
    """Number of CUDA GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def describe(config: AuroraConfig) -> str:
    """Where target and draft compute, and why, in a line. Raises ConfigError as `uses_gpus`."""
    engine, precision, gpus = config.engine, config.target.precision, num_gpus()
    if uses_gpus(config):
        where = "the GPU" if engine.devices == 1 else f"{engine.devices} GPUs"
        return f"target and draft compute on {where}, in eager torch, never tested on a real GPU (see docs/vllm.md)"
    if not gpus:
        why = "there is no GPU"
    elif engine.device == "cpu":
        why = "engine.device=cpu"
    elif engine.strategy == "single" and precision not in ("int8", "int4"):
        why = "engine.strategy=single; engine.device=cuda would use a GPU in eager torch, never tested on a real one"
    elif gpus < engine.devices:
        why = f"engine.devices={engine.devices} is more than the {gpus} GPUs"
    else:
        why = f"target.precision={precision} needs it"
    return f"target and draft compute on the CPU ({why})"
