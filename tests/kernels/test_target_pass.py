"""A round's pass in one native call gives what separate calls give: states, the target's own tokens, features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB, save_model

from aurora_lit.kernels import native
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.models import loading
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import keys_by_position, values_by_position
from aurora_lit.models.loading import load_target

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

CAPACITY = 64
CHAIN = [-1, 0, 1, 2]
TREE = [-1, 0, 0, 1]


def rows_of(seed: int) -> dict[str, list[list[int]]]:
    """Tokens of a chain, a tree, a single column and a prompt."""
    gen = torch.Generator().manual_seed(seed)
    return {"tokens": [torch.randint(VOCAB, (width,), generator=gen).tolist() for width in (4, 4, 1, 9)]}


@pytest.fixture(
    scope="module", params=["llama fp32", "llama bf16", "llama int8", "llama int4", "qwen3 fp32", "qwen3 int4"]
)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """With an embedding that is a plain table, and in qwen3's case one that is packed."""
    family, precision = request.param.split()
    folder: Path = save_model(family, tmp_path_factory.mktemp(family))
    if family == "llama":
        return load_target(folder, precision=precision)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "_SMALLEST_BYTES", 0)
        return load_target(folder, precision=precision, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("drawn", "skips_prompts_last"), [(False, False), (True, False), (False, True)])
@torch.no_grad()
def test_one_call_gives_what_separate_calls_give(target: Target, drawn: bool, skips_prompts_last: bool) -> None:
    """Two passes, so that the second one reads what the first one wrote, into buffers that are used again."""
    alone, together = (target.make_kv_cache(num_slots=5, capacity=CAPACITY) for _ in range(2))
    aux_SLF = torch.full((5, CAPACITY, 3 * target.hidden_size), 7.0, dtype=target.kv_dtype)
    last_SLH = torch.full((5, CAPACITY + 1, target.hidden_size), 7.0, dtype=torch.bfloat16)
    run = target.make_pass(together, aux_SLF=aux_SLF, last_SLH=last_SLH)
    assert run is not None
    slots, parents = [4, 0, 2, 1], [CHAIN, TREE, CHAIN]
    num_chosen = 4 + 4 + 1
    for starts, seed in (([0, 0, 0, 0], 0), ([4, 4, 1, 9], 1)):
        tokens = rows_of(seed)["tokens"]
        draws = ColumnDraws([0.0, 0.7, 1.3] * 3, range(100, 109), [5, 6, 7, 8, 5, 6, 6, 7, 3])
        result = run(
            tokens,
            slots=slots,
            starts=starts,
            parents=parents,
            num_prompts=1,
            num_chosen=num_chosen,
            keeps_last=[True, False, True, not skips_prompts_last],
            skips_prompts_last=skips_prompts_last,
            draws=draws if drawn else None,
        )
        aux_NF, last_NH = target.forward_ragged(
            torch.tensor([token for row in tokens for token in row]),
            widths=[4, 4, 1, 9],
            kv_cache=alone,
            slots_B=torch.tensor(slots),
            starts_B=torch.tensor(starts),
            parents_BT=torch.tensor(parents),
            num_prompts=1,
        )
        assert torch.equal(result.aux_NF, aux_NF)
        computed = slice(num_chosen if skips_prompts_last else None)
        assert torch.equal(result.last_NH[computed], last_NH[computed])
        if drawn:
            expected_N, _ = target.choose(
                last_NH[:num_chosen],
                temperature_N=torch.tensor(draws.temperatures),
                key_N=torch.tensor(draws.keys),
                position_N=torch.tensor(draws.positions),
            )
        else:
            expected_N = target.greedy_tokens(last_NH[:num_chosen])
        assert result.own_tokens == expected_N.tolist()
        first = 0
        for slot, start, row in zip(slots, starts, tokens, strict=True):
            for table, states in ((aux_SLF, aux_NF), (last_SLH, last_NH)):
                stored = table[slot, start : start + len(row)]
                expected = states[first : first + len(row)].to(table.dtype)
                is_kept = table is aux_SLF or (slot != slots[1] and not (skips_prompts_last and slot == slots[3]))
                assert torch.equal(stored, expected if is_kept else torch.full_like(expected, 7.0))
            first += len(row)
    for table in (aux_SLF, last_SLH):
        assert (table[3] == 7.0).all(), "nothing is stored in a slot without a row"
        assert (table[2, 2:] == 7.0).all(), "nor beyond a row's columns"


@pytest.mark.parametrize("keeps_last", [True, False])
@torch.no_grad()
def test_of_a_kept_path_all_is_stored_that_a_pass_over_it_stores(target: Target, keeps_last: bool) -> None:
    """A path of several columns that are not in their places, as copies beside the draft's may have."""
    tree, path, kept = [-1, 0, 0, 2, 2, 4], [0, 2, 4, 5], []
    gen = torch.Generator().manual_seed(4)
    before, tokens = (torch.randint(VOCAB, (width,), generator=gen).tolist() for width in (5, 6))
    for branches in (True, False):
        kv_cache = target.make_kv_cache(num_slots=2, capacity=CAPACITY)
        aux_SLF = torch.full((2, CAPACITY, 3 * target.hidden_size), 7.0, dtype=target.kv_dtype)
        last_SLH = torch.full((2, CAPACITY, target.hidden_size), 7.0, dtype=torch.bfloat16)
        run = target.make_pass(kv_cache, aux_SLF=aux_SLF, last_SLH=last_SLH)
        assert run is not None
        run([before], slots=[1], starts=[0], keeps_last=[True])
        if branches:
            run([tokens], slots=[1], starts=[5], parents=[tree], keeps_last=[keeps_last])
            run.keep_path(path, slot=1, start=5, keeps_last=keeps_last)
        else:
            run([[tokens[column] for column in path]], slots=[1], starts=[5], keeps_last=[keeps_last])
        end = 5 + len(path)
        kept.append([aux_SLF[1, :end], last_SLH[1, :end]])
        kept[-1] += [keys_by_position(keys)[1, ..., :end] for keys in kv_cache.keys_SGCQPE]
        kept[-1] += [values_by_position(values)[1, :, :end] for values in kv_cache.values_SGMDE]
    assert all(map(torch.equal, *kept))


@torch.no_grad()
def test_prompts_alone_need_no_last_states(target: Target) -> None:
    whole, skipping = (target.make_kv_cache(num_slots=2, capacity=CAPACITY) for _ in range(2))
    features = [torch.zeros(2, CAPACITY, 3 * target.hidden_size) for _ in range(2)]
    states = []
    for kv_cache, aux_SLF, skips in ((whole, features[0], False), (skipping, features[1], True)):
        run = target.make_pass(kv_cache, aux_SLF=aux_SLF, last_SLH=None)
        assert run is not None
        prompts = [list(range(1, 30)), [5, 6, 7]]
        run(prompts, slots=[0, 1], starts=[0, 0], num_prompts=2, skips_prompts_last=skips)
        states.append(run([[3], [4]], slots=[0, 1], starts=[29, 3], num_chosen=2).last_NH.clone())
    assert torch.equal(*states), "what follows reads the same keys and values"
    assert torch.equal(*features)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused_and_nothing_is_computed(target: Target, token: int) -> None:
    kv_cache = target.make_kv_cache(num_slots=1, capacity=CAPACITY)
    run = target.make_pass(kv_cache, aux_SLF=None, last_SLH=None)
    assert run is not None
    before = kv_cache.keys_SGCQPE[0].clone()
    with pytest.raises(IndexError, match="not in the vocabulary"):
        run([[1, token]], slots=[0], starts=[0], num_chosen=1)
    assert torch.equal(kv_cache.keys_SGCQPE[0], before)


def test_what_one_call_cannot_do_is_left_to_separate_calls(tmp_path: Path) -> None:
    """Layers that are not fused; and a head whose logits are changed afterwards."""
    gemma = load_target(save_model("gemma", tmp_path / "gemma"), precision="fp32")
    capped = load_target(save_model("llama", tmp_path / "llama"), precision="fp32")
    capped.logit_transform = capped.logit_transform.__class__(bias_V=None, softcap=5.0)
    for target in (gemma, capped):
        kv_cache = target.make_kv_cache(num_slots=1, capacity=CAPACITY)
        assert target.make_pass(kv_cache, aux_SLF=None, last_SLH=None) is None
