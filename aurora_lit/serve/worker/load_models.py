"""Loads what a configuration names: the target or a shard of it, its tokenizer, and the draft to start with.

Left out: how models are read (models/), drafts that are published later (drafts/hot_reload.py), and the engine that
runs them (serve/worker/build.py).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aurora_lit.config import AuroraConfig, draft_folder
from aurora_lit.drafts.checkpoint import check_fits, load_draft, read_config
from aurora_lit.errors import ConfigError
from aurora_lit.machine import use_threads
from aurora_lit.models import loading
from aurora_lit.models.interface import CPU, Target
from aurora_lit.models.native_target import NativeTarget
from aurora_lit.models.source import cache_root, find_target, read_model_config
from aurora_lit.models.tokenizer import Tokenizer, keep_tokenizer, transformers_tokenizer
from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.placement import uses_gpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aurora_lit.models.sharded_target import ShardedTarget

UNTRAINED_VERSION = "untrained"
"""Version of the randomly initialised draft that serves until a learner with learn.from_scratch publishes its first."""
_UNTRAINED_VOCABULARY_SIZE = 4096
_log = logging.getLogger(__name__)


def prepare(config: AuroraConfig) -> None:
    """Fetch the target, keep its tokenizer, and check that it can be placed and partitioned as configured.

    Runs before any process of the engine is started. Raises SourceError or ConfigError.
    """
    uses_gpus(config)
    folder = find_target(config)
    try:
        keep_tokenizer(folder, cache_dir=cache_root())
    except OSError as error:
        _log.warning("the tokenizer cannot be kept (%s); every start will load it with transformers", error)
    if config.engine.strategy != "single":
        from aurora_lit.models.partition import check_partition

        check_partition(config, read_model_config(folder))


def check_one_process(config: AuroraConfig) -> None:
    """Raise ConfigError if the target is to be sharded, which only a server does."""
    if config.engine.strategy != "single":
        raise ConfigError(
            f"engine.strategy={config.engine.strategy}: only `aurora-lit serve` shards a target over processes; "
            "use engine.strategy=single and engine.devices=1 here"
        )


def load_serving_target(config: AuroraConfig) -> Target:
    """The target in its configured precision, for an engine: from its packed file where that is possible.

    Raises SourceError, and ConfigError if it cannot hold max_seq_len positions.
    """
    device = _device(config)
    if config.engine.compile == "on" or device != CPU:
        return load_target(config, device=device)
    cache_dir = cache_root()
    target = loading.load_target(find_target(config), precision=config.target.precision, cache_dir=cache_dir)
    _check_length(config, target)
    return target


def _device(config: AuroraConfig) -> torch.device:
    return torch.device("cuda") if uses_gpus(config) else CPU


def load_target(config: AuroraConfig, *, device: torch.device = CPU) -> NativeTarget | TorchTarget:
    """As `load_serving_target`, but with transformers' model, whose layers can be read, and run without a cache."""
    target = loading.load_target(find_target(config), precision=config.target.precision, device=device)
    _check_length(config, target)
    if config.engine.compile != "on":
        return target
    assert target.in_torch is not None
    target.in_torch.compile_forward()
    return target.in_torch


def _check_length(config: AuroraConfig, target: Target) -> None:
    if config.engine.max_seq_len > target.max_positions:
        raise ConfigError(
            f"engine.max_seq_len={config.engine.max_seq_len}: the target has {target.max_positions} positions; lower it"
        )


def load_tokenizer(config: AuroraConfig) -> PreTrainedTokenizerBase:
    """The target's tokenizer as transformers has it, without its weights. Raises SourceError."""
    tokenizer: PreTrainedTokenizerBase = transformers_tokenizer(find_target(config))
    return tokenizer


def eos_token_ids(target: Target, tokenizer: Tokenizer | PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-text tokens: those of the generation config and of the tokenizer, as far as the model has them."""
    of_tokenizer = frozenset() if tokenizer.eos_token_id is None else frozenset([int(tokenizer.eos_token_id)])
    return frozenset(i for i in target.end_of_text_ids | of_tokenizer if i < target.vocab_size)


def load_shard(config: AuroraConfig, run_folder: Path, rank: int) -> ShardedTarget:
    """One rank's shard of the target; all ranks call it at the same time. Raises SourceError or ConfigError."""
    # Imported here: lightning.fabric takes two seconds, and a target in one process does not need it.
    from aurora_lit.distributed import Ranks
    from aurora_lit.models.sharded_target import read_shard

    engine = config.engine
    assert engine.strategy != "single"
    use_threads(engine.threads, processes=engine.devices)
    ranks = Ranks(
        rank=rank, size=engine.devices, folder=run_folder, strategy=engine.strategy, on_gpus=uses_gpus(config)
    )
    source, precision = find_target(config), config.target.precision
    target = read_shard(source, precision=precision, strategy=engine.strategy, ranks=ranks)
    _check_length(config, target)
    return target


def uses_draft(config: AuroraConfig) -> bool:
    """True if the engine has a draft, so that there is one to learn."""
    source = config.draft.checkpoint is not None or config.learn.from_scratch
    return source and config.engine.speculate


def starting_draft(config: AuroraConfig, target: Target) -> tuple[Eagle3Draft | None, str]:
    """The draft that an engine starts with, and the name of its version. Raises CheckpointError."""
    folder = draft_folder(config)
    if not uses_draft(config):
        return None, "none"
    if not config.learn.from_scratch:
        assert folder is not None
        return load_draft(folder, target), folder.name
    if folder is not None:
        _log.warning(
            "learn.from_scratch=true: the weights of draft.checkpoint=%s are not used, only its shape; "
            "to begin with them, set learn.from_scratch=false",
            folder,
        )
        shape = read_config(folder)
        check_fits(folder, shape, target)
        return Eagle3Draft(shape), UNTRAINED_VERSION
    size, heads = target.hidden_size, max(1, target.hidden_size // target.head_dim)
    shape = Eagle3Config(
        hidden_size=size,
        target_hidden_size=size,
        intermediate_size=size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(_UNTRAINED_VOCABULARY_SIZE, target.vocab_size),
        aux_layer_ids=target.aux_layer_ids,
    )
    return Eagle3Draft(shape), UNTRAINED_VERSION
