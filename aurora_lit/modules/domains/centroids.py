"""A prompt's embedding, the clusters of embeddings at one moment, and which of them one belongs to. Nothing is learned.

The learner has clusters that change with every request (modules/domains/clusters.py) and publishes them from time to
time (drafts/centroid_file.py); the engine assigns requests by what was published. Both use the embedding and the
distance defined here, so that both find the same domain.

    assigner = DomainAssigner(centroids, version=12)
    assigner.assign(pool_prompt(aux_TE, prompt_length))     # "auto-3"; "" for an outlier

Shapes: P positions that are read, E embedding (three hidden states side by side), D clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

UNKNOWN = ""
"""The domain of outliers, and of all requests while there are no domains."""
AUTO_PREFIX = "auto-"
"""Begins the names of domains without a label. A client's label with this prefix is ignored."""

MAX_POOLED_POSITIONS = 128
"""Positions that a mean is taken of at most."""
RECENCY = 32.0
"""Positions over which the weight of a position falls to 1/e of that of a later one."""


def client_label(label: str) -> str:
    """A client's label, if it may name a domain; UNKNOWN for none and for one with the reserved prefix."""
    return UNKNOWN if label.startswith(AUTO_PREFIX) else label


def pool_prompt(aux_TE: Tensor, prompt_length: int) -> Tensor | None:
    """Mean of the auxiliary states at a prompt's last positions [E]; None if it has fewer than three tokens.

    A position's weight falls exponentially with its distance from the prompt's end, because what is asked stands there:
    before it come instructions and examples that all requests of a program share, and by which its kinds of requests
    cannot be told apart (docs/results/domains.md). Weights are rounded to the states' type, and so is the sum, once,
    which is accumulated in fp32; the mean is fp32.

    - The first position is left out: models use it as an attention sink, and its large values would dominate the mean.
    - The last one is left out too. Serving needs the domain before the first decoding round, and it is this round that
      computes the prompt's last token.
    - At most MAX_POOLED_POSITIONS are read; those before have a fiftieth of the weight together. So the longest prompt
      costs the engine some 54 µs.

    `aux_TE`: states of the prompt's positions, bf16 or fp32; more positions may follow.
    """
    last = prompt_length - 2
    if last < 1:
        return None
    positions_P = torch.arange(max(1, last + 1 - MAX_POOLED_POSITIONS), last + 1, device=aux_TE.device)
    weights_P = torch.softmax((positions_P - last) / RECENCY, 0).to(aux_TE.dtype)
    # A sum of rows that makes no fp32 copy of them, in two thirds of the time.
    sum_1E = embedding_bag(
        positions_P, aux_TE, torch.zeros_like(positions_P[:1]), mode="sum", per_sample_weights=weights_P
    )
    return sum_1E[0].float()


@dataclass(frozen=True, kw_only=True, eq=False)
class Centroids:
    """The clusters at one moment."""

    names: tuple[str, ...]
    """At least one."""
    centroid_DE: Tensor
    """fp32. Mean embedding of each cluster."""
    mean_E: Tensor
    """fp32. Mean embedding of all requests."""
    variance_E: Tensor
    """fp32. Variance of all requests' embeddings, by dimension."""
    common: float
    """Square of a coordinate that all embeddings have in common, beside the standardised ones."""
    novelty_threshold: float
    """Distance (1 − cosine) to every centroid beyond which a request is an outlier."""


def standardise(x_E: Tensor, *, mean_E: Tensor, variance_E: Tensor, common: float) -> Tensor:
    """Standardised by dimension, with a constant more, and of length 1; [E + 1] or [., E + 1].

    The distance is 1 − the product of two of them.
    """
    z_E = (x_E - mean_E) * inverse_deviation(variance_E)
    constant = z_E.new_full((*z_E.shape[:-1], 1), common**0.5)
    return torch.nn.functional.normalize(torch.cat([z_E, constant], dim=-1), dim=-1)


def inverse_deviation(variance_E: Tensor) -> Tensor:
    """1 / standard deviation, by dimension; finite where nothing varies."""
    return (variance_E + 1e-8).rsqrt()


class DomainAssigner:
    """Assigns embeddings to fixed clusters; never changes, so that threads may share it.

    It gives the name that the learner's clusters would give at the moment they were published.
    """

    def __init__(self, centroids: Centroids, *, version: int) -> None:
        """version: number of the publication, for reports."""
        self.version = version
        self._names, self._threshold = centroids.names, centroids.novelty_threshold
        # z = x · scale − shift, computed in one operation.
        self._scale_E = inverse_deviation(centroids.variance_E)
        self._negative_shift_E = -centroids.mean_E * self._scale_E
        direction_DE1 = standardise(
            centroids.centroid_DE,
            mean_E=centroids.mean_E,
            variance_E=centroids.variance_E,
            common=centroids.common,
        )
        self._direction_DE = direction_DE1[:, :-1].contiguous()
        self._common = centroids.common
        self._common_D = direction_DE1[:, -1] * self._common**0.5

    @property
    def names(self) -> tuple[str, ...]:
        """The domains that a request can be assigned."""
        return self._names

    def assign(self, x_E: Tensor) -> str:
        """The domain of an embedding (fp32, on the CPU); UNKNOWN if it is an outlier."""
        z_E = torch.addcmul(self._negative_shift_E, x_E, self._scale_E)
        product, nearest = torch.addmv(self._common_D, self._direction_DE, z_E).max(0)
        length = (float(torch.dot(z_E, z_E)) + self._common) ** 0.5
        if not length:  # all prompts were equal so far, and this is another one of them
            return UNKNOWN
        return self._names[int(nearest)] if 1 - float(product) / length <= self._threshold else UNKNOWN
