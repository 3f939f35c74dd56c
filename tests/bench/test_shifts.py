"""bench shifts: delays and false alarms are counted correctly."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_lit.bench import shifts
from aurora_lit.config import load_config
from aurora_lit.modules.domains.detector import prompt_embedding
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace

H = 8


def a_trace(request_id: str, direction: int) -> Trace:
    """A noisy prompt of one of the three kinds of a direction."""
    number = zlib.crc32(request_id.encode())
    gen = torch.Generator().manual_seed(number)
    aux_T3H = 0.05 * torch.randn(9, 3 * H, generator=gen)
    aux_T3H[:, direction + number % 3] += 1
    return Trace(
        request_id=request_id,
        domain="told",
        verify="greedy",
        answer_start=6,
        token_ids_T=torch.arange(9, dtype=torch.int32),
        aux_T3H=aux_T3H.bfloat16(),
        last_TH=torch.zeros(9, H, dtype=torch.bfloat16),
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Two phases of one domain each, and a return to the first domain."""
    log = TraceLogWriter(tmp_path / "traffic", kind="traffic", shard_positions=900)
    for number, direction in enumerate((0, 5, 0)):
        for at in range(150):
            log.append(a_trace(f"{number}-x/{at:05d}", direction))
    log.flush()
    stream = {"phases": [{"name": name} for name in ("one", "two", "one-again")]}
    (tmp_path / "stream.json").write_text(json.dumps({"complete": True, "stream": stream}))
    return tmp_path


def test_phases_are_noticed_and_random_orders_are_quiet(recorded: Path, tmp_path: Path) -> None:
    report: dict[str, Any] = shifts.run(load_config(None, []), traces=recorded, shuffles=3, out=tmp_path / "out")
    first, second, third = report["phases"]
    assert first == {"phase": "one", "delay_requests": None, "more_shifts": 0}
    assert 0 <= second["delay_requests"] < 40
    assert 0 <= third["delay_requests"] < 60
    assert len(report["false_alarms_by_order"]) == 3
    assert sum(report["false_alarms_by_order"]) <= 3
    assert json.loads((tmp_path / "out" / "shifts.json").read_text()) == report


def test_a_prompt_only_is_all_the_detector_sees(recorded: Path) -> None:
    config = load_config(None, [])
    whole = [a_trace(f"{n}", 5 * (n > 60)) for n in range(140)]
    alone = [shifts.prompt_only(trace) for trace in whole]
    for trace, small in zip(whole, alone, strict=True):
        torch.testing.assert_close(prompt_embedding(small), prompt_embedding(trace))
        assert small.domain == ""
    unlabelled = [Trace(**{**vars(trace), "domain": ""}) for trace in whole]
    assert shifts.detected_shifts(config, alone) == shifts.detected_shifts(config, unlabelled) != []


def test_delays_are_counted_from_each_phases_first_request() -> None:
    phases = [0] * 10 + [1] * 10 + [2] * 10
    rows = shifts.delays([3, 14, 17], phases, ["a", "b", "c"])
    assert [(row["delay_requests"], row["more_shifts"]) for row in rows] == [(None, 1), (4, 1), (None, 0)]
