"""`aurora-lit export`: writes a draft to a folder of its own, in the form that vLLM and SGLang load.

    FOLDER/config.json           EAGLE-3's, with the auxiliary layer ids as each of the two servers reads them
    FOLDER/model.safetensors     as it was published, without the vocabulary's maps if they map each token to itself;
                                 in bf16 if it was stored in 8 bits

vLLM reads `eagle_aux_hidden_state_layer_ids` and takes hidden_states[k], the input of layer k, as we do. SGLang reads
the list inside `eagle_config` and takes the output of layer k, so the ids there are smaller by one.

Leaves out the value head, training state and scores, which these servers do not use. `loadable` does the same to the
draft that vLLM is started with.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from aurora_lit.config import AuroraConfig, draft_folder, versions_folder
from aurora_lit.drafts.checkpoint import (
    CONFIG_NAME,
    VALUE_NAME,
    WEIGHTS_NAME,
    is_in_8_bits,
    load_draft,
    read_config,
    read_tensors,
    without_identity,
)
from aurora_lit.drafts.public_forms import LAYER_IDS, eagle_config
from aurora_lit.drafts.versions import PublishedVersions, version_name
from aurora_lit.durable import sync
from aurora_lit.errors import CheckpointError


def export(config: AuroraConfig, *, out: Path, version: int | None) -> None:
    """Write a version to the new folder `out`. None: the current one, or the starting draft if there is none.

    Raises CheckpointError if there is no such version, it is damaged, or `out` is not empty.
    """
    source = _source(config, version)
    shape = read_config(source)
    load_draft(source, shape)  # validates it
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"--out {out} exists already; name a new folder")
    fields = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    # Whatever form it has: SGLang reads layers in eagle_config, vLLM beside it.
    fields["eagle_config"] = {**(fields.get("eagle_config") or {}), **eagle_config(shape.aux_layer_ids)}
    fields[LAYER_IDS] = list(shape.aux_layer_ids)
    out = out.absolute()  # "." has no name
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"--out {out} cannot be written: {error}; name another folder") from error
    try:
        stored = read_tensors(source)
        kept = without_identity(stored)
        if kept is stored and not is_in_8_bits(source):
            shutil.copyfile(source / WEIGHTS_NAME, temporary / WEIGHTS_NAME)
        else:
            save_file(kept, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(temporary / CONFIG_NAME, temporary / WEIGHTS_NAME)  # safetensors 0.8 lets only the owner read
        load_draft(temporary, shape)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        os.replace(temporary, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported {source} as an EAGLE-3 draft to {out}")


def loadable(draft: Path, folder: Path) -> Path:
    """The draft's folder as vLLM loads it: in bf16 if it is stored in 8 bits, and without what it refuses, the value
    head and the maps of a whole vocabulary.

    Layer ids that are in SGLang's form alone are written beside it, since vLLM would take others. This is `draft`
    itself, or `folder` with links to its files. Raises CheckpointError.
    """
    shape = read_config(draft)
    in_8_bits = is_in_8_bits(draft)
    stored = read_tensors(draft) if in_8_bits or shape.draft_vocab_size == shape.vocab_size else {}
    kept = without_identity(stored)
    has_other_weights = in_8_bits or kept is not stored
    fields = json.loads((draft / CONFIG_NAME).read_text(encoding="utf-8"))
    if not (draft / VALUE_NAME).exists() and not has_other_weights and fields.get(LAYER_IDS):
        return draft
    folder.mkdir(parents=True, exist_ok=True)
    for path in draft.glob("*"):
        link = folder / path.name
        link.unlink(missing_ok=True)
        if path.name != VALUE_NAME:
            link.symlink_to(path)
    if has_other_weights:
        (folder / WEIGHTS_NAME).unlink()
        save_file(kept, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        shutil.copymode(draft / CONFIG_NAME, folder / WEIGHTS_NAME)
    if not fields.get(LAYER_IDS):
        fields[LAYER_IDS] = list(shape.aux_layer_ids)
        (folder / CONFIG_NAME).unlink()
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return folder


def _source(config: AuroraConfig, version: int | None) -> Path:
    store = PublishedVersions(versions_folder(config))
    if version is not None:
        folder = store.folder / version_name(version)
        if not folder.is_dir():
            raise CheckpointError(f"--version {version}: there is no {folder}; see `aurora-lit drafts list`")
        return folder
    current = store.current()
    if current is not None:
        return store.folder / current
    starting = draft_folder(config)
    if starting is None:
        raise CheckpointError(
            f"{store.folder} has no current version and draft.checkpoint is null; name one with --version"
        )
    return starting
