"""Keeps the calibration's cost tables in the cache, so that a start need not wait for it.

    kept = KeptCosts(folder, key={"machine": …, "code": …, "options": …})
    if not kept.load_into(costs):
        …                  # measure them (serve/speculation/calibration.py)
        kept.save(costs)

One small JSON file for each key. Tables of another machine, version or configuration have another key; a damaged file
counts as none.

Left out: measuring (serve/speculation/calibration.py), and what belongs into a key (serve/worker/build.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from aurora_lit.durable import changed_at, sync
from aurora_lit.serve.speculation.costs import Costs

_KEPT_FILES = 32
"""The newest of a cache: each version of the code and each deployment has its own."""
_TABLES = ("target", "chain")
_log = logging.getLogger(__name__)


class KeptCosts:
    """A file of cost tables."""

    def __init__(self, folder: Path, *, key: Mapping[str, str]) -> None:
        """`key`: everything that the costs depend on."""
        self._key = dict(key)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:24]}.json"

    def load_into(self, costs: Costs) -> bool:
        """Fill the tables; False, and nothing is changed, if there is no file or a damaged one."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["key"] != self._key:
                raise ValueError("it has another key")
            prefill_position_s = _seconds(content["prefill_position_s"])
            tables = {name: [(int(b), int(q), _seconds(s)) for b, q, s in content[name]] for name in _TABLES}
            if not tables["target"]:
                raise ValueError("it has no costs of the target")
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("the kept costs %s are not used (%r); they are measured again", self.path, error)
            return False
        costs.prefill_position_s = prefill_position_s
        for name, measurements in tables.items():
            for batch_size, query_length, seconds in measurements:
                getattr(costs, name).set_initial(batch_size, query_length, seconds)
        return True

    def save(self, costs: Costs) -> None:
        """Write what the calibration has measured; a cache that cannot be written is logged."""
        content = {"key": self._key, "prefill_position_s": costs.prefill_position_s}
        content |= {name: getattr(costs, name).all_initial for name in _TABLES}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content), encoding="utf-8")
            sync(temporary)
            os.replace(temporary, self.path)
            for old in sorted(self.path.parent.glob("*.json"), key=changed_at)[:-_KEPT_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the measured costs cannot be kept (%s); every start measures them", error)


def _seconds(value: float) -> float:
    if not (isinstance(value, float | int) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{value!r} is no duration")
    return float(value)
