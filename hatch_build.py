"""Build hook: adds configs/ and the shipped drafts to the wheel, inside the package.

In a checkout they are beside the package, and an editable install leaves them there.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("configs", "checkpoints/smollm2-base", "checkpoints/qwen2.5-coder-0.5b-base")
"""Folders. The draft of the 1.5B, of 52 MB, is in the repository alone: its preset says where to get it."""


class ShippedData(BuildHookInterface):  # type: ignore[misc, type-arg]
    """The hook that pyproject.toml names under `tool.hatch.build.targets.wheel.hooks.custom`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders to the wheel; `version` is "editable" or "standard"."""
        if version != "editable":
            folders = [folder for folder in SHIPPED if (Path(self.root) / folder).exists()]
            build_data["force_include"].update({folder: f"aurora_lit/{folder}" for folder in folders})
