"""Beside the installed vLLM: traces are what transformers computes, drafts are swapped, and texts stay as they were.

Greedy requests only: with a temperature and speculation vLLM's CPU build answers wrongly, with or without us
(docs/vllm.md).
Needs vLLM and the cached default model; run with -m slow in an environment that has vLLM.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import torch
from support.vllm_server import DRAFT, MODEL, VllmServer

from aurora_lit.config import load_config
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.models.source import find_target
from aurora_lit.traces.record import Trace

pytest.importorskip("vllm.version", reason="vLLM is not installed: nothing here is checked")
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(600)]

PROMPTS = [
    "Write a Python function that reverses a list.\n",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small robot who",
    "SELECT name FROM users WHERE",
    "# A class for a stack\nclass Stack:\n",
]
LONG_PROMPT = "A list of numbers: " + ", ".join(str(i) for i in range(150)) + "\nThe sum of these is"
# Few blocks and small steps, so that prompts come in chunks and requests are preempted.
ARGUMENTS = ("--max-model-len", "768", "--max-num-seqs", "4", "--max-num-batched-tokens", "256")
ARGUMENTS += ("--block-size", "32", "--num-gpu-blocks-override", "40")


@pytest.fixture(scope="module")
def plain_texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What vLLM answers without us, one request at a time."""
    with VllmServer(tmp_path_factory.mktemp("plain"), beside=False, arguments=ARGUMENTS) as server:
        return [server.complete(prompt)["choices"][0]["text"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def server(plain_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """Ours, after the plain one has ended."""
    with VllmServer(tmp_path_factory.mktemp("beside"), arguments=ARGUMENTS) as running:
        yield running


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def by_answer(traces: list[Trace]) -> dict[tuple[int, ...], Trace]:
    """Traces by their answers' tokens, as far as they have them."""
    return {tuple(trace.token_ids_T[trace.answer_start :].tolist()): trace for trace in traces}


def test_texts_are_those_of_vllm_alone(server: VllmServer, plain_texts: list[str]) -> None:
    server.traces()
    assert [server.complete(prompt)["choices"][0]["text"] for prompt in PROMPTS] == plain_texts


def test_traces_hold_the_tokens_and_the_states_that_transformers_computes(server: VllmServer) -> None:
    from aurora_lit.models.loading import transformers_model

    server.traces()
    answers = [server.complete(prompt)["choices"][0] for prompt in [*PROMPTS, LONG_PROMPT]]
    found = by_answer(server.traces())
    model = transformers_model(find_target(load_config(None, [])), dtype=torch.bfloat16).eval()
    layers = read_config(DRAFT).aux_layer_ids
    agreeing = total = 0
    aux, neighbours, last = [], [], []
    for answer in answers:
        trace = found[tuple(answer["token_ids"][:-1])]  # the last token is not computed
        prompt = answer["prompt_token_ids"][trace.first_position :]
        assert trace.token_ids_T.tolist() == prompt + answer["token_ids"][:-1]
        everything = torch.tensor([answer["prompt_token_ids"] + answer["token_ids"][:-1]])
        with torch.no_grad():
            states = model.model(everything, output_hidden_states=True)
        rows = slice(trace.first_position, None)
        for part, layer in zip(trace.aux_T3H.chunk(3, -1), layers, strict=True):
            wrong = {shift: _distance(part, states.hidden_states[layer + shift][0, rows]) for shift in (-1, 0, 1)}
            aux.append(wrong[0])
            neighbours.append(min(wrong[-1], wrong[1]))
            assert wrong[0] < 0.02
            assert wrong[0] < 0.7 * neighbours[-1]
        last.append(_distance(trace.last_TH, states.last_hidden_state[0, rows]))
        assert last[-1] < 0.05
        chosen = (trace.last_TH @ model.lm_head.weight.T).argmax(-1)
        expected = torch.tensor(prompt[1:] + answer["token_ids"])
        start = trace.answer_start - 1
        agreeing += int((chosen[start:] == expected[start:]).sum())
        total += len(expected) - start
    assert agreeing >= 0.99 * total, (agreeing, total)
    for name, errors in (("auxiliary", aux), ("neighbouring layers", neighbours), ("last", last)):
        print(f"relative error, {name}: {min(errors):.4f} to {max(errors):.4f}")  # shown by pytest -rP
    print(f"argmax of last x head is the emitted token: {agreeing} of {total}")


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_requests_of_every_kind_leave_the_traces_that_they_should(server: VllmServer) -> None:
    server.traces()
    opted_out = server.status.opted_out
    assert server.complete("No one may learn this:", store=False)["choices"]
    assert server.traces() == []
    assert server.status.opted_out == opted_out + 1
    server.complete("A labelled one:", metadata={"aurora_domain": "code"})
    (labelled,) = server.traces()
    assert labelled.domain == "code"
    several = server.complete("def add(a, b):", n=2, max_tokens=32, temperature=1.0)  # greedy ones may not be two
    assert len(several["choices"]) == len(server.traces()) == 2
    stopped = server.complete("One, two, three,", stop=[" six"], max_tokens=48)["choices"][0]
    (trace,) = server.traces()
    count = len(trace.token_ids_T) - trace.answer_start
    assert trace.token_ids_T[trace.answer_start :].tolist()[: len(stopped["token_ids"])] == stopped["token_ids"][:count]
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{server.url}/v1/completions",
            json={"model": MODEL, "prompt": "Count to a thousand: 1, 2, 3,", "max_tokens": 600, "ignore_eos": True},
            timeout=1.5,
        )
    until(lambda: server.status.running == 0)
    (aborted,) = server.traces()
    assert 0 < len(aborted.token_ids_T) - aborted.answer_start < 599


def test_a_repeated_prompt_begins_after_its_cached_prefix(server: VllmServer) -> None:
    server.complete(LONG_PROMPT, max_tokens=8)
    server.traces()
    server.complete(LONG_PROMPT, max_tokens=8)
    (trace,) = server.traces()
    assert trace.first_position > 0


def test_preempted_requests_are_recorded_once(server: VllmServer) -> None:
    server.traces()
    prompts = [f"{prompt} (number {i})" for i, prompt in enumerate(PROMPTS)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=500, ignore_eos=True), prompts))
    metrics = httpx.get(f"{server.url}/metrics").text
    preemptions = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
    assert float(preemptions[0].split()[-1]) > 0
    traces = server.traces()
    for answer in answers:
        wanted = answer["choices"][0]["token_ids"][:-1]
        parts = [trace for trace in traces if answer["id"] in trace.request_id]
        assert sum((part.token_ids_T[part.answer_start :].tolist() for part in parts), []) == wanted


def test_a_version_is_swapped_in_and_rolled_back_on_live_acceptance_and_texts_stay(
    server: VllmServer, plain_texts: list[str]
) -> None:
    for i in range(12):  # what the draft that vLLM began with accepts
        server.complete(f"{PROMPTS[i % 6]} {i}", max_tokens=96)
    before = server.status.mean_accepted_length
    assert before is not None
    assert before > 1.3
    useless = load_draft(DRAFT, read_config(DRAFT))
    with torch.no_grad():
        useless.lm_head.weight.zero_()
    name = server.store.publish(useless, record={})
    until(lambda: server.status.draft_version == name)
    texts = []
    for i in range(20):
        texts.append(server.complete(PROMPTS[i % 6])["choices"][0]["text"])
        if server.status.rollbacks:
            break
    assert texts == [plain_texts[i % 6] for i in range(len(texts))]
    until(lambda: server.status.draft_version == DRAFT.name)
    assert server.store.current() is None
    assert "than of the version before" in (server.store.versions()[0].retired or "")
    assert [server.complete(prompt)["choices"][0]["text"] for prompt in PROMPTS] == plain_texts


def test_a_draft_of_another_shape_is_refused_outside_the_engine(server: VllmServer) -> None:
    name = server.store.publish(load_draft(DRAFT, read_config(DRAFT)), record={})
    until(lambda: server.status.draft_version == name)
    weights = server.store.folder / "draft-000003"
    bad = server.store.publish(load_draft(DRAFT, read_config(DRAFT)), record={})
    assert weights.name == bad
    until(lambda: server.status.draft_version == bad)
    (weights / "config.json").write_text((weights / "config.json").read_text().replace('"head_dim": ', '"head_dim": 1'))
    server.store.promote(name)
    until(lambda: server.status.draft_version == name)
    server.store.promote(bad)
    until(lambda: server.status.refused_version == bad)
    assert server.status.draft_version == name
    assert "head_dim" in server.status.refused_reason
    assert server.complete(PROMPTS[1])["choices"]
