"""The best draft of each domain, kept on disk; the learner continues from it when traffic returns to the domain.

    FOLDER/kept-000012/     a checkpoint (drafts/checkpoint.py) and record.json: domain, score, requests

In each trial the learner's draft is compared with the kept one on the domain's held-out requests, and replaces it if it
is better. A new draft is written to a temporary folder, synced and renamed before the one it replaces is deleted: after
a crash at any moment, the newest complete draft of a domain is used.

When traffic shifts back to a domain whose kept draft is better there than the learner's, the learner continues from it.
The gate tests the result like any other draft, so other domains do not suffer; after repeated refusals the learner
returns to the served draft (learn/online/learner.py). Leaves out the gate (learn/online/gate.py).

    kept = DomainDrafts(folder, target_head, scratch=module, max_domains=16, batch_positions=1024)
    kept.warm_start(learner, held_out)                      # True: the learner has other weights now
    kept.keep_if_better(challenger, held_out)               # in each trial
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
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.draft_module import DraftModule

MIN_REQUESTS_OF_DOMAIN = 3
"""Held-out requests of a domain that a comparison needs at least."""
_NAME = re.compile(r"kept-(\d{6,})")
_TEMPORARY, _RECORD_NAME = ".new.", "record.json"


class DomainDrafts:
    """See the file's docstring. Only one process writes to the folder: the learner that publishes the versions."""

    def __init__(
        self, folder: Path, target_head: TargetHead, *, scratch: DraftModule, max_domains: int, batch_positions: int
    ) -> None:
        """scratch: a module like the learner's, for scoring kept drafts. max_domains: whose draft is kept at most."""
        self._folder, self._target_head, self._scratch, self._max_domains = folder, target_head, scratch, max_domains
        self._batch_positions = batch_positions
        self._handled_shift: Shift | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_TEMPORARY}*"):  # of a learner that was killed
            shutil.rmtree(leftover)
        self._of_domain: dict[str, Path] = {}
        """Ordered by the last improvement, the latest at the end."""
        for path in sorted(self._paths(), key=_number):
            self._register(str(self._record(path).get("domain", "")), path)

    @property
    def domains(self) -> list[str]:
        """Domains that have a kept draft."""
        return list(self._of_domain)

    def warm_start(self, learner: Learner, held_out: HeldOut) -> bool:
        """Continue the learner from a kept draft if traffic has returned to its domain and it is better there."""
        shift = learner.controller.last_shift
        if shift is None or shift is self._handled_shift:
            return False
        self._handled_shift = shift
        requests = _requests_of(shift.domain, held_out)
        if shift.cause != "mix" or len(requests) < MIN_REQUESTS_OF_DOMAIN:
            return False
        with learner.averaged() as module, learner.fabric.autocast():
            best = self._score_kept(shift.domain, requests)
            if best is None or best <= self._score(module, requests):
                return False
        learner.restart_from(self._scratch.draft, version=learner.version)
        return True

    def keep_if_better(self, challenger: DraftModule, held_out: HeldOut) -> None:
        """Keep the challenger's draft for each domain of the newest requests where it is better than the kept one."""
        for domain in dict.fromkeys(request.domain for request in held_out.newest):
            requests = _requests_of(domain, held_out)
            if len(requests) < MIN_REQUESTS_OF_DOMAIN:
                continue
            score, best = self._score(challenger, requests), self._score_kept(domain, requests)
            if best is None or score > best:
                self._keep(domain, challenger.draft, {"score": round(score, 4), "requests": len(requests)})

    def _score_kept(self, domain: str, requests: Sequence[HeldOutRequest]) -> float | None:
        """Load the domain's kept draft into `scratch` and score it; None if there is none that can be used."""
        path = self._of_domain.get(domain)
        if path is None:
            return None
        try:
            draft = load_draft(path, self._target_head)
            if draft.config != self._scratch.draft.config:
                raise CheckpointError(f"{path} is of another shape")
        except CheckpointError:
            self._delete(self._of_domain.pop(domain))
            return None
        self._scratch.draft.load_state_dict(draft.state_dict())
        self._target_head.install_head(self._scratch)
        return self._score(self._scratch, requests)

    def _score(self, module: DraftModule, requests: Sequence[HeldOutRequest]) -> float:
        scores = [score for _, score in score_requests(module, requests, batch_positions=self._batch_positions)]
        return sum(scores) / len(scores) if scores else 0.0

    # -- on disk ---------------------------------------------------------------------------------------------------

    def _keep(self, domain: str, draft: Eagle3Draft, record: dict[str, Any]) -> None:
        """Write a draft, then delete the one it replaces and those beyond `max_domains`; nothing on a full disk."""
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
        self._register(domain, path)

    def _register(self, domain: str, path: Path) -> None:
        """Make a complete draft the domain's kept one, and delete those that are no longer kept."""
        before = self._of_domain.pop(domain, None)
        self._of_domain[domain] = path
        if before is not None:
            self._delete(before)
        while len(self._of_domain) > self._max_domains:
            self._delete(self._of_domain.pop(next(iter(self._of_domain))))

    def _delete(self, path: Path) -> None:
        # Renamed first, so that a partly deleted draft does not look complete.
        gone = self._folder / f"{_TEMPORARY}gone.{path.name}"
        os.replace(path, gone)
        shutil.rmtree(gone)

    def _paths(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]

    @staticmethod
    def _record(path: Path) -> dict[str, Any]:
        try:
            record = json.loads((path / _RECORD_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged; the weights are checked when they are loaded
            return {}
        return record if isinstance(record, dict) else {}


def _requests_of(domain: str, held_out: HeldOut) -> list[HeldOutRequest]:
    return [request for request in held_out if request.domain == domain]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("kept-"))
