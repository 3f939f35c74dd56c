"""The training loop learns, resumes, and follows its schedule."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    VOCAB,
    draft_module,
    random_draft,
)

from aurora_lit.errors import AuroraError
from aurora_lit.learn.data.log_batches import held_out_batches
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.training_state import read_state, write_state
from aurora_lit.learn.pretrain import trainer as trainer_module
from aurora_lit.learn.pretrain.generate_answers import PromptToAnswer, generate_answers
from aurora_lit.learn.pretrain.trainer import DraftTrainer, TrainerOptions, lr_factor
from aurora_lit.models.interface import Target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.objective import OnlineReport, OnlineWeights
from aurora_lit.request import SamplingParams
from aurora_lit.traces.log import TraceLogWriter, read_index, read_shard


@pytest.fixture(scope="module")
def recorded(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy answers of the target, which a draft can learn."""
    gen = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(0, VOCAB, (3,), generator=gen).tolist()) for _ in range(60)]
    questions = [
        PromptToAnswer(domain="chat", prompt_ids=prompt, params=SamplingParams(temperature=0.0)) for prompt in prompts
    ]
    folder = tmp_path_factory.mktemp("recorded")
    writer = TraceLogWriter(folder, kind="answer")
    for trace in generate_answers(target, questions, eos_token_ids=frozenset(), max_answer_tokens=20):
        writer.append(trace)
    writer.flush()
    return folder


@pytest.fixture
def log(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "traces"))


def trainer(target: Target, folder: Path, *, learning_rate: float = 4e-3) -> DraftTrainer:
    options = TrainerOptions(
        total_positions=40_000, batch_positions=512, max_length=64, learning_rate=learning_rate, warmup_steps=5
    )
    online = OnlineWeights()
    module = draft_module(target, random_draft(target), num_steps=2, online=online)
    return DraftTrainer(module, folder, options)


def accepted_length(report: dict[str, dict[str, object]]) -> float:
    return float(report["chat"]["expected_accepted_length"])  # type: ignore[arg-type]


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    shape = {"warmup_steps": 10, "total_steps": 110}
    factors = {step: lr_factor(step, **shape, min_lr_factor=0.1) for step in (0, 4, 9, 10, 35, 60, 85, 110, 1000)}
    half = math.sqrt(0.5)
    assert factors == pytest.approx(
        {0: 0.1, 4: 0.5, 9: 1, 10: 1, 35: 0.55 + 0.45 * half, 60: 0.55, 85: 0.55 - 0.45 * half, 110: 0.1, 1000: 0.1}
    )


def test_the_learning_rate_falls_with_positions_not_steps(target: Target, log: Path, tmp_path: Path) -> None:
    shards = read_index(log)
    learning = trainer(target, tmp_path / "fit")
    peak = learning.options.learning_rate
    learning.fit(log, shards, until_positions=4_000)
    seen = learning.positions_seen / learning.options.batch_positions
    factor = lr_factor(int(seen), warmup_steps=5, total_steps=40_000 // 512, min_lr_factor=0.05)
    assert learning.schedules[0].get_last_lr()[0] == pytest.approx(peak * factor, rel=1e-6)
    assert learning.schedules[0].last_epoch > 1.2 * seen, (
        "prompts are not trained on, so there are more steps than batches of positions"
    )


def test_a_few_steps_learn_and_a_rebuilt_trainer_continues_where_the_last_one_stopped(
    target: Target, log: Path, tmp_path: Path
) -> None:
    shards = read_index(log)
    first = trainer(target, tmp_path / "fit")
    untrained = first.validate(log, shards, logsumexp=TargetHead(target).log_sum_exp)
    first.fit(log, shards, until_positions=6_000)
    trained = first.validate(log, shards, logsumexp=TargetHead(target).log_sum_exp)
    assert accepted_length(trained) > accepted_length(untrained) + 0.1
    assert 6_000 <= first.positions_seen < 6_600

    again = trainer(target, tmp_path / "fit")
    assert (again.positions_seen, again.epoch) == (first.positions_seen, first.epoch)
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name
    assert again.validate(log, shards, logsumexp=TargetHead(target).log_sum_exp) == trained

    # Not stopped, or stopped and rebuilt: the same draft in the end.
    first.fit(log, shards, until_positions=8_000)
    (tmp_path / "fit" / "training.safetensors").unlink()
    again.fit(log, shards, until_positions=8_000)
    assert again.positions_seen == first.positions_seen
    for name, tensor in first.module.state_dict().items():
        torch.testing.assert_close(tensor, again.module.state_dict()[name])
    again.fit(log, shards, until_positions=8_000)
    assert again.positions_seen == first.positions_seen, "nothing is left to do"


def test_an_epoch_that_was_broken_off_goes_on_where_it_was(
    target: Target, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash comes in the middle of an epoch, after a save; and so does the end that was asked for."""
    monkeypatch.setattr(trainer_module, "SAVE_EVERY_S", 0.0)
    shards = read_index(log)

    def taken(folder: Path, *, crashes_after: int | None = None, until_positions: int = 1_800) -> list[list[list[int]]]:
        found: list[list[list[int]]] = []
        learning = trainer(target, folder)
        step = learning._step

        def crash_or_step(batch: OnlineBatch) -> OnlineReport:
            if len(found) == crashes_after:
                raise KeyboardInterrupt
            found.append(batch.traces.token_ids_BT.tolist())
            return step(batch)

        monkeypatch.setattr(learning, "_step", crash_or_step)
        with nullcontext() if crashes_after is None else pytest.raises(KeyboardInterrupt):
            learning.fit(log, shards, until_positions=until_positions)
        return found

    unbroken = taken(tmp_path / "unbroken")
    first = taken(tmp_path / "broken", crashes_after=2)
    assert first == unbroken[:2]
    assert taken(tmp_path / "broken") == unbroken[2:]
    ended = [taken(tmp_path / "ended", until_positions=positions) for positions in (300, 700, 1_800)]
    assert all(ended)
    assert sum(ended, []) == unbroken


def test_an_epoch_of_other_shards_is_not_gone_on_with(
    target: Target, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "SAVE_EVERY_S", 0.0)
    shards = read_index(log)
    learning = trainer(target, tmp_path / "fit")
    monkeypatch.setattr(learning, "save", partial(save_and_stop, learning.save))
    with pytest.raises(KeyboardInterrupt):
        learning.fit(log, shards, until_positions=2_000)
    writer = TraceLogWriter(log, kind="answer")
    for trace in list(read_shard(log / shards[0].name))[:20]:
        writer.append(trace)
    writer.close()
    again = trainer(target, tmp_path / "fit")
    assert (again.epoch, again.batches_taken) == (0, 1)
    again.fit(log, read_index(log), until_positions=again.positions_seen + 1)
    assert (again.epoch, again.batches_taken) == (1, 1), "a new one was begun"


def save_and_stop(save: Callable[[], None]) -> None:
    save()
    raise KeyboardInterrupt


def test_the_expected_length_is_the_mean_along_chains(target: Target, log: Path, tmp_path: Path) -> None:
    """Not a product of mean acceptances: positions that are easy to propose for come together."""
    shards, learning = read_index(log), trainer(target, tmp_path / "fit")
    learning.fit(log, shards, until_positions=3_000)
    report = learning.validate(log, shards, logsumexp=TargetHead(target).log_sum_exp)
    lengths = []
    for batch in held_out_batches(
        log, shards, batch_positions=512, max_length=64, logsumexp=TargetHead(target).log_sum_exp
    ):
        with torch.no_grad(), learning.fabric.autocast():
            stats, mask_KBT = learning.module.score(batch)
        alpha_KBT = stats.alpha_N.view_as(mask_KBT)
        for row, root in mask_KBT[0].nonzero().tolist():
            end, length, reached = int((batch.weight_BT[row] > 0).nonzero().max()), 1.0, 1.0
            for number in range(min(2, end + 1 - root)):
                reached *= float(alpha_KBT[number, row, root + number])
                length += reached
            lengths.append(length)
    assert accepted_length(report) == pytest.approx(sum(lengths) / len(lengths), abs=6e-4)


def test_a_state_of_an_older_version_is_refused(target: Target, log: Path, tmp_path: Path) -> None:
    """It does not say where in its epoch it was."""
    learning = trainer(target, tmp_path / "fit")
    learning.fit(log, read_index(log), until_positions=1_000)
    state = read_state(learning.state_path)
    assert state is not None
    for name in ("batches_taken", "epoch_of"):
        del state[name]
    write_state(learning.state_path, state)
    with pytest.raises(AuroraError, match="an older version, whose training cannot be continued; delete it to train"):
        trainer(target, tmp_path / "fit")


def test_a_rebuilt_trainer_has_its_own_learning_rate(target: Target, log: Path, tmp_path: Path) -> None:
    shards = read_index(log)
    first = trainer(target, tmp_path / "fit")
    first.fit(log, shards, until_positions=4_000)
    again = trainer(target, tmp_path / "fit", learning_rate=1e-9)
    before = {name: tensor.clone() for name, tensor in again.module.state_dict().items()}
    again.fit(log, shards, until_positions=5_000)
    assert again.positions_seen > first.positions_seen
    for name, tensor in again.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_a_damaged_state_is_an_error(target: Target, tmp_path: Path) -> None:
    trainer(target, tmp_path).save()
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AuroraError, match="is damaged; delete it"):
        trainer(target, tmp_path)


def with_nan(log: Path, folder: Path, *, every: int) -> Path:
    """The log with states that are not numbers in every so many traces."""
    writer = TraceLogWriter(folder, kind="answer")
    for number, trace in enumerate(trace for shard in read_index(log) for trace in read_shard(log / shard.name)):
        states = torch.full_like(trace.last_TH, math.nan)
        writer.append(trace if number % every else replace(trace, last_TH=states))
    writer.close()
    return folder


def test_batches_without_finite_loss_change_nothing_and_are_counted(target: Target, log: Path, tmp_path: Path) -> None:
    spoiled = with_nan(log, tmp_path / "spoiled", every=30)
    learning = trainer(target, tmp_path / "fit")
    learning.fit(spoiled, read_index(spoiled), until_positions=4_000)
    assert learning.num_dropped > 0
    assert learning.schedules[0].last_epoch > 1, "others are learned from"
    assert all(parameter.isfinite().all() for parameter in learning.module.parameters())


def test_training_that_finds_nothing_finite_any_more_ends_with_an_error_and_saves_nothing(
    target: Target, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "SAVE_EVERY_S", 0.0)
    spoiled = with_nan(log, tmp_path / "spoiled", every=1)
    learning = trainer(target, tmp_path / "fit")
    with pytest.raises(AuroraError, match="20 batches in a row .* not finite; lower --learning-rate"):
        learning.fit(spoiled, read_index(spoiled), until_positions=40_000)
    assert not learning.state_path.exists()


def test_training_on_nothing_is_an_error(target: Target, tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="holds no sequence to learn from"):
        trainer(target, tmp_path).fit(tmp_path, [], until_positions=10)


def test_a_state_of_a_draft_with_another_vocabulary_is_refused(target: Target, log: Path, tmp_path: Path) -> None:
    """Its rows of the head are of other tokens, though their number is the same."""
    shards = read_index(log)
    trainer(target, tmp_path / "fit").fit(log, shards, until_positions=1_000)
    other = random_draft(target)
    other.d2t[0] = 0  # its first token is 0 instead of 1
    module = draft_module(target, other, num_steps=2, online=OnlineWeights())
    with pytest.raises(AuroraError, match="another vocabulary or shape; repeat the --start-from"):
        DraftTrainer(module, tmp_path / "fit", TrainerOptions(total_positions=40_000))
