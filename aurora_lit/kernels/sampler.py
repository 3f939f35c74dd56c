"""Sampling in native code: tokens from stored logits (csrc/sampler.hpp), and the noise they are drawn with.

Leaves out: rows whose logits need not be stored (`PackedLinear.choose`), and the definition of each option
(modules/sampling/distribution.py).

Shapes: D rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_lit.kernels import native
from aurora_lit.request import SamplingParams


class _Row(ctypes.Structure):
    """DenseRow in sampler.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bias_tokens", "bias_values")),
        ("num_bias", ctypes.c_int64),
        ("context", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("context_length", "prompt_length", "top_k", "key", "position")),
        *((name, ctypes.c_float) for name in ("temperature", "repetition", "presence", "frequency", "min_p", "top_p")),
    )


@dataclass(frozen=True, kw_only=True)
class DenseRows:
    """What decides the tokens of D rows besides their logits."""

    params: Sequence[SamplingParams]
    """Of each row's request, without their temperature and seed."""
    contexts: Sequence[Tensor]
    """int64 on the CPU, the tokens before each row: prompt, output and the proposals that the row follows. Only rows
    with a penalty read them."""
    prompt_lengths: Sequence[int]
    """Tokens of each context that belong to the prompt."""
    temperature_D: Tensor
    """fp32; 0: greedy."""
    key_D: Tensor
    """int64, keys of the noise."""
    position_D: Tensor
    """int64, index in the output of each row's token."""


def choose_dense(logits_DV: Tensor, rows: DenseRows) -> Tensor:
    """As `choose_dense` in modules/sampling/choice.py, for contiguous fp32 logits on the CPU.

    Raises IndexError for a token that is not in the vocabulary.
    """
    kernels = native.library()
    assert kernels is not None
    assert logits_DV.dtype == torch.float32
    assert logits_DV.is_contiguous()
    D, vocab_size = logits_DV.shape
    contexts = [context.long().contiguous() for context in rows.contexts]
    native_rows = (_Row * D)()
    # By the identity of a request's options, which all its columns share; also keeps alive what the rows point to.
    bias_by_params: dict[int, tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_float]]] = {}
    numbers = (rows.prompt_lengths, rows.temperature_D.tolist(), rows.key_D.tolist(), rows.position_D.tolist())
    for row, p, context, prompt_length, temperature, key, position in zip(
        native_rows, rows.params, contexts, *numbers, strict=True
    ):
        if p.logit_bias:
            if id(p) not in bias_by_params:
                count = len(p.logit_bias)
                tokens = (ctypes.c_int64 * count)(*p.logit_bias.keys())
                bias_by_params[id(p)] = tokens, (ctypes.c_float * count)(*p.logit_bias.values())
            tokens, values = bias_by_params[id(p)]
            row.bias_tokens, row.bias_values = ctypes.addressof(tokens), ctypes.addressof(values)
            row.num_bias = len(tokens)
        row.context, row.context_length, row.prompt_length = context.data_ptr(), len(context), prompt_length
        row.temperature, row.key, row.position = temperature, key, position
        row.repetition, row.presence, row.frequency = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        row.min_p, row.top_k, row.top_p = p.min_p, p.top_k, p.top_p
    token_D = torch.zeros(D, dtype=torch.int64)
    logits, tokens_out = ctypes.c_void_p(logits_DV.data_ptr()), ctypes.c_void_p(token_D.data_ptr())
    if not kernels.aurora_choose_dense(logits, ctypes.c_int64(vocab_size), native_rows, ctypes.c_int64(D), tokens_out):
        raise IndexError(f"a logit bias or a context names a token that is not in the vocabulary of {vocab_size}")
    return token_D


def noise(key: int, position: int, token_id_V: Tensor) -> tuple[Tensor, Tensor]:
    """The hash's bits, int64 [V], and the noise, fp32 [V], that the kernels use for some tokens of one draw.

    `gumbel` in modules/sampling/noise.py is the reference.
    """
    kernels = native.library()
    assert kernels is not None
    token_id_V = token_id_V.long().contiguous()
    bits_V, noise_V = torch.empty_like(token_id_V), torch.empty(len(token_id_V))
    draw = (ctypes.c_int64(key), ctypes.c_int64(position))
    tensors = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (bits_V, noise_V))
    kernels.aurora_noise(*draw, ctypes.c_void_p(token_id_V.data_ptr()), ctypes.c_int64(len(token_id_V)), *tensors)
    return bits_V, noise_V
