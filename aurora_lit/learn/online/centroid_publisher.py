"""When the learner publishes its domains: soon after one was founded, else now and then while requests move them.

A founding, which may merge two others to make room, changes what requests are assigned; between foundings centroids
only drift. Leaves out the file (drafts/centroid_file.py).

    publisher = CentroidPublisher(store.folder / CENTROIDS_NAME, target_head)
    publisher.publish_when_due(detector)        # True: the file was replaced
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from aurora_lit.drafts.centroid_file import published_version, write_centroids
from aurora_lit.drafts.checkpoint import TargetShape
from aurora_lit.durable import discard_unfinished
from aurora_lit.modules.domains.detector import DomainDetector

FOUNDED_EVERY_S = 1.0
"""Least time between two publications, where a domain was founded since the last one."""
DRIFTED_EVERY_S, DRIFTED_REQUESTS = 10.0, 32
"""Least time and requests between two publications otherwise."""


class CentroidPublisher:
    """Writes one file; see the file's docstring. The first publication comes as soon as there are domains."""

    def __init__(self, path: Path, target: TargetShape, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        """Continue the numbers of the file that exists, if it can be read."""
        self._path, self._target, self._monotonic_s = path, target, monotonic_s
        discard_unfinished(path)
        self.version = published_version(path)
        self._last_s = -float("inf")
        self._founded = -1
        """Domains founded before the last publication; −1: there was none."""
        self._requests = 0
        """Requests before the last publication."""

    def publish_when_due(self, detector: DomainDetector) -> bool:
        """Publish the detector's domains if it is time. Raises OSError; the next call after a pause tries again."""
        if not self._is_due(detector):
            return False
        centroids = detector.centroids()
        if centroids is None:
            return False
        self._last_s = self._monotonic_s()
        write_centroids(self._path, centroids, version=self.version + 1, target=self._target)
        self.version += 1
        self._founded, self._requests = detector.num_founded, detector.num_requests
        return True

    def _is_due(self, detector: DomainDetector) -> bool:
        elapsed_s = self._monotonic_s() - self._last_s
        if detector.num_founded != self._founded:
            return elapsed_s >= FOUNDED_EVERY_S
        return elapsed_s >= DRIFTED_EVERY_S and detector.num_requests - self._requests >= DRIFTED_REQUESTS
