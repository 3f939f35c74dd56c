"""Tiny random models, and drafts and engines on them: everything with weights, on a CPU, in seconds.

folder = save_model("llama", tmp_path)        # transformers and load_target both read it
target = load_target(folder, precision="fp32")
engine = make_engine(target, random_draft(target), max_draft_tokens=3)
outputs = run(engine, [request("a", (1, 2, 3), max_tokens=8)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models.gguf import gguf_in
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import transformers_model
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.modules.losses.batch import TraceBatch
from aurora_lit.modules.losses.chain_losses import accepted_proposals
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.fused_lk import TargetRows, fused_lk_loss
from aurora_lit.modules.losses.unroll import shift_positions
from aurora_lit.request import Output, Request, SamplingParams, TokenLogprob
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.round_plan import SIBLING_TOKENS
from aurora_lit.serve.engine.thread_budget import ThreadBudget
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.settings import EngineSettings, MemorySettings

VOCAB = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 7,  # so that the three auxiliary layers differ: 2, 3, 4
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the native attention needs it
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 256,
    "n_embd": 64,
    "n_layer": 7,
    "n_head": 2,
    "n_inner": 96,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama3": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 9}),
    "mistral_wide": (MistralConfig, {"sliding_window": 64}),
    "mixtral": (MixtralConfig, {**_MOE, "num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, {**_MOE, "num_experts": 6, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
    "olmoe": (OlmoeConfig, {**_MOE, "num_experts": 4, "clip_qkv": 1.0}),
    "gpt_oss": (
        GptOssConfig,
        {
            **_MOE,
            "num_local_experts": 4,
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 9, "query_pre_attn_scalar": 48, "final_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 9, "query_pre_attn_scalar": 48, "sliding_window_pattern": 2}),
    "gemma3_wide": (Gemma3TextConfig, {"sliding_window": 64, "sliding_window_pattern": 2}),
    "cohere": (CohereConfig, {"logit_scale": 0.3}),
    "phi": (PhiConfig, {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": (Phi3Config, {}),
    "gpt_neox": (GPTNeoXConfig, {"num_key_value_heads": 2}),
    "gpt2": (GPT2Config, {}),
}
"""Configuration class of each family, and the fields in which its tiny model differs. Windows: 9 or 64 positions."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model."""
    kind, own = FAMILIES[family]
    return kind(**{**(_GPT2 if family == "gpt2" else _COMMON), **own, **changes})


def save_model(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random model. One-dimensional parameters are random too, so that a missing norm or bias is noticed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def reference_model(folder: Path) -> PreTrainedModel:
    """The same model in transformers, fp32."""
    if gguf_in(folder) is not None:
        model: PreTrainedModel = transformers_model(folder, dtype=torch.float32)
        model.set_attn_implementation("eager")
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def draft_config(target: Target, **changes: Any) -> Eagle3Config:
    """Configuration of a tiny draft for a target; its vocabulary lacks three ids."""
    fields: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "target_hidden_size": target.hidden_size,
        "intermediate_size": 80,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size - 3,
        "aux_layer_ids": target.aux_layer_ids,
        "max_position_embeddings": 256,
    }
    return Eagle3Config(**{**fields, **changes})


def random_draft(target: Target, *, seed: int = 0, **changes: Any) -> Eagle3Draft:
    """An untrained draft; its vocabulary lacks the ids 0, 5 and 6."""
    torch.manual_seed(seed)
    config = draft_config(target, **changes)
    ids = torch.tensor([i for i in range(target.vocab_size) if i not in (0, 5, 6)])[: config.draft_vocab_size]
    draft = Eagle3Draft(config, ids)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name != "fc.weight":
                parameter.normal_(std=0.15)
        draft.value_head.weight.normal_(std=0.1)
    return draft


def draft_batch(target: Target, ids_BT: torch.Tensor) -> TraceBatch:
    """A training batch: the target's states over some tokens, fp32."""
    with torch.no_grad():
        aux_BT3H, last_BTH = target.in_torch.forward_uncached(ids_BT)
        lse_BT = target.logits(last_BTH).logsumexp(-1)
    weight_BT = torch.ones(ids_BT.shape)
    domains = ("chat",) * len(ids_BT)
    return TraceBatch(
        token_ids_BT=ids_BT, aux_BT3H=aux_BT3H, last_BTH=last_BTH, lse_BT=lse_BT, weight_BT=weight_BT, domains=domains
    )


def draft_module(target: Target, draft: Eagle3Draft, **changes: Any) -> DraftModule:
    """The training module of a draft for a target."""
    ids = draft.draft_token_ids
    fields = {"head_VdH": target.head_rows(ids), "logit_transform": target.logit_transform.select(ids), **changes}
    return DraftModule(draft, embed=TargetHead(target).embed, **fields)


def supervised_loss(module: DraftModule, batch: TraceBatch) -> torch.Tensor:
    """The LK loss of every step at every position with a weight, and a tenth of the value head's squared error.

    Step j counts 0.8^j. What a toy draft is trained on, whose target's distribution is known over its vocabulary.
    """
    assert batch.lse_BT is not None
    hidden_KBTH, ones_BT = module.unroll(batch), torch.ones_like(batch.weight_BT)
    K, B, T, H = hidden_KBTH.shape
    mask_KBT = torch.stack([shift_positions(ones_BT, 1 + step) for step in range(K)]) * (batch.weight_BT > 0)
    weight_KBT = mask_KBT * batch.weight_BT * (0.8 ** torch.arange(K))[:, None, None]
    row_R = (weight_KBT > 0).any(0).flatten().nonzero()[:, 0]
    loss_sum, stats = fused_lk_loss(
        h_NH=module.draft.norm(hidden_KBTH.view(K, B * T, H)[:, row_R]),
        weight_DH=module.draft.lm_head.weight,
        row_weight_N=weight_KBT.view(K, B * T)[:, row_R],
        target=TargetRows(
            h_NG=batch.last_BTH.flatten(0, 1)[row_R],
            weight_DG=module.head_VdH,
            logit_transform=module.logit_transform,
            lse_N=batch.lse_BT.flatten()[row_R],
        ),
    )
    value_KBT = module.draft.compute_value(hidden_KBTH.detach())
    alpha_KN = stats.alpha_N.new_zeros(K, B * T).index_copy(1, row_R, stats.alpha_N)
    alpha_KBT = alpha_KN.view(K, B, T) * (mask_KBT > 0)
    return_KBT = accepted_proposals(alpha_KBT, torch.ones_like(alpha_KBT))
    value_sum = ((value_KBT - return_KBT).square() * weight_KBT).sum()
    return (loss_sum + 0.1 * value_sum) / weight_KBT.sum().clamp_min(1.0)


def trained_draft(target: Target, ids_BT: torch.Tensor, *, steps: int = 60) -> Eagle3Draft:
    """A draft trained on token sequences, so that long runs of its proposals are accepted along them."""
    draft = random_draft(target, seed=1)
    module = draft_module(target, draft, num_steps=3)
    batch = draft_batch(target, ids_BT)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=4e-3)
    for _ in range(steps):
        loss = supervised_loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draft


def request(request_id: str, prompt_ids: Sequence[int], **params: Any) -> Request:
    """A request with these sampling parameters; greedy by default."""
    fields: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0}
    return Request(request_id=request_id, prompt_ids=tuple(prompt_ids), params=SamplingParams(**{**fields, **params}))


def make_engine(
    target: Target,
    draft: Eagle3Draft | None = None,
    *,
    eos_token_ids: frozenset[int] = frozenset(),
    max_draft_tokens: int = 4,
    copied_tokens: int = 0,
    lookup: bool = True,
    memory_scope: Literal["domain", "client", "off"] = "off",
    prefill_chunk_tokens: int = 16,
    max_round_s: float = 0.05,
    branches: bool = False,
    draft_version: str = "",
    observer: TraceRecorder | None = None,
    grammars: GrammarCompiler | None = None,
    threads: ThreadBudget | None = None,
    **settings: Any,
) -> Engine:
    """A small engine with these settings; by default nothing is copied, and no token ends an output.

    `max_draft_tokens` 0: the draft is not used. `copied_tokens`: most of a round, from within the request (`lookup`) or
    from a memory of one MiB (`memory_scope`). `branches`: beside the tokens of drafted chains it proposes others where
    it can; unless `adaptive`, always twice as many in all.
    """
    defaults: dict[str, Any] = {"max_seq_len": 96, "adaptive": False, "prefix_cache_mb": 1}
    remembers = copied_tokens > 0 and memory_scope != "off"
    engine = Engine(
        target,
        draft if max_draft_tokens else None,
        EngineSettings(
            max_draft_tokens=max_draft_tokens or 1, lookup=lookup and copied_tokens > 0, **{**defaults, **settings}
        ),
        eos_token_ids=eos_token_ids,
        memory=MemorySettings(capacity_mb=int(remembers), scope="domain" if memory_scope == "off" else memory_scope),
        prefill_chunk_tokens=prefill_chunk_tokens,
        max_round_s=max_round_s,
        draft_version=draft_version,
        observer=observer,
        grammars=grammars,
        threads=threads,
    )
    weigher = engine.proposer.weigher
    siblings = SIBLING_TOKENS if branches and target.has_native_decoder else 0
    if siblings and settings.get("adaptive"):
        siblings = weigher.limits.sibling_tokens
    weigher.limits = replace(weigher.limits, copied_tokens=copied_tokens, sibling_tokens=siblings)
    return engine


@dataclass(kw_only=True)
class Answer:
    """All outputs of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    rounds: list[Output] = field(default_factory=list)

    def add(self, output: Output) -> None:
        """Append the output of one round."""
        assert self.finish_reason is None, "an output after the last one"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            assert not self.rounds
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        self.rounds.append(output)


def run(engine: Engine, requests: Sequence[Request], *, arrivals: Sequence[int] = ()) -> dict[str, Answer]:
    """Serve all requests to their end. Request i is submitted before round `arrivals[i]`, by default round 0."""
    waiting = [(arrivals[i] if i < len(arrivals) else 0, r) for i, r in enumerate(requests)]
    answers = {r.request_id: Answer() for r in requests}
    number = 0
    while waiting or engine.has_work:
        for _, due in [w for w in waiting if w[0] <= number]:
            engine.submit(due)
        waiting = [w for w in waiting if w[0] > number]
        for output in engine.round():
            answers[output.request_id].add(output)
        number += 1
        assert number < 3000, "the engine does not finish"
    return answers
