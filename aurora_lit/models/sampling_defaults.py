"""The sampling parameters that a model's author recommends, for what a request leaves out.

As in vLLM: the model's generation_config.json has them (its `do_sample` and `max_new_tokens` are not used), and the
deployment replaces some or all of them. Leaves out which values a request may have (settings.py) and where they are
filled in (serve/http/routes.py, llm.py).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from aurora_lit.config import AuroraConfig, is_sampling_value
from aurora_lit.models.source import cache_root, cached
from aurora_lit.settings import SAMPLING_RANGES

_log = logging.getLogger(__name__)


def default_sampling(config: AuroraConfig) -> dict[str, Any]:
    """The defaults of those parameters in SAMPLING_RANGES that have one, by name.

    A target that is not on this machine yet has none of its own. top_k is 0 where it is said to be -1: all tokens.
    """
    target, own = config.target, dict[str, Any]()
    if config.server.generation_config == "auto":
        folder = cached(target.source, cache_dir=cache_root(), sha256=target.sha256)
        own = {} if folder is None else _recommended(folder / "generation_config.json")
    found = own | (config.server.default_sampling or {})
    return found | ({"top_k": max(0, found["top_k"])} if "top_k" in found else {})


def _recommended(path: Path) -> dict[str, Any]:
    """The values in a generation config; those that no request could have are left out, which is logged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there need not be one
        return {}
    given = {
        name: fields[name] for name in SAMPLING_RANGES if isinstance(fields, dict) and fields.get(name) is not None
    }
    for name in [name for name, value in given.items() if not is_sampling_value(name, value)]:
        _log.warning("%s: %s=%s cannot be a default of requests, and is left out", path, name, given.pop(name))
    return given
