"""`aurora-lit pretrain`: a first draft from prompts and text, in stages that resume where they were stopped.

    read text -> answer prompts -> choose the draft vocabulary -> learn from text, then from answers -> checkpoint

Reading gives positions several times faster than answering; answers are what the draft will meet. The traces are kept
beside the checkpoint. What is left out: each stage's own work (learn/).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig
from aurora_lit.drafts.checkpoint import load_draft, save_draft
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE, choose_vocabulary, count_tokens, initial_draft
from aurora_lit.errors import ConfigError
from aurora_lit.learn.pretrain.generate_answers import Question, answer
from aurora_lit.learn.pretrain.label_text import encode_prompt, read_batch, read_prompts, text_pieces
from aurora_lit.learn.pretrain.trainer import FitOptions, Fitter
from aurora_lit.models.target import Target
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.serve.worker.build import eos_token_ids, load_target, load_tokenizer
from aurora_lit.traces.log import ShardInfo, TraceLogWriter, read_index, read_shard

_READ_TOGETHER = 12
_PIECE_TOKENS = 384
_LONGEST_SEQUENCE = 1024
VOCABULARY_NAME = "vocabulary.json"


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """What `aurora-lit pretrain` was asked for."""

    prompts: tuple[Path, ...]
    """Prompt files, one domain each; answered by the target."""
    text: tuple[Path, ...]
    """Text files; read by the target."""
    out: Path
    """The checkpoint's folder."""
    start_from: Path | None = None
    """A draft checkpoint of this target to go on from, vocabulary included; None: start from the target itself."""
    text_positions: int = 1_000_000
    """Positions of text to read."""
    answers: int | None = None
    """Prompts to answer, taken from the files in turn; None: all."""
    max_answer_tokens: int = 160
    sampled_share: float = 1 / 3
    """Share of the answers that are sampled at temperature 0.7 instead of greedy."""
    positions: int = 3_000_000
    """Positions to learn from in all, repetitions included."""
    text_share: float = 0.15
    """Share of those that is learnt from text alone, before answers."""
    batch_positions: int = 1024
    learning_rate: float = 1e-3
    draft_vocab_size: int = DRAFT_VOCABULARY_SIZE
    seed: int = 0


def pretrain(config: AuroraConfig, options: PretrainOptions) -> dict[str, Any]:
    """Run all stages; returns, prints and stores the held-out acceptance by domain."""
    console = Console()
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    traces = options.out.with_name(f"{options.out.name}.traces")
    tokenizer, target = load_tokenizer(config), load_target(config)
    draft = load_draft(options.start_from, target) if options.start_from else None  # refused before hours of work
    _read(target, tokenizer, options, traces)
    _answer(target, tokenizer, options, traces)
    shards = read_index(traces)
    if not shards:
        raise ConfigError("--prompts and --text gave nothing to learn from; name files with more text")
    if draft is None:
        ids = _vocabulary(target, tokenizer, options, traces, shards)
        draft = initial_draft(target, ids, max_positions=config.engine.max_seq_len)
    module = DraftModule(
        draft,
        embedding_VH=target.embedding_rows(),
        head_VdH=target.head_rows(draft.draft_token_ids).bfloat16(),
        finish=target.finish.rows(draft.draft_token_ids),
    )
    fitter = Fitter(
        module,
        traces,
        FitOptions(
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
        fitter.fit(traces, texts, until_positions=int(options.positions * share))
    if answers:
        fitter.fit(traces, answers, until_positions=options.positions)
    report = fitter.validate(traces, shards)
    save_draft(module.draft, options.out)
    (options.out / "training.json").write_text(json.dumps(_record(options, shards, report), indent=2) + "\n")
    console.print_json(data=report)
    console.print(f"draft written to {options.out}; serve it with draft.checkpoint={options.out}")
    return report


def _read(target: Target, tokenizer: PreTrainedTokenizerBase, options: PretrainOptions, traces: Path) -> None:
    """Stage one; skips the pieces that an earlier run has stored."""
    writer = TraceLogWriter(traces, kind="text")
    if not options.text or writer.num_positions >= options.text_positions:
        return
    done = sum(shard.num_sequences for shard in read_index(traces) if shard.kind == "text")
    pieces = itertools.islice(_text_in_turn(tokenizer, options.text), done, None)
    with Progress() as bar:
        task = bar.add_task("reading", total=options.text_positions, completed=writer.num_positions)
        while writer.num_positions < options.text_positions:
            batch = list(itertools.islice(pieces, _READ_TOGETHER))
            if not batch:
                break
            for trace in read_batch(target, batch, domain="text"):
                writer.append(trace)
            bar.update(task, completed=writer.num_positions)
    writer.flush()


def _text_in_turn(tokenizer: PreTrainedTokenizerBase, paths: tuple[Path, ...]) -> Iterator[list[int]]:
    """Pieces of all files, a piece of each in turn, so that a short run sees all of them."""
    streams = [text_pieces(path, tokenizer, piece_tokens=_PIECE_TOKENS) for path in paths]
    for pieces in itertools.zip_longest(*streams):
        yield from (piece for piece in pieces if piece is not None)


def _answer(target: Target, tokenizer: PreTrainedTokenizerBase, options: PretrainOptions, traces: Path) -> None:
    """Stage two; prompts that an earlier run has answered are not asked again."""
    asked = _questions(tokenizer, options)
    answered = {
        tuple(trace.token_ids_T[: trace.answer_start].tolist())
        for shard in read_index(traces)
        if shard.kind == "answer"
        for trace in read_shard(traces / shard.name)
    }
    questions = [question for question in asked if question.prompt_ids not in answered]
    if not questions:
        return
    writer = TraceLogWriter(traces, kind="answer")
    with Progress() as bar:
        task = bar.add_task("answering", total=len(asked), completed=len(asked) - len(questions))
        for trace in answer(
            target,
            questions,
            eos_token_ids=eos_token_ids(target, tokenizer),
            max_answer_tokens=options.max_answer_tokens,
            max_seq_len=min(_LONGEST_SEQUENCE, target.max_positions),
        ):
            writer.append(trace)
            bar.advance(task)
    writer.flush()


def _questions(tokenizer: PreTrainedTokenizerBase, options: PretrainOptions) -> list[Question]:
    """The prompts to answer: the files in turn, each shuffled by the seed."""
    rng = random.Random(options.seed)
    files = [read_prompts(path) for path in options.prompts]
    for prompts in files:
        rng.shuffle(prompts)
    in_turn = [prompt for row in itertools.zip_longest(*files) for prompt in row if prompt is not None]
    longest = _LONGEST_SEQUENCE - options.max_answer_tokens
    questions = []
    for prompt in in_turn:
        ids = encode_prompt(tokenizer, prompt)
        if len(ids) <= longest:
            temperature = 0.7 if rng.random() < options.sampled_share else 0.0
            questions.append(Question(domain=prompt.domain, prompt_ids=tuple(ids), temperature=temperature))
    return questions[: options.answers]


def _vocabulary(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    options: PretrainOptions,
    traces: Path,
    shards: list[ShardInfo],
) -> torch.Tensor:
    """Target ids of the draft vocabulary, most frequent in all traces; answers count tenfold. Chosen once a run."""
    path = traces / VOCABULARY_NAME
    if path.exists():
        return torch.tensor(json.loads(path.read_text()))
    counts = torch.zeros(target.vocab_size, dtype=torch.int64)
    for shard in shards:
        for trace in read_shard(traces / shard.name):
            counts += count_tokens([trace.token_ids_T], target.vocab_size)
            counts += 9 * count_tokens([trace.token_ids_T[trace.answer_start :]], target.vocab_size)
    size = min(options.draft_vocab_size, target.vocab_size)
    ids = choose_vocabulary(counts, size, always=eos_token_ids(target, tokenizer))
    path.write_text(json.dumps(ids.tolist()))
    return ids


def _record(options: PretrainOptions, shards: list[ShardInfo], report: dict[str, Any]) -> dict[str, Any]:
    """How the draft was made, kept beside it."""
    by_kind = {kind: sum(s.num_positions for s in shards if s.kind == kind) for kind in ("text", "answer")}
    return {
        "positions_learnt_from": options.positions,
        "distinct_positions": by_kind,
        "prompt_files": [path.name for path in options.prompts],
        "batch_positions": options.batch_positions,
        "learning_rate": options.learning_rate,
        "started_from": options.start_from.name if options.start_from else None,
        "held_out": report,
    }
