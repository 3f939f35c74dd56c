"""`aurora-lit export`: writes a draft to a folder of its own, in the form that vLLM and SGLang load.

    FOLDER/config.json           EAGLE-3's, with the auxiliary layer ids as each of the two servers reads them
    FOLDER/model.safetensors     as it was published

vLLM reads `eagle_aux_hidden_state_layer_ids` and takes hidden_states[k], the input of layer k, as we do. SGLang reads
the list inside `eagle_config` and takes the output of layer k, so the ids there are smaller by one.

Leaves out the value head, training state and scores, which these servers do not use.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from aurora_lit.config import AuroraConfig, draft_folder, versions_folder
from aurora_lit.drafts.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_draft, read_config
from aurora_lit.drafts.public_forms import eagle_config
from aurora_lit.drafts.versions import DraftStore, version_name
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
    fields["eagle_aux_hidden_state_layer_ids"] = list(shape.aux_layer_ids)
    out = out.absolute()  # "." has no name
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"--out {out} cannot be written: {error}; name another folder") from error
    try:
        shutil.copyfile(source / WEIGHTS_NAME, temporary / WEIGHTS_NAME)
        (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        load_draft(temporary, shape)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        os.replace(temporary, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported {source} as an EAGLE-3 draft to {out}")


def _source(config: AuroraConfig, version: int | None) -> Path:
    store = DraftStore(versions_folder(config), keep=config.checkpoint.keep)
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
