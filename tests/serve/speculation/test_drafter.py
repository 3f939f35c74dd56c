"""Drafter: the draft catches up with a prompt in parts, and then proposes what it does after reading it at once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, save_model

from aurora_lit.kernels import native
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.serve.engine.round_plan import SpeculationLimits
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.sources.draft import _LEAST_CATCH_UP, DraftSource
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.weigh import Weigher

LENGTH = 700
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(native.library() is None, reason="no kernels"))]


@pytest.fixture(scope="module", params=PRECISIONS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder: Path = save_model(
        "llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4, max_position_embeddings=1024
    )
    return load_target(folder, precision=request.param)


def drafters(target: Target, count: int) -> list[Drafter]:
    """With copies of one draft, and two slots that hold the same 700 tokens."""
    capacity = LENGTH + 40
    tokens_SL = torch.randint(0, VOCAB, (1, capacity + 1), generator=torch.Generator().manual_seed(2)).repeat(2, 1)
    with torch.no_grad():
        features_BTF, _ = target.in_torch.forward_uncached(tokens_SL[:1, :LENGTH])
    draft, made = random_draft(target, max_position_embeddings=1024), []
    for _ in range(count):
        drafter = Drafter(copy.deepcopy(draft), target, tokens_SL=tokens_SL, capacity=capacity)
        for slot in range(2):
            drafter.store_features(slot=slot, start=0, aux_TF=features_BTF[0, : LENGTH - 1])
        made.append(drafter)
    return made


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_keys_and_values_written_alone_have_the_bits_of_a_whole_pass(target: Target, fused: bool) -> None:
    whole, alone = drafters(target, 2)
    if not fused:  # as on a GPU, or for a layer that the kernels do not have
        for drafter in (whole, alone):
            drafter._runtime_draft = replace(drafter._runtime_draft, decoder=None)
    for start, count in ((0, 1), (1, 200), (201, 256)):
        whole._run_committed([1], [start], count)
        alone._write_committed(1, start, count)
    for name in ("keys_SGCQPE", "values_SGMDE"):
        (expected,), (found,) = (getattr(drafter._cache, name) for drafter in (whole, alone))
        assert expected.any()
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("length", "most", "noise"),
    [(2, 1, False), (40, 1, True), (40, 37, False), (300, 256, True), (LENGTH, 37, True), (LENGTH, 300, False)],
)
def test_catching_up_in_parts_gives_the_proposals_of_reading_at_once(
    target: Target, length: int, most: int, noise: bool
) -> None:
    at_once, in_parts = drafters(target, 2)
    parts = []
    while (count := in_parts.catch_up(1, length, most=most)) > 0:
        parts.append(count)
        assert count <= most
    assert sum(parts) == length - 2, "all but the last position, which the next proposal computes"
    assert in_parts.num_uncached(1, length) == 1
    assert in_parts.num_uncached(0, length) == length - 1, "another slot has read nothing"
    inputs = DraftInputs(slots=[1], lengths=[length])
    draws = ColumnDraws(temperatures=[0.8], keys=[3], positions=[2])
    drafted = [drafter.propose(inputs, num_steps=4, noise=draws if noise else None) for drafter in (at_once, in_parts)]
    assert drafted[0].tokens == drafted[1].tokens
    torch.testing.assert_close(drafted[0].outcome_JB, drafted[1].outcome_JB, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("max_round_s", "room"), [(0.001, _LEAST_CATCH_UP), (0.050, 50), (0.120, 120), (60.0, 10_000)])
def test_beside_others_a_long_prompt_is_caught_up_over_several_rounds(
    target: Target, max_round_s: float, room: int
) -> None:
    """A position of the draft's prefill takes a millisecond here. The others go on speculating meanwhile."""
    prompt = torch.randint(0, VOCAB, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    requests = {
        "short": request("short", prompt[:6], max_tokens=60),
        "sampled": request("sampled", prompt[3:8], max_tokens=60, temperature=0.9, seed=1),
        "long": request("long", prompt, max_tokens=30),
    }
    how: dict[str, Any] = {"max_seq_len": 400, "prefill_chunk_tokens": 400, "max_round_s": max_round_s}

    def serve(draft: Any) -> tuple[dict[str, Answer], list[int], list[dict[str, int]]]:
        engine = make_engine(target, draft, **how)
        engine.costs.prefill_position_s = 0.001
        engine._prefill._max_round_s = 60.0  # prompts of the target are not what is limited here
        answers = {name: Answer() for name in requests}
        engine.submit(requests["short"])
        engine.submit(requests["sampled"])
        uncached, proposed = [], []
        while engine.has_work:
            if len(proposed) == 3:
                engine.submit(requests["long"])
            outputs = engine.round()
            for output in outputs:
                answers[output.request_id].add(output)
            proposed.append({output.request_id: output.num_proposed for output in outputs})
            if engine._drafter is not None:
                for sequence in engine._decoding:
                    if sequence.request.request_id == "long" and answers["long"].rounds:
                        uncached.append(engine._drafter.num_uncached(sequence.slot, sequence.length))
        return answers, uncached, proposed

    plain, _, _ = serve(None)
    answers, uncached, proposed = serve(random_draft(target))
    assert {name: each.token_ids for name, each in answers.items()} == {
        name: each.token_ids for name, each in plain.items()
    }
    waiting = [each for each in proposed if each.get("long") == 0 and len(each) == 3]
    # Each round reads at most `room` positions, those of the other sequences included.
    assert len(waiting) == pytest.approx(300 / room, abs=300 / room * 0.25 + 1)
    assert all(each["short"] > 0 and each["sampled"] > 0 for each in waiting)
    read = [before - after for before, after in zip([300, *uncached], uncached, strict=False)]
    assert all(count <= room for count in read[: len(waiting)])
    assert any(each.get("long", 0) > 0 for each in proposed)


def test_what_a_round_may_catch_up_with_is_shared_by_its_sequences() -> None:
    """A hundred positions: 20 and 60 fit, and 20 of 70 are read for a later round."""
    read: dict[int, int] = {}

    class Reader:
        def num_uncached(self, slot: int, _length: int) -> int:
            return (70, 60, 20)[slot]

        def catch_up(self, slot: int, length: int, *, most: int) -> int:
            read[slot] = most
            return most

    limits = SpeculationLimits(draft_tokens=4, copied_tokens=0)
    source = DraftSource(cast(Any, Reader()), Weigher(limits, costs := Costs(ragged=True)), max_catch_up_s=0.1)
    costs.prefill_position_s = 0.001
    sequences = [RunningSequence(request=request(str(i), [1]), slot=i, prompt_length=1, length=99) for i in range(3)]
    assert source._caught_up(sequences, [0, 1, 2]) == ([1, 2], 100)
    assert read == {0: 20}
