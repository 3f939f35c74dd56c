"""From a configuration and a server's run folder to a learner's loop. Only wiring; no behaviour of its own."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from aurora_lit.config import AuroraConfig, draft_folder
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE, initial_draft
from aurora_lit.drafts.versions import DraftStore, version_number
from aurora_lit.errors import ConfigError
from aurora_lit.ipc.engine_status import StatusBlock
from aurora_lit.ipc.learner_status import LearnerBlock
from aurora_lit.ipc.ring import RingReader
from aurora_lit.learn.data.feed import Feed
from aurora_lit.learn.data.labelled_trace import for_gate
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.vocabulary import VocabularyUse
from aurora_lit.learn.online.budget import Budget, Load
from aurora_lit.learn.online.data_parallel import Follower, launched, leading
from aurora_lit.learn.online.domain_drafts import DomainDrafts
from aurora_lit.learn.online.gate import HeldOut
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.learn.online.loop import LearnerEnvironment, OnlineLoop
from aurora_lit.models.source import cache_root, resolve
from aurora_lit.models.target import Target
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.domains.detector import DomainDetector
from aurora_lit.modules.domains.lr_schedule import DomainSignal, SignalRange
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.losses.draft_module import DraftModule, OnlineWeights
from aurora_lit.traces.record import LAYOUT_DIGEST

STATE_NAME = "learner.ckpt"
"""The learner's state, beside the versions it has published."""
DOMAINS_NAME = "domains"
"""Folder of the drafts that were best in one domain, beside the versions too."""
_MOST_REPLAY = 0.95
_MIB = 1 << 20
_FULL = 0.75
"""Share of slots beyond which serving takes all of the machine: between two requests a slot is free for a moment."""


@contextlib.contextmanager
def build_loop(
    config: AuroraConfig, run_folder: Path, ring_path: Path, page: LearnerBlock, status: StatusBlock
) -> Iterator[OnlineLoop]:
    """A loop attached to a server's ring; the ring is let go at the end. Raises AuroraError."""
    learn = config.learn
    torch.set_num_threads(learn.threads)
    with contextlib.ExitStack() as leaving:
        ring = leaving.enter_context(contextlib.closing(RingReader.open(ring_path, layout=LAYOUT_DIGEST)))
        ends, starting = ends_and_start(config)
        store = DraftStore(Path(config.checkpoint.dir) / config.checkpoint.run, keep=config.checkpoint.keep)
        store.prune()  # and with it what a learner left that was killed while it published
        if learn.from_scratch and store.current() is None:
            store.publish(starting, record={"reason": "untrained: learning begins from scratch"})

        def served_draft(version: str | None) -> Draft:
            return starting if version is None else load_draft(store.folder / version, ends)

        current = store.current()
        module = online_module(config, copy.deepcopy(served_draft(current)), ends)
        state_path = store.folder / STATE_NAME
        fabric = launched(learn, loggers=_loggers(config))
        leader = leaving.enter_context(leading()) if learn.devices > 1 else None
        learner = Learner(
            module,
            steering_of(config),
            state_path,
            ends=ends,
            version=current or STARTING_VERSION,
            starting_ids=starting.draft_token_ids,
            vocabulary_use=VocabularyUse(ends) if learn.adapt_vocabulary else None,
            ema_decay=learn.ema_decay,
            fabric=fabric,
            before_step=leader.share if leader else None,
        )
        if learner.resume() and version_number(learner.version) > version_number(current or STARTING_VERSION):
            learner.restart_from(served_draft(current), version=current or STARTING_VERSION)  # taken back meanwhile
        ends.to(learner.fabric.device)
        champion = online_module(config, copy.deepcopy(module.draft), ends).to(learner.fabric.device)
        feed = Feed(
            ends,
            Reservoir(run_folder / "reservoir", limit_bytes=learn.reservoir_mb * _MIB, seed=learn.seed),
            batch_positions=learn.batch_positions,
            replay_share=learn.replay_share,
            live_bytes=learn.reservoir_mb * _MIB // 8,
            max_client_share=learn.max_client_share,
            choice=learn.trace_selection,
            seed=learn.seed,
            vocabulary_use=learner.vocabulary_use,
        )
        yield OnlineLoop(
            LearnerEnvironment(
                traces=ring,
                store=store,
                page=page,
                load=lambda: _load(status, num_slots=config.engine.max_batch_size),
                served_draft=served_draft,
            ),
            config=learn,
            learner=learner,
            champion=champion,
            ends=ends,
            feed=feed,
            held_out=HeldOut(num_newest=learn.gate_requests, seed=learn.seed, read=partial(for_gate, ends=ends)),
            budget=Budget(
                share=learn.compute_share,
                full_load_share=learn.full_load_share,
                minimum_share=learn.minimum_share,
                cpu_s=leader.processor_s if leader else time.process_time,
            ),
            domain_drafts=_domain_drafts(config, store, starting, ends) if learn.domain_drafts else None,
        )


def _load(status: StatusBlock, *, num_slots: int) -> Load:
    now = status.read()
    if now.waiting:
        return Load.QUEUEING
    return Load.FULL if now.running > _FULL * num_slots else Load.SPARE


def run_follower(config: AuroraConfig) -> None:
    """Learn with the process that this one is a copy of, until it has enough. Raises AuroraError."""
    learn = config.learn
    torch.set_num_threads(learn.threads)
    ends, starting = ends_and_start(config)
    fabric = launched(learn)
    follower = Follower()
    module = online_module(config, starting, ends)
    learner = Learner(
        module,
        steering_of(config),
        Path(os.devnull),
        ends=ends,
        version=STARTING_VERSION,
        ema_decay=learn.ema_decay,
        fabric=fabric,
    )
    ends.to(fabric.device)
    follower.follow(learner)


def _domain_drafts(config: AuroraConfig, store: DraftStore, starting: Draft, ends: TargetHead) -> DomainDrafts:
    return DomainDrafts(
        store.folder / DOMAINS_NAME,
        ends,
        scratch=online_module(config, copy.deepcopy(starting), ends).to(ends.head_VH.device),
        most=config.domain.max_domains,
        batch_positions=config.learn.batch_positions,
    )


def steering_of(config: AuroraConfig) -> DomainController:
    """What the sections `domain` and `schedule` ask for; cold is what their neighbours say."""
    domain, schedule = config.domain, config.schedule
    detector = DomainDetector(max_domains=domain.max_domains, novelty=domain.novelty_threshold) if domain.detect else None
    cold = DomainSignal(
        explore_share=config.engine.explore_share,
        explore_temperature=config.engine.explore_temperature,
        entropy_weight=config.learn.entropy_weight,
        replay_share=config.learn.replay_share,
    )
    hot = DomainSignal(
        explore_share=min(1.0, cold.explore_share + schedule.explore_share),
        explore_temperature=cold.explore_temperature * schedule.explore_temperature_factor,
        entropy_weight=cold.entropy_weight + schedule.entropy_weight,
        replay_share=min(_MOST_REPLAY, cold.replay_share * schedule.replay_factor),
    )
    return DomainController(
        detector,
        signals=SignalRange(cold=cold, hot=hot),
        warmup_steps=schedule.warmup_steps,
        min_lr_factor=schedule.min_lr_factor,
        decay_tokens=schedule.decay_tokens,
        max_labels=domain.max_domains,
    )


def _target_folder(config: AuroraConfig) -> Path:
    target = config.target
    return resolve(target.source, cache_dir=cache_root(target.cache_dir), sha256=target.sha256)


def ends_and_start(config: AuroraConfig) -> tuple[TargetHead, Draft]:
    """The target's two ends, and the draft that serving starts with; the target's layers are let go again."""
    folder = draft_folder(config)
    if folder is None and not config.learn.from_scratch:
        raise ConfigError(
            "draft.checkpoint=null: there is no draft to improve; name a checkpoint, or set learn.from_scratch=true"
        )
    target = Target.load(_target_folder(config), precision=config.target.precision)
    ends = TargetHead(target)
    if config.learn.from_scratch:
        starting = _untrained(config, target, folder)
    else:
        assert folder is not None
        starting = load_draft(folder, ends)
    del target
    gc.collect()
    return ends, starting


def _untrained(config: AuroraConfig, target: Target, folder: Path | None) -> Draft:
    """A draft that has seen nothing, of the configured checkpoint's shape and vocabulary where there is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.learn.seed)
        if folder is None:
            # No checkpoint to take a vocabulary from: the lowest ids, which are the commonest.
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


def online_module(config: AuroraConfig, draft: Draft, ends: TargetHead) -> DraftModule:
    """The draft as `learn` asks to train it."""
    learn = config.learn
    return DraftModule(
        draft,
        embedding_VH=ends.embedding_VH,
        head_VdH=ends.head_VH[draft.draft_token_ids],
        finish=ends.finish.rows(draft.draft_token_ids),
        num_steps=learn.unroll_steps,
        value_weight=learn.value_weight,
        online=OnlineWeights(
            base_loss=learn.base_loss,
            ppo_weight=learn.ppo_weight,
            clip=learn.ppo_clip,
            gae_lambda=learn.gae_lambda,
        ),
        learning_rate=learn.learning_rate,
    )


def _loggers(config: AuroraConfig) -> list[Logger]:
    """CSV always, TensorBoard where it is installed."""
    folder, name = config.learn.logs, config.checkpoint.run
    loggers: list[Logger] = [CSVLogger(folder, name=name, flush_logs_every_n_steps=1)]
    with contextlib.suppress(ModuleNotFoundError):
        loggers.append(TensorBoardLogger(folder, name=f"{name}-tensorboard"))
    return loggers
