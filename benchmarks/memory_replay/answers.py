"""Makes the answers that are replayed: the target answers prompt files by plain decoding, in batches.

One file for each prompt file and temperature, with the requests in the prompt file's order. A file that exists is kept,
so that a run that was stopped goes on, if it answers the same prompts; a folder has answers of one target and length
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from aurora_lit.bench.prompts import load_prompts
from aurora_lit.config import AuroraConfig
from aurora_lit.durable import is_as_begun
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.models.package_index import file_sha256
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.worker.build import build_engine

from .replay import Recorded, write_answers

SETTINGS = ("engine.speculate=false", "engine.max_batch_size=8", "engine.max_seq_len=1024")
"""Of the engine that answers; the command line may override them."""


def make_answers(
    config: AuroraConfig,
    prompts: Sequence[Path],
    out: Path,
    *,
    temperature: float,
    requests: int,
    max_tokens: int,
    seed: int,
    progress: Progress,
) -> list[Path]:
    """Answer the first `requests` prompts of each file, and write them to `out`; returns the paths.

    Prompts that leave no room for `max_tokens` within engine.max_seq_len are left out. Sampled requests have seeds.
    Raises ConfigError if `out` holds answers of another target, options, or prompts in files of the same names.
    """
    how = {
        "target": [config.target.source, config.target.precision],
        "max_seq_len": config.engine.max_seq_len,
        "requests": requests,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    begun = out / "begun.json"
    out.mkdir(parents=True, exist_ok=True)
    if (any(out.glob("*.jsonl")) and not begun.exists()) or not is_as_begun(begun, how):
        raise ConfigError(
            f"--out {out}: holds answers of another target, or of other --requests, --max-tokens, --seed or "
            "engine.max_seq_len; name another folder"
        )
    engine, tokenizer = build_engine(config)
    paths = []
    for path in prompts:
        paths.append(out / f"{path.stem}-{temperature:g}.jsonl")
        about, prompt_file = paths[-1].with_suffix(".begun.json"), {"prompts": file_sha256(path)}
        if paths[-1].exists():
            if not about.exists() or not is_as_begun(about, prompt_file):
                raise ConfigError(
                    f"--out {out}: {paths[-1].name} answers other prompts than {path} holds; delete it, or name "
                    "another folder"
                )
            continue
        loaded = load_prompts(
            [path], limit=requests, tokenizer=tokenizer, max_prompt_tokens=config.engine.max_seq_len - max_tokens
        )
        answers: list[list[int]] = [[] for _ in loaded]
        for number, prompt in enumerate(loaded):
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed * 1_000_003 + number)
            engine.submit(Request(request_id=str(number), prompt_ids=prompt.token_ids, params=params))
        task = progress.add_task(paths[-1].stem, total=len(loaded))
        while engine.has_work:
            for output in engine.round():
                if output.error is not None:
                    raise AuroraError(f"the engine failed on prompt {output.request_id} of {path}: {output.error}")
                answers[int(output.request_id)] += output.token_ids
                progress.advance(task, output.finish_reason is not None)
        recorded = [
            Recorded(domain=path.stem, temperature=temperature, prompt=list(prompt.token_ids), answer=answer)
            for prompt, answer in zip(loaded, answers, strict=True)
        ]
        about.unlink(missing_ok=True)  # of answers that are deleted, or were not finished
        is_as_begun(about, prompt_file)
        write_answers(paths[-1], recorded)
    return paths
