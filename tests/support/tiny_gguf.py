"""A tiny model in a GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, FFN, VOCAB, LAYERS = 64, 2, 96, 260, 4


def gguf_header(entry: bytes = b"", *, shape: tuple[int, ...] = (4, 32)) -> bytes:
    """A GGUF file with one tensor of fp32 and one entry of its metadata: the alignment, or else `entry`."""
    entry = entry or struct.pack("<Q17sII", 17, b"general.alignment", 4, 32)
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return (
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + entry + struct.pack("<Q1s", 1, b"x") + dimensions + bytes(4 + 8 + 600)
    )


def write_gguf(
    path: Path, *, architecture: str = "llama", kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> Path:
    """A model with a byte-level tokenizer. `kind`: of its matrices; in qwen2 there are biases and a head of its own."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "llama":
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(["<|endoftext|>", "a", "b", "ab", *(f"t{index}" for index in range(4, VOCAB))])
    writer.add_token_types([3, *[1] * (VOCAB - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if architecture == "qwen2":
        shapes["output.weight"] = (VOCAB, HIDDEN)
    size = HIDDEN // HEADS
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (size, HIDDEN),
            "attn_v": (size, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                shapes[f"blk.{layer}.{name}.bias"] = (shape[0],)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * (0.2 if len(shape) == 2 else 1.0)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        elif kind is gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
