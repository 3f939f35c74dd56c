"""bench throughput and bench acceptance: what they count, on fake engines whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from aurora_lit.bench import acceptance, throughput
from aurora_lit.bench.prompts import (
    Answer,
    BenchPrompt,
    PromptRun,
    answer_prompts,
    load_prompts,
    params_for,
    repeated_share,
)
from aurora_lit.bench.reference import generate as reference_generate
from aurora_lit.bench.reporting import Spread
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.request import Output, SamplingParams
from aurora_lit.settings import DraftSettings, EngineSettings

CONFIG = AuroraConfig(draft=DraftSettings(checkpoint="somewhere"))


def _prompt(*token_ids: int, domain: str = "chat") -> BenchPrompt:
    return BenchPrompt(domain=domain, token_ids=token_ids)


def _files(folder: Path) -> list[Path]:
    chat, plain = folder / "chat.jsonl", folder / "poems.txt"
    rows = [{"domain": "chat", "messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(5)]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("the world\n\nthe old world\n")
    return [chat, plain]


def _round(proposed: int, accepted: int, reason: str | None = None) -> Output:
    return Output(
        request_id="a",
        token_ids=(1,) * (accepted + 1),
        num_proposed=proposed,
        num_accepted=accepted,
        finish_reason=reason,
    )


def test_acceptance_leaves_out_last_rounds_and_rounds_without_proposals() -> None:
    rounds = [_round(3, 3), _round(3, 1), _round(1, 1), _round(0, 0), _round(3, 0), _round(3, 0, "length")]
    result = acceptance.summarise([Answer(domain="chat", token_ids=[1], rounds=rounds)], domain="chat", temperature=0.0)
    assert result.rounds == 4
    assert result.accepted_length == (4 + 2 + 2 + 1) / 4
    assert result.rate_by_position == [3 / 4, 1 / 3, 1 / 3]
    assert result.conditional_rate_by_position == [3 / 4, 1 / 2, 1.0]


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2, low=1, high=3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(median=3, low=2, high=4)


def test_arms_alternate_in_rotating_order_after_a_warm_up() -> None:
    calls: list[str] = []

    def arm(name: str, seconds: float) -> throughput.Arm:
        def answer(prompts: Sequence[BenchPrompt]) -> PromptRun:
            calls.append(name)
            answers = [Answer(domain="chat", token_ids=[1, 2], rounds=[_round(1, 1)]) for _ in prompts]
            return PromptRun(answers=answers, seconds=seconds, decode_tokens=1, decode_seconds=seconds / 2)

        return answer

    groups = throughput.group([_prompt(1), _prompt(2), _prompt(3), _prompt(4), _prompt(5)], 2)
    assert [len(g) for g in groups] == [2, 2]
    totals = throughput.interleave({"plain": arm("plain", 2.0), "draft": arm("draft", 1.0)}, groups, repeats=2)
    plain, draft = "plain", "draft"
    assert calls == [plain, draft, plain, draft, draft, plain, draft, plain, plain, draft]
    result = throughput.summarise(totals, batch_size=2)
    assert result.ratios == {"draft / plain": Spread(median=2, low=2, high=2)}
    assert result.tokens_per_s["draft"].median == 4
    assert result.decode_tokens_per_s["draft"].median == 2
    assert result.accepted_length == 2
    assert result.same_as_plain == 1


@pytest.fixture
def engines() -> list[Any]:
    """The fake engines that a benchmark has built."""
    return []


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, engines: list[Any]) -> list[AuroraConfig]:
    """Gives both benchmarks fake engines; the settings that these were built with."""
    configs: list[AuroraConfig] = []

    def build(config: AuroraConfig, *, target: object = None, max_round_s: float = 0.0) -> tuple[FakeEngine, object]:
        configs.append(config)
        engine: Any = FakeEngine(FakeOptions(tokens_per_round=3 if config.engine.speculate else 1))
        engine.max_round_s = max_round_s
        engine.target = target or f"target {len(configs)}"
        engines.append(engine)
        return engine, tiny_tokenizer()

    monkeypatch.setattr(throughput, "build_engine", build)
    monkeypatch.setattr(acceptance, "build_engine", build)
    return configs


def test_throughput_writes_numbers_and_a_plot(tmp_path: Path, built: list[AuroraConfig], engines: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    results = throughput.run(
        CONFIG, batch_sizes=(1, 2), prompts=_files(tmp_path), limit=2, repeats=2, max_tokens=6, out=tmp_path / "out"
    )
    assert [config.engine.speculate for config in built] == [True, False]
    assert [engine.target for engine in engines] == ["target 1"] * 2, "it is loaded once"
    kept = {(config.engine.prefix_cache_mb, config.memory.capacity_mb) for config in built}
    assert kept == {(0, 0)}, "repeats of the same prompts must not be read or copied"
    report = json.loads((tmp_path / "out/throughput.json").read_text())
    assert [r["batch_size"] for r in report["throughput"]] == [1, 2]
    assert report["throughput"][0]["ratios"].keys() == {"draft / plain"}
    assert report["draft_version"] == "fake-000001"
    assert "server" not in report["config"]
    assert (tmp_path / "out/throughput.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=160)
    console.print(throughput.table(results))
    assert "draft" in console.export_text()


def test_a_batch_that_the_prompts_do_not_fill_is_refused(tmp_path: Path, built: list[AuroraConfig]) -> None:
    """Its row would be the speed of a smaller one."""
    with pytest.raises(ConfigError, match=r"--batch 8 is more than the 4 prompts; name more, raise --limit"):
        throughput.run(
            CONFIG, batch_sizes=(1, 8), prompts=_files(tmp_path), limit=2, max_tokens=6, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_acceptance_measures_greedy_and_the_temperature_by_domain(
    tmp_path: Path, built: list[AuroraConfig], engines: list[Any]
) -> None:
    results = acceptance.run(
        CONFIG, prompts=_files(tmp_path), limit=2, max_tokens=7, temperature=0.7, out=tmp_path / "out"
    )
    assert [(config.engine.lookup, config.memory.capacity_mb) for config in built] == [(False, 0)], "nothing is copied"
    assert [(r.temperature, r.domain) for r in results] == [
        (0.0, "chat"),
        (0.0, "poems"),
        (0.0, "all"),
        (0.7, "chat"),
        (0.7, "poems"),
        (0.7, "all"),
    ]
    assert results[0].accepted_length == 3
    assert results[0].rate_by_position == [1.0, 1.0]
    assert built[0].engine.adaptive is False
    assert engines[0].max_round_s >= 60, "a draft that has not read a prompt in time would not propose"
    report = json.loads((tmp_path / "out/acceptance.json").read_text())
    assert report["acceptance"][0]["domain"] == "chat"


def test_unusable_settings_are_refused_before_anything_is_loaded(tmp_path: Path, built: list[AuroraConfig]) -> None:
    files = _files(tmp_path)
    with pytest.raises(ConfigError, match=r"draft\.checkpoint=null"):
        throughput.run(AuroraConfig(draft=DraftSettings(checkpoint=None)), batch_sizes=(1,), prompts=files)
    with pytest.raises(ConfigError, match=r"engine\.max_batch_size=2"):
        throughput.run(replace(CONFIG, engine=EngineSettings(max_batch_size=2)), batch_sizes=(4,), prompts=files)
    with pytest.raises(ConfigError, match=r"draft\.checkpoint=null"):
        acceptance.run(AuroraConfig(draft=DraftSettings(checkpoint=None)), prompts=files)
    assert built == []


def test_the_reference_batch_answers_as_transformers_does_prompt_by_prompt() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **shape)).eval()
    prompts = [_prompt(3, 4, 5, 6), _prompt(7, 8)]
    run = reference_generate(model, prompts, params_for(0, max_tokens=5), eos_token_ids=frozenset({31}))
    for prompt, answer in zip(prompts, run.answers, strict=True):
        alone = model.generate(
            torch.tensor([prompt.token_ids]), max_new_tokens=5, do_sample=False, eos_token_id=31, pad_token_id=31
        )
        assert answer.token_ids == alone[0, len(prompt.token_ids) :].tolist()
    assert 0 < run.decode_seconds < run.seconds
    eos = run.answers[0].token_ids[2]
    cut = reference_generate(model, prompts[:1], params_for(0, max_tokens=5), eos_token_ids=frozenset({eos}))
    assert cut.answers[0].token_ids[-1] == eos
    assert cut.answers[0].token_ids.count(eos) == 1


def test_every_option_of_sampling_reaches_the_reference() -> None:
    asked: dict[str, Any] = {}

    class Model:
        def generate(self, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
            asked.update(options)
            return torch.cat([ids_BT, ids_BT], dim=1)

    params = SamplingParams(
        max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=None
    )
    reference_generate(Model(), [_prompt(3, 4)], params, eos_token_ids=frozenset({31}))
    expected = {"max_new_tokens": 9, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "do_sample": True}
    assert expected.items() <= asked.items()
    assert asked["repetition_penalty"] == 1.2


# -- prompts answered by an engine ------------------------------------------------------------------------------------


def test_prompts_of_all_files_are_interleaved_limited_and_short_enough(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prompts = load_prompts(_files(tmp_path), limit=3, tokenizer=tokenizer, max_prompt_tokens=100)
    assert [p.domain for p in prompts] == ["chat", "poems", "chat", "poems", "chat"]
    assert tokenizer.decode(prompts[0].token_ids) == "<|user|>hello 0<|assistant|>"
    with pytest.raises(AuroraError, match="max-tokens"):
        load_prompts(_files(tmp_path), limit=None, tokenizer=tokenizer, max_prompt_tokens=1)


def test_every_prompt_is_answered_and_tokens_after_the_last_first_token_are_counted() -> None:
    engine = FakeEngine(FakeOptions(tokens_per_round=3, max_batch_size=2, round_s=0.01))
    ended: list[None] = []
    run = answer_prompts(
        engine,
        [_prompt(7, 8), _prompt(9), _prompt(5, 6)],
        params_for(0, max_tokens=7),
        on_answer=lambda: ended.append(None),
    )
    assert [a.token_ids for a in run.answers] == [[7, 8, 7, 8, 7, 8, 7], [9] * 7, [5, 6, 5, 6, 5, 6, 5]]
    assert run.num_tokens == 21
    assert run.decode_tokens == 4  # the third prompt began last, when the others had ended
    assert run.seconds >= 0.06 > run.decode_seconds >= 0.02
    assert len(ended) == 3


def test_an_engine_error_ends_the_benchmark() -> None:
    engine = FakeEngine()
    error = tiny_tokenizer().convert_tokens_to_ids("<|error|>")
    with pytest.raises(AuroraError, match="as asked"):
        answer_prompts(engine, [_prompt(error)], params_for(0, max_tokens=4))


def test_repeated_share_counts_repeats_within_an_answer() -> None:
    assert repeated_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 0
    assert repeated_share([[1] * 13]) == 0.9
    assert repeated_share([[1, 2]]) == 0


def test_a_command_samples_as_requests_do_unless_it_is_told_a_temperature() -> None:
    own = {"temperature": 0.7, "top_k": 20}
    assert params_for(None, max_tokens=4) == SamplingParams(max_tokens=4, temperature=0.0), "greedy, without any"
    assert params_for(None, max_tokens=4, defaults=own) == SamplingParams(max_tokens=4, **own)
    assert params_for(0.2, max_tokens=4, defaults=own) == SamplingParams(max_tokens=4, temperature=0.2, top_k=20)
