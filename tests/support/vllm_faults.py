"""A plugin of vLLM that makes our capture fail at chosen places. Only tests/vllm/test_faults.py installs it.

It is installed by a folder on PYTHONPATH with the metadata of a package, as any plugin of vLLM is by its entry point.

    faults = Faults(folder)                 # in the test
    VllmServer(..., environment=faults.environment)
    faults.next("sample")                   # the next time that this place is reached it raises
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aurora_lit.config import PROJECT_FOLDER

PLACES = ("execute_model", "sample", "before sample_tokens", "after sample_tokens")
"""The wraps of vllm/hooks.py; that around sample_tokens works before and after it."""
_VARIABLE = "AURORA_LIT_TEST_FAULT"


class Faults:
    """The test's side."""

    def __init__(self, folder: Path) -> None:
        """Write the plugin's metadata to `folder`."""
        metadata = folder / "aurora_lit_test_faults-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: aurora_lit_test_faults\nVersion: 1\n")
        entry = f"[vllm.general_plugins]\naurora_lit_test_faults = {__name__}:register\n"
        (metadata / "entry_points.txt").write_text(entry)
        self._place = folder / "place"
        self._place.write_text("")
        paths = [PROJECT_FOLDER, PROJECT_FOLDER / "tests", folder]
        self.environment = {"PYTHONPATH": ":".join(map(str, paths)), _VARIABLE: str(self._place)}

    def next(self, place: str) -> None:
        """The next time that this place is reached, it raises."""
        self._place.write_text(place)

    @property
    def has_raised(self) -> bool:
        """True if the chosen place has raised."""
        return not self._place.read_text()


def register() -> None:
    """What vLLM calls in each of its processes."""
    from aurora_lit.vllm import hooks
    from aurora_lit.vllm.capture import Capture

    file = Path(os.environ[_VARIABLE])

    def failing(function: Callable[..., Any], place: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if file.read_text() == place:
                file.write_text("")
                raise RuntimeError(f"injected in {place}")
            return function(*args, **kwargs)

        return wrapped

    original = hooks.RunnerHooks.__init__

    def init(self: hooks.RunnerHooks, runner: Any, reader: Any, *args: Any) -> None:
        reader = replace(
            reader,
            read_num_sampled=failing(reader.read_num_sampled, "sample"),
            read_batch=failing(reader.read_batch, "before sample_tokens"),
        )
        original(self, runner, reader, *args)

    hooks.RunnerHooks.__init__ = init  # type: ignore[method-assign]
    Capture.begin = failing(Capture.begin, "execute_model")  # type: ignore[method-assign]
    hooks.copy_step = failing(hooks.copy_step, "after sample_tokens")
