"""`aurora-lit doctor --vllm`: what a learner beside vLLM needs for a target, computed from the model's sizes.

Nothing is measured, loaded or downloaded. Leaves out the memory that vLLM itself takes besides weights: its own
`--gpu-memory-utilization` decides that.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from aurora_lit.cli.footprint import learner_needs
from aurora_lit.cli.model_sizes import draft_parameters, draft_shape, model_shape, model_sizes
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.errors import ConfigError
from aurora_lit.models.source import cache_root, cached

_CARD_BYTES = 80 * 10**9
_SHARE_FOR_WEIGHTS = 0.75
"""Of a card's memory; the rest holds keys, values and activations."""
_CARDS_OF_A_NODE = 8
_BF16 = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers for one target."""

    target_parameters: int
    active_parameters: int
    """That a token passes through: fewer than all in a mixture of experts."""
    cards: int
    """Of 80 GB, that hold the weights in bf16 and leave a quarter free."""
    tensor_parallel: int
    pipeline_parallel: int
    draft_parameters: int
    draft_bytes: int
    """In bf16, whole on every tensor-parallel rank but for its split matrices."""
    trace_bytes_per_token: int
    """Four hidden states in bf16: copied to main memory and written to the ring."""
    ring_tokens: int
    """Positions that trace.capacity_mb holds."""
    learner_bytes: int
    """On the learner's device."""
    learning_cost: float
    """Arithmetic of learning one position / of serving one token without speculation."""
    learned_share: float
    """Share of the served tokens that learn.compute_share pays for, at most 1."""


def recipe(config: AuroraConfig) -> Recipe:
    """The numbers. Raises ConfigError if the model's sizes are not known."""
    target = config.target
    folder = cached(target.source, cache_dir=cache_root(target.cache_dir), sha256=target.sha256)
    shape = model_shape(config, folder=folder)
    if shape is None:
        raise ConfigError("target.config_file=null: the model's sizes are not known; name its config.json")
    text, draft = shape.get_text_config(), draft_shape(config, shape.get_text_config())
    everything, _, of_experts = model_sizes(shape)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    used = getattr(text, "num_experts_per_tok", None) or 1
    active = everything - (of_experts - of_experts * used // experts if experts > 1 else 0)
    cards = 2 ** math.ceil(math.log2(max(1.0, everything * _BF16 / (_SHARE_FOR_WEIGHTS * _CARD_BYTES))))
    in_draft, _ = draft_parameters(draft)
    # Forward and backward of each unrolled step: 6 operations a parameter, where serving a token takes 2.
    cost = 3 * config.learn.unroll_steps * in_draft / active
    return Recipe(
        target_parameters=everything,
        active_parameters=active,
        cards=cards,
        tensor_parallel=min(cards, _CARDS_OF_A_NODE),
        pipeline_parallel=max(1, cards // _CARDS_OF_A_NODE),
        draft_parameters=in_draft,
        draft_bytes=in_draft * _BF16,
        trace_bytes_per_token=4 * text.hidden_size * _BF16,
        ring_tokens=(config.trace.capacity_mb << 20) // (4 * text.hidden_size * _BF16),
        learner_bytes=sum(need.num_bytes for need in learner_needs(config, text)),
        learning_cost=cost,
        learned_share=min(1.0, config.learn.compute_share / cost),
    )


def show(config: AuroraConfig, *, as_json: bool) -> None:
    """Print the numbers on standard output. Raises ConfigError."""
    found = recipe(config)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    table = Table("beside vLLM", "", "how", title=config.target.source)
    table.add_row(
        "target",
        f"{found.target_parameters / 1e9:.1f} billion parameters",
        f"{found.active_parameters / 1e9:.1f} billion of them for each token",
    )
    nodes = f", on {found.pipeline_parallel} machines of {_CARDS_OF_A_NODE}" if found.pipeline_parallel > 1 else ""
    table.add_row("GPUs of 80 GB", f"{found.cards}{nodes}", "bf16 weights in three quarters of their memory")
    table.add_row(
        "draft", f"{found.draft_parameters / 1e6:,.0f} million parameters", f"{found.draft_bytes / 1e9:.2f} GB in bf16"
    )
    if found.pipeline_parallel > 1:
        table.add_row(
            "learning beside it", "not possible", "traces need the API server and the last stage on one machine"
        )
    table.add_row("traces", f"{found.trace_bytes_per_token / 1024:g} KiB a token", "four hidden states in bf16")
    table.add_row("ring", f"{found.ring_tokens:,} tokens", f"trace.capacity_mb={config.trace.capacity_mb}")
    table.add_row("learner", f"{found.learner_bytes / 1e9:.1f} GB", "embedding, head, draft, optimiser, one step")
    table.add_row(
        "learning a token",
        f"{100 * found.learning_cost:.1f} % of serving one",
        f"learn.compute_share={config.learn.compute_share:g} pays for {100 * found.learned_share:.0f} % of the tokens",
    )
    console = Console()
    console.print(table)
    parallel = f"--tensor-parallel-size {found.tensor_parallel}"
    if found.pipeline_parallel > 1:
        parallel += f" --pipeline-parallel-size {found.pipeline_parallel}"
    command = ["aurora-lit", "vllm", config.target.source, "--draft", "DIR"]
    command += [word for setting in _learner_settings(config) for word in ("--set", setting)]
    console.print(f"{shlex.join(command)} {parallel}", soft_wrap=True, highlight=False, markup=False)


def _learner_settings(config: AuroraConfig) -> Iterator[str]:
    """`key=value` of what `aurora-lit vllm`, which reads no file of ours, would otherwise leave at its default.

    Whether a server has a learner of its own, and whether that begins without a draft, does not hold beside vLLM.
    """
    default = asdict(load_config(None, []))
    for section in ("trace", "learn", "domain", "schedule", "checkpoint"):
        for key, value in asdict(config)[section].items():
            if value != default[section][key] and f"{section}.{key}" not in ("learn.enabled", "learn.from_scratch"):
                yield f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
