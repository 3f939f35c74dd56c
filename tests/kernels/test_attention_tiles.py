"""Attention on matrix tiles: as exact as its inputs, and no query's bits depend on what is computed beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aurora_lit.kernels import native
from aurora_lit.models.kv_cache import KVCache, keys_by_position, values_by_position

pytestmark = pytest.mark.skipif(native.cache_pair(torch.bfloat16, 64) != 2, reason="no matrix tiles here")

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, N, T, D], keys and values [B, G, T, D]."""


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sequence(length: int, *, rows: int = 1, N: int = 9, G: int = 3, D: int = 64, seed: int = 0) -> Heads:
    gen = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(rows, length, heads, D, generator=gen).transpose(1, 2) for heads in (N, G, G))
    return query, key, value


def new_cache(*, slots: int = 1, G: int = 3, D: int = 64, capacity: int = 400) -> KVCache:
    return KVCache(num_layers=1, num_slots=slots, num_kv_heads=G, head_dim=D, capacity=capacity, dtype=torch.bfloat16)


def attend(
    new: Heads, cache: KVCache, *, slots: list[int], starts: list[int], scale: float = 0.2, prompts: bool = False
) -> torch.Tensor:
    """[B, T, N, D]; of prompts, or of sequences that decode."""
    return native.attend(
        *new,
        cache.keys_SGCQPE[0],
        cache.values_SGMDE[0],
        torch.tensor(slots),
        torch.tensor(starts),
        scale=scale,
        num_prompts=len(slots) if prompts else 0,
    )


def in_chunks(new: Heads, cache: KVCache, sizes: list[int], *, prompts: bool) -> torch.Tensor:
    """Attention of one sequence, computed in chunks of these sizes; [T, N, D]."""
    parts, at = [], 0
    for size in sizes:
        query, key, value = (x[:, :, at : at + size] for x in new)
        parts.append(attend((query, key, value), cache, slots=[0], starts=[at], prompts=prompts)[0])
        at += size
    return torch.cat(parts)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize(("N", "G", "D"), [(9, 3, 64), (2, 2, 32), (4, 1, 96), (12, 3, 128)])
def test_queries_and_probabilities_keep_sixteen_bits(N: int, G: int, D: int, prompts: bool) -> None:
    """The error is at most a thirtieth of the one that rounding queries and probabilities to bf16 would cause."""
    new, cache = sequence(150, N=N, G=G, D=D), new_cache(G=G, D=D)
    found = attend(new, cache, slots=[0], starts=[0], scale=D**-0.5, prompts=prompts)[0].double()
    keys = keys_by_position(cache.keys_SGCQPE[0])[0, :, :, :150].double().repeat_interleave(N // G, 0)
    values = values_by_position(cache.values_SGMDE[0])[0, :, :150].double().repeat_interleave(N // G, 0)
    future = torch.ones(150, 150).triu(1).bool()

    def exact(query_NTD: torch.Tensor, *, rounded: bool) -> torch.Tensor:
        scores = (query_NTD.double() @ keys * D**-0.5).masked_fill(future, float("-inf"))
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = p.bfloat16().double() if rounded else p
        return (weights @ values / p.sum(-1, keepdim=True)).transpose(0, 1)

    expected = exact(new[0][0], rounded=False)
    error_of_bf16 = (exact(new[0][0].bfloat16(), rounded=True) - expected).square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() < error_of_bf16 / 30
    assert (found - expected).abs().max() < 3e-5 * float(values.abs().max())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "sizes", [[1] * 320, [7] * 45 + [5], [16] * 20, [64] * 5, [300, 20], [13, 300, 7], [63, 2, 64, 190, 1]]
)
@pytest.mark.parametrize("prompts", [False, True])
def test_bits_do_not_depend_on_chunks(sizes: list[int], prompts: bool) -> None:
    new = sequence(sum(sizes))
    torch.set_num_threads(1)
    whole = attend(new, new_cache(), slots=[0], starts=[0], prompts=prompts)[0]
    torch.set_num_threads(2)
    assert torch.equal(in_chunks(new, new_cache(), sizes, prompts=prompts), whole)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 17])
def test_rows_do_not_depend_on_the_rows_beside_them(threads: int, T: int, prompts: bool) -> None:
    """Sequences of different lengths in one call, as in the engine, and each alone with one thread."""
    starts, gen = [0, 1, 30, 63, 64, 200, 319], torch.Generator().manual_seed(1)
    new, cache = sequence(T, rows=7, seed=T), new_cache(slots=7)
    cache.keys_SGCQPE[0].normal_(generator=gen)
    cache.values_SGMDE[0].normal_(generator=gen)
    slots = [4, 0, 6, 2, 1, 5, 3]
    together = attend(new, cache, slots=slots, starts=starts, prompts=prompts)
    torch.set_num_threads(3 - threads)
    for b in range(7):
        query, key, value = (x[b : b + 1] for x in new)
        one = {"slots": slots[b : b + 1], "starts": starts[b : b + 1]}
        alone = attend((query, key, value), cache, **one, prompts=prompts)
        assert torch.equal(alone[0], together[b])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_reaches_only_the_queries_that_attend_to_it(value: float, prompts: bool) -> None:
    new, cache = sequence(100), new_cache()
    expected = attend(new, cache, slots=[0], starts=[0], prompts=prompts)[0]
    for poisoned in (1, 2):
        bad = [x.clone() for x in new]
        bad[poisoned][0, 1, 70, 5] = value
        query, key, v = bad
        found = attend((query, key, v), cache, slots=[0], starts=[0], prompts=prompts)[0]
        assert torch.equal(found[:70], expected[:70])
        if poisoned == 2:
            assert found[70:, 3:6].isnan().all(), "the heads of that key-value head"
        assert torch.equal(found[70:, :3], expected[70:, :3])
        # A later request in the same slot does not see what an earlier one left behind.
        query, key, v = (x[:, :, :40] for x in new)
        again = attend((query, key, v), cache, slots=[0], starts=[0], prompts=prompts)[0]
        assert torch.equal(again, expected[:40])


def test_a_copied_prefix_has_the_bits_of_a_computed_one() -> None:
    new, cache = sequence(130), new_cache(slots=2)
    expected = attend(new, cache, slots=[0], starts=[0])[0]
    for start, length in ((0, 1), (0, 63), (0, 64), (0, 75), (0, 128), (5, 63), (63, 64), (64, 75), (65, 128)):
        cache.keys_SGCQPE[0][1].zero_()
        cache.values_SGMDE[0][1].zero_()
        cache.copy_prefix(0, 1, start)
        cache.copy_prefix(0, 1, length, start=start)
        query, key, value = (x[:, :, length:] for x in new)
        assert torch.equal(attend((query, key, value), cache, slots=[1], starts=[length])[0], expected[length:])
