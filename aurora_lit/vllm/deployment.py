"""What vLLM's processes must know of a deployment: a small JSON file in the run folder, named by one variable.

`aurora-lit vllm` (cli/vllm.py) writes the file and sets the variable; the middleware in vLLM's API server and the
worker extension in its workers read it. Without the variable, neither does anything.

    Deployment(run_folder=folder, ...).write()
    Deployment.of_environment()             # None: AURORA_LIT_VLLM is not set
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.ipc.engine_status import STATUS_NAME

VARIABLE = "AURORA_LIT_VLLM"
"""The environment variable that names the run folder."""
_FILE_NAME = "vllm.json"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One vLLM server with a learner beside it."""

    run_folder: Path
    """Where the ring and the status pages are."""
    starting_draft: Path
    """The draft that vLLM was started with."""
    versions: Path
    """Folder of the published drafts (drafts/versions.py)."""
    ring_bytes: int
    """Size of each ring, and the most that traces which are being recorded may hold."""

    def write(self) -> None:
        """Write the file."""
        content = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        (self.run_folder / _FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, run_folder: Path) -> Deployment:
        """The deployment of a run folder. Raises ConfigError."""
        try:
            content: dict[str, Any] = json.loads((run_folder / _FILE_NAME).read_text(encoding="utf-8"))
            for name in ("run_folder", "starting_draft", "versions"):
                content[name] = Path(content[name])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{VARIABLE}={run_folder} is not the run folder of a running `aurora-lit vllm`: {error}"
            ) from error

    @classmethod
    def of_environment(cls) -> Deployment | None:
        """The deployment that AURORA_LIT_VLLM names; None if it is not set. Raises ConfigError."""
        folder = os.environ.get(VARIABLE)
        return cls.read(Path(folder)) if folder else None

    def check_shape(self, folder: Path) -> None:
        """Raise CheckpointError if a draft has another shape than the starting one, whose shape vLLM keeps."""
        config, starting = read_config(folder), read_config(self.starting_draft)
        for each in fields(config):
            found, wanted = getattr(config, each.name), getattr(starting, each.name)
            if found != wanted:
                raise CheckpointError(
                    f"{folder} is refused: {each.name} is {found}, but vLLM was started with a draft that has "
                    f"{wanted}; start it with one of this shape, or with --set checkpoint.run=NAME"
                )

    def status_path(self, engine: int) -> Path:
        """The status page of a data-parallel engine; the first one's has the name that every server's has."""
        return self.run_folder / (STATUS_NAME if engine == 0 else f"{STATUS_NAME}-{engine}")

    def ring_path(self, engine: int) -> Path:
        """The ring of a data-parallel engine."""
        return self.run_folder / f"traces-{engine}.ring"
