"""Outputs over many keys have the law of plain decoding, whatever is proposed: two million by chi-square.

The target is a head over toy tables, so that the next token depends on the one before. Each key decodes two tokens with
a proposal for the first, in one of several ways; `judge` accepts what equals the target's own token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from support.toy_sampling import OPTIONS, PROMPT, Toy, reference_law

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.modules.sampling.choice import choose, choose_dense
from aurora_lit.modules.sampling.noise import gumbel
from aurora_lit.request import SamplingParams

V = 6
ROWS, CALLS = 200_000, 10
PROPOSED_BY = ("nothing", "the draft's argmax", "the draft with the target's noise", "other noise")


def in_law(count_VV: torch.Tensor, law_VV: torch.Tensor) -> bool:
    expected, count = law_VV.flatten() * count_VV.sum(), count_VV.flatten()
    assert (count[expected == 0] == 0).all(), "a token that the options remove was drawn"
    cells = expected > 5
    statistic = ((count - expected)[cells] ** 2 / expected[cells]).sum().item()
    return bool(chi2.sf(statistic, int(cells.sum()) - 1) > 1e-4)


def proposed(by: str, logits_V: torch.Tensor, key_N: torch.Tensor) -> torch.Tensor:
    """A first token for each key, by a draft with these logits."""
    if by == "the draft with the target's noise":
        return (logits_V + gumbel(key_N, torch.zeros_like(key_N), torch.arange(V))).argmax(-1)
    if by == "other noise":
        return (logits_V + gumbel(key_N + 10**9, torch.zeros_like(key_N), torch.arange(V))).argmax(-1)
    return torch.full_like(key_N, int(logits_V.argmax()))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("by", PROPOSED_BY)
def test_two_million_pairs_of_tokens_have_the_law_of_the_targets_softmax(by: str, temperature: float) -> None:
    """The second token is decided in the first pass where the proposal is accepted, else in a later one."""
    params = SamplingParams(max_tokens=2, temperature=temperature)
    toy = Toy.random(V=V, seed=5, dtype=torch.float32)
    draft_V = toy.target[0] + torch.randn(V, generator=torch.Generator().manual_seed(1))
    head = torch.nn.Linear(V + 1, V, bias=False)  # its inputs are one-hot: no token yet, or the token before
    with torch.no_grad():
        head.weight.copy_(torch.cat([toy.target[0][None], toy.target[1]]).T)
    packed = PackedLinear(head, WeightFormat.FP32) if native.library() is not None else None

    def chosen(before_N: torch.Tensor, key_N: torch.Tensor, position: int) -> torch.Tensor:
        x_NI = torch.nn.functional.one_hot(before_N, V + 1).float()
        draws = {
            "temperature_N": torch.full((len(key_N),), temperature),
            "key_N": key_N,
            "position_N": torch.full_like(key_N, position),
        }
        if packed is None:
            return choose(x_NI @ head.weight.detach().T, **draws)
        return packed.choose(x_NI, **draws, dense_N=torch.full_like(key_N, -1))[0]

    count, accepted = torch.zeros(V * V, dtype=torch.float64), 0
    for call in range(CALLS):
        key_N = torch.arange(call * ROWS, (call + 1) * ROWS) * 6_364_136_223_846_793_005
        first_N = chosen(torch.zeros_like(key_N), key_N, 0)
        second_N = torch.full_like(first_N, -1)
        if by != "nothing":
            proposal_N = proposed(by, draft_V / temperature, key_N)
            in_first_pass_N = chosen(proposal_N + 1, key_N, 1)
            is_accepted_N = proposal_N == first_N
            second_N = torch.where(is_accepted_N, in_first_pass_N, second_N)
            accepted += int(is_accepted_N.sum())
        rest = (second_N < 0).nonzero()[:, 0]
        if len(rest):
            second_N[rest] = chosen(first_N[rest] + 1, key_N[rest], 1)
        count += torch.bincount(first_N * V + second_N, minlength=V * V)
    assert count.sum() == ROWS * CALLS >= 2e6
    assert in_law(count.view(V, V), reference_law(toy, params).sum(-1))
    assert by == "nothing" or 0.1 < accepted / (ROWS * CALLS) < 0.95


@pytest.mark.skipif(native.library() is None, reason="torch takes a row at a time; test_choice.py compares both")
@pytest.mark.parametrize("name", OPTIONS)
def test_pairs_with_options_have_the_law_of_their_definition(name: str) -> None:
    """Also with penalties that count the first token at the second, whether it was a proposal or not."""
    params, count = OPTIONS[name], torch.zeros(V * V)
    toy, rows = Toy.random(V=V, seed=len(name), dtype=torch.float32), 40_000
    plain = replace(params, temperature=1.0)

    def chosen(
        logits_NV: torch.Tensor, contexts: list[torch.Tensor], position: int, key_N: torch.Tensor
    ) -> torch.Tensor:
        return choose_dense(
            logits_NV.contiguous(),
            [plain] * rows,
            contexts,
            [len(PROMPT)] * rows,
            torch.full((rows,), params.temperature),
            key_N,
            torch.full((rows,), position),
        )

    contexts = [torch.tensor([*PROMPT, token]) for token in range(V)]
    for call in range(3):
        key_N = torch.arange(call * rows, (call + 1) * rows)
        first_N = chosen(toy.target[0].repeat(rows, 1), [contexts[0][:-1]] * rows, 0, key_N)
        second_N = chosen(toy.target[1][first_N], [contexts[token] for token in first_N.tolist()], 1, key_N)
        count += torch.bincount(first_N * V + second_N, minlength=V * V)
    assert in_law(count.double().view(V, V), reference_law(toy, params).sum(-1))
