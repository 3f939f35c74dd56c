"""Builds a learner's loop from a configuration and a server's run folder: construction only, no behaviour."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from aurora_lit.config import AuroraConfig, draft_folder, logs_folder, versions_folder
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE, initial_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import version_number
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.ipc.ring import RingReaders
from aurora_lit.ipc.run_folder import RINGS
from aurora_lit.learn.data.online_batcher import OnlineBatcher, fewest_live
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.budget import Budget, LoadWatch
from aurora_lit.learn.online.data_parallel import Follower, launch_fabric, leader_process
from aurora_lit.learn.online.environment import LearnerEnvironment
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner, weights_digest
from aurora_lit.learn.online.loop import OnlineLoop, newest_usable
from aurora_lit.learn.online.trial import Trial
from aurora_lit.learn.training_precision import training_dtype
from aurora_lit.models.loading import load_target
from aurora_lit.models.source import cache_root, resolve
from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.domains.detector import DomainDetector
from aurora_lit.modules.domains.lr_schedule import DECAY_TOKENS, MIN_LR_FACTOR, WARMUP_STEPS
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.objective import BaseLoss, OnlineWeights
from aurora_lit.traces.record import LAYOUT_DIGEST

STATE_NAME = "learner.safetensors"
"""The learner's state, in the folder of the versions it publishes."""
BATCH_POSITIONS = 512
"""Token positions in a batch that are trained on; the context before them counts a quarter."""
_MIN_UNROLL_STEPS = 4
_SAMPLED_TOKENS = 512
"""Over which a batch's loss is computed. A quarter of what pretraining takes: a step costs a tenth less, and drafts
come out alike (docs/results/learning.md)."""
_MAX_QUEUED = 256
"""Values that wait for TensorBoard's writer: many times those of a step, so that they find room if it ends meanwhile,
on a full disk, and never so many that the process waits for them at its end."""
_MIB = 1 << 20


@contextlib.contextmanager
def build_loop(
    config: AuroraConfig, run_folder: Path, ring_path: Path, page: LearnerStatusPage, status: EngineStatusPage
) -> Iterator[OnlineLoop]:
    """A loop attached to a server's ring, which is closed at the end. Raises AuroraError."""
    learn = config.learn
    torch.set_num_threads(learn.threads)
    with contextlib.ExitStack() as stack:
        # Beside vLLM each of its data-parallel engines has a ring.
        rings = sorted(ring_path.parent.glob(RINGS)) or [ring_path]
        ring = stack.enter_context(contextlib.closing(RingReaders.open(rings, layout=LAYOUT_DIGEST)))
        target_head, starting = load_head_and_draft(config)
        store = DraftStore(versions_folder(config))
        store.check_target(target_head)
        # CheckpointError: a CURRENT that names no version, which `newest_usable` tells; OSError: learning can begin.
        with contextlib.suppress(CheckpointError, OSError):
            store.prune()  # also deletes what a learner left that was killed while it published
        starting_digest = weights_digest(starting)
        begins_anew = learn.from_scratch and not store.has_current
        if begins_anew:
            store.publish(starting, record={"reason": "untrained: learning begins from scratch"})

        untrained = starting if learn.from_scratch else None

        def served_draft(version: str | None) -> Eagle3Draft:
            if version is not None:
                return load_draft(store.folder / version, target_head)
            return starting_draft(config, target_head) if untrained is None else untrained

        current, draft = newest_usable(store, served_draft)
        fabric = launch_fabric(learn, run_folder, loggers=_loggers(config))
        # The learner's own: no other copy of the draft that serving starts with stays in memory.
        module = online_module(config, starting if draft is None else draft, target_head)
        del starting, draft
        state_path = store.folder / STATE_NAME
        leader = stack.enter_context(leader_process()) if learn.devices > 1 else None
        learner = Learner(
            module,
            controller_for(config),
            state_path,
            target_head=target_head,
            version=current or STARTING_VERSION,
            starting_digest=starting_digest,
            ema_decay=learn.ema_decay,
            fabric=fabric,
            before_step=leader.broadcast_step if leader else None,
        )
        record = _record_of(store, current)
        if learner.resume() and (
            begins_anew
            or version_number(learner.version) > version_number(current or STARTING_VERSION)
            or record.get("steps", 0) > learner.steps
        ):
            # Anew, or of a later version: it was rolled back meanwhile, or cannot be loaded. Of fewer steps: the
            # learner was killed after it had published and before it saved its state.
            learner.restart_from(served_draft(current), version=current or STARTING_VERSION)
        # Those of the draft that it goes on from. With fewer the next start would go back to that draft again.
        learner.steps = max(learner.steps, record.get("steps", 0))
        learner.positions = max(learner.positions, record.get("positions", 0))
        served = for_scoring(copy.deepcopy(module.draft))
        champion = online_module(config, served, target_head).to(learner.fabric.device)
        yield OnlineLoop(
            LearnerEnvironment(
                traces=ring,
                store=store,
                page=page,
                server_load=LoadWatch(status),
                served_draft=served_draft,
            ),
            config=learn,
            learner=learner,
            champion=champion,
            target_head=target_head,
            batcher=make_batcher(config, run_folder),
            trial=make_trial(config),
            budget=Budget(
                idle_share=learn.idle_share,
                share=learn.compute_share,
                cpu_s=leader.cpu_s if leader else time.process_time,
            ),
        )


def _record_of(store: DraftStore, version: str | None) -> dict[str, Any]:
    """What was recorded when a version was published; empty for the starting draft."""
    return next((each.record for each in store.versions() if each.name == version), {})


def make_batcher(config: AuroraConfig, folder: Path, *, seed: int = 0) -> OnlineBatcher:
    """Batches as the settings `learn` describe them; remembered traces, by `seed`, are files in `folder`/reservoir."""
    learn = config.learn
    return OnlineBatcher(
        Reservoir(folder / "reservoir", limit_bytes=learn.reservoir_mb * _MIB, seed=seed),
        batch_positions=BATCH_POSITIONS,
        replay_share=learn.replay_share,
        live_bytes=learn.reservoir_mb * _MIB // 8,
    )


def make_trial(config: AuroraConfig, *, seed: int = 0, gated: bool = True) -> Trial:
    """Trials as the settings `learn` describe them; older requests are chosen by `seed`. gated: false if none is held,
    so that no request waits for one."""
    learn = config.learn
    return Trial(seed=seed, num_waiting=learn.gate_requests if gated else 0, limit_bytes=learn.reservoir_mb * _MIB // 4)


def run_follower(config: AuroraConfig, run_folder: Path) -> None:
    """Take the steps of the leader, of which this process is a copy, until it is done. Raises AuroraError."""
    learn = config.learn
    torch.set_num_threads(learn.threads)
    target_head, starting = load_head_and_draft(config)
    store = DraftStore(versions_folder(config))
    # Of the leader's shape, which its state must have.
    draft = newest_usable(store, lambda version: load_draft(store.folder / version, target_head))[1]
    fabric = launch_fabric(learn, run_folder)
    follower = Follower()
    module = online_module(config, starting if draft is None else draft, target_head)
    learner = Learner(
        module,
        controller_for(config),
        Path(os.devnull),
        target_head=target_head,
        version=STARTING_VERSION,
        ema_decay=learn.ema_decay,
        fabric=fabric,
    )
    follower.follow(learner)


def for_scoring(draft: Eagle3Draft) -> Eagle3Draft:
    """The draft with its matrices in the type in which it is scored anyway; it is not for training."""
    draft.requires_grad_(False)
    for matrix in (parameter for parameter in draft.parameters() if parameter.ndim > 1):
        matrix.data = matrix.data.to(training_dtype())
    return draft


def controller_for(config: AuroraConfig) -> DomainController:
    """A controller by the settings `domain`."""
    return DomainController(
        DomainDetector() if config.domain.detect else None,
        warmup_steps=WARMUP_STEPS,
        min_lr_factor=MIN_LR_FACTOR,
        decay_tokens=DECAY_TOKENS,
    )


def _target_folder(config: AuroraConfig) -> Path:
    target = config.target
    return resolve(target.source, cache_dir=cache_root(), sha256=target.sha256)


def load_head_and_draft(config: AuroraConfig) -> tuple[TargetHead, Eagle3Draft]:
    """The target's embedding and head, and the draft that serving starts with; the target's layers are freed again.

    Raises ConfigError when there is no draft and `learn.from_scratch` is false.
    """
    folder = draft_folder(config)
    if folder is None and not config.learn.from_scratch:
        raise ConfigError(
            "draft.checkpoint=null: there is no draft to improve; name a checkpoint, or set learn.from_scratch=true"
        )
    source, precision = _target_folder(config), config.target.precision
    # A new draft begins with copies of the target's layers, which a packed file does not give.
    cache_dir = None if config.learn.from_scratch else cache_root()
    target = load_target(source, precision=precision, cache_dir=cache_dir, mapped=True)
    target_head, in_torch = TargetHead(target), target.in_torch
    if config.learn.from_scratch:
        assert in_torch is not None
        starting = _untrained(config, in_torch, folder)
    else:
        starting = starting_draft(config, target_head)
    del target, in_torch
    gc.collect()
    return target_head, starting


def starting_draft(config: AuroraConfig, target_head: TargetHead) -> Eagle3Draft:
    """The checkpoint that serving starts with. Raises CheckpointError."""
    folder = draft_folder(config)
    assert folder is not None
    return load_draft(folder, target_head)


def _untrained(config: AuroraConfig, target: TorchTarget, folder: Path | None) -> Eagle3Draft:
    """An untrained draft, of the shape and vocabulary of the configured checkpoint if there is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if folder is None:
            # Without a checkpoint to take the vocabulary from: the lowest ids, which are the most frequent tokens.
            ids = torch.arange(min(DRAFT_VOCABULARY_SIZE, target.vocab_size))
            return initial_draft(target, ids, max_positions=config.engine.max_seq_len)
        shape = read_config(folder)
        return initial_draft(
            target,
            load_draft(folder, target).draft_token_ids,
            num_key_value_heads=shape.num_key_value_heads,
            intermediate_size=shape.intermediate_size,
            max_positions=shape.max_position_embeddings,
        )


def unroll_steps(config: AuroraConfig) -> int:
    """Draft steps unrolled in training: as many as the engine drafts, but _MIN_UNROLL_STEPS at least."""
    return max(_MIN_UNROLL_STEPS, config.engine.max_draft_tokens)


def online_module(
    config: AuroraConfig, draft: Eagle3Draft, target_head: TargetHead, *, base_loss: BaseLoss = "lk"
) -> DraftModule:
    """The draft in a module that is trained as the settings `learn` say; another `base_loss` is for comparison."""
    learn = config.learn
    return DraftModule(
        draft,
        embed=target_head.embed,
        head_VdH=target_head.rows(draft.draft_token_ids),
        logit_transform=target_head.logit_transform.select(draft.draft_token_ids),
        num_steps=unroll_steps(config),
        online=OnlineWeights(
            base_loss=base_loss,
            ppo=learn.ppo,
            replay_weight=learn.replay_share / (1 - learn.replay_share),
            fewest_live=fewest_live(batch_positions=BATCH_POSITIONS, replay_share=learn.replay_share),
            sampled_tokens=_SAMPLED_TOKENS,
        ),
        learning_rate=learn.learning_rate,
    )


def _loggers(config: AuroraConfig) -> list[Logger]:
    """A CSV logger, and a TensorBoard logger if TensorBoard is installed."""
    folder, name = logs_folder(config), config.checkpoint.run
    loggers: list[Logger] = [CSVLogger(folder, name=name, flush_logs_every_n_steps=1)]
    with contextlib.suppress(ModuleNotFoundError):
        loggers.append(TensorBoardLogger(folder, name=f"{name}-tensorboard", max_queue=_MAX_QUEUED))
    return loggers
