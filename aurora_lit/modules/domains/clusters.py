"""Online k-means over embeddings of requests, with a cap, and clusters founded where several odd ones lie together.

Compared are directions after standardising each dimension by the statistics of all requests. Centroids are kept as
plain means, so that they stay right while those statistics move. An embedding far from all centroids is odd; enough
odd ones close together found a cluster. Beyond the cap, the closest two are merged if that costs less than it gains.
What is left out: what is embedded, and what clusters mean (modules/domains/detector.py).

Requests without a cluster have a mean too: requests of one kind alone stand out from nothing, and are among those
until other kinds come. A cluster founded near that mean is nothing new.

Shapes: E embedding, D clusters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARMUP_REQUESTS = 16
"""Requests that only the statistics learn from."""
_FOUNDERS = 4
"""Odd requests close together that found a cluster."""
_ODD_KEPT = 32
_STATISTICS_REQUESTS, _CENTROID_REQUESTS = 1024, 256
"""Memory of means: exponential forgetting beyond so many requests."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where an embedding belongs."""

    name: str | None
    """None: to no cluster."""
    distance: float
    """1 - cosine to the nearest centroid; 2 when there is none."""
    founded: float = 0.0
    """Novelty of the cluster that it founded: distance to all that was seen before, at most 1. 0: it founded none."""
    merged: tuple[str, str] | None = None
    """A cluster that is no more, and the one it is part of now."""


class Clusters:
    """See the file's docstring.

    >>> clusters = Clusters(most=16, novelty=0.7)
    >>> clusters.add(x_E, new_name="auto-1").name           # None, until there are clusters
    """

    def __init__(self, *, most: int, novelty: float) -> None:
        """novelty: distance to every centroid beyond which an embedding is odd."""
        self._most, self._novelty = most, novelty
        self.names: list[str] = []
        self._fixed: list[bool] = []
        """Never merged: their names come from outside."""
        self._sizes: list[int] = []
        self._number = self._num_alone = 0
        self._mean_E = self._variance_E = self._alone_E = torch.zeros(0)
        self._centroid_DE = torch.zeros(0, 0)
        self._odd: deque[Tensor] = deque(maxlen=_ODD_KEPT)

    def add(self, x_E: Tensor, *, new_name: str, fixed_name: str | None = None) -> Found:
        """Take in an embedding. `new_name`: of a cluster that it may found; `fixed_name`: of the one it belongs to, as
        long as there is room for it."""
        self._learn_statistics(x_E)
        distance_D = 1 - self._directions(self._centroid_DE) @ self._directions(x_E)
        nearest = int(distance_D.argmin()) if self.names else -1
        distance = float(distance_D[nearest]) if self.names else 2.0
        if fixed_name is not None:
            if fixed_name in self.names:
                return self._join(self.names.index(fixed_name), x_E, distance)
            if (room := self._make_room(distance)) is not None:
                return self._begin(fixed_name, x_E, distance, fixed=True, size=1, merged=room)
        if self._number <= WARMUP_REQUESTS:
            return self._stay_alone(x_E, distance)
        if distance <= self._novelty:
            return self._join(nearest, x_E, distance)
        near = self._odd_ones_near(x_E)
        if len(near) + 1 < _FOUNDERS or (room := self._make_room(distance)) is None:
            self._odd.append(x_E)
            return self._stay_alone(x_E, distance)
        founders = [x_E, *(self._odd[place] for place in near)]
        self._odd = deque((x for place, x in enumerate(self._odd) if place not in near), maxlen=_ODD_KEPT)
        centre_E = torch.stack(founders).mean(0)
        return self._begin(new_name, centre_E, distance, fixed=False, size=len(founders), merged=room)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain numbers and strings."""
        return {
            "names": list(self.names),
            "fixed": list(self._fixed),
            "sizes": list(self._sizes),
            "number": self._number,
            "num_alone": self._num_alone,
            "mean": self._mean_E,
            "variance": self._variance_E,
            "alone": self._alone_E,
            "centroids": self._centroid_DE.clone(),
            "odd": list(self._odd),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.names, self._fixed, self._sizes = list(state["names"]), list(state["fixed"]), list(state["sizes"])
        self._number, self._num_alone = state["number"], state["num_alone"]
        self._mean_E, self._variance_E, self._alone_E = state["mean"], state["variance"], state["alone"]
        self._centroid_DE = state["centroids"].clone()
        self._odd = deque(state["odd"], maxlen=_ODD_KEPT)

    def _learn_statistics(self, x_E: Tensor) -> None:
        if not self._number:
            self._mean_E, self._variance_E, self._alone_E = (torch.zeros_like(x_E) for _ in range(3))
            self._centroid_DE = x_E.new_zeros(0, len(x_E))
        self._number += 1
        rate = max(1 / self._number, 1 / _STATISTICS_REQUESTS)
        away_E = x_E - self._mean_E
        self._mean_E = self._mean_E + rate * away_E
        self._variance_E = (1 - rate) * (self._variance_E + rate * away_E.square())

    def _directions(self, x_E: Tensor) -> Tensor:
        """Standardised, of length 1; [E] or [., E]."""
        z_E = (x_E - self._mean_E) * (self._variance_E + 1e-8).rsqrt()
        return torch.nn.functional.normalize(z_E, dim=-1, eps=1e-6)

    def _join(self, index: int, x_E: Tensor, distance: float) -> Found:
        self._sizes[index] += 1
        rate = max(1 / self._sizes[index], 1 / _CENTROID_REQUESTS)
        self._centroid_DE[index] += rate * (x_E - self._centroid_DE[index])
        return Found(name=self.names[index], distance=distance)

    def _stay_alone(self, x_E: Tensor, distance: float) -> Found:
        self._num_alone += 1
        rate = max(1 / self._num_alone, 1 / _CENTROID_REQUESTS)
        self._alone_E = self._alone_E + rate * (x_E - self._alone_E)
        return Found(name=None, distance=distance)

    def _odd_ones_near(self, x_E: Tensor) -> list[int]:
        if not self._odd:
            return []
        near_N = self._directions(torch.stack(list(self._odd))) @ self._directions(x_E) >= 1 - self._novelty
        return [int(place) for place in near_N.nonzero()[:, 0]]

    def _begin(
        self, name: str, centre_E: Tensor, distance: float, *, fixed: bool, size: int, merged: tuple[str, ...]
    ) -> Found:
        seen_DE = torch.cat([self._centroid_DE, self._alone_E[None]]) if self._num_alone else self._centroid_DE
        apart_D = 1 - self._directions(seen_DE) @ self._directions(centre_E)
        novelty = min(1.0, float(apart_D.min())) if len(apart_D) else 1.0
        self.names.append(name)
        self._fixed.append(fixed)
        self._sizes.append(size)
        self._centroid_DE = torch.cat([self._centroid_DE, centre_E[None]])
        pair = (merged[0], merged[1]) if merged else None
        return Found(name=name, distance=distance, founded=max(1e-3, novelty), merged=pair)

    def _make_room(self, distance: float) -> tuple[str, ...] | None:
        """Room for a cluster that far from all others: () if there is, the names of two that are merged for it, else
        None: all lie further apart than that."""
        if len(self.names) < self._most:
            return ()
        directions_DE = self._directions(self._centroid_DE)
        apart_DD = (1 - directions_DE @ directions_DE.T).fill_diagonal_(float("inf"))
        fixed_D = torch.tensor(self._fixed)
        apart_DD[fixed_D] = apart_DD[:, fixed_D] = float("inf")
        kept, gone = divmod(int(apart_DD.argmin()), len(self.names))
        if not float(apart_DD[kept, gone]) < distance:
            return None
        if self._sizes[kept] < self._sizes[gone]:
            kept, gone = gone, kept
        names = self.names[gone], self.names[kept]
        self._sizes[kept] += self._sizes[gone]
        share = self._sizes[gone] / self._sizes[kept]
        self._centroid_DE[kept] += share * (self._centroid_DE[gone] - self._centroid_DE[kept])
        self._centroid_DE = torch.cat([self._centroid_DE[:gone], self._centroid_DE[gone + 1 :]])
        del self.names[gone], self._fixed[gone], self._sizes[gone]
        return names
