"""A small Mixtral, end to end: trained on this machine, saved, served, and its draft trained on the traffic.

    python benchmarks/moe.py --out moe --train-seconds 200 --requests 240

The text is the source of Python's standard library, so nothing is downloaded and the model learns something real. A
byte-pair tokenizer and the model are trained on 9 in 10 files; prompts are stretches of text from the rest. Then two
real servers answer the same requests, both from an untrained draft: one with a learner, one without (`aurora-lit bench
online`). Prints the model's loss before and after training, and the accepted length over the traffic.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from aurora_lit.bench.online import run
from aurora_lit.config import load_config

VOCABULARY, LENGTH, BATCH = 512, 128, 6
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The chat template of a model of bare text: the prompt is continued."""


def main(arguments: list[str]) -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-seconds", type=float, default=200.0)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--measure-requests", type=int, default=24)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="after --")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    model_folder = options.out / "model"
    training_texts, held_out_texts = standard_library()
    if not (model_folder / "config.json").exists():
        report = train(training_texts, held_out_texts, model_folder, seconds=options.train_seconds)
        (options.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print((options.out / "training.json").read_text())
    lines = prompts(held_out_texts)
    files = {"traffic": lines[: options.requests], "measure": lines[-options.measure_requests :]}
    for name, texts in files.items():
        rows = [{"domain": "python", "messages": [{"role": "user", "content": text}]} for text in texts]
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        None,
        [
            f"target.source={model_folder}",
            "target.precision=fp32",
            "draft.checkpoint=null",
            "learn.from_scratch=true",
            f"checkpoint.dir={options.out / 'checkpoints'}",
            f"learn.logs={options.out / 'logs'}",
            "engine.max_seq_len=256",
            "engine.prefill_chunk_tokens=128",
            "engine.lookup=false",
            "engine.adaptive=false",
            "engine.explore_share=0.05",
            "learn.learning_rate=2e-3",
            "learn.ema_decay=0.9",
            "learn.compute_share=0.4",
            "learn.publish_every_s=10",
            "learn.gate_requests=16",
            "engine.threads=1",
            *options.settings,
        ],
    )
    run(
        config,
        prompts=[options.out / "traffic.jsonl"],
        measure=[options.out / "measure.jsonl"],
        requests=options.requests,
        measure_requests=options.measure_requests,
        concurrency=4,
        arms=("static", "learning"),
        max_tokens=64,
        window=40,
        out=options.out,
    )


def standard_library() -> tuple[list[str], list[str]]:
    """The files of Python's standard library: 9 in 10 for training, the rest held out; always in the same order."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def prompts(texts: list[str]) -> list[str]:
    """Stretches of about 200 characters that end before a space, shuffled, without duplicates."""
    found = {text[start : start + 200].rsplit(" ", 1)[0] for text in texts for start in range(0, len(text) - 200, 400)}
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def train(training_texts: list[str], held_out_texts: list[str], folder: Path, *, seconds: float) -> dict[str, Any]:
    """Train tokenizer and model and save both; returns sizes, steps and held-out losses (nats per token)."""
    tokenizer = make_tokenizer(training_texts)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = MixtralForCausalLM(config)
    tokens, held_out = (
        torch.tensor(tokenizer("\n".join(texts)).input_ids) for texts in (training_texts, held_out_texts)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    before, started, steps, share = evaluate(model, held_out), time.monotonic(), 0, 0.0
    while share < 1:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps + 1) / 20) * (1 - 0.95 * share)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps, share = steps + 1, (time.monotonic() - started) / seconds
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_of_text": len(tokens),
        "steps": steps,
        "tokens_trained": steps * BATCH * LENGTH,
        "loss_before": before,
        "loss_after": evaluate(model, held_out),
    }


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer of VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=PLAIN_TEMPLATE)


@torch.no_grad()
def evaluate(model: MixtralForCausalLM, tokens: torch.Tensor) -> float:
    """Mean loss over the first 32 sequences of LENGTH tokens, in nats per token."""
    batch = tokens[: 32 * LENGTH].view(32, LENGTH)
    return float(model(input_ids=batch, labels=batch).loss)


if __name__ == "__main__":
    main(sys.argv[1:])
