"""Which part of the traffic memory a request may read and write.

Pure, so that what is claimed of it can be tested with random requests. Leaves out the memory itself, and which scope a
deployment has (`resolved_memory_scope` in config.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from aurora_lit.request import Request

MemoryScope = Literal["domain", "client", "off"]
"""Who shares a part of the memory: all clients (a domain's own answers come first), or requests of one client; off:
there is no memory."""


class MemoryPartition(NamedTuple):
    """The key of one part of the memory. It is compared as it is, never by a hash, so no two parts can be confused."""

    client: str
    """Pseudonym of the only client of this part; "": all clients share it."""
    salt: str
    """The `cache_salt` that all its requests have; "": they have none."""


def memory_partition_key(request: Request, *, scope: MemoryScope) -> MemoryPartition | None:
    """The part of the memory that `request` may read and write; None: it has no memory.

    A request with `store` False may read its part but must write nothing, for which its writer checks `Request.store`.
    With scope client, a request of an unknown client has no memory: what one such client wrote, another would read.
    """
    if scope == "off" or (scope == "client" and not request.client):
        return None
    client = request.client if scope == "client" else ""
    return MemoryPartition(client=client, salt=request.cache_salt)
