"""The traffic memory: what earlier requests were answered, so that later ones may copy from it.

Learning by remembering: it needs no training and no pass of the draft, and works from the first repeated phrase. It is
bounded, the oldest forgotten first; a client that holds more than half of it has no one else's forgotten. What a
request may read and write is decided by its key (`Request.scope`): sequences of different keys never meet, since the
index compares keys exactly. What was kept on disk belongs to a key again by the hash that its file is named by.

Left out: the index (kernels/suffix_index.py), searching it (ngram.py), and files (kept_answers.py).

Shapes: L capacity of a slot.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch

from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.kernels import native
from aurora_lit.kernels.suffix_index import CONTEXT_TOKENS, DOMAIN_BITS, SuffixMemory
from aurora_lit.request import Scope, SharedBy
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources.kept_answers import KeptAnswer, KeptAnswers
from aurora_lit.settings import MemorySettings

NO_MEMORY = MemorySettings(capacity_mb=0, scope="domain")
"""Settings with which there is none."""
_MAX_KEYS = 16_384
"""Keys that are known; what was remembered for the least recently used one can then no longer be read."""
_MAX_DOMAINS = (1 << DOMAIN_BITS) - 1
"""Domains that have a number; a new one then gets that of the least recently used one."""


class TrafficMemory:
    """What ended requests were answered, by key.

    >>> memory = TrafficMemory(64 << 20, shared_by="domain", counters=counters)
    >>> memory.open(sequence)         # when its prompt has been read
    >>> memory.remember(sequence, tokens)    # when it has ended
    """

    def __init__(self, capacity_bytes: int, *, shared_by: SharedBy, counters: EngineCounters) -> None:
        """Needs kernels. `capacity_bytes`: of the index; pages are taken as it fills. `counters`: the engine's."""
        self.counters, self._shared_by = counters, shared_by
        self.index = SuffixMemory(capacity_bytes)
        self._parts: OrderedDict[Scope, int] = OrderedDict()
        self._next_part = 1
        self._domains: OrderedDict[str, int] = OrderedDict()
        self._numbering = threading.Lock()
        """Of domains: what was kept is inserted by another thread."""
        self._kept: KeptAnswers | None = None
        self._part_by_file: dict[str, int] = {}

    def keep(self, kept: KeptAnswers) -> None:
        """Remember what was kept, in a thread, and keep what is remembered from now on. Call it before any `open`."""
        self._kept = kept
        self._part_by_file = {file: part for part, file in enumerate(kept.files, start=self._next_part)}
        self._next_part += len(self._part_by_file)
        kept.start(self._insert_kept)

    def open(self, sequence: RunningSequence) -> None:
        """Let a sequence read what its key allows, of its domain first, if that is known by now."""
        key = sequence.request.scope(self._shared_by)
        sequence.memory_part = 0 if key is None else (self._part(key) << DOMAIN_BITS) + self._domain(sequence.domain)

    def remember(self, sequence: RunningSequence, tokens_L: torch.Tensor) -> None:
        """Remember the answer of a sequence that has ended; `tokens_L`: of its slot."""
        if not sequence.memory_part or not sequence.request.store:
            return
        # Of a long prompt only the end is needed.
        answer = sequence.length - sequence.prompt_length
        tokens = tokens_L[max(0, sequence.prompt_length - CONTEXT_TOKENS) : sequence.length].tolist()
        client = sequence.request.client.source
        if not self.index.insert_answer(tokens, answer=answer, part=sequence.memory_part, client=client):
            return
        self.counters.memory_answers += 1
        key = sequence.request.scope(self._shared_by)
        if self._kept is not None and key is not None:
            self._kept.add(key, domain=sequence.domain, tokens=tokens, answer=answer)

    def _insert_kept(self, each: KeptAnswer) -> None:
        part = (self._part_by_file[each.file] << DOMAIN_BITS) + self._domain(each.domain)
        self.index.insert_answer(each.tokens, answer=each.answer, part=part)

    def _domain(self, name: str) -> int:
        """0 if it is unknown. Answers of a domain that lost its number come first in the one that has it now."""
        if not name:
            return 0
        with self._numbering:
            if name not in self._domains:
                full = len(self._domains) == _MAX_DOMAINS
                self._domains[name] = self._domains.popitem(last=False)[1] if full else len(self._domains) + 1
            self._domains.move_to_end(name)
            return self._domains[name]

    def _part(self, key: Scope) -> int:
        part = self._parts.get(key)
        if part is None:
            kept = None if self._kept is None else self._part_by_file.get(self._kept.file(key))
            part = self._parts[key] = self._next_part if kept is None else kept
            self._next_part += kept is None
            if len(self._parts) > _MAX_KEYS:
                self._parts.popitem(last=False)
        else:
            self._parts.move_to_end(key)
        return part


def can_remember(device: torch.device) -> bool:
    """True if a memory can be searched: that needs kernels and a CPU."""
    return native.library() is not None and device.type == "cpu"
