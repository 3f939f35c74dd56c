"""Requests that wait for a slot, oldest first; those with a grammar wait until it has been compiled, in a thread.

    queue = WaitingQueue(grammars, eos_token_ids=ids, shared_by="domain")
    queue.append(request)                    # its grammar begins to be compiled
    for ready in queue.take(num_free):       # before a round; grammars that cannot be used need no slot
        ready.request, ready.grammar, ready.end_tokens

Left out: slots (serve/engine/slot_allocator.py), and what grammars allow (grammars/matcher.py).
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Hashable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from aurora_lit.errors import RequestError
from aurora_lit.grammars.matcher import Grammar, GrammarCompiler
from aurora_lit.request import Request, SharedBy

_COMPILING_POLL_S = 0.01
"""How long a round without other work waits for a grammar."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadyRequest:
    """A request that may begin."""

    request: Request
    end_tokens: frozenset[int]
    """Those that end its output."""
    grammar: Grammar | None = None
    error: str | None = None
    """Why its grammar cannot be used: it cannot begin."""


class WaitingQueue:
    """See the file's example."""

    def __init__(self, grammars: GrammarCompiler | None, *, eos_token_ids: frozenset[int], shared_by: SharedBy) -> None:
        """`grammars` None: requests with a grammar are refused. `shared_by`: whose requests may use a compiled one."""
        self._grammars, self._eos_token_ids, self._shared_by = grammars, eos_token_ids, shared_by
        self._requests: dict[str, Request] = {}
        """By id, in the order of their arrival."""
        self._compiling: dict[str, Future[Grammar]] = {}
        self._failed: deque[tuple[Request, Future[Grammar]]] = deque()
        """What could not be compiled, from other threads; some of it may have been removed since."""

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: Request) -> None:
        """Add a request. Raises RequestError if its grammar cannot be used with this model."""
        asked = request.params.structured_outputs
        if asked is not None:
            has_end = bool(self._eos_token_ids) and not request.params.ignore_eos
            if self._grammars is None or not has_end:
                reason = "this model's tokenizer cannot be read for it" if has_end else "no token ends every output"
                raise RequestError(f"structured_outputs cannot be used: {reason}", param="structured_outputs")
            compiling = self._grammars.compile(
                asked, end_tokens=self._end_tokens(request), owners=self._owners(request)
            )
            compiling.add_done_callback(functools.partial(self._note, request))
            self._compiling[request.request_id] = compiling
        self._requests[request.request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget a request; an unknown id is ignored."""
        self._requests.pop(request_id, None)
        if compiling := self._compiling.pop(request_id, None):
            compiling.cancel()  # or the grammars of others would wait for one that nobody wants

    def take(self, most: int) -> list[ReadyRequest]:
        """Take out all whose grammars cannot be used, and the oldest requests that may begin: up to `most`."""
        refused: list[ReadyRequest] = []
        while self._failed:
            request, compiling = self._failed.popleft()
            if self._compiling.get(request.request_id) is compiling:
                refused.append(self._ready(request, compiling))
                self.remove(request.request_id)
        begins: list[ReadyRequest] = []
        for request_id, request in self._requests.items():
            if len(begins) >= most:
                break
            of_request = self._compiling.get(request_id)
            if of_request is None or of_request.done():
                begins.append(self._ready(request, of_request))
        for each in begins:
            self.remove(each.request.request_id)
        return refused + begins

    def wait_for_grammar(self) -> None:
        """Wait a moment for a grammar, if nothing else is to be done."""
        wait(self._compiling.values(), timeout=_COMPILING_POLL_S, return_when=FIRST_COMPLETED)

    def _note(self, request: Request, compiling: Future[Grammar]) -> None:
        """Runs in the thread that has compiled a grammar, or has cancelled that."""
        if not compiling.cancelled() and compiling.exception() is not None:
            self._failed.append((request, compiling))

    def _ready(self, request: Request, compiling: Future[Grammar] | None) -> ReadyRequest:
        grammar, error = None, None
        fault = None if compiling is None else compiling.exception()
        if isinstance(fault, RequestError | ValueError):
            error = str(fault)
        elif fault is not None:  # whatever it is, such as a panic of llguidance, other requests go on
            _log.error("the grammar of request %s could not be compiled", request.request_id, exc_info=fault)
            error = f"its grammar could not be compiled: {type(fault).__name__}: {fault}"
        elif compiling is not None:
            grammar = compiling.result()
        return ReadyRequest(request=request, end_tokens=self._end_tokens(request), grammar=grammar, error=error)

    def _owners(self, request: Request) -> list[Hashable]:
        """Whose compiled grammars a request may use; the first of them will own what is compiled for it."""
        own, scope = request.call or request.request_id, request.scope(self._shared_by)
        if scope is None:
            return [own]
        return [scope, own] if request.store else [own, scope]

    def _end_tokens(self, request: Request) -> frozenset[int]:
        of_model = frozenset[int]() if request.params.ignore_eos else self._eos_token_ids
        return of_model | frozenset(request.params.stop_token_ids)
