"""What each `target.precision` costs in quality: perplexity, divergence and likeliest token against transformers' fp32.

    python -m benchmarks.quality --text text.txt code.txt --config qwen2.5-coder-0.5b
    python -m benchmarks.quality --text ... --gguf FILE.gguf --keep /tmp/reference -- target.source=/models/qwen

The texts' tokens are read in windows that begin anew, equally many of each file; each token but a window's first is
predicted. The reference is transformers in fp32 on the same file: --gguf, else the target's own. Its last hidden states
and its head are computed once, and kept in the folder --keep for later runs; one model is in memory at a time. With
--gguf llama.cpp reads the same tokens as one batch a window, if `llama-cpp-python` is installed.

`--arithmetic decode` computes our target's positions as those of answers, `prompt` as those of prompts, which tiles
compute faster and round otherwise.

The interval (95 %, Student's t) is of the ratio of perplexities, from the windows' pairs; divergence is Kullback and
Leibler's from the reference in nats a token; `same` is how often the likeliest token is the reference's.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import importlib.util
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from aurora_lit.bench.load import interval
from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError
from aurora_lit.machine import use_threads
from aurora_lit.models.interface import Target
from aurora_lit.models.source import find_target
from aurora_lit.progress import Progress
from aurora_lit.serve.worker.load_models import load_serving_target, load_tokenizer
from benchmarks.peers.environments import processor

_CHUNK = 128
"""Positions whose logits are in memory together."""
Rows = Callable[[slice], torch.Tensor]
"""Logits [T, V] of these positions of a window."""
Reader = Callable[[torch.Tensor], Rows]
"""Reads a window's tokens [T]."""


class Scores(NamedTuple):
    """Of each window [W], in float64: sums over its predicted tokens."""

    exact_losses_W: torch.Tensor
    """Negative log-probabilities that the reference gives the tokens that follow, nats."""
    losses_W: torch.Tensor
    """Those that are scored."""
    divergences_W: torch.Tensor
    """Nats."""
    same_W: torch.Tensor
    """Positions with the reference's likeliest token."""


def windows_of(
    texts: Sequence[str], encode: Callable[[str], Sequence[int]], *, tokens: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [W, T], and which text each window is of [W], equally many of each. Raises AuroraError for a short text."""
    each = math.ceil(tokens / len(texts) / window)
    ids = [torch.tensor(encode(text)[: each * window]) for text in texts]
    for number, found in enumerate(ids):
        if len(found) < each * window:
            raise AuroraError(f"text {number + 1} has {len(found)} of {each * window} tokens; name a longer one")
    return torch.cat(ids).view(-1, window), torch.arange(len(texts)).repeat_interleave(each)


@torch.inference_mode()
def make_reference(source: Path, ids_WT: torch.Tensor, path: Path) -> None:
    """Write tokens, last hidden states [W, T, H] and head [V, H] of transformers' fp32 model of a folder or GGUF file.

    Raises AuroraError if its logits are not those states times that head.
    """
    name, more = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True, **more)
    model.eval()
    head_VH = model.get_output_embeddings().weight
    states = []
    with Progress("transformers, fp32", len(ids_WT), "windows") as progress:
        for ids_T in ids_WT:
            states.append(model.base_model(ids_T[None]).last_hidden_state[0])
            progress.advance()
    few = slice(0, 8)
    if not torch.allclose(model(ids_WT[:1, few]).logits[0], states[0][few] @ head_VH.T, rtol=1e-3, atol=1e-3):
        raise AuroraError("this family's logits are not its last hidden states times its head")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"ids": ids_WT, "states": torch.stack(states), "head": head_VH.contiguous()}, partial)
    partial.replace(path)


@torch.inference_mode()
def score(read: Reader, reference: Path, *, name: str = "") -> Scores:
    """Compare logits with the reference's, window by window; logits of one chunk at a time are in memory."""
    with safe_open(reference, framework="pt") as kept:
        ids_WT, head_VH, states = kept.get_tensor("ids"), kept.get_tensor("head"), kept.get_slice("states")
        sums_W4 = torch.zeros(len(ids_WT), 4, dtype=torch.float64)
        with Progress(name, len(ids_WT), "windows") as progress:
            for window, ids_T in enumerate(ids_WT):
                rows, states_TH = read(ids_T), states[window]
                for start in range(0, len(ids_T) - 1, _CHUNK):
                    chunk = slice(start, min(start + _CHUNK, len(ids_T) - 1))
                    exact_TV = (states_TH[chunk] @ head_VH.T).log_softmax(-1)
                    found_TV = rows(chunk)[:, : exact_TV.shape[1]].float().log_softmax(-1)
                    following_T1 = ids_T[chunk.start + 1 : chunk.stop + 1, None]
                    sums_W4[window, 0] -= exact_TV.gather(1, following_T1).double().sum()
                    sums_W4[window, 1] -= found_TV.gather(1, following_T1).double().sum()
                    sums_W4[window, 3] += (exact_TV.argmax(-1) == found_TV.argmax(-1)).sum()
                    sums_W4[window, 2] += (exact_TV.exp() * (exact_TV - found_TV)).sum(-1).double().sum()
                progress.advance()
    return Scores(*sums_W4.T)


def reader_of_target(target: Target, *, window: int, as_prompt: bool) -> Reader:
    """Our target, in one of its two arithmetics."""
    cache, zero_B = target.make_kv_cache(num_slots=1, capacity=window), torch.zeros(1, dtype=torch.int64)

    def read(ids_T: torch.Tensor) -> Rows:
        _, last_1TH = target(ids_T[None], kv_cache=cache, slots_B=zero_B, starts_B=zero_B, num_prompts=int(as_prompt))
        return lambda chunk: target.logits(last_1TH[:, chunk])[0]

    return read


def reader_of_llama_cpp(path: Path, *, window: int, threads: int) -> Reader:
    """llama.cpp on a GGUF file."""
    Llama: Any = importlib.import_module("llama_cpp").Llama

    how = {"n_ctx": window, "n_batch": window, "n_threads": threads, "n_threads_batch": threads}
    model = Llama(model_path=str(path), logits_all=True, verbose=False, **how)

    def read(ids_T: torch.Tensor) -> Rows:
        model.reset()
        model.eval(ids_T.tolist())
        return lambda chunk: torch.from_numpy(model.scores[chunk])

    return read


def table_of(found: dict[str, Scores], texts: Sequence[Path], of_W: torch.Tensor, *, predicted: int) -> list[str]:
    """A Markdown table. `predicted`: tokens of a window."""

    def perplexities(losses_W: torch.Tensor) -> list[str]:
        groups = [losses_W, *(losses_W[of_W == number] for number in range(len(texts)))]
        return [f"{math.exp(float(group_W.mean()) / predicted):.4f}" for group_W in groups]

    heads = ["", "perplexity", *(path.stem for path in texts), "over fp32", "95 % interval", "divergence", "same"]
    exact_W = next(iter(found.values())).exact_losses_W
    rows = [heads, ["---"] * len(heads), ["transformers, fp32", *perplexities(exact_W), *["–"] * 4]]
    for name, scores in found.items():
        ratio, low, high = interval(((scores.losses_W - exact_W) / predicted).exp().tolist())
        divergence, same = (float(sums_W.mean()) / predicted for sums_W in (scores.divergences_W, scores.same_W))
        cells = [f"{ratio:.4f}", f"{low:.4f}–{high:.4f}", f"{divergence:.5f}", f"{same:.2%}"]
        rows.append([name, *perplexities(scores.losses_W), *cells])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="plain files")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--precisions", nargs="*", default=["auto", "int4", "int8", "bf16"])
    parser.add_argument("--arithmetic", choices=["decode", "prompt"], default="decode")
    parser.add_argument("--gguf", type=Path, help="the target's GGUF file, for transformers and llama.cpp")
    parser.add_argument("--keep", type=Path, default=Path("bench-results/quality"), help="folder of references")
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, after `--`")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    use_threads(config.engine.threads)
    folder = find_target(config)
    source = options.gguf or next(folder.glob("*.gguf"), folder)
    encode = load_tokenizer(config).encode
    ids_WT, of_W = windows_of(
        [path.read_text() for path in options.text],
        lambda text: encode(text, add_special_tokens=False),
        tokens=options.tokens,
        window=options.window,
    )
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    key = repr([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    digest = hashlib.sha256(key.encode() + ids_WT.numpy().tobytes()).hexdigest()
    reference = options.keep / f"{digest[:16]}.safetensors"
    if not reference.exists():
        make_reference(source, ids_WT, reference)
        gc.collect()
    found = {}
    for precision in options.precisions:
        target = load_serving_target(load_config(options.config, [*options.overrides, f"target.precision={precision}"]))
        read = reader_of_target(target, window=options.window, as_prompt=options.arithmetic == "prompt")
        found[precision] = score(read, reference, name=precision)
        del target, read
        gc.collect()
    if options.gguf and importlib.util.find_spec("llama_cpp"):
        read = reader_of_llama_cpp(options.gguf, window=options.window, threads=torch.get_num_threads())
        found["llama.cpp"] = score(read, reference, name="llama.cpp")
    elif options.gguf:
        print("llama.cpp is left out: `pip install llama-cpp-python` compiles it", file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{processor()[0]}, {len(os.sched_getaffinity(0))} cores; {commit}; {ids_WT.numel():,} tokens of {source.name};"
    )
    print(f"{options.arithmetic} arithmetic: `python -m benchmarks.quality {shlex.join(sys.argv[1:])}`\n")
    print("\n".join(table_of(found, options.text, of_W, predicted=options.window - 1)))


if __name__ == "__main__":
    main()
