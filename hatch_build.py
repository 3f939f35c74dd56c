"""Build hook: adds configs/ and the shipped drafts to the wheel, inside the package.

In a checkout they are beside the package, and an editable install leaves them there.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("configs", "checkpoints/*-base")
"""Patterns of folders."""


class ShippedData(BuildHookInterface):  # type: ignore[misc, type-arg]
    """The hook that pyproject.toml names under `tool.hatch.build.targets.wheel.hooks.custom`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders to the wheel; `version` is "editable" or "standard"."""
        if version != "editable":
            folders = [path.relative_to(self.root) for pattern in SHIPPED for path in Path(self.root).glob(pattern)]
            build_data["force_include"].update({str(folder): f"aurora_lit/{folder}" for folder in folders})
