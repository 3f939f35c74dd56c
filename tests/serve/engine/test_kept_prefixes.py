"""Prefixes whose slots others have taken: bounded, apart by scope, and with the bits that computing them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import VOCAB, make_engine, random_draft, run, save_model

from aurora_lit.kernels import native
from aurora_lit.kernels.native import KEY_BLOCK
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache, keys_by_position, values_by_position
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Client, Request, SamplingParams, Scope
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.prefix_cache import Prefix, PrefixCache
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace, to_bytes

LONG = torch.randint(VOCAB, (200,), generator=torch.Generator().manual_seed(4)).tolist()
B = KEY_BLOCK


def ask(name: str, *own: int, shared: int = 150, first: int | None = None, **changes: Any) -> Request:
    """The first tokens of LONG, the very first one replaced if another is named, and its own."""
    prompt = [*([] if first is None else [first]), *LONG[first is not None : shared], *own]
    fields: dict[str, Any] = {"params": SamplingParams(max_tokens=6, temperature=0.0), **changes}
    return Request(request_id=name, prompt_ids=tuple(prompt), **fields)


class Served:
    """An engine with one slot, its answers and its traces."""

    def __init__(self, target: Target, draft: Eagle3Draft | None = None, **changes: Any) -> None:
        self.traces: dict[str, bytes] = {}
        recorder = TraceRecorder(self._keep, hidden_size=target.hidden_size)
        fields = {"max_batch_size": 1, "max_seq_len": 240, "prefill_chunk_tokens": 64, "max_draft_tokens": 3}
        self.engine: Engine = make_engine(target, draft, observer=recorder, **{**fields, **changes})

    def _keep(self, trace: Trace) -> None:
        self.traces[trace.request_id] = to_bytes(trace)

    def __call__(self, *requests: Request) -> list[tuple[list[int], int]]:
        """Each request's answer, and how much of its prompt was not computed; one after the other."""
        results = []
        for request in requests:
            before = self.engine.counters.cached_tokens
            answer = run(self.engine, [request])[request.request_id].token_ids
            results.append((answer, self.engine.counters.cached_tokens - before))
        return results

    def cached(self, *requests: Request) -> list[int]:
        return [cached for _, cached in self(*requests)]


def in_slot(target: Target) -> int:
    """Of a prompt's 150 tokens, those that another may use while a slot has them: where prompts have an arithmetic of
    their own, not the last one, with which decoding began."""
    return 149 if target.has_prompt_arithmetic else 150


OTHER = ask("other", first=60)
"""Takes the slot, and shares nothing."""


@pytest.mark.parametrize("drafts", [True, False])
def test_outputs_and_traces_have_the_same_bits(target: Target, draft: Eagle3Draft, drafts: bool) -> None:
    """From the store; and once from the slot as far as that goes, and the rest from the store."""
    requests = [ask("a", shared=200), OTHER, ask("b", 1, 2), ask("c", shared=200), ask("d", 3, shared=64)]
    plain = Served(target, draft if drafts else None, prefix_cache_mb=0)
    store = Served(target, draft if drafts else None)
    wanted, found = plain(*requests), store(*requests)
    assert [answer for answer, _ in found] == [answer for answer, _ in wanted]
    assert [cached for _, cached in wanted] == [0] * 5
    assert [cached for _, cached in found] == [0, 0, 2 * B, 3 * B, B]
    assert store.traces.keys() == plain.traces.keys()
    if native.library() is not None:
        assert store.traces == plain.traces


def test_torch_targets_keep_prefixes_too(target: Target, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep generated tokens as well, which they compute as those of prompts."""
    monkeypatch.setattr(native, "library", lambda: None)
    torch_target = load_target(save_model("gemma2", tmp_path), precision="fp32")
    first = ask("a", shared=B - 5, params=SamplingParams(max_tokens=20, temperature=0.0))
    plain, store = Served(torch_target, prefix_cache_mb=0), Served(torch_target, random_draft(torch_target))
    answer = plain(first)[0][0]
    assert store(first, OTHER)[0][0] == answer
    again = ask("b", *answer, 1, 2, shared=B - 5)
    assert store(again) == [(plain(again)[0][0], B)]


@pytest.mark.parametrize(("size_mb", "cached"), [(1, 0), (3, 2 * B)])
def test_a_long_prefix_outlives_twenty_others_if_it_fits(target: Target, size_mb: int, cached: int) -> None:
    """Each of the twenty leaves two blocks."""
    served = Served(target, prefix_cache_mb=size_mb)
    others = [ask(str(first), first=first) for first in [*set(range(30)) - {LONG[0]}][:20]]
    assert served.cached(ask("a", 1), *others)[1:] == [0] * 20
    cache = served.engine.prefix_cache
    assert cache is not None
    assert cache.num_bytes <= size_mb << 20
    assert served.cached(ask("b", 2)) == [cached]


def test_what_is_counted_is_what_is_kept(target: Target, draft: Eagle3Draft) -> None:
    served = Served(target, draft)
    served(ask("a"), OTHER, ask("a again"))
    cache, positions = served.engine.prefix_cache, 4 * B
    assert cache is not None
    keys_and_values = 4 * 2 * target.num_kv_heads * target.head_dim * target.kv_dtype.itemsize
    drafted = 2 * draft.config.num_key_value_heads * draft.config.head_dim * target.kv_dtype.itemsize
    states = 3 * target.hidden_size * target.kv_dtype.itemsize
    assert cache.num_bytes == positions * (keys_and_values + drafted + states)


def test_nothing_is_kept_that_its_slot_still_has(target: Target) -> None:
    """A conversation that goes on where it was; what the slot loses of it is less than a block."""
    served = Served(target)
    cache = served.engine.prefix_cache
    assert cache is not None
    assert served.cached(ask("a"), ask("b", 1, shared=140), ask("c", *LONG[140:190], shared=140)) == [0, 140, 140]
    assert cache.num_bytes == 0
    served(OTHER)
    assert cache.num_bytes > 0


def test_the_last_token_of_a_prompt_of_whole_blocks_is_computed(target: Target) -> None:
    served = Served(target)
    first, other, again = served(ask("a", shared=2 * B + 1), OTHER, ask("b", shared=2 * B))
    assert again == (Served(target, prefix_cache_mb=0)(ask("b", shared=2 * B))[0][0], B)


def test_a_store_without_room_leaves_prefixes_to_the_slots(target: Target) -> None:
    served = Served(target, prefix_cache_mb=1)
    cache = served.engine.prefix_cache
    assert cache is not None
    cache._free.clear()
    assert served.cached(ask("a"), ask("b", 1), OTHER, ask("c", 2)) == [0, in_slot(target), 0, 0]
    assert cache.num_bytes == 0


def test_copies_are_made_in_one_thread(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, and found again; then all threads compute."""
    served, threads, seen = Served(target), torch.get_num_threads(), list[int]()
    copy_blocks = KVCache.copy_blocks

    def noted(*args: Any, **how: Any) -> None:
        seen.append(torch.get_num_threads())
        copy_blocks(*args, **how)

    monkeypatch.setattr(KVCache, "copy_blocks", noted)
    torch.set_num_threads(2)
    try:
        served(ask("a"), OTHER, ask("b", 1))
        assert seen == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_who_may_use_a_kept_prefix(target: Target) -> None:
    for shared_by, first, second, shares in (
        ("domain", {}, {}, True),
        ("domain", {"client": Client("a")}, {"client": Client("b")}, True),
        ("domain", {"cache_salt": "s"}, {"cache_salt": "s"}, True),
        ("domain", {"cache_salt": "s"}, {}, False),
        ("domain", {}, {"cache_salt": "s"}, False),
        ("client", {"client": Client("a")}, {"client": Client("a")}, True),
        ("client", {"client": Client("a")}, {"client": Client("b")}, False),
        ("client", {"client": Client("a"), "cache_salt": "s"}, {"client": Client("a"), "cache_salt": "t"}, False),
        ("client", {}, {}, False),
        ("domain", {"store": False}, {}, False),
        ("domain", {"store": False}, {"store": False}, False),
        ("domain", {}, {"store": False}, True),
    ):
        served = Served(target, memory_scope=shared_by)
        cached = served.cached(ask("a", **first), OTHER, ask("b", 1, **second))
        assert cached == [0, 0, 2 * B if shares else 0], (shared_by, first, second)


def test_what_a_request_that_may_not_be_stored_computed_dies_with_it(target: Target) -> None:
    """No other copies from its slot, while it runs or after; the choices of its own call do."""
    secret = {"store": False, "call": "mine", "params": SamplingParams(max_tokens=30, temperature=0.0)}
    for changes, cached in (({}, 0), ({"store": False}, 0), ({"store": False, "call": "mine"}, 150)):
        served = Served(target, max_batch_size=3)
        answers = run(served.engine, [ask("a", 1, **secret), ask("b", 2, **changes)], arrivals=[0, 8])
        assert served.engine.counters.cached_tokens == cached
        assert served.cached(ask("c", 3))[0] == (150 if changes == {} else 0), "what b has computed may be used"
        assert len(answers["a"].token_ids) == 30
        assert not {"a"} & served.traces.keys()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_drafts_keys_are_kept_but_not_those_of_weights_that_are_gone(
    target: Target, draft: Eagle3Draft, recompute: bool
) -> None:
    """Also where two prompts share a block and go on with different tokens, on which its last position depends."""

    def keys(served: Served) -> torch.Tensor:
        drafter = served.engine._drafter
        assert drafter is not None
        (keys,), (values,) = drafter._cache.keys_SGCQPE, drafter._cache.values_SGMDE
        return torch.cat([keys_by_position(keys)[0, 0].T, values_by_position(values)[0, 0]], dim=1)[: 2 * B - 1].clone()

    served = Served(target, draft)
    drafter, cache = served.engine._drafter, served.engine.prefix_cache
    assert drafter is not None
    assert cache is not None

    @torch.no_grad()
    def load(request: Request) -> int:
        """Into an empty slot; returns how much of two blocks the draft has to compute."""
        places = cache.find(Scope("", ""), request.prompt_ids)
        drafter.forget(0)
        cache.copy(Prefix(len(places) * B, places=places), slot=0, start=0)
        assert len(places) == 2
        return drafter.num_uncached(0, 2 * B)

    prompts = [ask("a"), ask("b", *LONG[100:190], shared=B)]
    computed = []
    for request in prompts:
        served(request)
        computed.append(keys(served))
    assert not torch.equal(*computed)
    served(OTHER)
    if recompute:
        served.engine.swap_draft(draft, version="again", recompute=True)
    for request, wanted in zip(prompts, computed, strict=True):
        assert load(request) == (2 * B - 1 if recompute else 0)
        assert torch.equal(keys(served), wanted) != recompute
    served(OTHER, ask("c", 5))
    assert torch.equal(keys(served), computed[0])
    served(OTHER)  # what was computed anew is kept
    assert load(prompts[0]) == 0
    drafter._num_cached[0] = 150
    drafter.load_blocks(0, cache.find(Scope("", ""), prompts[0].prompt_ids))
    assert drafter._num_cached[0] == 150, "the slot has more"


def test_a_place_in_the_store_does_not_keep_the_drafts_keys_of_an_earlier_prompt(
    target: Target, draft: Eagle3Draft
) -> None:
    """The second prompt was never drafted for."""
    served = Served(target, draft)
    drafter, cache = served.engine._drafter, served.engine.prefix_cache
    assert drafter is not None
    assert cache is not None
    cache._free = [0, 1]
    params = SamplingParams(max_tokens=6, temperature=0.0, speculate=False)
    served(ask("drafted"), ask("not drafted", first=60, params=params), ask("another", first=59))
    places = cache.find(Scope("", ""), [60, *LONG[1:150]])
    assert sorted(places) == [0, 1]
    drafter.forget(0)
    with torch.no_grad():
        cache.copy(Prefix(2 * B, places=places), slot=0, start=0)
    assert drafter.num_uncached(0, 2 * B) == 2 * B - 1


def test_what_is_found_has_been_used(target: Target) -> None:
    """The oldest prefix stays if it was asked for since, and the one after it goes."""
    served = Served(target)
    cache = served.engine.prefix_cache
    assert cache is not None
    cache._free = list(range(4))
    assert served.cached(ask("a"), ask("b", first=60), ask("a again", 1, store=False)) == [0, 0, 2 * B]
    assert served.cached(ask("c", first=59), ask("d", first=58)) == [0, 0]
    assert len(cache.find(Scope("", ""), LONG[:150])) == 2
    assert not cache.find(Scope("", ""), [60, *LONG[1:150]])


def test_a_draft_of_another_shape_computes_its_own_keys(target: Target, draft: Eagle3Draft) -> None:
    served, plain = Served(target, draft), Served(target, prefix_cache_mb=0)
    served(ask("a"), OTHER)
    served.engine.swap_draft(random_draft(target, seed=5, num_key_value_heads=2), version="wider")
    for request in (ask("b", 1), OTHER, ask("c", 2)):
        assert served(request)[0] == (plain(request)[0][0], 2 * B)


def test_what_a_cancelled_prompt_has_computed_is_kept(target: Target) -> None:
    served, plain = Served(target), Served(target, prefix_cache_mb=0)
    served.engine.submit(ask("a", shared=200))
    for _ in range(2):
        served.engine.round()
    served.engine.cancel("a")
    served(OTHER)
    assert served(ask("b", 1)) == [(plain(ask("b", 1))[0][0], 2 * B)]


def test_an_interrupt_while_blocks_are_kept_leaves_no_false_prefix(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, plain = Served(target), Served(target, prefix_cache_mb=0)
    served(ask("a"))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "copy_blocks", interrupted)
        served.engine.submit(OTHER)
        with pytest.raises(KeyboardInterrupt):
            served.engine.round()
    assert served(ask("b", 1), OTHER, ask("c", 2)) == [
        (answer, cached)
        for (answer, _), cached in zip(plain(ask("b", 1), OTHER, ask("c", 2)), (in_slot(target), 0, 2 * B), strict=True)
    ]


class OneLayer:
    """A target of which only its cache is used."""

    def make_kv_cache(self, **sizes: Any) -> KVCache:
        return KVCache(num_layers=1, num_kv_heads=1, head_dim=4, **sizes)

    def copy_blocks(self, *, kv_cache: KVCache, **which: Any) -> None:
        kv_cache.copy_blocks(**which)


KEPT = st.tuples(st.sampled_from(["s", "t"]), st.lists(st.integers(0, 2), min_size=1, max_size=4))
"""A scope, and the tokens of which each fills a block."""


@settings(deadline=None, max_examples=60)
@given(st.lists(KEPT, max_size=24), st.integers(0, 6))
def test_the_store_returns_what_was_kept_for_the_same_tokens_and_forgets_the_oldest(
    kept: list[tuple[str, list[int]]], capacity: int
) -> None:
    """Each block's states tell its scope and all tokens up to it."""
    target: Any = OneLayer()
    states_SLX = torch.zeros(2, 4 * B, 6, dtype=torch.int64)
    kv_cache = target.make_kv_cache(num_slots=2, capacity=4 * B)
    block_bytes = B * (2 * 4 * 4 + 6 * 8)
    cache = PrefixCache(target, kv_cache, drafter=None, states=[states_SLX], capacity_bytes=capacity * block_bytes)
    used: list[tuple[str, list[int]]] = []  # all blocks, the last used at the end
    for salt, blocks in kept:
        chains = [(salt, blocks[:end]) for end in range(1, len(blocks) + 1)]
        for at, (_, chain) in enumerate(chains):
            told = [ord(salt), len(chain), *chain]
            states_SLX[0, at * B : (at + 1) * B] = torch.tensor([*told, *[9] * (6 - len(told))])
        cache.keep(Scope("", salt), [token for token in blocks for _ in range(B)] + [7] * 5, slot=0)
        used = [each for each in used if each not in chains]
        used = [*(used[-max(0, capacity - len(chains)) :] if capacity > len(chains) else []), *chains[:capacity][::-1]]
        assert cache.num_bytes == len(used) * block_bytes <= capacity * block_bytes
        for other_salt, other in kept:
            expected = [other[:end] for end in range(1, len(other) + 1) if (other_salt, other[:end]) in used]
            places = cache._blocks.copy()
            found = cache.find(Scope("", other_salt), [token for token in other for _ in range(B)])
            cache._blocks = places  # looking is no use here
            assert len(found) == len(expected)
            cache.copy(Prefix(len(found) * B, places=found), slot=1, start=0) if found else None
            for at, chain in enumerate(expected):
                told = [ord(other_salt), len(chain), *chain]
                assert states_SLX[1, at * B : (at + 1) * B].unique(dim=0).tolist() == [[*told, *[9] * (6 - len(told))]]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_either_layout_come_back_as_they_were(dtype: torch.dtype, on_gpu: bool) -> None:
    """On a GPU all keys of a slot are one block."""
    sizes: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 32, "dtype": dtype}
    cache = KVCache(num_slots=2, capacity=4 * B, **sizes)
    pool = KVCache(num_slots=6, capacity=B, is_pool=True, **sizes)
    if on_gpu:
        cache.keys_SGCQPE = [torch.zeros(2, 3, 1, 32, 4 * B, 1, dtype=dtype) for _ in range(2)]
        cache.values_SGMDE = [torch.zeros(2, 3, 4 * B, 32, 1, dtype=dtype) for _ in range(2)]
        pool.keys_SGCQPE = [torch.zeros(6, 3, 1, 32, B, 1, dtype=dtype) for _ in range(2)]
        pool.values_SGMDE = [torch.zeros(6, 3, B, 32, 1, dtype=dtype) for _ in range(2)]
    tables = [*cache.keys_SGCQPE, *cache.values_SGMDE]
    for table in tables:
        table.normal_()
    cache.copy_blocks(pool, slot=0, first=1, places=[4, 5, 0], to_pool=True)
    cache.copy_blocks(pool, slot=1, first=1, places=[4, 5, 0], to_pool=False)
    for keys, values in zip(cache.keys_SGCQPE, cache.values_SGMDE, strict=True):
        for by_position in (keys_by_position(keys).transpose(2, 3), values_by_position(values)):
            assert torch.equal(by_position[0, :, B:], by_position[1, :, B:])
            assert not torch.equal(by_position[0, :, :B], by_position[1, :, :B])
