"""Our target as GGUF files for llama.cpp: fp32 from the weights that our server loads, then quantised by llama.cpp.

Supports only the plain Llama form with tied embeddings and a byte-level BPE tokenizer, which SmolLM2 has; anything else
raises an error. The pre-tokenizer is `gpt-2`, whose rule is that of the folder's tokenizer.json, so that prompts have
the same tokens for all engines.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from aurora_lit.errors import AuroraError

KINDS = ("F32", "BF16", "Q8_0", "Q4_0")
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_files(model: Path, folder: Path, *, quantize: Path) -> None:
    """Write F32.gguf and the other kinds to `folder`; files newer than the model's weights are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    made = (model / "model.safetensors").stat().st_mtime
    for kind in KINDS:
        path, partial = folder / f"{kind}.gguf", folder / f".{kind}.partial"
        if path.exists() and path.stat().st_mtime > made:
            continue
        if kind == "F32":
            write_f32(model, partial)
        else:
            command = [str(quantize), str(folder / "F32.gguf"), str(partial), kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                raise AuroraError(f"llama-quantize failed for {kind}: {done.stdout[-500:]}")
        partial.replace(path)


def write_f32(model: Path, path: Path) -> None:
    """Write the weights and the tokenizer in `model` as one GGUF file in fp32."""
    config = json.loads((model / "config.json").read_text())
    _check(config, model)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model, config)
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, heads if ".q_proj" in name else kv_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder rows of q or k for llama.cpp's rotation: the two of a pair are neighbours, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight of transformers' Llama."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name]
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    part = rest.removesuffix(".weight")
    if not prefix.isdigit() or part not in _LAYER:
        raise AuroraError(f"{name} is not a weight of the plain Llama form; this comparison supports SmolLM2 only")
    return f"blk.{prefix}.{_LAYER[part]}.weight"


def _check(config: dict[str, Any], model: Path) -> None:
    for key, wanted in (
        ("architectures", ["LlamaForCausalLM"]),
        ("tie_word_embeddings", True),
        ("attention_bias", False),
        ("hidden_act", "silu"),
    ):
        if config[key] != wanted:
            raise AuroraError(f"{model}: {key}={config[key]} cannot be written as GGUF here; {wanted} can")
    if config["rope_parameters"]["rope_type"] != "default":
        raise AuroraError(f"{model}: rope_type={config['rope_parameters']['rope_type']} cannot be written as GGUF here")


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    rule = tokenizer["pre_tokenizer"]
    if rule["type"] != "ByteLevel" or rule["add_prefix_space"] or not rule["use_regex"]:
        raise AuroraError(f"{model}: its pre-tokenizer is not GPT-2's, so llama.cpp would split prompts differently")
    words = {word: number for word, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(words.values(), gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        words[added["content"]] = added["id"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    named = {number: word for word, number in words.items()}
    numbers = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([named.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in numbers])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if config["bos_token_id"] is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    template = model / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())
