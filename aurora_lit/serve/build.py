"""From a configuration to an engine: source, target, draft checkpoint. Only wiring; no behaviour of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from aurora_lit.checkpoints import load_draft
from aurora_lit.config import AuroraConfig, draft_folder
from aurora_lit.errors import ConfigError
from aurora_lit.models.source import cache_root, resolve
from aurora_lit.models.target import Target
from aurora_lit.serve.engine import Engine


def build_engine(config: AuroraConfig) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Load target and draft and start an engine on them. Raises SourceError, CheckpointError or ConfigError."""
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    tokenizer = load_tokenizer(config)
    target = load_target(config)
    folder = draft_folder(config) if config.engine.speculate else None
    engine = Engine(
        target,
        None if folder is None else load_draft(folder, target),
        eos_token_ids=eos_token_ids(target, tokenizer),
        max_batch_size=config.engine.max_batch_size,
        max_seq_len=config.engine.max_seq_len,
        max_draft_tokens=config.engine.max_draft_tokens,
        prefill_chunk_tokens=config.engine.prefill_chunk_tokens,
        adaptive=config.engine.adaptive,
        lookup=config.engine.speculate and config.engine.lookup,
        draft_version="none" if folder is None else folder.name,
    )
    return engine, tokenizer


def find_target(config: AuroraConfig) -> Path:
    """The target's folder; downloads and converts it when it is not there yet. Raises SourceError."""
    target = config.target
    return resolve(target.source, cache_dir=cache_root(target.cache_dir), sha256=target.sha256)


def load_target(config: AuroraConfig) -> Target:
    """The target of a configuration, in its precision. Raises ConfigError when it cannot hold max_seq_len positions."""
    target = Target.load(find_target(config), precision=config.target.precision)
    if config.engine.max_seq_len > target.max_positions:
        raise ConfigError(
            f"engine.max_seq_len={config.engine.max_seq_len}: the target was made for {target.max_positions} "
            "positions; lower it"
        )
    if config.engine.compile == "on" or (config.engine.compile == "auto" and target.model.device.type == "cuda"):
        target.compile_forward()
    return target


def load_tokenizer(config: AuroraConfig) -> PreTrainedTokenizerBase:
    """The target's tokenizer, without its weights."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(find_target(config), local_files_only=True)
    return tokenizer


def eos_token_ids(target: Target, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    generation: GenerationConfig | None = getattr(target.model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    from_model = ids if isinstance(ids, list) else [ids]
    return frozenset(int(i) for i in [*from_model, tokenizer.eos_token_id] if i is not None)
