"""Whether output equals that of transformers' `generate` and of plain decoding, token for token, on real prompts.

    python benchmarks/losslessness.py --prompts FILE... --limit 34 --max-tokens 128
    python benchmarks/losslessness.py --prompts FILE... --sampling greedy cut penalties -- target.precision=auto

The reference is transformers in fp32, one prompt at a time; it is cached in the file that --reference names, because it
takes longest. Compared with it are the configured draft, a random draft and no draft, in batches of 1 and of 8, with
n-gram lookup. In other precisions transformers rounds differently, and seeded samples are drawn otherwise, so there the
reference is the engine's own plain decoding. Exit code 1 if any output differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from aurora_lit.config import AuroraConfig, draft_folder, load_config
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.learn.pretrain.prompts import encode_prompt, read_prompts
from aurora_lit.models.loading import transformers_model, weights_digest
from aurora_lit.models.source import find_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.load_models import eos_token_ids, load_target, load_tokenizer

Outputs = list[list[int]]
_SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "cut": SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    "penalties": SamplingParams(
        temperature=0.8, top_p=0.9, top_k=40, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.1
    ),
}
"""Seeded, where the temperature is not 0."""


def main() -> int:
    """Run the comparison; 0 if every output is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=34, help="prompts taken from each file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--reference", type=Path, default=Path("bench-results/losslessness-reference.json"))
    parser.add_argument(
        "--drafts", nargs="+", choices=["trained", "random", "none"], default=["trained", "random", "none"]
    )
    parser.add_argument("--sampling", nargs="+", choices=[*_SAMPLING], default=["greedy"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for example target.precision=fp32")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    tokenizer = load_tokenizer(config)
    prompts: Outputs = []
    for path in arguments.prompts:
        encoded = (encode_prompt(tokenizer, prompt) for prompt in read_prompts(path))
        fitting = (ids for ids in encoded if len(ids) <= arguments.max_prompt_tokens)
        prompts += [ids for ids, _ in zip(fitting, range(arguments.limit), strict=False)]

    target = load_target(config)
    eos_ids = eos_token_ids(target, tokenizer)
    console = Console()

    def decode(draft: Eagle3Draft | None, k: int, batch: int, params: SamplingParams) -> Outputs:
        settings = replace(
            config.engine, max_batch_size=batch, speculate=k > 0, max_draft_tokens=k or 1, adaptive=False, lookup=True
        )
        engine = Engine(target, draft, settings, eos_token_ids=eos_ids)
        for number, ids in enumerate(prompts):
            own = replace(params, max_tokens=arguments.max_tokens, seed=number)
            engine.submit(Request(request_id=str(number), prompt_ids=tuple(ids), params=own))
        outputs: Outputs = [[] for _ in prompts]
        while engine.has_work:
            for output in engine.round():
                outputs[int(output.request_id)] += output.token_ids
        return outputs

    folder = draft_folder(config)
    if folder is None and arguments.drafts != ["none"]:
        parser.error("draft.checkpoint is null: name a draft to compare with, or --drafts none")
    failures = 0
    make_draft: dict[str, Callable[[], Eagle3Draft | None]] = {"none": lambda: None}
    if folder is not None:
        checkpoint = folder
        make_draft["trained"] = lambda: load_draft(checkpoint, target)
        make_draft["random"] = lambda: Eagle3Draft(read_config(checkpoint))
    for sampling in arguments.sampling:
        params = _SAMPLING[sampling]
        if sampling == "greedy" and config.target.precision == "fp32":
            reference = _transformers_reference(config, prompts, eos_ids, arguments.max_tokens, arguments.reference)
        else:
            reference = decode(None, 0, 1, params)
        for batch, name in itertools.product(arguments.batches, arguments.drafts):
            outputs = decode(make_draft[name](), 4, batch, params)
            equal = sum(ours == theirs for ours, theirs in zip(outputs, reference, strict=True))
            failures += len(prompts) - equal
            case = f"{config.target.precision}  {sampling}  batch {batch}  draft {name:8}"
            console.print(f"{case}  {equal} of {len(prompts)} equal")
            for number, (ours, theirs) in enumerate(zip(outputs, reference, strict=True)):
                if ours != theirs:
                    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
                    console.print(f"    prompt {number} differs from token {at} on")
    return int(failures > 0)


def _transformers_reference(
    config: AuroraConfig, prompts: Outputs, eos_ids: frozenset[int], max_tokens: int, path: Path
) -> Outputs:
    known = json.loads(path.read_text()) if path.exists() else {}
    folder = find_target(config)
    digest = weights_digest(folder)
    model = transformers_model(folder, dtype=torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs: Outputs = []
    for ids in track(prompts, description="transformers generate, fp32"):
        key = f"{digest}:{max_tokens}:{ids}"
        if key not in known:
            with torch.no_grad():
                tokens = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    eos_token_id=sorted(eos_ids),
                    pad_token_id=min(eos_ids),
                )
            known[key] = tokens[0, len(ids) :].tolist()
            path.write_text(json.dumps(known))
        outputs.append(known[key])
    return outputs


if __name__ == "__main__":
    sys.exit(main())
