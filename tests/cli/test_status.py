"""`aurora-lit status` shows what learning left out, and labels cannot write markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_lit.cli import status as live_status
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage


def test_what_was_left_out_is_shown_and_labels_cannot_write_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    page = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    page.write(domains="[/bold]sneaky 100% (heat 1.00)", looping=3, over_client_share=2, labels_dropped=1, records=9)
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "[/bold]sneaky 100%" in shown
    assert "3 looping answers, 1 labels, 2 waits of clients over their share" in shown
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=True)
    assert '"looping": 3' in capsys.readouterr().out
