"""bench stream: a stream is planned as its file says, recorded once, and resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from support import ROOT
from support.fake_engine import tiny_tokenizer
from support.tiny_models import random_draft, save_model

from aurora_lit.bench.stream import read_stream_info, recorded_ids
from aurora_lit.bench.stream_plan import phase_of, plan, read_stream
from aurora_lit.cli.main import main
from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.learn.offline.replay import read_traces
from aurora_lit.models.loading import load_target
from aurora_lit.traces.log import read_index


def write_prompts(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for domain in ("chat", "code", "sql"):
        rows = [{"domain": domain, "messages": [{"role": "user", "content": f"{domain} {i}"}]} for i in range(12)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = "timestamp_s,prompt_tokens\n" + "".join(f"{100 + i / 50},3\n" for i in range(6))
    (folder / "times.csv").write_text(times)


def write_stream(path: Path, **changes: Any) -> Path:
    stream = {
        "phases": [
            {"name": "chat", "prompts": ["chat.jsonl"], "requests": 5, "max_tokens": 12},
            {
                "name": "mix",
                "prompts": ["chat.jsonl", "code.jsonl"],
                "weights": [1, 3],
                "requests": 8,
                "max_tokens": 12,
                "sampled_share": 0.5,
                "temperature": 0.6,
            },
            {
                "name": "sql",
                "prompts": ["sql.jsonl"],
                "requests": 6,
                "max_tokens": 12,
                "arrivals": "times.csv",
                "arrivals_scale": 2,
            },
        ],
        "measure": {"prompts": ["sql.jsonl"], "requests": 2, "max_tokens": 12},
    }
    path.write_text(yaml.safe_dump({**stream, **changes}))
    return path


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "prompts")
    return write_stream(tmp_path / "prompts" / "stream.yaml")


def test_the_plan_mixes_files_uses_each_prompt_once_and_is_reproducible(stream: Path) -> None:
    phases, measured = plan(read_stream(stream), prompts=stream.parent, tokenizer=tiny_tokenizer(), max_seq_len=64)
    assert [len(phase) for phase in phases] == [5, 8, 6]
    requests = [planned.request for phase in [*phases, measured] for planned in phase]
    assert len({request.prompt_ids for request in requests}) == len(requests), "a file continues with its next prompt"
    assert len({request.request_id for request in requests}) == len(requests)
    domains = [planned.request.domain for planned in phases[1]]
    assert domains.count("code") > domains.count("chat") > 0
    params = [planned.request.params for planned in phases[1]]
    assert {p.temperature for p in params} == {0.0, 0.6}
    assert all((p.seed is None) == (p.temperature == 0) for p in params), "sampled answers must not depend on a draft"
    assert [planned.arrives_s for planned in phases[2]] == pytest.approx([i / 25 for i in range(6)])
    assert {planned.arrives_s for planned in phases[1]} == {0.0}
    assert [phase_of(planned.request.request_id) for planned in phases[2]] == [2] * 6
    again, _ = plan(read_stream(stream), prompts=stream.parent, tokenizer=tiny_tokenizer(), max_seq_len=64)
    assert again == phases
    write_stream(stream, seed=1)
    other, _ = plan(read_stream(stream), prompts=stream.parent, tokenizer=tiny_tokenizer(), max_seq_len=64)
    assert other != phases


_PHASE = {"name": "a", "prompts": ["chat.jsonl"], "requests": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases": []}, "phases=\\[\\]"),
        ({"phases": [{**_PHASE, "requests": 0}]}, "phases\\[0\\].requests=0.*1 or more"),
        ({"phases": [{**_PHASE, "prompts": []}]}, "prompts=\\[\\].*name at least one"),
        ({"phases": [{**_PHASE, "weights": [1, 2]}]}, "weights=.*for each of"),
        ({"phases": [{**_PHASE, "sampled_share": 2.0}]}, "sampled_share=2.0.*0 to 1"),
        ({"phases": [{**_PHASE, "max_tokens": 1}]}, "max_tokens=1.*2 or more"),
        ({"phases": [{**_PHASE, "name": "a/b"}]}, "name='a/b'"),
        ({"phases": [{**_PHASE, "request": 2}]}, "request=2: there is no such key; use one of .*requests"),
        ({"phases": [{**_PHASE, "requests": "two"}]}, "requests='two' is not of type int"),
        ({"phases": [{"name": "a", "prompts": ["chat.jsonl"]}]}, "requests is missing"),
        ({"phases": 3}, "phases=3 is not a list"),
        ({"measure": None}, "None is not a mapping"),
        ({"phases": [{**_PHASE, "requests": 13}]}, "chat.jsonl has no suitable prompt left"),
        ({"phases": [{**_PHASE, "prompts": ["poems.jsonl"]}]}, "poems.jsonl: there is no such prompt file"),
        ({"phases": [{**_PHASE, "requests": 7, "arrivals": "times.csv"}]}, "has 6 arrivals for 7 requests"),
        ({"phases": [{**_PHASE, "arrivals": "chat.jsonl"}]}, "column timestamp_s"),
    ],
)
def test_a_wrong_stream_is_refused_with_its_remedy(stream: Path, changes: dict[str, Any], said: str) -> None:
    write_stream(stream, **changes)
    with pytest.raises(ConfigError, match=said):
        plan(read_stream(stream), prompts=stream.parent, tokenizer=tiny_tokenizer(), max_seq_len=64)


def test_the_shipped_stream_is_valid() -> None:
    shipped = read_stream(ROOT / "benchmarks" / "stream.yaml")
    assert [phase.name for phase in shipped.phases] == ["chat", "code", "summarize", "sql", "chat-again", "translate"]


def test_a_stream_is_recorded_and_resumed(stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_lit.bench.stream._SHARD_POSITIONS", 150)
    folder = save_model("llama", tmp_path / "target", num_hidden_layers=4, vocab_size=len(tiny_tokenizer()))
    tiny_tokenizer().save_pretrained(folder)
    target = load_target(folder, precision="fp32")
    save_draft(random_draft(target), tmp_path / "start", dtype=torch.float32)
    out = tmp_path / "out"

    def record(*more: str) -> str:
        done = CliRunner().invoke(
            main,
            [
                "bench",
                "stream",
                "--stream",
                str(stream),
                "--out",
                str(out),
                f"target.source={folder}",
                "target.precision=fp32",
                f"draft.checkpoint={tmp_path / 'start'}",
                "engine.max_seq_len=64",
                "engine.prefill_chunk_tokens=64",
                "engine.lookup=false",
                "engine.explore_share=0.4",
                "engine.adaptive=false",
                "engine.threads=1",
                *more,
            ],
        )
        return f"{done.output}{done.exception or ''}"

    with pytest.raises(AuroraError, match="has no complete stream"):
        read_stream_info(out)
    record()
    found = read_stream_info(out)
    traffic = list(read_traces(out / "traffic"))
    assert [phase_of(t.request_id) for t in traffic] == sorted(phase_of(t.request_id) for t in traffic)
    assert len(traffic) == 19
    assert {t.verify for t in traffic} == {"greedy", "sampled"}
    assert any(t.explored_R.any() for t in traffic), "as on a live server"
    for trace in traffic:  # slots were reused since, yet each trace has its own states
        with torch.no_grad():
            aux_1T3H, last_1TH = target.in_torch.forward_uncached(trace.token_ids_T.long()[None])
        torch.testing.assert_close(trace.aux_T3H.float(), aux_1T3H[0], atol=0.05, rtol=0.02)
        start = trace.answer_start - 1
        torch.testing.assert_close(trace.last_TH[start:].float(), last_1TH[0, start:], atol=0.05, rtol=0.02)
    tokens = sum(len(t.token_ids_T) - t.answer_start for t in traffic if t.domain == "sql")
    assert (found["traffic"]["sql"]["segments"], found["traffic"]["sql"]["tokens"]) == (6, tokens)
    assert found["runs"]["2-sql"]["seconds"] >= 0.2, "requests are submitted when they are due"
    assert len(list(read_traces(out / "measure"))) == 2
    # What is lost with a shard is planned again, nothing else is.
    whole = {t.request_id: t.token_ids_T.tolist() for t in traffic}
    *_, last = read_index(out / "traffic")
    (out / "traffic" / last.name).unlink()
    assert 0 < len(recorded_ids(out / "traffic")) < 19
    record()
    again = list(read_traces(out / "traffic"))
    assert {t.request_id: t.token_ids_T.tolist() for t in again} == whole
    assert len(again) == 19
    record()
    assert len(list(read_traces(out / "traffic"))) == 19
    assert "holds answers of" in record("target.precision=bf16")
    write_stream(stream, seed=4)
    assert "holds another stream" in record()
