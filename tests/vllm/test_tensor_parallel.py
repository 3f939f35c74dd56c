"""Three tensor-parallel ranks of the installed vLLM: answers as without us, and every rank has the same draft.

SmolLM2 has nine heads, so three ranks and not two; vLLM splits the draft's vocabulary too, so it is cut to a multiple.
Needs vLLM and the cached default model; run with -m slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from support.vllm_server import DRAFT, VllmServer

from aurora_lit.drafts.checkpoint import load_draft, read_config, save_draft
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

pytest.importorskip("vllm.version", reason="vLLM is not installed: nothing here is checked")
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(600)]

PROMPTS = ["def fibonacci(n):\n    ", "The capital of France is", "# A class for a stack\nclass Stack:\n"]
RANKS, DRAFT_VOCABULARY = 3, 15_360


@pytest.fixture(autouse=True)
def ranks_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would bind each rank to cores of its own, of which there may be too few."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def cut_draft(folder: Path) -> Path:
    """The shipped draft without its last tokens, mixed, so that each rank's part of them has frequent ones."""
    whole = load_draft(DRAFT, read_config(DRAFT))
    config = replace(whole.config, draft_vocab_size=DRAFT_VOCABULARY)
    kept = torch.randperm(DRAFT_VOCABULARY, generator=torch.Generator().manual_seed(0))
    cut = Eagle3Draft(config, whole.draft_token_ids[kept])
    state = {name: tensor for name, tensor in whole.state_dict().items() if name not in ("d2t", "t2d")}
    state["lm_head.weight"] = state["lm_head.weight"][kept]
    cut.load_state_dict(state, strict=False)
    save_draft(cut, folder)
    return folder


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def answers(server: VllmServer) -> tuple[list[str], float]:
    """The answers, and accepted proposals per round of a sequence, by vLLM's own counters."""

    def count(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:spec_decode_num_{name}_total"))

    drafts, accepted = count("drafts"), count("accepted_tokens")
    texts = [server.complete(prompt, max_tokens=40)["choices"][0]["text"] for prompt in PROMPTS]
    return texts, (count("accepted_tokens") - accepted) / (count("drafts") - drafts)


def test_answers_are_those_without_us_and_all_ranks_swap_together(tmp_path: Path) -> None:
    draft = cut_draft(tmp_path / "cut")
    arguments = ("--max-model-len", "512", "--max-num-seqs", "2", "--tensor-parallel-size", str(RANKS))
    for name in ("plain", "beside"):
        (tmp_path / name).mkdir()
    with VllmServer(tmp_path / "plain", beside=False, draft=draft, arguments=arguments) as plain:
        wanted, per_round = answers(plain)
    assert per_round > 0.3
    useless = load_draft(draft, read_config(draft))
    with torch.no_grad():
        useless.lm_head.weight.zero_()
    with VllmServer(tmp_path / "beside", draft=draft, arguments=arguments) as server:

        def serve(published: Eagle3Draft) -> tuple[list[str], float]:
            version = server.store.publish(published, record={})
            until(lambda: server.status.draft_version == version)
            return answers(server)

        # The useless one comes first: there is nothing that its trial could compare it with yet.
        texts, without_use = serve(useless)
        assert texts == wanted
        assert without_use < 0.05
        # A rank that kept the other draft would give that one's logits for its part of the vocabulary.
        assert serve(load_draft(draft, read_config(draft))) == (wanted, pytest.approx(per_round, abs=0.02))
