"""The learner: a draft module, its optimisers and schedules. `update` is the only optimiser step of online learning.

Its state is saved whole or not at all: a learner that is killed goes on from the last `save`, or from the draft that it
has published since (learn/online/build.py).
Leaves out batches (learn/data/online_batcher.py), when to take a step (learn/online/loop.py), the losses
(modules/losses/draft_module.py), the state's file (learn/data/training_state.py), and how several processes take the
same steps (learn/online/data_parallel.py).

    learner = Learner(module, controller, state_path, target_head=target_head, version="draft-000003")
    learner.resume()                    # True: it continues from the saved state
    learner.update(batch)               # None: loss or gradient was not finite, nothing changed
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

from aurora_lit.errors import AuroraError
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.training_state import read_state, write_state
from aurora_lit.learn.online.step_metrics import StepMetrics
from aurora_lit.learn.training_precision import one_process_fabric
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.draft_module import DraftModule, clip_gradients
from aurora_lit.modules.losses.objective import OnlineReport

STARTING_VERSION = "start"
"""Version of the draft that serving started with, before any was published."""
STATE_FORMAT = 1
"""Of the saved state. Raise it when a state of before could not be continued."""
PATIENCE_TRIALS = 4
"""After so many refusals without a pass, learning restarts from the served draft at half the learning rate."""
_LOG_EVERY_STEPS = 8
_log = logging.getLogger(__name__)


def weights_digest(draft: Eagle3Draft) -> str:
    """Tells drafts of the same shape apart."""
    digest = hashlib.sha256()
    for parameter in draft.parameters():
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _check_writer(logger: Any) -> None:
    """Raise RuntimeError if the thread of tensorboardX has ended, of which nothing else tells."""
    with contextlib.suppress(AttributeError):  # another logger
        if not logger.experiment.file_writer.event_writer._worker.is_alive():
            raise RuntimeError("TensorBoard's writer has ended, as on a full disk")


class Learner:
    """See the file's docstring."""

    def __init__(
        self,
        module: DraftModule,
        controller: DomainController,
        state_path: Path,
        *,
        target_head: TargetHead,
        version: str,
        starting_digest: str = "",
        ema_decay: float = 0.0,
        fabric: Fabric | None = None,
        before_step: Callable[[Learner, OnlineBatch], None] | None = None,
    ) -> None:
        """`version`: the published draft, or STARTING_VERSION, whose weights the module starts from.

        starting_digest: of the weights of the draft that serving starts with (`weights_digest`).
        ema_decay: decay of the averaged weights at each step (see `averaged`); 0: there is no average.
        fabric: for several processes that take each step together; each must be given the same batches.
        before_step: called with this learner and the batch before each step.
        """
        self._target_head = target_head
        self._origin = hashlib.sha256(module.draft.draft_token_ids.cpu().numpy().tobytes()).hexdigest()
        self._starting_digest = starting_digest
        self.controller = controller
        self.state_path = state_path
        self.version = version
        self.steps = 0
        self.num_weight_changes = 0
        """Changes of the weights by anything but a step."""
        self.positions = 0
        """Positions trained on, replay included."""
        self._num_refused = 0
        """Refusals by the gate since a draft passed or learning restarted."""
        self.lineage: dict[str, Any] = {}
        """State of the trials (`OnlineLoop`), as plain data: saved with the learner's, empty after a restart."""
        self.num_nonfinite = 0
        """Batches since this object was made that were skipped because loss or gradient was not finite."""
        self._before_step = before_step
        self.fabric = fabric or one_process_fabric()
        self.module: Any = self.fabric.setup_module(module)
        self._metrics = StepMetrics()
        self._is_logged, self._logging_error = True, ""
        self._ema_decay = ema_decay
        self._average = self._new_average()
        self._new_optimizers()

    @property
    def draft(self) -> Eagle3Draft:
        """The draft with the weights of the last step."""
        draft = self.module.draft
        assert isinstance(draft, Eagle3Draft)
        return draft

    @property
    def _averaged_draft(self) -> Eagle3Draft:
        """What is evaluated and published."""
        draft = self._average.module if self._average is not None else self.draft
        assert isinstance(draft, Eagle3Draft)
        return draft

    @contextlib.contextmanager
    def averaged(self) -> Iterator[DraftModule]:
        """While inside, the module has the weights that are evaluated and published: their running average, if any.

        Averaging removes the noise of a high learning rate without lowering the rate (Polyak and Juditsky 1992).
        """
        module: DraftModule = self.module.module
        current = module.draft
        module.draft = self._averaged_draft
        try:
            yield module
        finally:
            module.draft = current

    def between_pieces(self, action: Callable[[], None]) -> None:
        """Call `action` several times in the course of every step from now on, where the step can wait."""
        module: DraftModule = self.module.module
        module.between_pieces = action

    def update(self, batch: OnlineBatch) -> OnlineReport | None:
        """Take one optimiser step on a batch. None if its loss or gradient is not finite: nothing is changed then."""
        if self._before_step is not None:
            self._before_step(self, batch)
        part = batch.shard(self.fabric.global_rank, world_size=self.fabric.world_size).to(self.fabric.device)
        module: DraftModule = self.module.module
        self.module.zero_grad()  # before the step needs memory
        with self.fabric.autocast():
            report = module.training_step(part)
        module.between_pieces()
        self.fabric.backward(report.loss)
        module.between_pieces()
        loss, value_loss = self._sum_over_processes(torch.stack([report.loss.detach(), report.value_loss]))
        norm = clip_gradients(self.draft.parameters())
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self.num_nonfinite += 1
            return None
        self.controller.record_batch(batch)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        if self._average is not None:
            # Rotary tables grow with what a draft is given, which for the average is trials; buffers are paired too.
            longest = max(len(draft.cos_LD) for draft in (self.draft, self._averaged_draft))
            for draft in (self.draft, self._averaged_draft):
                draft.extend_positions(longest)
            self._average.update_parameters(self.draft)
        self.steps += 1
        self.positions += int((batch.traces.weight_BT > 0).sum())
        self._metrics.update(replace(report, loss=loss, value_loss=value_loss), norm)
        if self.steps % _LOG_EVERY_STEPS == 0:
            rate = float(self.schedules[0].get_last_lr()[0])
            heat = self.controller.heat
            self.log(
                {**self._metrics.compute_and_reset(), "learning_rate": rate, "heat": heat, "positions": self.positions}
            )
        return report

    def apply_gate_decision(self, *, passed: bool, champion: Eagle3Draft, version: str) -> bool:
        """React when the gate has passed or refused the averaged draft; True if learning restarts from `champion`.

        `champion`, of `version`: the draft served before it.
        """
        self._num_refused = 0 if passed else self._num_refused + 1
        for schedule in self.schedules if passed else []:
            schedule.recover()
        if self._num_refused < PATIENCE_TRIALS:
            return False
        for schedule in self.schedules:
            schedule.back_off()
        self.restart_from(champion, version=version)
        return True

    def restart_from(self, draft: Eagle3Draft, *, version: str) -> None:
        """Continue from another draft's weights, with new optimiser states and a new average."""
        self.draft.load_state_dict(draft.state_dict())
        self._target_head.install_head(self.module.module)
        self.version = version
        self._num_refused, self.lineage = 0, {}
        self.num_weight_changes += 1
        self.module.module.forget_rest()
        self._average = self._new_average()
        self._new_optimizers()

    def save(self) -> None:
        """Save the whole state durably. Raises OSError."""
        if self.fabric.is_global_zero:
            write_state(self.state_path, self.state_dict())

    def resume(self) -> bool:
        """Load the saved state; False, and nothing changes, if there is none.

        The same, with a warning, if it cannot be read or is not of this draft; the next `save` replaces it. One of
        another version is set aside. Raises AuroraError if only a part of it could be loaded: it is set aside too, so
        that the next start begins from the draft.
        """
        state = read_state(self.state_path)
        if state is None:
            return False
        found = state.get("format", STATE_FORMAT)  # an older state does not say
        if found != STATE_FORMAT:
            aside = self._set_aside()
            message = "the learner's state has format %s, and this version reads %s: it is set aside as %s"
            _log.warning(message, found, STATE_FORMAT, aside)
            return False
        try:
            if reason := self._mismatch(state):
                _log.warning("the learner's state in %s is not used: %s", self.state_path, reason)
                return False
            self.load_state_dict(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            aside = self._set_aside()
            message = f"the learner's state cannot be read ({error!r}) and is set aside as {aside}; start it again"
            raise AuroraError(message) from error
        return True

    def _set_aside(self) -> Path:
        aside = self.state_path.with_name(f"{self.state_path.name}.unread")
        if self.fabric.is_global_zero:
            self.state_path.replace(aside)
        return aside

    def state_dict(self) -> dict[str, Any]:
        """The whole state, of plain data and tensors."""
        return {
            "format": STATE_FORMAT,
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "version": self.version,
            "steps": self.steps,
            "positions": self.positions,
            "refused": self._num_refused,
            "lineage": self.lineage,
            "origin": self._origin,
            "starting": self._starting_digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a learner of the same shape."""
        for name, part in self._stateful().items():
            if name in state:
                part.load_state_dict(state[name])
        if "average" not in state:  # of a learner without one
            self._average = self._new_average()
        self._target_head.install_head(self.module.module)
        for schedule, of_schedule in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(of_schedule)
        self.version, self.steps, self.positions = state["version"], state["steps"], state["positions"]
        # An older state does not say.
        self._num_refused, self.lineage = state.get("refused", 0), state.get("lineage", {})
        self.num_weight_changes += 1

    def _mismatch(self, state: dict[str, Any]) -> str:
        """Why a state is not of this draft; "" if it is."""
        shapes = {name: tensor.shape for name, tensor in self.module.state_dict().items()}
        found = {name: tensor.shape for name, tensor in state["module"].items()}
        if shapes != found:
            return "it is of a draft of another shape"
        if any(name not in state for name in self._stateful() if name != "average"):
            return "it is of a learner with other optimizers"
        if state["origin"] != self._origin:
            return "serving began with a draft of another vocabulary"
        # An older state does not say.
        same_start = state.get("starting", self._starting_digest) == self._starting_digest
        is_of_start = state["version"] == STARTING_VERSION
        return "serving began with a draft of other weights" if is_of_start and not same_start else ""

    def mean(self, name: str) -> float:
        """Mean of a metric since it was last logged; 0 before the first step."""
        return self._metrics.mean(name)

    def log(self, values: dict[str, float]) -> None:
        """Pass metrics of this step to the loggers. If one cannot write, no more are logged, and learning goes on."""
        if not self._is_logged:
            return
        try:
            for logger in self.fabric.loggers:
                _check_writer(logger)
            self.fabric.log_dict(values, step=self.steps)
        except (OSError, RuntimeError, ValueError) as error:  # a full disk; ValueError: Lightning's, for TensorBoard's
            # For good: TensorBoard's writer has ended then, and its queue would fill up and block.
            self._is_logged = False
            cause = error.__cause__ or error
            self._logging_error = f"metrics are not logged any more until the learner is restarted: {cause}"
            _log.warning("%s", self._logging_error)

    def take_logging_error(self) -> str:
        """Why metrics are not logged any more, once; else ""."""
        error, self._logging_error = self._logging_error, ""
        return error

    def _new_average(self) -> AveragedModel | None:
        if not self._ema_decay:
            return None
        average = AveragedModel(self.draft, multi_avg_fn=get_ema_multi_avg_fn(self._ema_decay))  # type: ignore[no-untyped-call]
        average.n_averaged += 1  # start from the current weights
        return average

    def _new_optimizers(self) -> None:
        module: DraftModule = self.module.module
        optimizers = module.make_optimizers()
        self.schedules = self.controller.schedules_for(optimizers)
        self.optimizers: list[Any] = [self.fabric.setup_optimizers(optimizer) for optimizer in optimizers]

    def _sum_over_processes(self, losses_L: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of all processes in place, and return the sums of their L losses.

        Not left to the strategy's wrapper, which averages and does not accept frozen dataclasses.
        """
        if self.fabric.world_size == 1:
            return losses_L
        parameters = [p for p in self.draft.parameters() if p.grad is not None]
        before = [p.grad for p in parameters if p.grad is not None]
        gradients: list[torch.Tensor] = [gradient.to_dense() for gradient in before]
        flat = torch.cat([losses_L, *(gradient.flatten() for gradient in gradients)])
        flat = torch.as_tensor(self.fabric.all_reduce(flat, reduce_op="sum"))
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, own, summed in zip(parameters, before, torch.split(flat[len(losses_L) :], sizes), strict=True):
            gradient = summed.view_as(parameter)
            parameter.grad = gradient.to_sparse(1) if own.is_sparse else gradient
        return flat[: len(losses_L)]

    def _stateful(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "domains": self.controller,
            **({"average": self._average} if self._average is not None else {}),
            **{f"optimizer_{number}": optimizer for number, optimizer in enumerate(self.optimizers)},
        }
