"""The training loop of pretraining: one Fabric loop over a trace log that saves its state every minute and resumes.

Leaves out the loss (modules/losses/draft_module.py), the data (learn/data/log_batches.py), and the stages
(learn/pretrain/stages.py).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from aurora_lit.errors import AuroraError
from aurora_lit.learn.data.log_batches import held_out_batches, training_batches
from aurora_lit.learn.data.training_state import read_state, write_state
from aurora_lit.learn.training_precision import one_process_fabric
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.chain_losses import accepted_proposals
from aurora_lit.modules.losses.draft_module import DraftModule, clip_gradients
from aurora_lit.modules.losses.objective import OnlineReport
from aurora_lit.progress import Progress
from aurora_lit.traces.log import ShardInfo

STATE_NAME = "training.safetensors"
SAVE_EVERY_S = 60.0
_MIN_LR_FACTOR = 0.05
_MOST_DROPPED = 20
"""Batches in a row without finite loss or gradient, after which the draft counts as spoiled."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Sizes and learning rate of the training."""

    total_positions: int
    """Positions of the whole training, all stages together; the learning-rate schedule spans them."""
    batch_positions: int = 1024
    max_length: int = 512
    prompt_share: float = 0.3
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    """Optimiser steps, of `batch_positions` each, in which the learning rate rises."""
    seed: int = 0


def lr_factor(step: int, *, warmup_steps: int, total_steps: int, min_lr_factor: float) -> float:
    """Factor of the learning rate at an optimiser step: linear warm-up, then cosine decay to `min_lr_factor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_factor + (1 - min_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress))


class DraftTrainer:
    """Trains a module up to given numbers of positions; one made on the same folder again resumes.

    >>> trainer = DraftTrainer(module, folder, options)
    >>> trainer.fit(traces, shards, until_positions=1_000_000)
    >>> trainer.validate(traces, shards, logsumexp=target_head.log_sum_exp)
    """

    def __init__(self, module: DraftModule, folder: Path, options: TrainerOptions) -> None:
        self.options = options
        self.state_path = folder / STATE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        self.fabric = one_process_fabric()
        module.learning_rate = options.learning_rate
        self.positions_seen = 0
        optimizers = module.make_optimizers()
        # By positions, not steps: the number of trained positions of a batch is not known in advance.
        self.schedules = [LambdaLR(each, lambda _: self._lr_factor()) for each in optimizers]
        self.module, *self.optimizers = self.fabric.setup(module, *optimizers)
        self.epoch = self.batches_taken = 0
        self.num_dropped = 0
        """Batches since this object was made that changed nothing, because loss or gradient was not finite."""
        self._dropped_in_row = 0
        self._epoch_of: list[Any] = []
        """What the order of the epoch's batches follows from; after as many of them as `batches_taken` it goes on."""
        if self.state_path.exists():
            self._resume()

    def fit(self, traces: Path, shards: Sequence[ShardInfo], *, until_positions: int) -> None:
        """Take optimiser steps over the shards, epoch after epoch, until `until_positions` were trained on in all.

        Raises AuroraError when the shards hold no sequence to train on, or the loss is not finite any more.
        """
        last_save = time.monotonic()
        with Progress("learning", until_positions, "positions", done=self.positions_seen) as progress:
            while self.positions_seen < until_positions:
                before, skipped = self.positions_seen, self._begin_epoch(shards)
                for batch in itertools.islice(self._batches(traces, shards), skipped, None):
                    report = self._step(batch)
                    self.batches_taken += 1
                    progress.advance(self.positions_seen - progress.done, note=_note(report))
                    if time.monotonic() - last_save > SAVE_EVERY_S and not self._dropped_in_row:
                        self.save()
                        last_save = time.monotonic()
                    if self.positions_seen >= until_positions:
                        break
                else:
                    self.epoch, self.batches_taken = self.epoch + 1, 0
                if self.positions_seen == before and not skipped:
                    raise AuroraError(f"{traces} holds no sequence to learn from; record text or answers first")
        self.save()

    def _begin_epoch(self, shards: Sequence[ShardInfo]) -> int:
        """Begin an epoch, or go on with one that was broken off; returns how many of its batches were taken before.

        One of other shards or options is not gone on with: its batches would come in another order.
        """
        options = self.options
        order = [options.seed, options.batch_positions, options.max_length, *(shard.name for shard in shards)]
        if self.batches_taken and order != self._epoch_of:
            self.epoch, self.batches_taken = self.epoch + 1, 0
        self._epoch_of = order
        return self.batches_taken

    @torch.no_grad()
    def validate(
        self, traces: Path, shards: Sequence[ShardInfo], *, logsumexp: Callable[[Tensor], Tensor]
    ) -> dict[str, dict[str, Any]]:
        """By domain, on the held-out sequences: acceptance rate at each draft step, and expected accepted length.

        The rates are means over all positions. The length is the mean over the chains from each, 1 + Σ_t Π_{i≤t} α_i
        along a chain, which ends with the answer. A product of the rates is another figure, since positions that are
        easy to propose for come together.

        logsumexp: maps the target's last hidden states [N, H] to the log-sum-exp of its logits [N].
        """
        alphas: dict[str, list[MeanMetric]] = {}
        matches: dict[str, list[MeanMetric]] = {}
        lengths: dict[str, MeanMetric] = {}
        steps = self.module.num_steps
        for batch in held_out_batches(
            traces,
            shards,
            batch_positions=self.options.batch_positions,
            max_length=self.options.max_length,
            logsumexp=logsumexp,
        ):
            with self.fabric.autocast():
                stats, mask_KBT = self.module.score(batch.to(self.fabric.device))
            domain = batch.domains[0]
            weight_KN = mask_KBT.flatten(1)
            for table, values_KN in ((alphas, stats.alpha_N), (matches, stats.top1_match_N)):
                meters = table.setdefault(domain, [MeanMetric() for _ in range(steps)])
                for step, meter in enumerate(meters):
                    meter.update(values_KN[step].float(), weight_KN[step])
            alpha_KBT = stats.alpha_N.view_as(mask_KBT) * mask_KBT
            accepted_BT = accepted_proposals(alpha_KBT, torch.ones_like(alpha_KBT))[0]
            lengths.setdefault(domain, MeanMetric()).update(1 + accepted_BT, mask_KBT[0])
        report_by_domain = {}
        for domain, meters in alphas.items():
            report_by_domain[domain] = {
                "acceptance_by_position": [round(float(meter.compute()), 4) for meter in meters],
                "top1_match_by_position": [round(float(meter.compute()), 4) for meter in matches[domain]],
                "expected_accepted_length": round(float(lengths[domain].compute()), 3),
            }
        return report_by_domain

    def _lr_factor(self) -> float:
        """Factor of the learning rate now; whole batches of positions count as steps."""
        options = self.options
        return lr_factor(
            self.positions_seen // options.batch_positions,
            warmup_steps=options.warmup_steps,
            total_steps=max(1, options.total_positions // options.batch_positions),
            min_lr_factor=_MIN_LR_FACTOR,
        )

    def save(self) -> None:
        """Save the whole training state durably, in place of the last one. Raises OSError."""
        write_state(
            self.state_path,
            {
                **{name: part.state_dict() for name, part in self._stateful().items()},
                "schedules": [schedule.state_dict() for schedule in self.schedules],
                "positions_seen": self.positions_seen,
                "epoch": self.epoch,
                "batches_taken": self.batches_taken,
                "epoch_of": self._epoch_of,
            },
        )

    def _resume(self) -> None:
        state = _saved_state(self.state_path)
        own, saved = self.module.state_dict(), state["module"]
        same_shapes = own.keys() == saved.keys() and all(own[name].shape == saved[name].shape for name in own)
        if not same_shapes or not torch.equal(own["draft.d2t"].cpu(), saved["draft.d2t"].cpu()):
            raise AuroraError(
                f"{self.state_path} is of a draft with another vocabulary or shape; repeat the --start-from and "
                "--draft-vocab-size that it began with, or name another --out"
            )
        if not all(bool(torch.isfinite(each).all()) for each in saved.values()):
            raise AuroraError(f"{self.state_path}: its weights are not finite; delete it to train from the beginning")
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        for schedule, of_schedule in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict({**of_schedule, "base_lrs": schedule.base_lrs})
        self.positions_seen, self.epoch = state["positions_seen"], state["epoch"]
        self.batches_taken, self._epoch_of = state["batches_taken"], state["epoch_of"]
        for schedule in self.schedules:  # with this object's learning rate, not the saved one
            for group, base_lr in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = base_lr * self._lr_factor()

    def _batches(self, traces: Path, shards: Sequence[ShardInfo]) -> Iterator[OnlineBatch]:
        options = self.options
        for batch in training_batches(
            traces,
            shards,
            batch_positions=options.batch_positions,
            max_length=options.max_length,
            prompt_share=options.prompt_share,
            seed=options.seed * 1_000_003 + self.epoch,
        ):
            yield OnlineBatch.without_rounds(batch).to(self.fabric.device)

    def _step(self, batch: OnlineBatch) -> OnlineReport:
        with self.fabric.autocast():
            report: OnlineReport = self.module.training_step(batch)
        self.module.zero_grad()
        self.fabric.backward(report.loss)
        norm = clip_gradients(self.module.parameters())
        self.positions_seen += int((batch.traces.weight_BT > 0).sum())
        if not (torch.isfinite(report.loss) and torch.isfinite(norm)):
            self._drop()
            return report
        self._dropped_in_row = 0
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return report

    def _drop(self) -> None:
        """Count a batch that changes nothing. Raises AuroraError after _MOST_DROPPED in a row."""
        self.num_dropped += 1
        self._dropped_in_row += 1
        if self._dropped_in_row == _MOST_DROPPED:
            raise AuroraError(
                f"{_MOST_DROPPED} batches in a row have a loss or gradient that is not finite; lower --learning-rate "
                f"and start again; if that changes nothing, delete {self.state_path} to train from the beginning"
            )

    def _stateful(self) -> dict[str, Any]:
        optimizers = {f"optimizer_{number}": optimizer for number, optimizer in enumerate(self.optimizers)}
        return {"module": self.module, **optimizers}


def positions_trained(folder: Path) -> int:
    """On how many positions the training in a folder has trained so far.

    Raises AuroraError if its state is damaged or of an older version.
    """
    path = folder / STATE_NAME
    return int(_saved_state(path)["positions_seen"]) if path.exists() else 0


def _saved_state(path: Path) -> dict[str, Any]:
    state = read_state(path)
    if state is None:
        raise AuroraError(f"{path} is damaged; delete it to train from the beginning")
    if "batches_taken" not in state:
        raise AuroraError(
            f"{path} is of an older version, whose training cannot be continued; delete it to train from the beginning "
            "on the same traces"
        )
    return state


def _note(report: OnlineReport) -> str:
    weight_N = report.mask_KBT[0].flatten()
    alpha = float((report.stats.alpha_N[0] * weight_N).sum() / weight_N.sum().clamp_min(1))
    return f"loss {float(report.loss.detach()):.3f}, first-proposal acceptance {alpha:.3f}"
