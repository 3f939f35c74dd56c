"""`aurora-lit pretrain`: a first draft from prompts and text, in stages that resume where they were stopped.

    record text -> answer prompts -> choose the draft vocabulary -> train on text, then on answers -> checkpoint

Recording text gives positions several times faster than generating answers; answers are what the draft will propose in
serving. The traces are kept beside the checkpoint. Leaves out the work of each stage (the other files of this folder).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig
from aurora_lit.drafts.checkpoint import check_replaceable, load_draft, save_draft
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE, choose_vocabulary, initial_draft
from aurora_lit.drafts.versions import settings_to_serve
from aurora_lit.durable import is_as_begun, replace_file
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.ipc.process_lifetime import sigterm_as_exit
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.pretrain.generate_answers import PromptToAnswer, generate_answers
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.learn.pretrain.record_text import record_pieces, text_pieces
from aurora_lit.learn.pretrain.trainer import DraftTrainer, TrainerOptions, positions_trained
from aurora_lit.machine import use_threads
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import weights_digest
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.models.source import find_target
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.progress import Progress
from aurora_lit.request import SamplingParams
from aurora_lit.serve.worker.load_models import check_one_process, eos_token_ids, load_target, load_tokenizer
from aurora_lit.traces.log import ShardInfo, TraceLogWriter, read_index, read_shard

_PIECES_AT_ONCE = 32
_PIECE_TOKENS = 384
_MAX_SEQUENCE_TOKENS = 1024
_MAX_BATCH_SIZE = 32
BEGUN_NAME, VOCABULARY_NAME = "begun.json", "vocabulary.json"


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """The options of `aurora-lit pretrain`."""

    prompts: tuple[Path, ...]
    """Prompt files; the target answers their prompts."""
    text: tuple[Path, ...]
    """Text files; the target's states on their text are recorded."""
    out: Path
    """The checkpoint's folder."""
    start_from: Path | None = None
    """A draft checkpoint of this target to continue from, vocabulary included; None: start from the target's layers."""
    text_positions: int = 1_000_000
    """Positions of text to record."""
    answers: int | None = None
    """Prompts to answer, taken from the files in turn; None: all."""
    max_answer_tokens: int = 160
    sampled_share: float = 1 / 3
    """Share of the answers that are sampled as the model's default says, instead of greedy."""
    positions: int = 3_000_000
    """Positions to train on in all, repetitions included."""
    text_share: float = 0.15
    """Share of `positions` that is text, trained on before the answers."""
    batch_positions: int = 1024
    learning_rate: float = 1e-3
    draft_vocab_size: int = DRAFT_VOCABULARY_SIZE
    draft_intermediate_size: int | None = None
    """Width of the draft's MLP; None: as wide as the target's."""
    draft_kv_heads: int | None = None
    """Heads of the draft's keys and values; None: as many as of its queries."""
    draft_dtype: str = "bfloat16"
    """How weights are stored: "bfloat16", or "int8", in half the size."""
    seed: int = 0


def pretrain(config: AuroraConfig, options: PretrainOptions) -> dict[str, Any]:
    """Run all stages; returns, prints and stores the held-out acceptance by domain.

    Raises ConfigError when there is nothing to train on, the traces are of other work or `out` holds other files than
    a draft's, CheckpointError when `start_from` cannot be used.
    """
    check_one_process(config)
    if config.engine.device == "cuda":
        raise ConfigError("engine.device=cuda: pretraining runs the target on the CPU; use engine.device=cpu here")
    try:
        check_replaceable(options.out)
    except CheckpointError as error:
        raise ConfigError(f"--out: {error}") from error
    console = Console()
    use_threads(config.engine.threads)
    traces = options.out.with_name(f"{options.out.name}.traces")
    tokenizer, target = load_tokenizer(config), load_target(config)
    in_torch = target.in_torch
    assert in_torch is not None
    # Loaded first, so that an unusable draft is refused before hours of work.
    draft = load_draft(options.start_from, target) if options.start_from else None
    _check_begun(config, options, traces)
    _check_vocabulary_size(target, options, traces)
    left_out = ""
    if (seen := positions_trained(traces)) >= options.positions:
        console.print(f"already trained on {seen:,} positions, so nothing is recorded or answered; raise --positions")
    else:
        prompts, left_out = _prompts_to_answer(config, tokenizer, options, max_positions=target.max_positions)
        if left_out:
            console.print(left_out)
        _record_text(target, tokenizer, options, traces)
        _answer_prompts(config, target, tokenizer, prompts, options, traces)
    shards = read_index(traces)
    if not shards:
        remedy = f"{left_out}; lower --max-answer-tokens" if left_out else "name files with more text"
        raise ConfigError(f"--prompts and --text gave nothing to learn from; {remedy}")
    if draft is None:
        ids = _vocabulary(target, tokenizer, options, traces, shards)
        draft = initial_draft(
            in_torch,
            ids,
            num_key_value_heads=options.draft_kv_heads,
            intermediate_size=options.draft_intermediate_size,
            max_positions=config.engine.max_seq_len,
        )
    target_head = TargetHead(target)
    module = DraftModule(
        draft,
        embed=target_head.embed,
        head_VdH=target_head.rows(draft.draft_token_ids),
        logit_transform=target.logit_transform.select(draft.draft_token_ids),
    )
    trainer = DraftTrainer(
        module,
        traces,
        TrainerOptions(
            total_positions=options.positions,
            batch_positions=options.batch_positions,
            learning_rate=options.learning_rate,
            seed=options.seed,
        ),
    )
    texts = [shard for shard in shards if shard.kind == "text"]
    answers = [shard for shard in shards if shard.kind == "answer"]
    if texts:
        share = options.text_share if answers else 1.0
        trainer.fit(traces, texts, until_positions=int(options.positions * share))
    if answers:
        trainer.fit(traces, answers, until_positions=options.positions)
    report = trainer.validate(traces, shards, logsumexp=target_head.log_sum_exp)
    save_draft(module.draft, options.out, dtype=getattr(torch, options.draft_dtype))
    record = json.dumps(_record(config, options, shards, report), indent=2) + "\n"
    replace_file(options.out / "training.json", record.encode())
    console.print_json(data=report)
    if dropped := trainer.num_dropped:
        console.print(f"{dropped} batches were dropped: their loss or gradient was not finite")
    settings = settings_to_serve(options.out, config)
    console.print(f"draft written to {options.out}; serve it with {settings}", soft_wrap=True, markup=False)
    return report


def _check_begun(config: AuroraConfig, options: PretrainOptions, traces: Path) -> None:
    """Raise ConfigError if the traces there are of another target, or of a training that began from another draft."""
    traces.mkdir(mode=0o700, parents=True, exist_ok=True)
    how = {
        "weights": weights_digest(find_target(config)),
        "precision": config.target.precision,
        "start_from": weights_digest(options.start_from) if options.start_from else None,
    }
    if not is_as_begun(traces / BEGUN_NAME, how):
        raise ConfigError(
            f"--out {options.out}: {traces} is of another target, precision or --start-from; name another --out"
        )


def _check_vocabulary_size(target: Target, options: PretrainOptions, traces: Path) -> None:
    """Raise ConfigError if the vocabulary that an earlier run has chosen there is of another size."""
    path = traces / VOCABULARY_NAME
    size = min(options.draft_vocab_size, target.vocab_size)
    if path.exists() and (chosen := len(json.loads(path.read_text()))) != size:
        raise ConfigError(
            f"--draft-vocab-size {size}: {traces} is of a training with {chosen}; use that, or name another --out"
        )


def _record_text(target: Target, tokenizer: PreTrainedTokenizerBase, options: PretrainOptions, traces: Path) -> None:
    """Stage one: record text; pieces that an earlier run has stored are skipped."""
    stored = [shard for shard in read_index(traces) if shard.kind == "text"]
    if not options.text or sum(shard.num_positions for shard in stored) >= options.text_positions:
        return
    writer = TraceLogWriter(traces, kind="text")
    recorded = {tuple(trace.token_ids_T.tolist()) for shard in stored for trace in read_shard(traces / shard.name)}
    pieces = (piece for piece in _text_in_turn(tokenizer, options.text) if tuple(piece) not in recorded)
    progress = Progress("recording text", options.text_positions, "positions", done=writer.num_positions)
    with progress, sigterm_as_exit(), closing(writer):
        while writer.num_positions < options.text_positions:
            batch = list(itertools.islice(pieces, _PIECES_AT_ONCE))
            if not batch:
                break
            for trace in record_pieces(target, batch, domain="text"):
                writer.append(trace)
            progress.advance(writer.num_positions - progress.done)


def _text_in_turn(tokenizer: PreTrainedTokenizerBase, paths: tuple[Path, ...]) -> Iterator[list[int]]:
    """Pieces of all files, one of each in turn, so that a short run uses all files."""
    streams = [text_pieces(path, tokenizer, piece_tokens=_PIECE_TOKENS) for path in paths]
    for pieces in itertools.zip_longest(*streams):
        yield from (piece for piece in pieces if piece is not None)


def _answer_prompts(
    config: AuroraConfig,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptToAnswer],
    options: PretrainOptions,
    traces: Path,
) -> None:
    """Stage two: answer prompts; those that an earlier run has answered are skipped."""
    answered = {
        tuple(trace.token_ids_T[: trace.answer_start].tolist())
        for shard in read_index(traces)
        if shard.kind == "answer"
        for trace in read_shard(traces / shard.name)
    }
    remaining = [prompt for prompt in prompts if prompt.prompt_ids not in answered]
    if not remaining:
        return
    writer = TraceLogWriter(traces, kind="answer")
    progress = Progress("answering", len(prompts), "prompts", done=len(prompts) - len(remaining))
    with progress, sigterm_as_exit(), closing(writer):
        for trace in generate_answers(
            target,
            remaining,
            eos_token_ids=eos_token_ids(target, tokenizer),
            max_answer_tokens=options.max_answer_tokens,
            max_batch_size=min(_MAX_BATCH_SIZE, config.engine.max_batch_size),
            max_seq_len=min(_MAX_SEQUENCE_TOKENS, target.max_positions),
        ):
            writer.append(trace)
            progress.advance()


def _prompts_to_answer(
    config: AuroraConfig, tokenizer: PreTrainedTokenizerBase, options: PretrainOptions, *, max_positions: int
) -> tuple[list[PromptToAnswer], str]:
    """The prompts to answer, from all files in turn, each shuffled by the seed; and a line on those left out, or ""."""
    rng = random.Random(options.seed)
    files = [read_prompts(path) for path in options.prompts]
    for prompts in files:
        rng.shuffle(prompts)
    in_turn = [prompt for group in itertools.zip_longest(*files) for prompt in group if prompt is not None]
    longest = max(0, min(_MAX_SEQUENCE_TOKENS, max_positions) - options.max_answer_tokens)
    chosen, num_too_long = [], 0
    greedy, sampled = SamplingParams(temperature=0.0), SamplingParams(**default_sampling(config))
    special = tuple(sorted(tokenizer.added_tokens_decoder))  # a filled hole ends where any of them follows
    for prompt in in_turn:
        ids = encode_prompt(tokenizer, prompt)
        if len(ids) > longest:
            num_too_long += 1
            continue
        params = sampled if rng.random() < options.sampled_share else greedy
        params = replace(params, seed=rng.getrandbits(32), stop_token_ids=special if prompt.raw is not None else ())
        chosen.append(PromptToAnswer(domain=prompt.domain, prompt_ids=tuple(ids), params=params))
    said = f"{num_too_long} of {len(in_turn)} prompts have more than {longest} tokens and are left out"
    return chosen[: options.answers], said if num_too_long else ""


def _vocabulary(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    options: PretrainOptions,
    traces: Path,
    shards: list[ShardInfo],
) -> torch.Tensor:
    """Target ids of the draft vocabulary: the most frequent tokens of all traces, prompts and texts.

    Those of answers count ten times. Prompts that were not answered and the rest of the texts are many more tokens, at
    no cost. Chosen once and stored beside the traces, so that a resumed run has the same.
    """
    path = traces / VOCABULARY_NAME
    if path.exists():
        return torch.tensor(json.loads(path.read_text()))
    counts = torch.zeros(target.vocab_size, dtype=torch.int64)
    for shard in shards:
        for trace in read_shard(traces / shard.name):
            ids_T = trace.token_ids_T.long()
            counts += torch.bincount(ids_T, minlength=target.vocab_size)
            counts += 9 * torch.bincount(ids_T[trace.answer_start :], minlength=target.vocab_size)
    prompts = (encode_prompt(tokenizer, prompt) for file in options.prompts for prompt in read_prompts(file))
    for token_ids in itertools.chain(prompts, _text_in_turn(tokenizer, options.text)):
        counts += torch.bincount(torch.tensor(token_ids), minlength=target.vocab_size)[: target.vocab_size]
    size = min(options.draft_vocab_size, target.vocab_size)
    ids = choose_vocabulary(counts, size, always=eos_token_ids(target, tokenizer))
    replace_file(path, json.dumps(ids.tolist()).encode())  # one that a full disk cuts short could not be read again
    return ids


def _record(
    config: AuroraConfig, options: PretrainOptions, shards: list[ShardInfo], report: dict[str, Any]
) -> dict[str, Any]:
    """How the draft was trained, stored beside it."""
    by_kind = {kind: sum(s.num_positions for s in shards if s.kind == kind) for kind in ("text", "answer")}
    return {
        "target": config.target.source,
        "precision": config.target.precision,
        "positions_learnt_from": options.positions,
        "distinct_positions": by_kind,
        "prompt_files": [path.name for path in options.prompts],
        "max_answer_tokens": options.max_answer_tokens,
        "draft_vocab_size": options.draft_vocab_size,
        "batch_positions": options.batch_positions,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "started_from": options.start_from.name if options.start_from else None,
        "held_out": report,
    }
