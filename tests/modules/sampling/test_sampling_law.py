"""Outputs over many keys have the target's law, two million by chi-square, and are the same whatever is proposed.

The target is a head over toy tables, so that the next token depends on the one before. Each key decodes two tokens;
proposals for the first are made in several ways, and what equals the target's own token is accepted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2
from support.toy_sampling import OPTIONS, PROMPT, Toy, reference_law

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.sampler import DenseRows
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.modules.sampling.choice import choose, choose_dense
from aurora_lit.modules.sampling.noise import gumbel
from aurora_lit.request import SamplingParams

V = 6
ROWS, CALLS = 200_000, 10
PROPOSED_BY = ("the draft's argmax", "the draft with the target's noise", "other noise")


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


class TwoTokens:
    """Decodes two tokens for each key, at a temperature."""

    def __init__(self, temperature: float) -> None:
        self.toy, self.temperature = Toy.random(V=V, seed=5, dtype=torch.float32), temperature
        self._head = torch.nn.Linear(V + 1, V, bias=False)  # its inputs are one-hot: no token yet, or the token before
        with torch.no_grad():
            self._head.weight.copy_(torch.cat([self.toy.target[0][None], self.toy.target[1]]).T)
        self._packed = PackedLinear(self._head, WeightFormat.FP32) if native.library() is not None else None

    def _chosen(self, before_N: torch.Tensor, key_N: torch.Tensor, position: int) -> torch.Tensor:
        x_NI = torch.nn.functional.one_hot(before_N, V + 1).float()
        draws = {
            "temperature_N": torch.full((len(key_N),), self.temperature),
            "key_N": key_N,
            "position_N": torch.full_like(key_N, position),
        }
        if self._packed is None:
            return choose(x_NI @ self._head.weight.detach().T, **draws)
        return self._packed.choose(x_NI, **draws, dense_N=torch.full_like(key_N, -1))[0]

    def plain(self, key_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first_N = self._chosen(torch.zeros_like(key_N), key_N, 0)
        return first_N, self._chosen(first_N + 1, key_N, 1)

    def speculative(
        self, key_N: torch.Tensor, proposal_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both tokens, and which proposals are accepted: their second token is decided in the first pass."""
        first_N, second_N = self._chosen(torch.zeros_like(key_N), key_N, 0), self._chosen(proposal_N + 1, key_N, 1)
        is_accepted_N = proposal_N == first_N
        rest = (~is_accepted_N).nonzero()[:, 0]
        second_N[rest] = self._chosen(first_N[rest] + 1, key_N[rest], 1)
        return first_N, second_N, is_accepted_N


def keys(call: int) -> torch.Tensor:
    return torch.arange(call * ROWS, (call + 1) * ROWS) * 6_364_136_223_846_793_005


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_two_million_pairs_of_tokens_have_the_law_of_the_targets_softmax(temperature: float) -> None:
    decoder, count = TwoTokens(temperature), torch.zeros(V * V, dtype=torch.float64)
    for call in range(CALLS):
        first_N, second_N = decoder.plain(keys(call))
        count += torch.bincount(first_N * V + second_N, minlength=V * V)
    assert count.sum() == ROWS * CALLS >= 2e6
    law_VV = reference_law(decoder.toy, SamplingParams(max_tokens=2, temperature=temperature)).sum(-1)
    assert in_law(count.view(V, V), law_VV)


@pytest.mark.parametrize("temperature", [pytest.param(0.6, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("by", PROPOSED_BY)
def test_pairs_are_the_same_whatever_is_proposed(by: str, temperature: float) -> None:
    """So that they have the same law."""
    decoder, key_N = TwoTokens(temperature), keys(0)
    draft_V = decoder.toy.target[0] + torch.randn(V, generator=torch.Generator().manual_seed(1))
    first_N, second_N, is_accepted_N = decoder.speculative(key_N, proposed(by, draft_V / temperature, key_N))
    assert 0.1 < is_accepted_N.float().mean() < 0.95
    plain = decoder.plain(key_N)
    assert torch.equal(first_N, plain[0])
    assert torch.equal(second_N, plain[1])


@pytest.mark.skipif(native.library() is None, reason="torch takes a row at a time; test_choice.py compares both")
@pytest.mark.parametrize(
    "name", [name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
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
            DenseRows(
                params=[plain] * rows,
                contexts=contexts,
                prompt_lengths=[len(PROMPT)] * rows,
                temperature_D=torch.full((rows,), params.temperature),
                key_D=key_N,
                position_D=torch.full((rows,), position),
            ),
        )

    contexts = [torch.tensor([*PROMPT, token]) for token in range(V)]
    for call in range(3):
        key_N = torch.arange(call * rows, (call + 1) * rows)
        first_N = chosen(toy.target[0].repeat(rows, 1), [contexts[0][:-1]] * rows, 0, key_N)
        second_N = chosen(toy.target[1][first_N], [contexts[token] for token in first_N.tolist()], 1, key_N)
        count += torch.bincount(first_N * V + second_N, minlength=V * V)
    assert in_law(count.double().view(V, V), reference_law(toy, params).sum(-1))
