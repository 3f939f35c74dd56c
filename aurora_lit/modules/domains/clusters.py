"""Online k-means over embeddings of requests, with a maximum number of clusters.

Distances are cosine distances after standardising each dimension with the statistics of all requests, but by no less
than the usual magnitude of its hidden state, and with a coordinate that all have in common (`_common`): so the details
of a template found no clusters. Centroids are kept as plain means, so that they stay correct while those statistics
change. An embedding that is far from all centroids is an outlier; enough outliers close together found a cluster. At
the maximum, the two closest clusters are merged if they are closer to each other than the new cluster is to its
nearest. Clusters that have their names from outside are never merged, and are half of all at most; at that number, one
whose name nobody has used for long gives way to a new one.

Requests without a cluster have a mean too. While all traffic is of one kind that varies much, few of its requests are
in a cluster until other kinds arrive. A cluster founded near that mean has low novelty.

Leaves out the distance, and assigning without learning (modules/domains/centroids.py), what is embedded, and what
clusters mean (modules/domains/detector.py).

Shapes: E embedding, D clusters, N outliers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aurora_lit.modules.domains.centroids import Centroids, standardise

WARMUP_REQUESTS = 16
"""The first requests only update the statistics, and are outliers."""
MAX_CLUSTERS = 16
"""Beyond them the closest two are merged. At most half have names from outside, and are never merged while these are
used. A smaller number than there are clusters deletes none."""
UNUSED_REQUESTS = 512
"""Requests without a name from outside after which a new name may take its place: such as ticket numbers, of which each
is used once."""
NOVELTY_THRESHOLD = 0.75
"""Distance to every centroid beyond which an embedding is an outlier. Smaller values give finer clusters."""
_MIN_FOUNDERS = 4
"""Outliers close together that found a cluster."""
_MAX_OUTLIERS = 32
"""Outliers that are remembered; the oldest are forgotten."""
_STATISTICS_REQUESTS, _CENTROID_REQUESTS = 1024, 256
"""Memory of the statistics and of a centroid, in requests: a plain mean until then, an exponential one after."""


@dataclass(frozen=True, kw_only=True)
class ClusterAssignment:
    """The cluster of one embedding."""

    name: str | None
    """None: no cluster."""
    founded_novelty: float = 0.0
    """Above 0 if it founded its cluster: the new centroid's distance to everything seen before, at most 1."""
    merged: tuple[str, str] | None = None
    """A cluster that was removed, and the one that its members belong to now."""


class OnlineClusters:
    """Assigns one embedding after the other, and learns the clusters from them; see the file's docstring.

    >>> clusters = OnlineClusters(max_clusters=MAX_CLUSTERS, novelty_threshold=NOVELTY_THRESHOLD)
    >>> clusters.assign(x_E, new_name="auto-1").name        # None until there are clusters
    """

    def __init__(self, *, max_clusters: int, novelty_threshold: float) -> None:
        """novelty_threshold: distance to every centroid beyond which an embedding is an outlier."""
        self._max_clusters, self._novelty_threshold = max_clusters, novelty_threshold
        self.names: list[str] = []
        self._is_fixed: list[bool] = []
        """Clusters whose names come from outside. They are never merged."""
        self._used_at: list[int] = []
        """Number of requests when each cluster last got one."""
        self._max_fixed = (max_clusters + 1) // 2
        self._sizes: list[int] = []
        self._num_requests = self._num_unassigned = 0
        self._mean_E = self._variance_E = self._magnitude_E = self._unassigned_mean_E = torch.zeros(0)
        self._scale_E, self._common = torch.zeros(0), 0.0
        self._centroid_DE = torch.zeros(0, 0)
        self._outliers: deque[Tensor] = deque(maxlen=_MAX_OUTLIERS)
        self.num_founded = 0
        """Clusters founded since this object was made; merging makes room for one, so it is counted too."""

    def assign(self, x_E: Tensor, *, new_name: str, fixed_name: str | None = None) -> ClusterAssignment:
        """Assign an embedding to a cluster and update that cluster.

        Args:
            x_E: the embedding.
            new_name: name for the cluster that it may found.
            fixed_name: name of the cluster that it belongs to whatever the distance, as long as there is room for it,
                and for no more than half of the clusters, but for those that have long been unused.
        """
        self._update_statistics(x_E)
        distance_D = 1 - self._standardise(self._centroid_DE) @ self._standardise(x_E)
        nearest = int(distance_D.argmin()) if self.names else -1
        distance = float(distance_D[nearest]) if self.names else 2.0
        if fixed_name is not None:
            if fixed_name in self.names:
                return self._join(self.names.index(fixed_name), x_E)
            if self._may_fix_another() and (merged := self._make_room(distance)) is not None:
                return self._found(fixed_name, x_E, is_fixed=True, size=1, merged=merged)
        if self._num_requests <= WARMUP_REQUESTS:
            self._outliers.append(x_E)
            return self._leave_unassigned(x_E)
        if distance <= self._novelty_threshold:
            return self._join(nearest, x_E)
        near = self._outliers_near(x_E)
        if len(near) + 1 < _MIN_FOUNDERS or (merged := self._make_room(distance)) is None:
            self._outliers.append(x_E)
            return self._leave_unassigned(x_E)
        # Those near the first founders' centre too: a centre of few is a poor one.
        near = self._outliers_near(torch.stack([x_E, *(self._outliers[index] for index in near)]).mean(0))
        founders = [x_E, *(self._outliers[index] for index in near)]
        self._outliers = deque((x for index, x in enumerate(self._outliers) if index not in near), maxlen=_MAX_OUTLIERS)
        centre_E = torch.stack(founders).mean(0)
        self._take_from_unassigned(founders[1:])
        return self._found(new_name, centre_E, is_fixed=False, size=len(founders), merged=merged)

    def names_of(self, x_NE: Tensor) -> list[str | None]:
        """The clusters that embeddings without a fixed name belong to now; nothing is learned from them."""
        if not self.names:
            return [None] * len(x_NE)
        distance_N, nearest_N = (1 - self._standardise(x_NE) @ self._standardise(self._centroid_DE).T).min(1)
        near_N = (distance_N <= self._novelty_threshold).tolist()
        return [self.names[at] if near else None for at, near in zip(nearest_N.tolist(), near_N, strict=True)]

    def centroids(self) -> Centroids | None:
        """The clusters as they are now, copied; None while no embedding would be assigned to one."""
        if not self.names or self._num_requests < WARMUP_REQUESTS:
            return None
        return Centroids(
            names=tuple(self.names),
            centroid_DE=self._centroid_DE.clone(),
            mean_E=self._mean_E.clone(),
            variance_E=self._scale_E,
            common=self._common,
            novelty_threshold=self._novelty_threshold,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain numbers and strings."""
        return {
            "names": list(self.names),
            "is_fixed": list(self._is_fixed),
            "used_at": list(self._used_at),
            "sizes": list(self._sizes),
            "num_requests": self._num_requests,
            "num_unassigned": self._num_unassigned,
            "mean": self._mean_E,
            "variance": self._variance_E,
            "magnitude": self._magnitude_E,
            "unassigned_mean": self._unassigned_mean_E,
            "centroids": self._centroid_DE.clone(),
            "outliers": list(self._outliers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.names, self._is_fixed, self._sizes = list(state["names"]), list(state["is_fixed"]), list(state["sizes"])
        for surplus in [at for at, is_fixed in enumerate(self._is_fixed) if is_fixed][self._max_fixed :]:
            self._is_fixed[surplus] = False  # saved when there was no limit, or a higher one
        self._num_requests, self._num_unassigned = state["num_requests"], state["num_unassigned"]
        self._used_at = list(state.get("used_at", [self._num_requests] * len(self.names)))
        self._mean_E, self._variance_E = state["mean"], state["variance"]
        self._magnitude_E, self._unassigned_mean_E = state["magnitude"], state["unassigned_mean"]
        self._centroid_DE = state["centroids"].clone()
        self._set_scale()
        self._outliers = deque(state["outliers"], maxlen=_MAX_OUTLIERS)

    def _update_statistics(self, x_E: Tensor) -> None:
        if not self._num_requests:
            self._mean_E, self._variance_E, self._magnitude_E, self._unassigned_mean_E = (
                torch.zeros_like(x_E) for _ in range(4)
            )
            self._centroid_DE = x_E.new_zeros(0, len(x_E))
        self._num_requests += 1
        rate = max(1 / self._num_requests, 1 / _STATISTICS_REQUESTS)
        deviation_E = x_E - self._mean_E
        self._mean_E = self._mean_E + rate * deviation_E
        self._variance_E = (1 - rate) * (self._variance_E + rate * deviation_E.square())
        self._magnitude_E = self._magnitude_E + rate * (_magnitude(x_E) - self._magnitude_E)
        self._set_scale()

    def _standardise(self, x_E: Tensor) -> Tensor:
        """Standardised by dimension and of length 1; [E] or [., E]."""
        return standardise(x_E, mean_E=self._mean_E, variance_E=self._scale_E, common=self._common)

    def _set_scale(self) -> None:
        """What dimensions are divided by, and what all embeddings have in common.

        `_scale_E` is a variance: the traffic's, at least the squared usual magnitude. `_common` is the square of a
        further coordinate: with u, the traffic's variance as a share of the scale, it is u (1 − u)³ of the number of
        dimensions, found by trial on real prompts (docs/design/learning.md): much for traffic of one template, nothing
        for mixed traffic.
        """
        self._scale_E = torch.maximum(self._variance_E, self._magnitude_E.square())
        share = float((self._variance_E / self._scale_E.clamp_min(1e-8)).mean()) if len(self._scale_E) else 0.0
        self._common = len(self._scale_E) * share * (1 - share) ** 3

    def _join(self, index: int, x_E: Tensor) -> ClusterAssignment:
        self._sizes[index] += 1
        self._used_at[index] = self._num_requests
        rate = max(1 / self._sizes[index], 1 / _CENTROID_REQUESTS)
        self._centroid_DE[index] += rate * (x_E - self._centroid_DE[index])
        return ClusterAssignment(name=self.names[index])

    def _leave_unassigned(self, x_E: Tensor) -> ClusterAssignment:
        self._num_unassigned += 1
        rate = max(1 / self._num_unassigned, 1 / _CENTROID_REQUESTS)
        self._unassigned_mean_E = self._unassigned_mean_E + rate * (x_E - self._unassigned_mean_E)
        return ClusterAssignment(name=None)

    def _take_from_unassigned(self, x_NE: list[Tensor]) -> None:
        """Remove embeddings that have a cluster now from the mean of those without."""
        if not x_NE:
            return
        number = min(self._num_unassigned, _CENTROID_REQUESTS)
        left = number - len(x_NE)
        self._num_unassigned = max(0, left)
        if left > 0:
            self._unassigned_mean_E = (number * self._unassigned_mean_E - torch.stack(x_NE).sum(0)) / left

    def _outliers_near(self, x_E: Tensor) -> list[int]:
        """Indices of the remembered outliers within the threshold of an embedding."""
        if not self._outliers:
            return []
        cosine_N = self._standardise(torch.stack(list(self._outliers))) @ self._standardise(x_E)
        return [int(index) for index in (cosine_N >= 1 - self._novelty_threshold).nonzero()[:, 0]]

    def _found(
        self, name: str, centre_E: Tensor, *, is_fixed: bool, size: int, merged: tuple[str, ...]
    ) -> ClusterAssignment:
        seen_DE = self._centroid_DE
        if self._num_unassigned:
            seen_DE = torch.cat([self._centroid_DE, self._unassigned_mean_E[None]])
        distance_D = 1 - self._standardise(seen_DE) @ self._standardise(centre_E)
        novelty = min(1.0, float(distance_D.min())) if len(distance_D) else 1.0
        self.num_founded += 1
        self.names.append(name)
        self._is_fixed.append(is_fixed)
        self._used_at.append(self._num_requests)
        self._sizes.append(size)
        self._centroid_DE = torch.cat([self._centroid_DE, centre_E[None]])
        pair = (merged[0], merged[1]) if merged else None
        return ClusterAssignment(name=name, founded_novelty=max(1e-3, novelty), merged=pair)

    def _may_fix_another(self) -> bool:
        """True if there is room for a name from outside; one that nobody uses gives way: its cluster may be merged."""
        fixed = [at for at, is_fixed in enumerate(self._is_fixed) if is_fixed]
        if len(fixed) < self._max_fixed:
            return True
        oldest = min(fixed, key=self._used_at.__getitem__)
        self._is_fixed[oldest] = self._num_requests - self._used_at[oldest] <= UNUSED_REQUESTS
        return not self._is_fixed[oldest]

    def _make_room(self, distance: float) -> tuple[str, ...] | None:
        """Make room for a cluster at this distance from its nearest, by merging if necessary.

        Returns:
            () if there is room; the names (removed, kept) of two clusters that were merged; None if all clusters are
            further apart than `distance`, so that there is no room.
        """
        if len(self.names) < self._max_clusters:
            return ()
        directions_DE = self._standardise(self._centroid_DE)
        distance_DD = (1 - directions_DE @ directions_DE.T).fill_diagonal_(float("inf"))
        is_fixed_D = torch.tensor(self._is_fixed)
        distance_DD[is_fixed_D] = distance_DD[:, is_fixed_D] = float("inf")
        kept, removed = divmod(int(distance_DD.argmin()), len(self.names))
        if not float(distance_DD[kept, removed]) < distance:
            return None
        if self._sizes[kept] < self._sizes[removed]:
            kept, removed = removed, kept
        names = self.names[removed], self.names[kept]
        self._sizes[kept] += self._sizes[removed]
        share = self._sizes[removed] / self._sizes[kept]
        self._centroid_DE[kept] += share * (self._centroid_DE[removed] - self._centroid_DE[kept])
        self._centroid_DE = torch.cat([self._centroid_DE[:removed], self._centroid_DE[removed + 1 :]])
        self._used_at[kept] = max(self._used_at[kept], self._used_at[removed])
        del self.names[removed], self._is_fixed[removed], self._used_at[removed], self._sizes[removed]
        return names


def _magnitude(x_E: Tensor) -> Tensor:
    """The usual magnitude of each dimension: the median over its hidden state's dimensions, [E].

    It differs little between kinds of traffic, other than variances do. The median leaves out the few dimensions that
    are very large.
    """
    state_3H = x_E.view(3, -1)
    return state_3H.abs().median(1, keepdim=True).values.expand_as(state_3H).flatten()
