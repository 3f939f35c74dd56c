"""A replay in one or two processes, of which the second has no room for past traces, that reports each one's result.

    one, two = replay_with(folder, model_folder, traces_folder, processes=2)       # one entry a process
    two["learned"], two["served"], two["version"], two["steps"], two["scored"], two["errors"]

They may form no group beside Fabric's. At the end the second process has other traces than the first. Run as a script
it is one of the processes; Fabric starts the second as a copy of it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import child_environment


def replay_with(folder: Path, model: Path, traces: Path, *, processes: int) -> list[dict[str, Any]]:
    from aurora_lit.learn.data.training_state import read_state

    if processes == 1:  # in this process, which has imported everything already
        main(folder, model, traces, processes)
    else:
        command = [sys.executable, __file__, str(folder), str(model), str(traces), str(processes)]
        subprocess.run(command, check=True, env=child_environment(), timeout=200)
    return [read_state(folder / f"{processes}-{rank}") or {} for rank in range(processes)]


def main(folder: Path, model: Path, traces: Path, processes: int) -> None:
    import torch
    import torch.distributed as dist
    from lightning.fabric import Fabric

    from aurora_lit.errors import AuroraError
    from aurora_lit.learn.data.reservoir import Reservoir
    from aurora_lit.learn.data.training_state import write_state
    from aurora_lit.learn.offline.loop import blocks, read_traces
    from aurora_lit.models.loading import load_target
    from support.replay_harness import make_replay
    from support.tiny_models import random_draft

    several = processes > 1
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if several else "auto", precision="32-true")
    if several:
        fabric.launch()
        del dist.new_group
    rank, target = fabric.global_rank, load_target(model, precision="fp32")
    if rank:
        Reservoir.add = lambda *args, **options: False  # type: ignore[method-assign]
    scratch = folder / f"scratch-{processes}-{rank}"
    replay = make_replay(
        target, random_draft(target), scratch, fabric=fabric, steps_per_trace=1.0, publish_every_steps=5
    )
    stream = list(read_traces(traces))
    for block in blocks(iter(stream), 24):
        replay.process_block(block)
    result = {
        "learned": dict(replay.learner.draft.state_dict()),
        "served": dict(replay.served.state_dict()),
        "version": replay.version,
        "trials": len(replay.trials),
        "steps": replay.learner.steps,
        "scored": [repr(each) for each in replay.scored],
    }
    errors = []
    damaged = replace(stream[0], last_TH=torch.full_like(stream[0].last_TH, float("nan")))
    # It lacks a trace; it has no more, while the first one has traces, or one that is skipped.
    for block in (stream[: 3 - rank], [] if rank else stream[:3], [] if rank else [damaged]):
        try:
            if several and block:
                replay.process_block(block)
            elif several:
                replay.check_same_traces([])
        except AuroraError as error:
            errors.append(str(error))
    write_state(folder / f"{processes}-{rank}", {**result, "errors": errors})


if __name__ == "__main__":
    folder, model, traces = map(Path, sys.argv[1:4])
    main(folder, model, traces, int(sys.argv[4]))
