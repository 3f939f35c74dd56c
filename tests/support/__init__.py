"""What tests share: tiny models, fakes, and processes to break. Nothing here is a test.

Tiny models and data: tiny_models (random targets and drafts, engines on them), domain_prompts, trace_examples,
toy_sampling, kernel_formats, ring_payloads; qwen2.5.jinja (that family's chat template).
Fakes: fake_engine (an engine without a model), fake_learner (a learner's process without learning), fake_device
(tensors that must not meet the CPU's).
Whole processes: fake_server (HTTP over the fake engine), tiny_server (real servers and learners on a tiny model),
fork_host (forks those two from a process that has imported everything), two_ranks, learning_ranks, replay_ranks,
crash_points (kills a process at every step it takes on disk).
Learning: live_traces (traces as a tiny engine makes them), learner_harness, replay_harness.
"""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a test's own processes: they find the package and this folder, and use one thread."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", **more}


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run
