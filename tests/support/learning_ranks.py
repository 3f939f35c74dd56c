"""A learner of one or two processes, without a server, that reports each process's final weights and mean losses.

    weights = learn_with(folder, model_folder, processes=2)       # one entry a process
    weights[1]["draft"], weights[1]["steps"]

Run as a script it is one of the processes; Fabric starts the second as a copy of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from support import child_environment

STEPS = 6
"""After a third of them learning continues from another draft."""


def learn_with(folder: Path, model: Path, *, processes: int) -> list[dict[str, Any]]:
    from aurora_lit.learn.data.training_state import read_state

    if processes == 1:  # in this process, which has imported everything already
        main(folder, model, processes)
    else:
        command = [sys.executable, __file__, str(folder), str(model), str(processes)]
        subprocess.run(command, check=True, env=child_environment(), timeout=200)
    return [read_state(folder / f"{processes}-{rank}") or {} for rank in range(processes)]


def main(folder: Path, model: Path, processes: int) -> None:
    from aurora_lit.learn.data.collate import collate_online
    from aurora_lit.learn.data.target_head import TargetHead
    from aurora_lit.learn.data.training_state import write_state
    from aurora_lit.learn.online.data_parallel import Follower, launch_fabric, leader_process
    from aurora_lit.learn.online.learner import Learner
    from aurora_lit.models.loading import load_target
    from aurora_lit.settings import LearnSettings
    from support.live_traces import make_controller, online_module, serve, some_requests
    from support.tiny_models import random_draft

    target = load_target(model, precision="fp32")
    target_head = TargetHead(target)
    fabric = launch_fabric(LearnSettings(devices=processes), folder)

    def a_learner(seed: int, **more: Any) -> Learner:
        module = online_module(target, random_draft(target, seed=seed, draft_vocab_size=32))
        return Learner(
            module,
            make_controller(min_lr_factor=0.3),
            folder / "state",
            target_head=target_head,
            version="start",
            ema_decay=0.8,
            fabric=fabric,
            **more,
        )

    def lead(learner: Learner) -> None:
        traffic = serve(target, random_draft(target), some_requests(12))
        for step in range(STEPS):
            if step == STEPS // 3:
                learner.restart_from(random_draft(target, seed=7, draft_vocab_size=32), version="other")
            # Batches that divide evenly between two processes, and not.
            batch = collate_online(traffic[: 3 + step % 2], traffic[10:])
            learner.controller.assign_domain(traffic[0])
            assert learner.update(batch) is not None

    # The follower starts from other weights: its state must come from the leader.
    if fabric.global_rank:
        follower = Follower()
        follower.follow(learner := a_learner(3))
    elif processes == 1:
        lead(learner := a_learner(0))
    else:
        with leader_process() as leader:
            lead(learner := a_learner(0, before_step=leader.broadcast_step))
    with learner.averaged() as module:
        average = {name: tensor.clone() for name, tensor in module.draft.state_dict().items()}
    weights = {"draft": dict(learner.draft.state_dict()), "average": average, "steps": learner.steps}
    losses = {name: learner.mean(name) for name in ("loss", "value_loss")}
    write_state(folder / f"{processes}-{fabric.global_rank}", weights | losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
