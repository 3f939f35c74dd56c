"""What a request leaves out comes from the deployment, else from the model's generation config, else is OpenAI's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.request import SamplingParams
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest
from aurora_lit.serve.http.tokenize import Limits, longest_token, prepare_chat, prepare_completion
from aurora_lit.settings import SAMPLING_RANGES

TURN: Any = [{"role": "user", "content": "hello"}]
OWN = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    unused = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": 2, "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps({**OWN, **unused}))
    return tmp_path


def configured(model: Path, *overrides: str) -> AuroraConfig:
    return load_config(None, [f"target.source={model}", "target.sha256=null", *overrides])


def test_a_deployments_values_replace_the_models(model: Path) -> None:
    assert default_sampling(configured(model)) == OWN, "do_sample is ignored, as in vLLM"
    assert default_sampling(configured(model, "server.default_sampling.top_k=-1"))["top_k"] == 0, "as the engine has it"
    pinned = ("server.default_sampling.temperature=0.2", "server.default_sampling.min_p=0.1")
    assert default_sampling(configured(model, *pinned)) == {**OWN, "temperature": 0.2, "min_p": 0.1}
    assert default_sampling(configured(model, *pinned, "server.generation_config=off")) == {
        "temperature": 0.2,
        "min_p": 0.1,
    }
    assert default_sampling(configured(model / "absent")) == {}


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_a_file_that_cannot_be_read_has_no_values(text: str, model: Path) -> None:
    (model / "generation_config.json").write_bytes(text.encode("latin-1"))
    assert default_sampling(configured(model)) == {}


def test_values_that_no_request_may_have_are_left_out_and_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = {"temperature": "0.7", "top_p": 0.0, "top_k": 2.5, "min_p": True, "repetition_penalty": 1.05}
    (model / "generation_config.json").write_text(json.dumps(wrong))
    assert default_sampling(configured(model)) == {"repetition_penalty": 1.05}
    assert [record.getMessage().split(": ")[1].split("=")[0] for record in caplog.records] == list(wrong)[:4]


@pytest.mark.parametrize("name", SAMPLING_RANGES)
def test_the_ranges_are_those_of_requests(name: str) -> None:
    low, high = SAMPLING_RANGES[name]
    for value in (low, high):
        ChatRequest(messages=TURN, **{name: value})
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=name):
            ChatRequest(messages=TURN, **{name: value})


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_a_request_that_says_nothing_or_null_gets_the_defaults_and_what_it_says_wins(kind: Any) -> None:
    tokenizer = tiny_tokenizer()
    limits = Limits(max_seq_len=64, vocab_size=len(tokenizer), longest_token=longest_token(tokenizer))
    content = {"messages": TURN} if kind is ChatRequest else {"prompt": "hello"}
    prepare: Any = prepare_chat if kind is ChatRequest else prepare_completion

    def params(**fields: Any) -> SamplingParams:
        body = kind(**content, max_tokens=4, **fields).with_defaults(OWN)
        (request,) = prepare(body, call_id="c", tokenizer=tokenizer, limits=limits).call.requests
        return request.params  # type: ignore[no-any-return]

    defaults = SamplingParams(max_tokens=4, **OWN)
    assert params() == params(temperature=None, top_p=None, top_k=None, repetition_penalty=None) == defaults
    explicit = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    assert params(**explicit) == SamplingParams(max_tokens=4, temperature=0.0)
    assert params(temperature=1.5) == replace(defaults, temperature=1.5)
