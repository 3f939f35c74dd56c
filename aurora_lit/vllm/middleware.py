"""ASGI middleware of vLLM's API server (`--middleware aurora_lit.vllm.middleware.Middleware`).

It starts the follower (follower.py) with the server, and hands two fields of a request, which vLLM accepts and drops,
to the engine as extra arguments: `store: false` (no trace is made of the request) and `metadata.aurora_domain` (its
label). A body is read only when vLLM reads it, which is after it has checked the API key. Without AURORA_LIT_VLLM it
passes everything on untouched.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aurora_lit.errors import AuroraError
from aurora_lit.vllm.capture import DOMAIN_ARGUMENT, STORE_ARGUMENT
from aurora_lit.vllm.deployment import Deployment
from aurora_lit.vllm.follower import follow

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/invocations",
)
"""Ends of the paths whose requests have `vllm_xargs`."""
_LABEL = "aurora_domain"
_log = logging.getLogger("vllm.aurora_lit")


class Middleware:
    """See the file's docstring."""

    def __init__(self, app: App) -> None:
        """Read the environment; a wrong one is one line, and the server goes on."""
        self._app = app
        self._deployment: Deployment | None = None
        try:
            self._deployment = Deployment.of_environment()
        except AuroraError as error:
            _log.warning("aurora-lit is off: %s; serving is unaffected", error)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request, or the life of the server."""
        if self._deployment is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "lifespan":
            _log_where_vllm_does()
            task = asyncio.create_task(follow(self._deployment, scope["app"].state.engine_client))
            try:
                await self._app(scope, receive, send)
            finally:
                task.cancel()
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(_PATHS):
            # Content-Length stays the client's: vLLM's metrics count it, and the body is read to its end all the same.
            await self._app(scope, _rewriting(receive), send)
        else:
            await self._app(scope, receive, send)


def _log_where_vllm_does() -> None:
    """Show what drafts/ says, such as why a version is refused, in vLLM's log.

    A library that vLLM's API server loads sets the root logger's level to ERROR.
    """
    ours = logging.getLogger("aurora_lit")
    ours.setLevel(logging.WARNING)
    for handler in logging.getLogger("vllm").handlers:
        ours.addHandler(handler)


def with_extra_arguments(body: bytes) -> bytes:
    """The body with the client's consent and label as extra arguments; what is no JSON object is left to vLLM."""
    # Names may be spelt with escapes, or in UTF-16 or UTF-32, which have zero bytes.
    if not any(sign in body for sign in (b'"store"', b'"metadata"', b"aurora_lit_", b"\\u", b"\0")):
        return body
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(fields, dict):
        return body
    given, metadata = fields.get("vllm_xargs"), fields.get("metadata")
    extra = {
        name: value
        for name, value in (given.items() if isinstance(given, dict) else ())
        if name not in (DOMAIN_ARGUMENT, STORE_ARGUMENT)
    }
    domain = metadata.get(_LABEL) if isinstance(metadata, dict) else None
    if fields.get("store") not in (None, True):  # vLLM may take "false" and 0 for False
        extra[STORE_ARGUMENT] = 0
    if isinstance(domain, str) and domain.isprintable():
        extra[DOMAIN_ARGUMENT] = domain
    if extra == (given or {}):
        return body
    fields["vllm_xargs"] = extra or None
    return json.dumps(fields).encode()


def _rewriting(receive: Receive) -> Receive:
    """Gives the whole body at once, with the extra arguments, then what follows, such as the end of the connection."""
    is_read = False

    async def rewritten() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        parts, is_read = list[bytes](), True
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return message
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return {"type": "http.request", "body": with_extra_arguments(b"".join(parts)), "more_body": False}

    return rewritten
