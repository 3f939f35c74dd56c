"""A learner of one or two processes, without a server: what each process's weights are in the end.

    weights = learn_by(folder, model_folder, processes=2)       # of each process
    weights[1]["draft"], weights[1]["steps"]

Run as a script it is one of the processes; Fabric starts the second as a copy of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from support import child_environment

STEPS = 9
"""In three parts: then another draft is gone on from, then other tokens enter its vocabulary."""


def learn_by(folder: Path, model: Path, *, processes: int) -> list[dict[str, Any]]:
    import torch

    environment = child_environment()
    subprocess.run(
        [sys.executable, __file__, str(folder), str(model), str(processes)], check=True, env=environment, timeout=200
    )
    return [torch.load(folder / f"{processes}-{rank}.pt", weights_only=True) for rank in range(processes)]


def main(folder: Path, model: Path, processes: int) -> None:
    import torch

    from aurora_lit.learn.data.labelled_trace import online_batch, read_lesson
    from aurora_lit.learn.data.target_head import TargetHead
    from aurora_lit.learn.data.vocabulary import VocabularyUse
    from aurora_lit.learn.online.data_parallel import Follower, launched, leading
    from aurora_lit.learn.online.learner import Learner
    from aurora_lit.models.target import Target
    from aurora_lit.settings import LearnSettings
    from support.live_traces import a_steering, online_module, serve, some_requests
    from support.tiny_models import random_draft

    target = Target.load(model, precision="fp32")
    ends = TargetHead(target)
    fabric = launched(LearnSettings(devices=processes))

    def a_learner(seed: int, **more: Any) -> Learner:
        module = online_module(target, random_draft(target, seed=seed, draft_vocab_size=32))
        return Learner(
            module,
            a_steering(min_lr_factor=0.3),
            folder / "state",
            ends=ends,
            version="start",
            ema_decay=0.8,
            fabric=fabric,
            **more,
        )

    def lead(learner: Learner) -> None:
        traffic = serve(target, random_draft(target), some_requests(12), explore_share=0.5, explore_temperature=1.0)
        lessons = [read_lesson(trace, ends) for trace in traffic]
        for trace in traffic:
            learner.vocabulary_use.add(trace)  # type: ignore[union-attr]
        for step in range(STEPS):
            if step == STEPS // 3:
                learner.restart_from(random_draft(target, seed=7, draft_vocab_size=32), version="other")
            if step == 2 * STEPS // 3:
                assert learner.adapt_vocabulary() > 0
            # As many rows on both sides, and not.
            batch = online_batch(lessons[: 3 + step % 2], [lesson.trace for lesson in lessons[10:]], oldest_fresh=0)
            learner.steering.place(traffic[0])
            assert learner.update(batch) is not None

    # Another start than the leader's: all that counts must come from there.
    if fabric.global_rank:
        follower = Follower()
        follower.follow(learner := a_learner(3))
    elif processes == 1:
        lead(learner := a_learner(0, vocabulary_use=VocabularyUse(ends)))
    else:
        with leading() as leader:
            lead(learner := a_learner(0, vocabulary_use=VocabularyUse(ends), before_step=leader.share))
    with learner.averaged() as module:
        average = {name: tensor.clone() for name, tensor in module.draft.state_dict().items()}
    left = {"draft": dict(learner.draft.state_dict()), "average": average, "steps": learner.steps}
    torch.save(left, folder / f"{processes}-{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
