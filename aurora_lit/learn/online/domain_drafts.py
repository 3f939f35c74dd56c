"""The best draft of each domain, kept beside the versions, and learning that goes on from it when the domain is back.

    FOLDER/kept-000012/     a checkpoint (checkpoints.py) and record.json: domain, score, requests

After each trial the learner's draft is compared with the kept one on the domain's held-out requests, and takes its
place when it is better. A kept draft is written to a folder of another name, made safe on disk and renamed before the
one that it replaces is deleted: whatever is killed at whatever moment, the newest whole one of a domain counts.

When traffic shifts back to a domain whose kept draft is better there than the learner's, the learner goes on from it.
The gate judges what comes of that like any other draft, so that the other domains do not pay; what it refuses again
and again is given up (learn/online/learner.py). What is left out: the gate (learn/online/gate.py).

    kept = DomainDrafts(folder, ends, scratch=module, most=16, batch_positions=1024)
    kept.warm_start(learner, held_out)                      # True: the learner has other weights now
    kept.offer(challenger, held_out)                        # in each trial
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aurora_lit.drafts.checkpoint import load_draft, write_draft
from aurora_lit.durable import sync
from aurora_lit.errors import CheckpointError
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.gate import HeldOut, HeldOutRequest, score_requests
from aurora_lit.learn.online.learner import Learner
from aurora_lit.modules.domains.detector import Shift
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.losses.draft_module import DraftModule

FEWEST_REQUESTS = 3
"""Held-out requests of a domain without which nothing is compared."""
_NAME = re.compile(r"kept-(\d{6,})")
_TEMPORARY, _RECORD_NAME = ".new.", "record.json"


class DomainDrafts:
    """See the file's docstring. One process writes; it is the learner that owns the versions."""

    def __init__(
        self, folder: Path, ends: TargetHead, *, scratch: DraftModule, most: int, batch_positions: int
    ) -> None:
        """scratch: a module of the learner's kind, to score with. most: domains whose draft is kept."""
        self._folder, self._ends, self._scratch, self._most = folder, ends, scratch, most
        self._batch_positions = batch_positions
        self._answered: Shift | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_TEMPORARY}*"):  # by a learner that was killed
            shutil.rmtree(left)
        self._of_domain: dict[str, Path] = {}
        """The one improved last stands last."""
        for path in sorted(self._paths(), key=_number):
            self._take(str(self._record(path).get("domain", "")), path)

    @property
    def domains(self) -> list[str]:
        """Those that have a kept draft."""
        return list(self._of_domain)

    def warm_start(self, learner: Learner, held_out: HeldOut) -> bool:
        """Go on from the draft kept of a domain that traffic has come back to, if it is better there."""
        shift = learner.steering.last_shift
        if shift is None or shift is self._answered:
            return False
        self._answered = shift
        requests = _of(shift.domain, held_out)
        if shift.cause != "mix" or len(requests) < FEWEST_REQUESTS:
            return False
        with learner.averaged() as module, learner.fabric.autocast():
            best = self._score_kept(shift.domain, requests)
            if best is None or best <= self._score(module, requests):
                return False
        learner.restart_from(self._scratch.draft, version=learner.version)
        return True

    def offer(self, challenger: DraftModule, held_out: HeldOut) -> None:
        """Keep its draft for every domain of the newest requests in which it is better than the one kept so far."""
        for domain in dict.fromkeys(request.domain for request in held_out.newest):
            requests = _of(domain, held_out)
            if len(requests) < FEWEST_REQUESTS:
                continue
            score, best = self._score(challenger, requests), self._score_kept(domain, requests)
            if best is None or score > best:
                self._keep(domain, challenger.draft, {"score": round(score, 4), "requests": len(requests)})

    def _score_kept(self, domain: str, requests: Sequence[HeldOutRequest]) -> float | None:
        """Of the kept draft, which is in `scratch` then; None when there is none, or none that can be used."""
        path = self._of_domain.get(domain)
        if path is None:
            return None
        try:
            draft = load_draft(path, self._ends)
            if draft.config != self._scratch.draft.config:
                raise CheckpointError(f"{path} is of another shape")
        except CheckpointError:
            self._delete(self._of_domain.pop(domain))
            return None
        self._scratch.draft.load_state_dict(draft.state_dict())
        self._ends.fit_head(self._scratch)
        return self._score(self._scratch, requests)

    def _score(self, module: DraftModule, requests: Sequence[HeldOutRequest]) -> float:
        scores = [score for _, score in score_requests(module, requests, batch_positions=self._batch_positions)]
        return sum(scores) / len(scores) if scores else 0.0

    # -- on disk ---------------------------------------------------------------------------------------------------

    def _keep(self, domain: str, draft: Draft, record: dict[str, Any]) -> None:
        """Write a draft, then let go of the one it replaces and of those beyond the bound; not on a full disk."""
        number = 1 + max(map(_number, self._paths()), default=0)
        path = self._folder / f"kept-{number:06d}"
        temporary = self._folder / f"{_TEMPORARY}{path.name}"
        try:
            temporary.mkdir()
            write_draft(draft, temporary)
            (temporary / _RECORD_NAME).write_text(json.dumps({"domain": domain, **record}) + "\n", encoding="utf-8")
            sync(temporary / _RECORD_NAME)
            os.replace(temporary, path)
            sync(self._folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            return
        self._take(domain, path)

    def _take(self, domain: str, path: Path) -> None:
        """Count a whole one as the newest of its domain."""
        before = self._of_domain.pop(domain, None)
        self._of_domain[domain] = path
        if before is not None:
            self._delete(before)
        while len(self._of_domain) > self._most:
            self._delete(self._of_domain.pop(next(iter(self._of_domain))))

    def _delete(self, path: Path) -> None:
        # Renamed first: what is half deleted must not look whole.
        gone = self._folder / f"{_TEMPORARY}gone.{path.name}"
        os.replace(path, gone)
        shutil.rmtree(gone)

    def _paths(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]

    @staticmethod
    def _record(path: Path) -> dict[str, Any]:
        try:
            record = json.loads((path / _RECORD_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # somebody meddled with it: its weights are checked when they are wanted
            return {}
        return record if isinstance(record, dict) else {}


def _of(domain: str, held_out: HeldOut) -> list[HeldOutRequest]:
    return [request for request in held_out if request.domain == domain]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("kept-"))
