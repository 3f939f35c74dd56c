"""The trace record: to bytes and back, and a clear refusal of everything invalid."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from support.trace_examples import HIDDEN, same_trace, trace_with_rounds

from aurora_lit.errors import TraceError
from aurora_lit.traces.record import LAYOUT_DIGEST, Trace, check, from_bytes, to_bytes, to_pieces

ROUNDS = [(1, 4, 1), (3, 3, 3), (7, 0, 0), (8, 1, 0), (9, 3, 2)]


def a_trace(**changes: Any) -> Trace:
    return trace_with_rounds(ROUNDS, **changes)


@pytest.mark.parametrize(
    "trace",
    [
        a_trace(),
        a_trace(lse_T=torch.arange(12) / 7),
        trace_with_rounds([]),
        trace_with_rounds([(2, 0, 0)]),
        trace_with_rounds(ROUNDS[:1], length=3, domain="ünï", temperature=0),  # the bonus token is beyond the end
        Trace(
            token_ids_T=torch.tensor([5], dtype=torch.int32),
            answer_start=1,
            aux_T3H=torch.ones(1, 6, dtype=torch.bfloat16),
            last_TH=torch.ones(1, 2, dtype=torch.bfloat16),
        ),
    ],
)
def test_bytes_give_back_every_field(trace: Trace) -> None:
    assert same_trace(from_bytes(memoryview(to_bytes(trace))), trace)
    assert trace.num_bytes < len(to_bytes(trace)) < trace.num_bytes + 3000


def test_the_format_changes_only_on_purpose() -> None:
    assert LAYOUT_DIGEST == "cc31f9f24d86116b", "a ring or log of the last release cannot be read any more"


def test_pieces_are_the_same_bytes_and_the_tensors_own_memory() -> None:
    trace = a_trace()
    pieces = to_pieces(trace)
    assert b"".join(pieces) == to_bytes(trace)
    before = from_bytes(to_bytes(trace))
    trace.last_TH.fill_(7)
    assert bool((from_bytes(b"".join(pieces)).last_TH == 7).all()), "a copy was made"
    assert not same_trace(from_bytes(b"".join(pieces)), before)


def test_a_copy_does_not_change_with_the_original() -> None:
    trace = a_trace(lse_T=torch.arange(12) / 7)
    kept, wanted = trace.copy(), from_bytes(to_bytes(trace))
    assert same_trace(kept, wanted)
    for name in ("token_ids_T", "aux_T3H", "last_TH", "lse_T", "proposal_RK"):
        getattr(trace, name).zero_()
    assert same_trace(kept, wanted)


def changed(name: str, index: Any, value: float) -> Trace:
    trace = a_trace()
    tensor = getattr(trace, name).clone()
    tensor[index] = value
    return replace(trace, **{name: tensor})


@pytest.mark.parametrize(
    ("trace", "word"),
    [
        (a_trace(verify="perhaps"), "verify"),
        (a_trace(verify="free"), "verify"),  # of an older release
        (a_trace(temperature=float("nan")), "temperature"),
        (a_trace(temperature=-1.0), "temperature"),
        (a_trace(first_position=-1), "first_position"),
        (a_trace(prompt_length=-1), "prompt_length"),
        (a_trace(answer_start=-1), "answer_start"),
        (a_trace(answer_start=13), "answer_start"),
        (a_trace(token_ids_T=torch.arange(12)), "token_ids_T is torch.int64"),
        (a_trace(token_ids_T=torch.arange(11, dtype=torch.int32)), "shape"),
        (a_trace(token_ids_T=torch.zeros(12, 1, dtype=torch.int32)), "shape"),
        (a_trace(aux_T3H=torch.zeros(12, 2 * HIDDEN, dtype=torch.bfloat16)), "aux_T3H"),
        (a_trace(lse_T=torch.zeros(3)), "lse_T"),
        (a_trace(source_R=torch.ones(4, dtype=torch.uint8)), "source_R"),
        (changed("token_ids_T", 0, -3), "token id"),
        (changed("aux_T3H", (3, 2), float("nan")), "aux_T3H is not finite"),
        (changed("aux_T3H", (3, 2), -float("nan")), "aux_T3H is not finite"),
        (changed("last_TH", (11, 0), float("inf")), "last_TH is not finite"),
        (changed("last_TH", (0, 1), -float("inf")), "last_TH is not finite"),
        (changed("round_root_R", 0, -1), "round_root is out of range"),
        (changed("round_root_R", 4, 10), "round_root is out of range"),
        (changed("round_root_R", 1, 1), "ascend"),
        (changed("num_proposed_R", 2, -1), "num_proposed"),
        (a_trace(proposal_RK=a_trace().proposal_RK[:, :3]), "num_proposed"),
        (changed("num_accepted_R", 1, 4), "num_accepted"),
        (changed("num_accepted_R", 2, -1), "num_accepted"),
        (changed("source_R", 0, 4), "source"),
        (changed("proposal_RK", (1, 0), -1), "proposal"),
        (changed("proposal_RK", (3, 3), 4), "proposal"),
        (changed("proposal_RK", (1, 2), 4), "an accepted proposal"),
        (trace_with_rounds([], length=0, answer_start=0), "no tokens"),
    ],
)
def test_an_invalid_field_is_refused_and_named(trace: Trace, word: str) -> None:
    for refuse in (lambda: check(trace), lambda: from_bytes(to_bytes(trace))):
        with pytest.raises(TraceError, match=word):
            refuse()


def test_plain_fields_of_a_wrong_type_are_refused() -> None:
    tensors = safetensors.torch.load(to_bytes(a_trace()))
    about = json.loads(bytes(tensors["about"].tolist()))
    for changes in (
        {"domain": 3},
        {"first_position": 1.5},
        {"answer_start": True},
        {"extra": 1},
        {"temperature": "1"},
        {"temperature": 10**400},
    ):
        text = json.dumps({**about, **changes}).encode()
        with pytest.raises(TraceError):
            from_bytes(safetensors.torch.save({**tensors, "about": torch.tensor(list(text), dtype=torch.uint8)}))
    with pytest.raises(TraceError, match="tensors"):
        from_bytes(safetensors.torch.save({**tensors, "more": torch.zeros(1)}))


def test_damaged_bytes_are_refused_or_give_a_valid_trace() -> None:
    good = to_bytes(a_trace())
    gen = torch.Generator().manual_seed(0)
    refused = 0
    cases = [good[:cut] for cut in range(0, len(good), 37)]
    for place, bits in zip(
        torch.randint(0, len(good), (1500,), generator=gen).tolist(),
        torch.randint(1, 256, (1500,), generator=gen).tolist(),
        strict=True,
    ):
        damaged = bytearray(good)
        damaged[place] ^= bits
        cases.append(bytes(damaged))
    for data in cases:
        try:
            check(from_bytes(data))
        except TraceError:
            refused += 1
    assert refused > len(cases) / 2
