"""The comparison with other engines: what it counts, runs and writes, with fake servers and a tiny model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError, ConfigError
from benchmarks.load import Answer
from benchmarks.peers import __main__ as driver
from benchmarks.peers import environments
from benchmarks.peers.client import Load, summarise
from benchmarks.peers.engines import OURS, PEERS, Engine
from benchmarks.peers.gguf_files import write_f32
from benchmarks.peers.report import Pair, ServerRun
from benchmarks.peers.report import summarise as ratios


def test_speed_is_over_all_answers_and_pauses_are_between_pieces() -> None:
    first = Answer(sent_s=0.0, pieces_s=(1.0, 1.5, 3.0), ended_s=3.0, tokens=9, text="a")
    second = Answer(sent_s=1.0, pieces_s=(4.0, 4.5), ended_s=5.0, tokens=6, text="b")
    load = summarise([first, second])
    assert load.tokens_per_s == 15 / 5
    assert load.first_token_s == 2.0  # 1 and 3
    assert load.token_s == pytest.approx((2 / 8 + 0.5 / 5) / 2)
    assert load.pause_p50_s == 0.5  # 0.5, 0.5, 1.5
    assert load.pause_p99_s == pytest.approx(1.48)
    assert load.texts == ["a", "b"]
    with pytest.raises(AuroraError, match="without text"):
        summarise([first, replace(second, pieces_s=())])
    with pytest.raises(AuroraError, match="nothing to time"):
        summarise([replace(first, pieces_s=(1.0,))])


def byte_level_model(folder: Path) -> Path:
    """A tiny Llama with tied embeddings, and a byte-level tokenizer with two merges and a special token."""
    alphabet = sorted(ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, "he", "hel"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [("h", "e"), ("he", "l")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + 1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_theta=1000.0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_gguf_file_is_the_same_model_with_the_same_tokens(tmp_path: Path) -> None:
    folder = byte_level_model(tmp_path / "model")
    write_f32(folder, tmp_path / "F32.gguf")
    read: dict[str, Any] = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "F32.gguf"}
    ids = torch.tensor([[5, 200, 9, 258, 31, 7]])
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)(ids).logits
    assert torch.equal(ours, theirs)
    text = "hello, hell<|end|>he 2026"
    plain, again = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(**read)
    assert plain.encode(text, add_special_tokens=False) == again.encode(text, add_special_tokens=False)
    assert again.chat_template == plain.chat_template


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        ("config.json", "tie_word_embeddings", False, "tie_word_embeddings"),
        ("config.json", "rope_parameters", {"rope_type": "linear", "rope_theta": 1.0}, "rope_type=linear"),
        ("tokenizer.json", "pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer"),
    ],
)
def test_an_unsupported_model_is_refused(tmp_path: Path, file: str, key: str, value: object, reason: str) -> None:
    folder = byte_level_model(tmp_path / "model")
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | {key: value}))
    with pytest.raises(AuroraError, match=reason):
        write_f32(folder, tmp_path / "F32.gguf")


def load(tokens_per_s: float, *texts: str) -> Load:
    return Load(
        tokens_per_s=tokens_per_s,
        first_token_s=0.1,
        token_s=1 / tokens_per_s,
        pause_p50_s=0.02,
        pause_p99_s=0.03,
        tokens=128,
        texts=list(texts or ("a",)),
    )


def server_run(loads: dict[int, Load], *, memory_mb: float = 900.0) -> ServerRun:
    return ServerRun(loads=loads, first_answer_s=12.0, memory_mb=memory_mb)


def test_ratios_are_computed_within_a_pair_with_quartiles_over_repeats() -> None:
    speeds = [(100.0, 50.0), (30.0, 10.0), (400.0, 100.0), (90.0, 90.0), (50.0, 10.0)]
    pairs = [
        Pair(
            repeat=i,
            peer="vllm",
            ours=server_run({4: load(ours, "a", "b")}),
            theirs=server_run({4: load(theirs, "a", "x")}, memory_mb=1800.0),
        )
        for i, (ours, theirs) in enumerate(speeds)
    ]
    (row,) = ratios(pairs)
    assert (row["peer"], row["clients"], row["repeats"]) == ("vllm", 4, 5)
    assert row["ratios"]["tokens_per_s"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert row["ratios"]["token_s"]["median"] == pytest.approx(1 / 3)
    assert (row["ratios"]["memory_mb"]["median"], row["ratios"]["first_answer_s"]["median"]) == (0.5, 1.0)
    assert (row["ours"]["tokens_per_s"], row["theirs"]["tokens_per_s"]) == (90.0, 50.0)
    assert row["same_answers"] == 0.5
    assert Pair.from_json(json.loads(json.dumps(pairs[0].to_json()))) == pairs[0]


SUBSTITUTIONS = {
    "python",
    "bin",
    "model",
    "draft",
    "gguf",
    "config",
    "precision",
    "cores",
    "threads",
    "tcmalloc",
    "iomp",
    "cache",
    "port",
}


def test_engine_names_are_unique_and_every_substitution_is_prepared() -> None:
    assert len({engine.name for engine in (OURS, *PEERS)}) == 1 + len(PEERS)
    for engine in (OURS, *PEERS):
        command, environ = engine.substituted({name: f"/{name}" for name in SUBSTITUTIONS})
        assert not any("{" in word for word in [*command, *environ.values()])
        assert "/port" in " ".join(command)


def test_an_environment_is_installed_once_and_again_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", lambda command, log: ran.append([str(word) for word in command]))
    for requirements in (["a==1"], ["a==1"], ["a==2"]):
        environments._make_venv(tmp_path / "peer", requirements)
    assert [command[-1] for command in ran] == [str(tmp_path / "peer"), "a==1", str(tmp_path / "peer"), "a==2"]


def prompt_file(path: Path, count: int) -> Path:
    rows = [{"domain": path.stem, "messages": [{"role": "user", "content": f"{path.stem} {i}"}]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_number_of_clients_has_its_own_prompts_from_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(driver, "encode_prompt", lambda tokenizer, prompt: [0] * 10)
    files = [prompt_file(tmp_path / f"{name}.jsonl", 10) for name in ("chat", "code")]
    choose: dict[str, Any] = {"config": None, "clients": [1, 4], "max_tokens": 8}
    chosen = driver.choose_prompts(files, rounds=2, **choose)
    assert chosen[1] == ["chat 0", "code 0"]
    assert chosen[4] == ["chat 1", "code 1", "chat 2", "code 2", "chat 3", "code 3", "chat 4", "code 4"]
    assert chosen[0] == ["chat 5", "code 5", "chat 6", "code 6"]
    with pytest.raises(ConfigError, match="54 are needed"):
        driver.choose_prompts(files, rounds=10, **choose)


def test_a_stopped_run_continues_and_the_order_alternates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(engine: Engine, substitutions: object, prompts: object, counts: list[int], *_: object) -> ServerRun:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(engine.name)
        return server_run({count: load(10.0) for count in counts})

    monkeypatch.setattr(driver, "_measure", measure)
    few = Engine(name="few", environment="", command=(), most_clients=1)
    many = Engine(name="many", environment="", command=())
    arguments = argparse.Namespace(out=tmp_path, repeats=2)
    peers, ours = [few, many], OURS.name

    def continue_run() -> list[str]:
        substitutions = {name: {} for name in (ours, "few", "many")}
        return driver._measure_all(peers, substitutions, {0: [], 1: ["a"], 4: ["b"]}, arguments, Console(quiet=True))

    with pytest.raises(KeyboardInterrupt):
        continue_run()
    assert measured == [ours, "few", ours]
    measured.clear()
    measured += [""] * 4  # past the point where it was interrupted
    assert continue_run() == []
    assert measured[4:] == [ours, "many", "few", ours, "many", ours]
    pairs = driver.read_pairs(tmp_path / "pairs.jsonl")
    assert [(pair.repeat, pair.peer, [*pair.theirs.loads]) for pair in pairs] == [
        (0, "few", [1]),
        (0, "many", [1, 4]),
        (1, "few", [1]),
        (1, "many", [1, 4]),
    ]


def test_a_failing_engine_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(
        engine: Engine, substitutions: object, prompts: object, counts: list[int], *_: object
    ) -> dict[int, Load]:
        if engine.name == "broken":
            raise AuroraError("it does not start")
        return server_run({count: load(10.0) for count in counts})

    monkeypatch.setattr(driver, "_measure", measure)
    peers = [Engine(name=name, environment="", command=()) for name in ("broken", "whole")]
    substitutions: dict[str, dict[str, str]] = {name: {} for name in (OURS.name, "broken", "whole")}
    arguments = argparse.Namespace(out=tmp_path, repeats=1)
    failures = driver._measure_all(peers, substitutions, {0: [], 1: ["a"]}, arguments, Console(quiet=True))
    assert failures == ["repeat 0, broken: it does not start"]
    assert [pair.peer for pair in driver.read_pairs(tmp_path / "pairs.jsonl")] == ["whole"]


def test_a_run_goes_on_only_with_the_plan_that_it_began_with(tmp_path: Path) -> None:
    config = load_config(None, ["draft.checkpoint=null"])

    def keep(**changes: Any) -> None:
        how = argparse.Namespace(**{"max_tokens": 8, "temperature": 0.0, "overrides": [], **changes})
        driver._keep_plan(tmp_path / "plan.json", how, config, {1: ["a"], 0: ["b"]})

    keep()
    keep()
    for changes in ({"max_tokens": 9}, {"temperature": 1.0}, {"overrides": ["engine.threads=1"]}):
        with pytest.raises(ConfigError, match="name a new folder with --out"):
            keep(**changes)
