"""Whether a sharded target gives the unsharded target's answers, how fast it is, and what memory it needs.

    python benchmarks/sharding.py --prompts FILE... --limit 20 -- target.precision=fp32

Answers the prompts greedily with the unsharded target, then with each strategy in as many processes as --processes
says, as a server's workers would; every engine runs in processes of its own. Prints the number of equal answers, rounds
per second (without rounds that read a prompt; with engine.adaptive=false the rounds are the same for all), and the
memory of each process: weights, everything that came with loading (slots and the kernels' copies included), and the
peak. Exit code 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.tensor import DTensor

from aurora_lit.bench.prompts import params_for
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.kernels import native
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.models.interface import Target
from aurora_lit.request import Request
from aurora_lit.serve.worker.build import build_worker
from aurora_lit.serve.worker.load_models import load_shard, load_tokenizer

_MIB = 1 << 20


def main() -> int:
    """Run the comparison; 0 if every answer is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="prompts in all, the files in turn")
    parser.add_argument("--max-prompt-tokens", type=int, default=128, help="longer prompts are skipped")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["tensor_parallel", "fsdp"])
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for example target.precision=fp32")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    tokenizer = load_tokenizer(config)
    files = [read_prompts(path) for path in arguments.prompts]
    encoded = (encode_prompt(tokenizer, prompt) for turn in zip(*files, strict=False) for prompt in turn)
    fitting = (ids for ids in encoded if len(ids) <= arguments.max_prompt_tokens)
    prompts = list(itertools.islice(fitting, arguments.limit))

    unsharded: list[list[int]] = []
    all_equal = True
    for strategy in ["single", *arguments.strategies]:
        processes = 1 if strategy == "single" else arguments.processes
        ranks = measure(config, strategy, processes, prompts, arguments.max_tokens)
        unsharded = unsharded or ranks[0]["answers"]
        equal = sum(a == b for a, b in zip(ranks[0]["answers"], unsharded, strict=True))
        all_equal &= equal == len(prompts)
        memory = "; ".join(
            f"{key} " + " + ".join(f"{each[key] / _MIB:.0f}" for each in ranks) + " MiB"
            for key in ("weights", "loaded", "peak")
        )
        print(
            f"{strategy}: {equal}/{len(prompts)} answers equal; {ranks[0]['rounds_per_s']:.2f} rounds/s; "
            f"{ranks[0]['tokens_per_s']:.1f} tokens/s; {memory}",
            flush=True,
        )
    return 0 if all_equal else 1


def measure(
    config: AuroraConfig, strategy: Any, processes: int, prompts: list[list[int]], max_tokens: int
) -> list[dict[str, Any]]:
    """Figures of each rank; those of rank 0 hold the answers too."""
    config = replace(config, engine=replace(config.engine, strategy=strategy, devices=processes))
    with tempfile.TemporaryDirectory() as folder:
        LearnerStatusPage.create(Path(folder) / LEARNER_STATUS_NAME)
        torch.multiprocessing.spawn(run, (config, Path(folder), prompts, max_tokens), nprocs=processes)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def run(rank: int, config: AuroraConfig, folder: Path, prompts: list[list[int]], max_tokens: int) -> None:
    """One process: the engine (rank 0), or a shard of the target."""
    native.library()
    process = psutil.Process()
    before = process.memory_info().rss
    figures: dict[str, Any] = {}
    if rank == 0:
        parts = build_worker(config, folder)
        engine: Any = parts.engine
        figures |= memory(engine.target, before)
        params = params_for(0, max_tokens=max_tokens)
        for i, ids in enumerate(prompts):
            engine.submit(Request(request_id=str(i), prompt_ids=tuple(ids), params=params))
        answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
        seconds, rounds, tokens = [], 0, 0
        while engine.has_work:
            reads = bool(engine._prefill.sequences or (engine.num_waiting and engine._allocator.num_free))
            started = time.perf_counter()
            outputs = engine.round()
            if not reads:
                seconds.append(time.perf_counter() - started)
                rounds += 1
                tokens += sum(len(output.token_ids) for output in outputs)
            for output in outputs:
                answers[output.request_id] += output.token_ids
        figures |= {
            "answers": list(answers.values()),
            "rounds_per_s": rounds / max(1e-9, sum(seconds)),
            "tokens_per_s": tokens / max(1e-9, sum(seconds)),
        }
        parts.close()
    else:
        target = load_shard(config, folder, rank)
        figures |= memory(target, before)
        target.run_worker_loop()
    figures["peak"] = _peak_rss() - before
    (folder / f"{rank}.json").write_text(json.dumps(figures))


def memory(target: Target, before: int) -> dict[str, int]:
    """Bytes of this rank's weights, and by how much the process has grown since `before`."""
    return {"weights": sum(map(_bytes, weights(target))), "loaded": psutil.Process().memory_info().rss - before}


def weights(target: nn.Module) -> Iterator[torch.Tensor]:
    """This rank's shard of every parameter, packed weights included."""
    seen = set()
    for module in target.modules():
        packed = getattr(module, "packed", None)
        for tensor in [*module.parameters(recurse=False), *([] if packed is None else [packed])]:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.data_ptr() not in seen:
                seen.add(local.data_ptr())
                yield local


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _peak_rss() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    sys.exit(main())
