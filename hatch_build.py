"""Build hook: adds configs/ and the shipped draft to the wheel, inside the package.

In a checkout they are beside the package, and an editable install leaves them there.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("configs", "checkpoints/smollm2-base")


class ShippedData(BuildHookInterface):  # type: ignore[misc, type-arg]
    """The hook that pyproject.toml names under `tool.hatch.build.targets.wheel.hooks.custom`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders to the wheel; `version` is "editable" or "standard"."""
        if version != "editable":
            build_data["force_include"].update({folder: f"aurora_lit/{folder}" for folder in SHIPPED})
