"""Where target and draft are, all of a round is: whole requests on a device that refuses to meet CPU tensors.

The device is a fake one (support/fake_device.py): it computes as torch does on the CPU, so its answers must be those of
the CPU. A real GPU was never available to these tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import copies_in_python
from support.fake_device import fake_device
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, run, save_model

from aurora_lit.config import load_config
from aurora_lit.errors import SourceError
from aurora_lit.kernels import native, suffix_index
from aurora_lit.models.interface import CPU
from aurora_lit.models.loading import load_target
from aurora_lit.request import Request
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation import calibration
from aurora_lit.serve.worker import build, load_models
from aurora_lit.traces.record import Trace


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple((7 * number + 3 * i * i) % (VOCAB - 1) + 1 for i in range(length))


SHARED = prompt(9, 24)
GREEDY = [request(str(i), prompt(i, 5 + 9 * i), max_tokens=8) for i in range(2)]
KINDS: dict[str, list[Request]] = {
    "mixed": [
        request("greedy", prompt(0, 4), max_tokens=8),
        request("seeded", prompt(1, 9), max_tokens=8, temperature=0.7, seed=5, top_k=20, min_p=0.01, top_p=0.9),
        request(
            "penalised", prompt(2, 7), max_tokens=8, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1
        ),
        request("biased", prompt(3, 7), max_tokens=8, logit_bias={3: 4.0, 9: -100.0}),
        request("logprobs", prompt(4, 19), max_tokens=8, logprobs=3, prompt_logprobs=2),
        request("plain", prompt(5, 3), max_tokens=8, speculate=False),
        request("short", prompt(6, 1), max_tokens=3),
    ],
    "prefixes": [request(str(i), (*SHARED, i + 1, i + 2), max_tokens=6) for i in range(5)],
}
LONG = request("long", prompt(7, 80), max_tokens=3)
"""The draft's prefill takes several passes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with fake_device() as device:
        yield device


@pytest.fixture(autouse=True)
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's answers are computed in torch too; on the device this must change nothing.

    Copies are still found, as beside a GPU: by their reference, since nothing else is native here.
    """
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(suffix_index, "look_up", copies_in_python.look_up)


def answers(folder: Path, requests: list[Request], device: torch.device, **options: object) -> dict[str, Answer]:
    target = load_target(folder, precision="fp32", device=device)
    draft = random_draft(load_target(folder, precision="fp32"))
    engine = make_engine(target, draft, max_batch_size=3, **options)
    return run(engine, requests, arrivals=[0, 0, 1, 3, 6, 9])


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_answered_as_on_the_cpu(kind: str, folder: Path) -> None:
    requests = [*KINDS[kind], LONG]
    there = answers(folder, requests, CPU, copied_tokens=6)
    with fake_device() as device:
        here = answers(folder, requests, device, copied_tokens=6)
    assert {name: answer.token_ids for name, answer in here.items()} == {
        name: answer.token_ids for name, answer in there.items()
    }
    assert any(output.num_proposed for answer in here.values() for output in answer.rounds)


def test_a_prefix_that_has_left_its_slot_is_kept_on_the_device(folder: Path) -> None:
    """One slot, and the draft's keys are kept too."""
    prompts = {"a": (*prompt(1, 70), 1), "other": prompt(2, 40), "b": (*prompt(1, 70), 2, 3)}

    def serve(device: torch.device, **options: object) -> tuple[list[list[int]], int]:
        target = load_target(folder, precision="fp32", device=device)
        engine = make_engine(target, random_draft(load_target(folder, precision="fp32")), max_batch_size=1, **options)
        found = [run(engine, [request(name, prompts[name], max_tokens=6)])[name].token_ids for name in prompts]
        return found, engine.counters.cached_tokens

    computed, none = serve(CPU, prefix_cache_mb=0)
    with fake_device() as device:
        kept, cached = serve(device)
    assert kept == computed
    assert (none, cached) == (0, 64)


@pytest.mark.slow
def test_costs_are_measured_on_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_CALLS", "_CALLS", "_CALLS_OF_ONE"):  # once is enough to see where
        monkeypatch.setattr(calibration, name, 1)
    there = answers(folder, GREEDY, CPU, max_draft_tokens=0)
    with fake_device() as device:
        here = answers(folder, GREEDY, device, adaptive=True, max_draft_tokens=1, copied_tokens=2)
    assert [here[name].token_ids for name in here] == [there[name].token_ids for name in there]


def test_an_engine_is_built_where_its_configuration_says(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load_models, "_device", lambda config: device)
    monkeypatch.setattr(build, "load_tokenizer", lambda config: SimpleNamespace(eos_token_id=None))
    settings = (f"target.source={folder}", "engine.max_seq_len=64")
    config = load_config(None, [*settings, "engine.adaptive=false", "learn.from_scratch=true", "draft.checkpoint=null"])
    engine, _ = build.build_engine(config)
    answer = run(engine, [request("a", prompt(1, 12))])["a"]
    assert len(answer.token_ids) == 16
    assert sum(output.num_proposed for output in answer.rounds)
    assert engine.target.in_torch.model.dtype == torch.bfloat16, "precision auto without the CPU's kernels"
    assert {each.device for each in engine.target.parameters()} == {device}
    assert "engine.device=cpu" in caplog.text, "what to do if it fails is said at the start"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_precisions_of_the_cpus_kernels_are_refused_elsewhere(
    precision: str, folder: Path, device: torch.device
) -> None:
    with pytest.raises(SourceError, match="runs on the CPU only; set engine.device=cpu"):
        load_target(folder, precision=precision, device=device)


@pytest.mark.slow
def test_unseeded_and_recorded_rounds_stay_on_the_device(folder: Path, device: torch.device) -> None:
    traces: list[Trace] = []
    target = load_target(folder, precision="fp32", device=device)
    draft = random_draft(load_target(folder, precision="fp32"))
    recorder = TraceRecorder(traces.append, hidden_size=target.hidden_size, segment_tokens=3, overlap_tokens=1)
    engine = make_engine(target, draft, observer=recorder, max_batch_size=3)
    requests = [request(str(i), prompt(i, 4 + i), max_tokens=6, temperature=1.0 if i % 2 else 0.0) for i in range(6)]
    assert all(len(answer.token_ids) == 6 for answer in run(engine, requests).values())
    assert engine.counters.drafts
    assert len(traces) >= 6
    for trace in traces:
        assert {tensor.device.type for tensor in (trace.token_ids_T, trace.aux_T3H, trace.last_TH)} == {"cpu"}


@pytest.mark.slow
def test_a_draft_is_swapped_on_the_device(folder: Path, device: torch.device) -> None:
    cpu = load_target(folder, precision="fp32")
    target = load_target(folder, precision="fp32", device=device)
    engine = make_engine(target, random_draft(cpu), draft_version="a")
    engine.submit(request("a", prompt(1, 30), max_tokens=30))
    for _ in range(6):
        engine.round()
    engine.swap_draft(random_draft(cpu, seed=3, num_key_value_heads=2), version="b", recompute=True)
    outputs = [output for _ in range(6) for output in engine.round()]
    assert outputs[-1].draft_versions == ("a", "b")


def test_the_fake_device_refuses_what_a_gpu_refuses(device: torch.device) -> None:
    here, there = torch.ones(3, device=device), torch.ones(3)
    for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there[here.long()]):
        with pytest.raises(RuntimeError, match="mixes fakegpu:0 and cpu"):
            mix()
    here[1:] = there[1:] * 2
    assert (here * there.sum()).tolist() == [3.0, 6.0, 6.0], "copies, and numbers from the CPU"
    assert here.cpu().device.type == "cpu"
