"""Ways to spoil a published draft on disk so that an engine must never load it.

for each in SPOILED:
    each.spoil(folder)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from aurora_lit.drafts.checkpoint import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, read_config, save_draft
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


@dataclass(frozen=True, kw_only=True)
class Spoiled:
    """One way."""

    name: str
    change: Callable[[Path], None]
    reason: str
    """What the refusal says."""
    has_manifest: bool = True
    """False: without the digests, which would show it at once."""

    def spoil(self, folder: Path) -> None:
        """Spoil the draft in `folder`."""
        self.change(folder)
        if not self.has_manifest:
            (folder / MANIFEST_NAME).unlink()


def _truncated(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def _altered(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors["fc.weight"] += 1
    save_file(tensors, folder / WEIGHTS_NAME)


def _not_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors["fc.weight"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS_NAME)


def _another(size: str, *, by: int) -> Callable[[Path], None]:
    """A complete draft in which one size differs."""

    def change(folder: Path) -> None:
        config = read_config(folder)
        save_draft(Eagle3Draft(replace(config, **{size: getattr(config, size) + by})), folder)

    return change


def _other_layers(folder: Path) -> None:
    fields = json.loads((folder / CONFIG_NAME).read_text())
    fields["eagle_aux_hidden_state_layer_ids"] = [0, 2, 3]
    (folder / CONFIG_NAME).write_text(json.dumps(fields))


SPOILED = [
    Spoiled(name="truncated", change=_truncated, reason="truncated or altered"),
    Spoiled(name="altered", change=_altered, reason="truncated or altered"),
    Spoiled(name="truncated, no manifest", change=_truncated, reason="cannot be read", has_manifest=False),
    Spoiled(name="NaN", change=_not_a_number, reason="NaN", has_manifest=False),
    Spoiled(name="other shape", change=_another("intermediate_size", by=8), reason="intermediate_size"),
    Spoiled(name="other vocabulary", change=_another("draft_vocab_size", by=-1), reason="draft_vocab_size"),
    Spoiled(name="other target", change=_another("vocab_size", by=1), reason="vocab_size"),
    Spoiled(name="other layers", change=_other_layers, reason="aux_layer_ids", has_manifest=False),
]
