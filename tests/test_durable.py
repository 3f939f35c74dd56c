"""Times of files that other processes may rename or delete meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from aurora_lit.durable import changed_at


def test_a_file_that_is_gone_counts_as_changed_now(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.touch()
    os.utime(old, (5.0, 5.0))
    assert changed_at(old) == 5.0
    before = time.time()
    assert changed_at(tmp_path / "gone") >= before
