"""A toy target given by tables, and a plain Python definition of every sampling option.

The reference shares no code with the package: one distribution at a time, sorted lists, float64.
"""

import math
from dataclasses import dataclass, replace

import torch

from aurora_lit.request import SamplingParams

PROMPT = (1, 3, 3)

BASE = SamplingParams(max_tokens=3)
GREEDY = replace(BASE, temperature=0.0)
OPTIONS: dict[str, SamplingParams] = {
    "plain": BASE,
    "temperature": replace(BASE, temperature=0.5),
    "high temperature": replace(BASE, temperature=1.75),
    "top_k": replace(BASE, top_k=3),
    "top_p": replace(BASE, top_p=0.7),
    "min_p": replace(BASE, min_p=0.2),
    "repetition": replace(BASE, repetition_penalty=1.5),
    "presence": replace(BASE, presence_penalty=0.9),
    "frequency": replace(BASE, frequency_penalty=0.6),
    "bias": replace(BASE, logit_bias={0: 1.5, 2: -100.0}),
    "all": replace(
        BASE,
        temperature=0.8,
        top_k=5,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        logit_bias={4: 0.7},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Logits after every prefix of up to two tokens."""

    target: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [V], [V, V], [V, V, V]

    @staticmethod
    def random(*, V: int, seed: int, dtype: torch.dtype = torch.float64) -> "Toy":
        gen = torch.Generator().manual_seed(seed)

        def table(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

        return Toy(target=(table(V), table(V, V), table(V, V, V)))

    def logits(self, prefix: tuple[int, ...]) -> torch.Tensor:
        """[V]: the target's logits after up to two tokens."""
        return self.target[len(prefix)][prefix]


def reference_p(logits_V: torch.Tensor, params: SamplingParams, *, output: tuple[int, ...]) -> list[float]:
    """The distribution of the next token after PROMPT and output, option by option."""
    z = [float(x) for x in logits_V]
    for token, value in params.logit_bias.items():
        z[token] += value
    for token in set(PROMPT) | set(output):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(output):
        z[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature == 0:
        return [float(i == max(range(len(z)), key=z.__getitem__)) for i in range(len(z))]
    p = [math.exp((x - max(z)) / params.temperature) for x in z]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=p.__getitem__, reverse=True)
    order = [i for i in order if p[i] >= params.min_p * p[order[0]]]
    if params.top_k:
        order = order[: params.top_k]
    mass, kept, before = sum(p[i] for i in order), [], 0.0
    for i in order:
        if kept and before >= params.top_p * mass:
            break
        kept.append(i)
        before += p[i]
    return [p[i] / before if i in kept else 0.0 for i in range(len(p))]


def reference_law(toy: Toy, params: SamplingParams) -> torch.Tensor:
    """[V, V, V]: the probability of every triple of first tokens under plain decoding."""
    V = len(toy.target[0])
    law = torch.zeros(V, V, V, dtype=torch.float64)
    p0 = reference_p(toy.target[0], params, output=())
    for x in range(V):
        p1 = reference_p(toy.target[1][x], params, output=(x,))
        for y in range(V):
            p2 = reference_p(toy.target[2][x, y], params, output=(x, y))
            law[x, y] = p0[x] * p1[y] * torch.tensor(p2, dtype=torch.float64)
    return law
