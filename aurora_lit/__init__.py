"""aurora_lit: an OpenAI-style server with lossless speculative decoding.

The names in `__all__` are the public API. Each is imported on first use, so that `import aurora_lit` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AuroraConfig",
    "AuroraError",
    "CheckpointError",
    "ConfigError",
    "LLM",
    "Output",
    "Request",
    "RequestError",
    "SamplingParams",
    "SourceError",
    "StructuredOutputsParams",
    "__version__",
    "load_config",
]

if TYPE_CHECKING:
    from aurora_lit.config import AuroraConfig, load_config
    from aurora_lit.errors import AuroraError, CheckpointError, ConfigError, RequestError, SourceError
    from aurora_lit.llm import LLM
    from aurora_lit.request import Output, Request, SamplingParams, StructuredOutputsParams

_MODULES = {
    "aurora_lit.config": ("AuroraConfig", "load_config"),
    "aurora_lit.errors": ("AuroraError", "CheckpointError", "ConfigError", "RequestError", "SourceError"),
    "aurora_lit.llm": ("LLM",),
    "aurora_lit.request": ("Output", "Request", "SamplingParams", "StructuredOutputsParams"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            if name == "LLM":  # it imports torch
                importlib.import_module("aurora_lit.machine").spin_briefly()
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
