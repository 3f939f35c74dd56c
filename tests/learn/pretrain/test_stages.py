"""`aurora-lit pretrain` as a whole, on a tiny model: a new draft, and one trained from it."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_engine import tiny_tokenizer
from support.tiny_models import random_draft, save_model
from support.trace_examples import numbered_trace

from aurora_lit.config import AuroraConfig, load_config, versions_folder
from aurora_lit.drafts.checkpoint import load_draft, read_config, save_draft
from aurora_lit.drafts.initial import choose_vocabulary
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import CheckpointError, ConfigError
from aurora_lit.learn.data import log_batches
from aurora_lit.learn.pretrain import stages
from aurora_lit.learn.pretrain.generate_answers import generate_answers
from aurora_lit.learn.pretrain.record_text import text_pieces
from aurora_lit.learn.pretrain.stages import PretrainOptions, pretrain
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.log import read_index, read_shard
from aurora_lit.traces.record import Trace


class Stopped(Exception):
    """Raised where a run is stopped."""


def stop(*_: object, **__: object) -> Any:
    raise Stopped


class Train:
    """Pretrains with the settings and options of the tests, or others."""

    def __init__(self, settings: list[str], options: PretrainOptions) -> None:
        self._settings, self.options = settings, options

    def config(self, *settings: str) -> AuroraConfig:
        return load_config(None, [*self._settings, *settings])

    def __call__(self, *settings: str, **options: Any) -> dict[str, Any]:
        return pretrain(self.config(*settings), dataclasses.replace(self.options, **options))


@pytest.fixture
def train(tmp_path: Path) -> Train:
    tokenizer = tiny_tokenizer()
    folder = save_model("llama", tmp_path / "target", num_hidden_layers=4, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    settings = [f"target.source={folder}", "target.precision=fp32", "engine.max_seq_len=256"]
    prompts = tmp_path / "words.jsonl"
    lines = [{"domain": "words", "messages": [{"role": "user", "content": f"the {n}"}]} for n in range(12)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = PretrainOptions(
        prompts=(prompts,),
        text=(),
        out=tmp_path / "first",
        max_answer_tokens=12,
        positions=1200,
        batch_positions=128,
        draft_vocab_size=32,
        learning_rate=0.02,
    )
    return Train([*settings, f"checkpoint.dir={tmp_path}"], options)


def test_a_draft_is_trained_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    monkeypatch.setattr(log_batches, "HELD_OUT_EVERY", 4)  # so that one of few prompts is held out
    untrained = train(out=tmp_path / "none", learning_rate=1e-9)
    trained = train()
    length = "expected_accepted_length"
    assert trained["words"][length] > untrained["words"][length]
    target = load_target(tmp_path / "target", precision="fp32")
    first = load_draft(train.options.out, target)
    # Too slow to learn: what comes out is what it started from, vocabulary included.
    slow = tmp_path / "second"
    train(out=slow, start_from=train.options.out, learning_rate=1e-9, positions=100)
    second = load_draft(slow, target)
    assert torch.equal(first.draft_token_ids, second.draft_token_ids)
    for name, weight in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), weight, atol=1e-4, rtol=1e-2)  # stored in bf16
    record = json.loads((slow / "training.json").read_text())
    assert record["started_from"] == "first"
    assert (record["target"], record["precision"]) == (str(tmp_path / "target"), "fp32")
    assert (record["max_answer_tokens"], record["draft_vocab_size"], record["seed"]) == (12, 32, 0)


def test_what_is_started_again_answers_and_trains_on_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: Train
) -> None:
    train()
    assert capsys.readouterr().out.endswith(f"serve it with draft.checkpoint={train.options.out}\n")
    before = (train.options.out / "model.safetensors").read_bytes()

    def answer_again(*_: object, **__: object) -> None:
        raise AssertionError("all prompts were answered")

    monkeypatch.setattr(stages, "generate_answers", answer_again)
    train("learn.from_scratch=true")
    assert (train.options.out / "model.safetensors").read_bytes() == before
    assert (
        f"draft.checkpoint={train.options.out} learn.from_scratch=false checkpoint.run=NEW\n" in capsys.readouterr().out
    )
    DraftStore(versions_folder(train.config()), keep=2).publish(Eagle3Draft(read_config(train.options.out)), record={})
    train(positions=1300)
    assert f"draft.checkpoint={train.options.out} checkpoint.run=NEW\n" in capsys.readouterr().out
    assert (train.options.out / "model.safetensors").read_bytes() != before, "there was more to train on"


def test_an_unusable_starting_draft_is_refused_before_any_work(tmp_path: Path, train: Train) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        train(start_from=tmp_path / "missing")
    assert not train.options.out.with_name("first.traces").exists()


def test_a_folder_of_other_files_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    train.options.out.mkdir()
    (train.options.out / "live").mkdir()
    monkeypatch.setattr(stages, "load_tokenizer", stop)
    with pytest.raises(ConfigError, match="--out: .*first holds files, but no draft .* name a new folder"):
        train()
    assert [path.name for path in train.options.out.iterdir()] == ["live"]


def test_the_present_folder_is_not_replaced(monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    train.options.out.mkdir()
    monkeypatch.chdir(train.options.out)
    with pytest.raises(ConfigError, match="--out: . is the present folder"):
        train(out=Path("."))


def test_a_finished_training_answers_no_prompts_that_are_added(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: Train
) -> None:
    train.options = dataclasses.replace(train.options, positions=200)
    train()
    before = json.loads((train.options.out / "training.json").read_text())
    with train.options.prompts[0].open("a") as file:
        file.write(json.dumps({"domain": "words", "messages": [{"role": "user", "content": "added"}]}) + "\n")
    monkeypatch.setattr(stages, "generate_answers", stop)
    train()
    assert "so nothing is recorded or answered; raise --positions" in " ".join(capsys.readouterr().out.split())
    assert json.loads((train.options.out / "training.json").read_text()) == before
    with pytest.raises(Stopped):
        train(positions=300)


@pytest.mark.parametrize("change", ["precision", "weights", "start_from"])
def test_traces_of_other_work_are_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.setattr(stages, "generate_answers", stop)
    for _ in range(2):  # begun, and started again
        with pytest.raises(Stopped):
            train()
    settings: tuple[str, ...] = ()
    if change == "precision":
        settings = ("target.precision=bf16",)
    elif change == "weights":
        save_model("llama", tmp_path / "target", seed=1, num_hidden_layers=4, vocab_size=len(tiny_tokenizer()))
    else:
        other = tmp_path / "other"
        save_draft(random_draft(load_target(tmp_path / "target", precision="fp32")), other)
        train.options = dataclasses.replace(train.options, start_from=other)
    with pytest.raises(ConfigError, match="another target, precision or --start-from"):
        train(*settings)


def test_another_vocabulary_size_is_refused_when_training_continues(
    monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.setattr(stages, "DraftTrainer", stop)
    with pytest.raises(Stopped):
        train()
    with pytest.raises(ConfigError, match="--draft-vocab-size 16: .*first.traces is of a training with 32; use that"):
        train(draft_vocab_size=16)


def test_training_continues_after_a_disk_that_was_full_when_the_vocabulary_was_written(
    monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(*arguments: Any, **named: Any) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        return choose_vocabulary(*arguments, **named)

    monkeypatch.setattr(stages, "choose_vocabulary", fill_the_disk)
    try:
        with pytest.raises(OSError, match="File too large"):
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(stages, "choose_vocabulary", choose_vocabulary)
    train()
    assert (train.options.out / "training.json").exists()


def test_a_target_that_was_moved_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    monkeypatch.setattr(stages, "generate_answers", stop)
    with pytest.raises(Stopped):
        train()
    (tmp_path / "target").rename(tmp_path / "moved")
    with pytest.raises(Stopped):
        train(f"target.source={tmp_path / 'moved'}")


def ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [ctrl_c, partial(signal.raise_signal, signal.SIGTERM)], ids=["Ctrl-C", "SIGTERM"])
def test_answers_before_an_interruption_are_kept(
    end: Callable[[], None], monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def interrupted(*arguments: Any, **named: Any) -> Iterator[Trace]:
        for number, trace in enumerate(generate_answers(*arguments, **named)):
            if number == 3:
                end()
            yield trace

    monkeypatch.setattr(stages, "generate_answers", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train()
    assert [shard.num_sequences for shard in read_index(train.options.out.with_name("first.traces"))] == [3]
    assert signal.getsignal(signal.SIGTERM) is before


def test_text_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train) -> None:
    text = tmp_path / "text.txt"
    monkeypatch.setattr(stages, "_PIECES_AT_ONCE", 2)
    text.write_text("the world " * 4000)
    batches: list[int] = []

    def interrupted(_: Target, pieces: list[list[int]], *, domain: str) -> list[Trace]:
        if batches:
            raise Stopped
        batches.append(len(pieces))
        return [numbered_trace(20, domain=domain) for _ in pieces]

    monkeypatch.setattr(stages, "record_pieces", interrupted)
    with pytest.raises(Stopped):
        train(text=(text,))
    assert [shard.num_sequences for shard in read_index(train.options.out.with_name("first.traces"))] == batches


def test_text_of_a_file_that_is_added_is_recorded_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.setattr(stages, "_PIECE_TOKENS", 16)
    monkeypatch.setattr(stages, "_PIECES_AT_ONCE", 2)
    monkeypatch.setattr(stages, "generate_answers", stop)
    texts = tmp_path / "one.txt", tmp_path / "two.txt"
    for number, text in enumerate(texts):
        text.write_text(" ".join(f"{number}{n}" for n in range(100, 160)))
    tokenizer = tiny_tokenizer()
    pieces = [piece for text in texts for piece in text_pieces(text, tokenizer, piece_tokens=16)]
    assert len(pieces) > 8
    for files, positions in ((texts[:1], 1), (texts, 100_000)):
        with pytest.raises(Stopped):
            train(text=files, text_positions=positions)
    traces = train.options.out.with_name("first.traces")
    recorded = [t.token_ids_T.tolist() for shard in read_index(traces) for t in read_shard(traces / shard.name)]
    assert sorted(recorded) == sorted(pieces)


def test_prompts_that_leave_no_room_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: Train
) -> None:
    """The target has 256 positions."""
    with train.options.prompts[0].open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "the world " * 200}]}) + "\n")
    monkeypatch.setattr(stages, "generate_answers", stop)
    with pytest.raises(Stopped):
        train()
    assert "1 of 13 prompts have more than 244 tokens and are left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="13 of 13 prompts have more than 0 tokens .*; lower --max-answer-tokens"):
        train(max_answer_tokens=300)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("engine.device=cuda",), "engine.device=cuda: pretraining runs the target on the CPU"),
        (("engine.strategy=fsdp", "engine.devices=2"), "engine.strategy=fsdp: only `aurora-lit serve`"),
    ],
)
def test_settings_that_it_cannot_follow_are_refused(settings: tuple[str, ...], said: str, train: Train) -> None:
    with pytest.raises(ConfigError, match=said):
        train(*settings)


def test_as_many_prompts_are_answered_together_as_the_engine_may_take(
    monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    sizes: list[int] = []

    def interrupted(*_: object, max_batch_size: int, **__: object) -> Iterator[Trace]:
        sizes.append(max_batch_size)
        raise Stopped

    monkeypatch.setattr(stages, "generate_answers", interrupted)
    for size in (3, 100):
        with pytest.raises(Stopped):
            train(f"engine.max_batch_size={size}")
    assert sizes == [3, 32]
