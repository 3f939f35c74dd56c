"""What the HTTP process and the engine worker say to each other.

HTTP -> worker: a `Call`, or `CANCEL` for a call's id. Worker -> HTTP: one tuple of `Delta`s a call a round, or one
`Failure`. Leaves out the way there (LitServe's queue) and back (ipc/channel.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from aurora_lit.request import Request, TokenLogprob

CANCEL = "cancel"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One client call: all the sequences it asked for (n choices of each prompt)."""

    call_id: str
    requests: tuple[Request, ...]
    """In the order of the answer's choices."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one round added to one choice."""

    index: int
    """Position in Call.requests."""
    text: str
    """Whole characters that are certain by now; may be empty while tokens came."""
    token_ids: tuple[int, ...]
    """Tokens that count: up to the one that completed a stop string."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_proposed: int = 0
    num_accepted: int = 0
    finish_reason: str | None = None
    """"stop" or "length" with the choice's last delta."""
    draft_versions: tuple[str, ...] = ()
    """Draft versions that have proposed for the choice so far."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The call as a whole ended with an error."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 500


Content = tuple[Delta, ...] | Failure
"""What a round brings a call."""
EVERY_CALL = "every call"
"""What the worker's messages are addressed to: each holds a (call id, Content) for every call that it is about."""
