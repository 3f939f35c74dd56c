"""Prefixes that a slot still holds are not computed again; outputs and traces do not change by it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft, run, save_model

from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache, keys_by_position, values_by_position
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.slot_allocator import slot_capacity
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.settings import EngineSettings, MemorySettings
from aurora_lit.traces.record import Trace, to_bytes

COMMON = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def make_request(
    name: str, *own: int, shared: int = len(COMMON), store: bool = True, salt: str = "", **params: Any
) -> Request:
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, **params}
    return Request(
        request_id=name,
        prompt_ids=(*COMMON[:shared], *own),
        params=SamplingParams(**fields),
        store=store,
        cache_salt=salt,
    )


class RecordedEngine:
    """An engine, and its traces by request id."""

    def __init__(self, target: Target, draft: Eagle3Draft | None, **changes: Any) -> None:
        self.traces: dict[str, Trace] = {}
        recorder = TraceRecorder(self._keep, hidden_size=target.hidden_size)
        fields: dict[str, Any] = {"max_draft_tokens": 3, "branches": True, "observer": recorder}
        self.engine: Engine = make_engine(target, copy.deepcopy(draft), **{**fields, **changes})

    def _keep(self, trace: Trace) -> None:
        self.traces[trace.request_id] = trace.copy()

    def serve(self, *requests: Request, **how: Any) -> dict[str, list[int]]:
        return {name: answer.token_ids for name, answer in run(self.engine, requests, **how).items()}


def same_traces(one: dict[str, Trace], other: dict[str, Trace]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a.nan_to_num(7), b.nan_to_num(7)) if isinstance(a, torch.Tensor) else a == b

    return one.keys() == other.keys() and all(
        same(getattr(one[name], field), getattr(other[name], field)) for name in one for field in vars(one[name])
    )


@pytest.mark.skipif(native.library() is None, reason="torch's sums depend on how many positions are computed together")
@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize(
    ("slots", "arrivals", "cached"),
    [
        (1, [0, 0, 0], 40 + 45),  # one slot: each request keeps the prefix in it
        (3, [0, 0, 0], 40 + 40),  # together: the first is computed, the others copy; the last does not wait for 5 more
        (3, [0, 4, 40], 40 + 45),  # beside a running one, and after all have ended
        (2, [0, 1, 2], 40 + 45),
    ],
)
def test_outputs_and_traces_have_the_same_bits(
    target: Target, draft: Eagle3Draft, drafts: bool, slots: int, arrivals: list[int], cached: int
) -> None:
    """The second prompt shares 40 tokens with the first, the third 45 with the second."""
    requests = [
        make_request("a", 1, 2, 3),
        make_request("b", 5, 5, 6, 7, 8, 9, 10),
        make_request("c", 5, 5, 6, 7, 8, 1, 2, temperature=0.9, seed=3),
    ]
    how = {"max_batch_size": slots, "prefill_chunk_tokens": 64}
    plain = RecordedEngine(target, draft if drafts else None, **how, prefix_cache_mb=0)
    cache = RecordedEngine(target, draft if drafts else None, **how)
    wanted = plain.serve(*requests, arrivals=arrivals)
    assert cache.serve(*requests, arrivals=arrivals) == wanted
    assert (plain.engine.counters.cached_tokens, cache.engine.counters.cached_tokens) == (0, cached)
    assert plain.engine.counters.prompt_tokens == cache.engine.counters.prompt_tokens
    same = {name: trace.last_TH for name, trace in cache.traces.items()}
    assert same.keys() == {"a", "b", "c"}
    for name, trace in plain.traces.items():
        assert torch.equal(trace.aux_T3H, cache.traces[name].aux_T3H)
        assert torch.equal(trace.last_TH, same[name])
    assert same_traces(plain.traces, cache.traces)


def test_only_prompts_that_are_looked_for_count_as_looked_up(target: Target) -> None:
    looking, off = RecordedEngine(target, None), RecordedEngine(target, None, prefix_cache_mb=0)
    off.serve(make_request("a", 1, 2))
    looking.serve(make_request("b", 1, 2, prompt_logprobs=1), make_request("c", 1, 2, shared=14))
    assert looking.engine.counters.looked_up_tokens == off.engine.counters.looked_up_tokens == 0
    looking.serve(make_request("d", 1, 2))
    assert looking.engine.counters.looked_up_tokens == 42


def test_a_conversation_continues_from_what_was_rounded_as_a_prompt(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft)
    first = recorded.serve(make_request("a", 1))["a"]
    recorded.serve(make_request("other", shared=3, max_tokens=4))  # takes another slot: the longest unused one
    again = make_request("b", 1, *first, 9, 9)
    answer = recorded.serve(again)
    own_output = 0 if target.has_prompt_arithmetic else len(first)  # and the prompt's last token, which is decoded
    assert recorded.engine.counters.cached_tokens == 40 + own_output
    assert answer == RecordedEngine(target, draft, prefix_cache_mb=0).serve(again)


@pytest.mark.parametrize(("slots", "cached"), [(8, 20 + 49 + 49), (1, 20 + 20 + 20)])
def test_conversations_that_share_a_system_prompt_do_not_evict_each_other_while_slots_are_empty(
    target: Target, draft: Eagle3Draft, slots: int, cached: int
) -> None:
    """The second one copies the 20 tokens that they share; then each goes on in its own slot."""
    recorded = RecordedEngine(target, draft, max_batch_size=slots)
    plain = RecordedEngine(target, draft, max_batch_size=slots, prefix_cache_mb=0)
    for name, own in (("a", 1), ("b", 2), ("a again", 1), ("b again", 2)):
        request = make_request(name, *[own] * 30, shared=20)
        assert recorded.serve(request) == plain.serve(request)
    assert recorded.engine.counters.cached_tokens == cached
    held = [holder for holder in recorded.engine._allocator._sequences if holder is not None]
    assert len(held) == min(slots, 2)
    if native.library() is not None:
        assert same_traces(recorded.traces, plain.traces)


def test_the_last_prompt_token_is_always_computed(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft)
    wanted = recorded.serve(make_request("a", 1))["a"]
    assert recorded.serve(make_request("b", 1)) == {"b": wanted}
    assert recorded.engine.counters.cached_tokens == 40


@pytest.mark.parametrize(("store", "chunks", "cached"), [(True, 1, 16), (True, 2, 32), (False, 2, 0), (True, 0, 0)])
def test_what_was_read_of_a_cancelled_prompt_is_kept_for_the_next_request(
    target: Target, draft: Eagle3Draft, store: bool, chunks: int, cached: int
) -> None:
    """Not with `store: false`; one that waits leaves nothing."""
    plain = RecordedEngine(target, draft, prefix_cache_mb=0).serve(make_request("next", 1))
    recorded = RecordedEngine(target, draft, max_batch_size=1, prefill_chunk_tokens=16)
    engine = recorded.engine
    engine.submit(make_request("left", 1, store=store))
    for _ in range(chunks):
        assert engine.round() == []
    assert sum(sequence.prefilled for sequence in engine._prefill.sequences) == 16 * chunks
    engine.cancel("left")
    assert not engine.has_work
    assert recorded.serve(make_request("next", 1)) == plain
    assert engine.counters.cached_tokens == cached


def test_a_prefix_is_copied_only_between_requests_with_the_same_salt(target: Target, draft: Eagle3Draft) -> None:
    """In the same slot, beside it, after it, and together."""
    plain = RecordedEngine(target, draft, prefix_cache_mb=0).serve(make_request("a", 1), make_request("b", 2, 3))
    for slots, arrivals in ((1, [0, 0]), (2, [0, 4]), (2, [0, 40]), (2, [0, 0])):
        for first, second, cached in (("", "", 40), ("s", "s", 40), ("s", "t", 0), ("s", "", 0), ("", "s", 0)):
            requests = [make_request("a", 1, salt=first), make_request("b", 2, 3, salt=second)]
            recorded = RecordedEngine(target, draft, max_batch_size=slots, prefill_chunk_tokens=64)
            assert recorded.serve(*requests, arrivals=arrivals) == plain
            assert recorded.engine.counters.cached_tokens == cached, (slots, arrivals, first, second)


def test_a_salt_is_no_part_of_a_trace(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft)
    recorded.serve(make_request("a", 1, salt="pepper"))
    assert b"pepper" not in to_bytes(recorded.traces["a"])


def test_a_salted_prompt_is_found_behind_a_longer_one_with_another_salt(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft)
    recorded.serve(make_request("mine", 1, shared=30, salt="s"), make_request("other", 1, salt="t"))
    recorded.serve(make_request("again", 2, salt="s"))
    assert recorded.engine.counters.cached_tokens == 30


def test_prompts_with_log_probabilities_are_computed_in_full(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft)
    first = run(recorded.engine, [make_request("a", 1, prompt_logprobs=1)])["a"]
    second = run(recorded.engine, [make_request("b", 1, prompt_logprobs=1)])["b"]
    assert first.prompt_logprobs == second.prompt_logprobs
    assert recorded.engine.counters.cached_tokens == 0


def test_the_prefix_that_a_cancelled_request_computed_is_used(target: Target, draft: Eagle3Draft) -> None:
    plain = RecordedEngine(target, draft, prefix_cache_mb=0).serve(make_request("b", 2))
    for rounds in (1, 2, 6):
        recorded = RecordedEngine(target, draft, prefill_chunk_tokens=20, max_batch_size=1)
        recorded.engine.submit(make_request("a", 1))
        for _ in range(rounds):
            recorded.engine.round()
        recorded.engine.cancel("a")
        assert recorded.serve(make_request("b", 2)) == plain
        assert recorded.engine.counters.cached_tokens == min(20 * rounds, 40)


def test_an_interrupt_while_a_request_is_admitted_keeps_no_slot_and_leaves_no_false_prefix(
    target: Target, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C in a notebook: the table of tokens has the new prompt, and the slot the old one's keys and values."""
    recorded = RecordedEngine(target, draft, max_batch_size=1)
    recorded.serve(make_request("old", 1))
    new = make_request("new", *COMMON[::-1], shared=0)

    def interrupted(slot: int, length: int) -> None:
        raise KeyboardInterrupt

    drafter = recorded.engine._drafter
    assert drafter is not None
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "keep_prefix", interrupted)
        recorded.engine.submit(new)
        with pytest.raises(KeyboardInterrupt):
            recorded.engine.round()
        recorded.engine.cancel("new")
    assert not recorded.engine.has_work
    assert recorded.serve(new) == RecordedEngine(target, draft, prefix_cache_mb=0).serve(new)
    assert recorded.engine.counters.cached_tokens == 0


def test_the_draft_is_swapped_between_two_requests_with_a_common_prefix(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft)
    recorded.serve(make_request("a", 1))
    recorded.engine.swap_draft(random_draft(target, seed=5, num_key_value_heads=2), version="wider")
    assert recorded.serve(make_request("b", 2)) == RecordedEngine(target, None, prefix_cache_mb=0).serve(
        make_request("b", 2)
    )
    assert recorded.engine.counters.cached_tokens == 40


def test_short_common_prefixes_are_computed(target: Target) -> None:
    recorded = RecordedEngine(target, None)
    recorded.serve(make_request("a", 1), make_request("b", *[7] * 30, shared=15))
    assert recorded.engine.counters.cached_tokens == 0


def test_the_draft_cache_of_a_copied_prefix_is_copied(target: Target, draft: Eagle3Draft) -> None:
    recorded = RecordedEngine(target, draft, max_batch_size=2)
    recorded.serve(make_request("a", 1), make_request("b", 2), arrivals=[0, 5])
    drafter = recorded.engine._drafter
    assert drafter is not None
    with torch.no_grad():
        keys = [keys_by_position(k).clone() for k in drafter._cache.keys_SGCQPE]
    assert drafter._num_cached[0] >= 40
    assert torch.equal(keys[0][0, ..., :39], keys[0][1, ..., :39])
    drafter._num_cached[1] = 0
    drafter.copy_prefix(0, 1, 30)
    assert drafter._num_cached[1] == 29, "nothing of it is computed again; the last one depends on the next token"


def test_of_a_prefix_only_what_the_slot_lacks_is_copied(
    target: Target, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the draft keeps what it has read, where the other slot's request was never drafted for."""
    copied: list[tuple[int, ...]] = []
    copy_prefix = KVCache.copy_prefix

    def noted(self: KVCache, source: int, slot: int, length: int, **how: int) -> None:
        copied.append((source, slot, length, how.get("start", 0)))
        copy_prefix(self, source, slot, length, **how)

    monkeypatch.setattr(KVCache, "copy_prefix", noted)
    requests = [
        make_request("first", 1),
        make_request("beside it", *[5] * 6, max_tokens=45, speculate=False),
        make_request("in the slot of the first", *[5] * 5, 7),
    ]
    arrivals = [0, 0, 30]
    recorded = RecordedEngine(target, draft, max_batch_size=2)
    plain = RecordedEngine(target, None, max_batch_size=2, prefix_cache_mb=0)
    assert recorded.serve(*requests, arrivals=arrivals) == plain.serve(*requests, arrivals=arrivals)
    assert copied[-1] == (1, 0, 45, 40)
    drafter = recorded.engine._drafter
    assert drafter is not None
    drafter._num_cached[:] = [39, 0]
    drafter.copy_prefix(1, 0, 45)
    assert drafter._num_cached[0] == 39


def test_nor_are_positions_copied_that_the_slot_has_in_a_block_with_others() -> None:
    """On a GPU all keys of a slot are one block."""
    cache = KVCache(num_layers=1, num_slots=2, num_kv_heads=1, head_dim=4, capacity=256)
    (keys,), (values,) = cache.keys_SGCQPE, cache.values_SGMDE
    for each in (keys, values):
        each[0] = 1.0
    block = native.KEY_BLOCK
    cache.copy_prefix(0, 1, block + 30, start=block + 10)
    for each_L in (keys_by_position(keys[1:])[0, 0, 0], values_by_position(values[1:])[0, 0, :, 0]):
        assert each_L.nonzero().flatten().tolist() == list(range(block + 10, block + 30))


def test_prefixes_are_copied_without_native_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    target = load_target(save_model("gemma2", tmp_path), precision="fp32")
    requests = [make_request("a", 1, 2, 3), make_request("b", 5, 5, 6)]
    recorded = RecordedEngine(target, random_draft(target), branches=False, prefill_chunk_tokens=64)
    assert recorded.serve(*requests) == RecordedEngine(target, None, branches=False, prefix_cache_mb=0).serve(*requests)
    assert recorded.engine.counters.cached_tokens == 40


def test_a_slot_has_room_for_the_proposals_of_a_round(target: Target) -> None:
    """Those of the draft and beside them, or the copies, and the last committed token."""
    nothing, memory = MemorySettings(capacity_mb=0), MemorySettings(scope="domain")
    for draft, lookup, remembers, capacity in (
        (4, False, nothing, 109),
        (8, False, nothing, 117),
        (4, True, nothing, 116),
        (4, False, memory, 116),
        (8, True, memory, 117),
    ):
        settings = EngineSettings(max_seq_len=100, max_draft_tokens=draft, lookup=lookup)
        assert slot_capacity(settings, remembers) == capacity
    assert slot_capacity(replace(settings, speculate=False), memory) == 117
    assert make_engine(target, max_seq_len=60, copied_tokens=15).slot_capacity == 76
