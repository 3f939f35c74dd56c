"""The learner: a draft module, its optimisers and its schedule. `update` is the only optimiser step of online learning.

Its state is written whole and safely, so that it is killed at the cost of what came after the last `save`.
What is left out: batches (learn/data/feed.py), when to step (learn/online/loop.py), the losses (modules/losses/draft_module.py), the file
of a state (learn/online/state_file.py), and how several learners keep in step (learn/online/data_parallel.py).

    learner = Learner(module, steering, state_path, ends=ends, version="draft-000003")
    learner.resume()                    # True: it goes on where the last one was
    learner.update(batch)               # None: the batch was poison and left no trace
    learner.save()
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.vocabulary import VocabularyUse, change_vocabulary
from aurora_lit.learn.online.state_file import read_state, write_state
from aurora_lit.learn.online.step_metrics import StepMetrics
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.draft_module import DraftModule, OnlineReport

STARTING_VERSION = "start"
"""Stands for the draft that serving began with, before any was published."""
PATIENCE_TRIALS = 4
"""Drafts refused one after the other after which learning goes back to the one that serves, at half the rate."""
_LOG_EVERY_STEPS = 8
_USE, _AVERAGE = "vocabulary_use", "average"
_log = logging.getLogger(__name__)


class Learner:
    """See the file's docstring for its life."""

    def __init__(
        self,
        module: DraftModule,
        steering: DomainController,
        state_path: Path,
        *,
        ends: TargetHead,
        version: str,
        vocabulary_use: VocabularyUse | None = None,
        starting_ids: torch.Tensor | None = None,
        ema_decay: float = 0.0,
        fabric: Fabric | None = None,
        before_step: Callable[[Learner, OnlineBatch], None] | None = None,
    ) -> None:
        """`version`: the published draft, or the starting checkpoint, that the module's weights descend from.

        vocabulary_use: what `adapt_vocabulary` goes by; None: the vocabulary stays. starting_ids: vocabulary of the
        draft that serving began with, by which a state of another deployment is told; None: the module's.
        ema_decay: what stays of the averaged weights at each step (see `averaged`).
        fabric: of several processes that take each step together; each must be given the same batches.
        before_step: is shown this and the batch before anything is learned from it.
        """
        self._ends, self.vocabulary_use = ends, vocabulary_use
        ids_D = module.draft.draft_token_ids if starting_ids is None else starting_ids
        self._origin = hashlib.sha256(ids_D.cpu().numpy().tobytes()).hexdigest()
        self.steering = steering
        self.state_path = state_path
        self.version = version
        self.steps = 0
        self.num_changes = 0
        """Of the weights, by anything but a step."""
        self.positions = 0
        """Positions learned from, replay included."""
        self._refused = 0
        """Drafts one after the other."""
        self.poisoned = 0
        """Batches since this object was made whose loss or gradient was not finite; they taught nothing."""
        self._before_step = before_step
        self.fabric = fabric or Fabric(accelerator="auto", devices=1, precision="bf16-mixed")
        self.module: Any = self.fabric.setup_module(module)
        self._metrics = StepMetrics()
        self._ema_decay = ema_decay
        self._average = self._new_average()
        self._new_optimizers()

    @property
    def draft(self) -> Draft:
        """The draft as it is now."""
        draft = self.module.draft
        assert isinstance(draft, Draft)
        return draft

    @property
    def _averaged_draft(self) -> Draft:
        draft = self._average.module
        assert isinstance(draft, Draft)
        return draft

    @contextlib.contextmanager
    def averaged(self) -> Iterator[DraftModule]:
        """The module with the running average of its weights, which is what is tried, published and kept.

        Averaging takes out the noise of a high learning rate without lowering it (Polyak and Juditsky 1992).
        """
        module: DraftModule = self.module.module
        learning = module.draft
        module.draft = self._averaged_draft
        try:
            yield module
        finally:
            module.draft = learning

    def update(self, batch: OnlineBatch) -> OnlineReport | None:
        """Learn from a batch: loss, gradient, one step of each optimiser and of the schedule."""
        if self._before_step is not None:
            self._before_step(self, batch)
        part = batch.part(self.fabric.global_rank, of=self.fabric.world_size).to(self.fabric.device)
        self._follow_signal()
        module: DraftModule = self.module.module
        with self.fabric.autocast():
            report = module.training_step(part)
        self.module.zero_grad()
        self.fabric.backward(report.loss)
        loss = self._join_parts(report.loss.detach())
        norm = self._clip_gradients()
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self.poisoned += 1
            return None
        self.steering.learned(batch)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self._average.update_parameters(self.draft)
        self.steps += 1
        self.positions += int((batch.traces.weight_BT > 0).sum())
        self._metrics.note(report, norm)
        if self.steps % _LOG_EVERY_STEPS == 0:
            rate = float(self.schedules[0].get_last_lr()[0])
            heat = self.steering.heat
            self.log({**self._metrics.take(), "learning_rate": rate, "heat": heat, "positions": self.positions})
        return report

    def judged(self, *, passed: bool, champion: Draft, version: str) -> None:
        """Take in a verdict on the averaged draft; `champion`, of `version`: the draft that serves unless it passed."""
        self._refused = 0 if passed else self._refused + 1
        for schedule in self.schedules if passed else []:
            schedule.recover()
        if self._refused == PATIENCE_TRIALS:
            self._refused = 0
            for schedule in self.schedules:
                schedule.back_off()
            self.restart_from(champion, version=version)

    def restart_from(self, draft: Draft, *, version: str) -> None:
        """Go on from other weights: those learned since were taken back. The optimisers forget what led there."""
        self.draft.load_state_dict(draft.state_dict())
        self._ends.fit_head(self.module.module)
        self.version = version
        self.num_changes += 1
        self._average = self._new_average()
        self._new_optimizers()

    def adapt_vocabulary(self) -> int:
        """Let the tokens that traffic uses into the draft's vocabulary; how many entered."""
        weight, use = self.draft.lm_head.weight, self.vocabulary_use
        ids_D = use.better_ids(self.draft.draft_token_ids) if use is not None else None
        if ids_D is None:
            return 0
        states = [optimizer.optimizer.state.get(weight, {}) for optimizer in self.optimizers]
        moments = [value for state in states for value in state.values() if value.shape == weight.shape]
        entered = change_vocabulary(self.draft, ids_D, self._ends.head_VH, per_row=moments)
        change_vocabulary(self._averaged_draft, ids_D, self._ends.head_VH, per_row=[])
        self._ends.fit_head(self.module.module)
        self.num_changes += 1
        return entered

    def save(self) -> None:
        """Write the whole state, safe on disk, over the last one."""
        if self.fabric.is_global_zero:
            write_state(self.state_path, self.state())

    def resume(self) -> bool:
        """Take over the last learner's state; False, and nothing taken, when there is none that fits this draft."""
        rest = read_state(self.state_path)
        if rest is None:
            return False
        if reason := self._why_not(rest):
            _log.warning("the learner's state in %s is not used: %s", self.state_path, reason)
            return False
        self.take(rest)
        return True

    def state(self) -> dict[str, Any]:
        """All that learning goes on from."""
        return {
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "version": self.version,
            "steps": self.steps,
            "positions": self.positions,
            "origin": self._origin,
        }

    def take(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, of a learner of the same shape."""
        for name, part in self._stateful().items():
            if name in state or name not in (_USE, _AVERAGE):  # states of before there were any have none
                part.load_state_dict(state[name])
        if _AVERAGE not in state:
            self._average = self._new_average()
        self._ends.fit_head(self.module.module)
        for schedule, of_schedule in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(of_schedule)
        self.version, self.steps, self.positions = state["version"], state["steps"], state["positions"]
        self.num_changes += 1

    def _why_not(self, rest: dict[str, Any]) -> str:
        """Why a state does not fit this draft; "" when it does."""
        shapes = {name: tensor.shape for name, tensor in self.module.state_dict().items()}
        found = {name: tensor.shape for name, tensor in rest["module"].items()}
        if shapes != found:
            return "it is of a draft of another shape"
        if "origin" in rest:
            same = rest["origin"] == self._origin
        else:  # written before vocabularies adapted: its own is that of the draft that serving began with
            same = torch.equal(rest["vocabulary"], self.draft.d2t.cpu())
        return "" if same else "serving began with a draft of another vocabulary"

    def mean(self, name: str) -> float:
        """Running mean of a metric since it was last logged; 0 before the first step."""
        return self._metrics.mean(name)

    def log(self, values: dict[str, float]) -> None:
        """Give numbers of this step to the loggers."""
        self.fabric.log_dict(values, step=self.steps)

    def _new_average(self) -> AveragedModel:
        average = AveragedModel(self.draft, multi_avg_fn=get_ema_multi_avg_fn(self._ema_decay))  # type: ignore[no-untyped-call]
        average.n_averaged += 1  # the weights as they are count
        return average

    def _new_optimizers(self) -> None:
        module: DraftModule = self.module.module
        optimizers = module.make_optimizers()
        self.schedules = self.steering.schedules_for(optimizers)
        self.optimizers: list[Any] = [self.fabric.setup_optimizers(optimizer) for optimizer in optimizers]

    def _follow_signal(self) -> None:
        """Weigh the loss's terms as what is left to learn asks for."""
        module: DraftModule = self.module.module
        signal = self.steering.signal
        replay_weight = signal.replay_share / (1 - signal.replay_share)
        module.online = replace(module.online, entropy_weight=signal.entropy_weight, replay_weight=replay_weight)

    def _join_parts(self, loss: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of all processes, and their losses.

        Here, not in the strategy's wrapper: that one averages, and takes no frozen records.
        """
        if self.fabric.world_size == 1:
            return loss
        gradients = [p.grad for p in self.draft.parameters() if p.grad is not None]
        flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
        flat = torch.as_tensor(self.fabric.all_reduce(flat, reduce_op="sum"))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, joined in zip(gradients, torch.split(flat[1:], sizes), strict=True):
            gradient.copy_(joined.view_as(gradient))
        return flat[0]

    def _clip_gradients(self) -> torch.Tensor:
        """Clip the gradient of the whole module, whichever optimiser has which part; its norm before."""
        norm = self.fabric.clip_gradients(self.module, self.optimizers[0], max_norm=1.0, error_if_nonfinite=False)
        assert norm is not None  # it is for strategies that clip out of sight
        return norm

    def _stateful(self) -> dict[str, Any]:
        use = {} if self.vocabulary_use is None else {_USE: self.vocabulary_use}
        return {
            "module": self.module,
            "domains": self.steering,
            _AVERAGE: self._average,
            **use,
            **{f"optimizer_{number}": optimizer for number, optimizer in enumerate(self.optimizers)},
        }
