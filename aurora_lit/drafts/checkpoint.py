"""One draft checkpoint on disk, in the EAGLE-3 layout that vLLM and SGLang load; written atomically.

A folder holds `config.json` and `model.safetensors` in that layout, `value_head.safetensors` (used only here), and
`manifest.json` with the SHA-256 of each. `load_draft` refuses a draft that is damaged or made for another target, and
gives the reason. Weights may be stored in 8 bits: a matrix `NAME` as int8, with a scale for each output in
`NAME_scale`. Other trainers' forms are read too (drafts/public_forms.py). A folder without `manifest.json` (a draft
of other origin) is loaded without the check of digests; all other checks are made.

Leaves out training state (learn/) and versions (drafts/versions.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from aurora_lit.drafts.public_forms import ARCHITECTURE, LAYER_IDS, common_config, common_tensors, eagle_config
from aurora_lit.durable import exchange, sync
from aurora_lit.errors import CheckpointError
from aurora_lit.kernels.quantization import quantize_per_output
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft

CONFIG_NAME, WEIGHTS_NAME, VALUE_NAME, MANIFEST_NAME = (
    "config.json",
    "model.safetensors",
    "value_head.safetensors",
    "manifest.json",
)
_VALUE_PREFIX = "value_head."
_SCALE = "_scale"
"""What the name of the scales [outputs] of a matrix in 8 bits ends with."""
# Fields of config.json as `Eagle3Config` names them: whole numbers, and flags that are only there if they are set.
_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "draft_vocab_size", "max_position_embeddings"),
)
_NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm")


class TargetShape(Protocol):
    """The sizes of a target that a draft must match."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def aux_layer_ids(self) -> tuple[int, int, int]: ...  # noqa: D102


def save_draft(draft: Eagle3Draft, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a draft under a temporary name, then move it to `folder`, replacing an older draft there.

    Raises CheckpointError if there is anything else, as `check_replaceable` does.
    """
    check_replaceable(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_draft(draft, temporary, dtype=dtype)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is absent, empty or a draft: replacing it deletes everything in it.

    Nor may it be the present folder, which shells would be left without.
    """
    if folder.absolute() == Path.cwd():
        raise CheckpointError(f"{folder} is the present folder, which would be replaced; name a folder in it")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        is_draft = _read_json(folder, CONFIG_NAME).get("architectures") == [ARCHITECTURE]
    except CheckpointError:
        is_draft = False
    if not is_draft:
        raise CheckpointError(
            f"{folder} holds files, but no draft (config.json with architectures={[ARCHITECTURE]}), and writing a "
            "draft there would delete them; name a new folder"
        )


def write_draft(draft: Eagle3Draft, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a draft's files into an existing folder and flush them to disk; the manifest comes last. Raises OSError.

    `dtype`: fp32, bf16, or int8, which stores matrices in 8 bits and all else in bf16.
    """
    in_8_bits, dtype = dtype == torch.int8, torch.bfloat16 if dtype == torch.int8 else dtype
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in draft.state_dict().items()
    }
    for name, matrix in draft.state_dict().items() if in_8_bits else ():
        if matrix.is_floating_point() and matrix.ndim == 2 and not name.startswith(_VALUE_PREFIX):
            state[name], state[name + _SCALE] = quantize_per_output(matrix.detach().float())
    weights = without_identity({name: each for name, each in state.items() if not name.startswith(_VALUE_PREFIX)})
    value = {name: tensor for name, tensor in state.items() if name.startswith(_VALUE_PREFIX)}
    try:
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        save_file(value, folder / VALUE_NAME)
    except SafetensorError as error:  # such as a full disk
        raise OSError(errno.EIO, f"cannot be written: {error}", str(folder)) from error
    config_text = json.dumps(_config_json(draft.config, dtype), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(config_text, encoding="utf-8")
    mode = stat.S_IMODE((folder / CONFIG_NAME).stat().st_mode)
    for name in (WEIGHTS_NAME, VALUE_NAME):
        (folder / name).chmod(mode)  # safetensors 0.8 lets only the owner read, whatever umask says
    digests = {name: _sha256(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME, VALUE_NAME)}
    (folder / MANIFEST_NAME).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    for name in (*digests, MANIFEST_NAME):
        sync(folder / name)
    sync(folder)


def without_identity(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A draft's tensors without `d2t` and `t2d` if it has the whole vocabulary in the target's order.

    vLLM has no parameter for them then, and refuses the file. `load_draft` computes them.
    """
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None or t2d is None or bool(d2t.any()) or not bool(t2d.all()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}


def check_fits(folder: Path, config: Eagle3Config, target: TargetShape) -> None:
    """Raise CheckpointError if the draft in `folder`, of this configuration, is not one of this target."""
    expected = {
        "vocab_size": (config.vocab_size, target.vocab_size),
        "target_hidden_size": (config.target_hidden_size, target.hidden_size),
        "hidden_size": (config.hidden_size, target.hidden_size),  # the embedding is shared
        LAYER_IDS: (config.aux_layer_ids, target.aux_layer_ids),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise _refusal(
                folder,
                f"{name} is {found}, but the target needs {wanted}; train a draft for this target with "
                "`aurora-lit pretrain`, or set draft.checkpoint=null",
            )


def load_draft(folder: Path, target: TargetShape) -> Eagle3Draft:
    """Load a draft as fp32 and validate it for the target. Raises CheckpointError with the reason.

    Digests are compared only if there is a manifest.
    """
    try:
        return _load_draft(folder, target)
    except OSError as error:  # such as a disk that fails, or too many open files
        raise _refusal(folder, f"it cannot be read: {error}") from error


def _load_draft(folder: Path, target: TargetShape) -> Eagle3Draft:
    config = read_config(folder)
    check_fits(folder, config, target)
    for name, digest in _read_json(folder, MANIFEST_NAME, missing={}).items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise _refusal(folder, f"{name} does not match {MANIFEST_NAME}: truncated or altered; copy it again")
    state = common_tensors(read_tensors(folder), vocab_size=config.vocab_size)
    if (folder / VALUE_NAME).exists():
        state |= read_tensors(folder, VALUE_NAME)
    try:
        draft = Eagle3Draft(config)
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        reason = f"no draft can have the sizes in {CONFIG_NAME}: {str(error).partition(chr(10))[0]}"
        raise _refusal(folder, reason) from error
    own = draft.state_dict()
    value_names = {name for name in own if name.startswith(_VALUE_PREFIX)}
    missing, unknown = set(own) - set(state) - value_names, set(state) - set(own)
    if missing or unknown:
        raise _refusal(folder, f"tensors missing: {sorted(missing) or '-'}, unknown: {sorted(unknown) or '-'}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise _refusal(folder, f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _refusal(folder, f"{name} holds NaN or infinite values")
    draft.load_state_dict(state, strict=False)
    _check_vocabulary(folder, draft)
    return draft


def read_config(folder: Path) -> Eagle3Config:
    """The configuration of a stored draft. Raises CheckpointError."""
    fields = _read_json(folder, CONFIG_NAME)
    try:
        raw = common_config(fields)
        if not (layers := raw.get(LAYER_IDS)):
            raise CheckpointError(
                f"it does not say which layers of the target it reads; add {LAYER_IDS} to {CONFIG_NAME}: of n layers "
                "most drafts read [2, n // 2, n - 3]"
            )
        low, middle, high = layers
        sizes: dict[str, Any] = {name: int(_number(raw, name)) for name in _SIZES}
        own_width = "target_hidden_size" if raw.get("target_hidden_size") else "hidden_size"
        return Eagle3Config(
            **sizes,
            target_hidden_size=int(_number(raw, own_width)),
            aux_layer_ids=(int(low), int(middle), int(high)),
            rms_norm_eps=_number(raw, "rms_norm_eps"),
            rope_theta=_number(raw, "rope_theta"),
            rope_scaling=raw["rope_scaling"],
            **{name: bool(raw.get(name)) for name in _NORMS},
        )
    except CheckpointError as error:
        raise _refusal(folder, str(error)) from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _refusal(folder, f"a field of {CONFIG_NAME} is missing or invalid: {error!r}") from error


def _number(raw: dict[str, Any], name: str) -> float:
    try:
        number = float(raw[name])
        int(number)  # it is finite
        return number
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"a field of {CONFIG_NAME} is missing or invalid: {name} is {raw.get(name)!r}; give a number"
        ) from error


def _config_json(config: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    layers, scaling = list(config.aux_layer_ids), config.rope_scaling
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "target_hidden_size": config.target_hidden_size,
        "num_hidden_layers": 1,
        **{name: getattr(config, name) for name in _SIZES},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **asdict(scaling)},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        LAYER_IDS: layers,
        "eagle_config": eagle_config(layers),
        **{name: True for name in _NORMS if getattr(config, name)},
    }


def _check_vocabulary(folder: Path, draft: Eagle3Draft) -> None:
    ids = draft.draft_token_ids
    in_range = bool((ids >= 0).all()) and bool((ids < draft.config.vocab_size).all())
    if not in_range or len(set(ids.tolist())) != len(ids):
        raise _refusal(folder, "d2t does not name distinct tokens of the target's vocabulary")
    if int(draft.t2d.sum()) != len(ids) or not bool(draft.t2d[ids].all()):
        raise _refusal(folder, "t2d and d2t disagree")


def _read_json(folder: Path, name: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    path = folder / name
    if missing is not None and not path.exists():
        return missing
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal(folder, f"{name} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise _refusal(folder, f"{name} is not a JSON object")
    return raw


def read_tensors(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, torch.Tensor]:
    """The tensors of a file of a checkpoint; matrices that are stored in 8 bits in bf16. Raises CheckpointError."""
    try:
        tensors = load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise _refusal(folder, f"{name} cannot be read: {error}") from error
    for matrix in [each for each, tensor in tensors.items() if tensor.dtype == torch.int8]:
        scale_O = tensors.pop(matrix + _SCALE, None)
        if scale_O is None or tensors[matrix].shape[:1] != scale_O.shape:
            raise _refusal(folder, f"{matrix} is stored in 8 bits, but {matrix + _SCALE} are not its scales")
        tensors[matrix] = (tensors[matrix].float() * scale_O[:, None]).bfloat16()
    return tensors


def is_in_8_bits(folder: Path) -> bool:
    """Whether the weights of a checkpoint are stored in 8 bits, which other engines do not read."""
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return any(name.endswith(_SCALE) for name in file.keys())  # noqa: SIM118


def _refusal(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"draft.checkpoint: {folder} is refused: {reason}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Move a finished folder into place. If names cannot be exchanged, `folder` does not exist for an instant."""
    if not folder.exists():
        os.replace(temporary, folder)
    elif not exchange(temporary, folder):
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)
