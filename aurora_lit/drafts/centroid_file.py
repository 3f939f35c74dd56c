"""The learner's domains as a file beside the published drafts, by which the engine assigns requests.

FOLDER/domains.safetensors holds the tensors of `Centroids`; its metadata holds the format, the publication's number,
the domains' names, the numbers of `Centroids`, and the target whose hidden states were clustered. It is replaced as a
whole.
`read_centroids` refuses a file that is damaged, of a newer format or of a target of other sizes, and gives the reason.

Leaves out when it is written (learn/online/centroid_publisher.py) and read (serve/worker/domain_watch.py).

    write_centroids(folder / CENTROIDS_NAME, centroids, version=12, target=target_head)
    centroids, version = read_centroids(folder / CENTROIDS_NAME, target)

Shapes: E embedding (three hidden states side by side), D clusters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aurora_lit.drafts.checkpoint import TargetShape
from aurora_lit.durable import replace_file
from aurora_lit.errors import CheckpointError
from aurora_lit.modules.domains.centroids import Centroids
from aurora_lit.request import MAX_DOMAIN_CHARACTERS
from aurora_lit.settings import MAX_DOMAINS

CENTROIDS_NAME = "domains.safetensors"
"""The file's name in the folder of a deployment's versions."""
FORMAT = 3
"""Number of the format, which changes whenever a reader would misunderstand another version's file. So it does with the
mean that embeddings are (modules/domains/centroids.py)."""
_TENSORS = {"centroids": "centroid_DE", "mean": "mean_E", "variance": "variance_E"}
"""Names in the file and in `Centroids`."""
_MAX_HEADER_BYTES = 1 << 16


def write_centroids(path: Path, centroids: Centroids, *, version: int, target: TargetShape) -> None:
    """Replace the file durably. Raises OSError; the file before it is intact then.

    version: number of the publication, larger than that of the file it replaces.
    """
    metadata = {
        "format": str(FORMAT),
        "version": str(version),
        "names": json.dumps(centroids.names),
        "common": repr(centroids.common),
        "novelty_threshold": repr(centroids.novelty_threshold),
        "target": _describe(target),
    }
    tensors = {name: getattr(centroids, field).float().contiguous() for name, field in _TENSORS.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, safetensors.torch.save(tensors, metadata), mode=0o600)  # means of what clients sent


def read_centroids(path: Path, target: TargetShape) -> tuple[Centroids, int]:
    """The published domains and the publication's number. Raises CheckpointError with the reason."""
    size_E = 3 * target.hidden_size
    try:
        largest = 4 * size_E * (MAX_DOMAINS + 2) + _MAX_HEADER_BYTES
        _require(path.stat().st_size <= largest, path, f"it is larger than the {largest} bytes that it may have")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as error:
        raise _refusal(path, f"it cannot be read: {error}") from error
    found = metadata.get("format")
    _require(found == str(FORMAT), path, f"its format is {found}, and this version reads {FORMAT}")
    expected = _describe(target)
    _require(metadata.get("target") == expected, path, f"it is of a target {metadata.get('target')}, not {expected}")
    _require(tensors.keys() == _TENSORS.keys(), path, f"it has the tensors {sorted(tensors)}")
    names, common, threshold, version = _plain(path, metadata)
    shapes = {"centroids": (len(names), size_E), "mean": (size_E,), "variance": (size_E,)}
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, shapes[name])
    _require(bool((tensors["variance"] >= 0).all()), path, "a variance is negative")
    centroids = Centroids(
        names=names,
        common=common,
        novelty_threshold=threshold,
        **{field: tensors[name].clone() for name, field in _TENSORS.items()},
    )
    return centroids, version


def published_version(path: Path) -> int:
    """The number of the publication in the file; 0 if there is none that can be read."""
    try:
        return max(0, int(_metadata(path)["version"]))
    except (KeyError, ValueError):
        return 0


def published_names(path: Path) -> list[str]:
    """The names of the domains in the file, of whatever target; none if there is none that can be read."""
    try:
        names = json.loads(_metadata(path)["names"])
    except (KeyError, ValueError):
        return []
    return [name for name in names if _is_name(name)] if isinstance(names, list) else []


def _metadata(path: Path) -> dict[str, str]:
    """The file's metadata; empty if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _plain(path: Path, metadata: dict[str, str]) -> tuple[tuple[str, ...], float, float, int]:
    """Names, what all embeddings share, novelty threshold and version."""
    try:
        names, common, threshold, version = (
            json.loads(metadata["names"]),
            float(metadata["common"]),
            float(metadata["novelty_threshold"]),
            int(metadata["version"]),
        )
    except (KeyError, ValueError) as error:
        raise _refusal(path, f"a field of its metadata is missing or invalid: {error!r}") from error
    _require(isinstance(names, list) and all(map(_is_name, names)), path, "a domain's name is invalid")
    _require(0 < len(set(names)) == len(names) <= MAX_DOMAINS, path, f"it has {len(names)} domains, or two of one name")
    _require(math.isfinite(common) and common >= 0, path, f"its common is {common}")
    _require(math.isfinite(threshold) and 0 < threshold < 2, path, f"its novelty_threshold is {threshold}")
    _require(0 < version < 2**63, path, f"its version is {version}")
    return tuple(names), common, threshold, version


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_DOMAIN_CHARACTERS and name.isprintable()


def _check_tensor(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _require(tensor.dtype == torch.float32, path, f"{name} is {tensor.dtype}, not torch.float32")
    _require(tuple(tensor.shape) == shape, path, f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    _require(bool(torch.isfinite(tensor).all()), path, f"{name} holds NaN or infinite values")


def _describe(target: TargetShape) -> str:
    """What a target's hidden states are told by: sizes and layers, as drafts are (drafts/checkpoint.py)."""
    return json.dumps(
        {
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "aux_layer_ids": list(target.aux_layer_ids),
        }
    )


def _require(condition: bool, path: Path, reason: str) -> None:
    if not condition:
        raise _refusal(path, reason)


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is refused: {reason}")
