"""The traffic of the benchmark of adaptation: what is held out is never learned from, and the rest comes again."""

from __future__ import annotations

import itertools
from pathlib import Path

from support.live_traces import serve, some_requests
from support.tiny_models import save_model

from aurora_lit.config import load_config
from aurora_lit.models.loading import load_target
from aurora_lit.traces.record import Trace
from benchmarks.adaptation import Domain


def test_held_out_requests_are_never_traffic_and_all_others_come_again_under_new_names(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path / "model"), precision="fp32")
    traces = serve(target, None, some_requests(30))
    domain = Domain("made", traces, load_config(None, ["learn.max_repeated_share=1"]))
    held_out, others = len(domain.held_out), 30 - len(domain.held_out)
    assert 0 < held_out < 30

    def text(trace: Trace) -> tuple[int, ...]:
        return tuple(trace.token_ids_T.tolist())

    traffic = list(itertools.islice(domain.traffic(), 2 * others))
    assert not {text(trace) for trace in traffic} & {text(trace) for trace in domain.held_out}
    assert {text(trace) for trace in traffic[:others]} == {text(trace) for trace in traffic[others:]}
    assert len({trace.request_id for trace in traffic}) == 2 * others
