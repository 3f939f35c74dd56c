"""Every error as OpenAI's error body `{"error": {"message", "type", "param", "code"}}`, in /openapi.json too.

Leaves out the checks that raise errors. `install_error_handlers` covers our RequestError, FastAPI's validation, the
framework's HTTP errors (404, 405) and any other exception (500).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict, shorten

RETRY_AFTER_S = 1
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAPPINGS = ("metadata", "logit_bias", "chat_template_kwargs")
"""Fields whose keys are the client's."""


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error body; the type follows from the HTTP status."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_event(error: RequestError) -> str:
    """The same as one complete server-sent event, for a stream that has begun."""
    return f"data: {json.dumps(error_body(error))}\n\n"


def install_error_handlers(app: FastAPI, *, on_error: Callable[[int], None], needs_key: bool) -> None:
    """Register the handlers.

    on_error: called with the HTTP status of every error response. needs_key: an API key is set, for /openapi.json.
    """

    def respond(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        on_error(error.status)
        more = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
        return JSONResponse(error_body(error), status_code=error.status, headers={**more, **(headers or {})})

    async def on_request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        return respond(error, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)

    async def on_invalid_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        unread = _why_unread(request, error.__cause__)
        return respond(unread or explain(error.errors(), content_type=request.headers.get("content-type")))

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        unread = _why_unread(request, error.__cause__) if error.status_code == 400 else None
        if unread is not None:
            return respond(unread)
        message, code = {
            404: (f"{request.method} {request.url.path} does not exist; see /docs", "not_found"),
            405: (f"{request.url.path} does not answer {request.method}; see /docs", "method_not_allowed"),
        }.get(error.status_code, (str(error.detail), None))
        param = "body" if error.status_code == 400 else None
        return respond(RequestError(message, param=param, code=code, status=error.status_code), error.headers)

    async def on_other_error(request: Request, error: Exception) -> JSONResponse:
        message = "internal error; the server's log has the details"
        return respond(RequestError(message, code="internal_error", status=500))

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_other_error)
    _document(app, needs_key=needs_key)


def _document(app: FastAPI, *, needs_key: bool) -> None:
    """Show our error body in /openapi.json for every error status, in place of FastAPI's 422.

    Also correct what FastAPI cannot know: that no API key is needed if none is set, and which responses are not JSON.
    """
    generate = app.openapi
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    properties = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable}
    error = {"type": "object", "required": list(properties), "properties": properties}
    body = {"type": "object", "required": ["error"], "properties": {"error": error}}
    text = {"schema": {"type": "string"}}

    def openapi() -> dict[str, Any]:
        schema = generate()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas["Error"] = body
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        if not needs_key:
            schema["components"].pop("securitySchemes", None)
        for path, method, operation in (
            (path, method, operation) for path, each in schema["paths"].items() for method, operation in each.items()
        ):
            operation["responses"].pop("422", None)
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            operation["responses"]["default"] = {"description": "An error", "content": content}
            if not needs_key:
                operation.pop("security", None)
            success = operation["responses"]["200"]
            if path in ("/health", "/ready"):
                operation["responses"]["503"] = {**success, "description": "Not now; status says why"}
            elif path == "/metrics":
                success["content"] = {"text/plain": text}
            elif method == "post" and (path.startswith("/v1/") or path == "/infill"):
                success["content"]["text/event-stream"] = text
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def explain(errors: list[Any] | Any, *, content_type: str | None) -> RequestError:
    """What pydantic's list of errors comes to; only the most specific error is reported."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        shown = shorten(content_type) if content_type else "missing"
        message = f"content-type is {shown}; send application/json"
        return RequestError(message, param="content-type", code="invalid_content_type")
    # Each branch of a union (such as prompt) reports an error; the one that got furthest into the value is best, and
    # then one of a branch for such a value.
    error = max(errors, key=_specificity)
    # Names of union branches ("list[str]") are not fields. The name of an unknown field is the last part.
    named = _field_names() | ({error["loc"][-1]} if error["type"] == "extra_forbidden" else set())
    location = [part for part in error["loc"][1:] if isinstance(part, int) or part in named]
    if error["type"] == "json_invalid":
        detail = error.get("ctx", {}).get("error", "")
        message = f"body is no valid JSON: {detail} at character {error['loc'][-1]}"
        return RequestError(message, param="body", code="invalid_json")
    if not location:
        return RequestError("body must be a JSON object", param="body", code="invalid_type")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:] or "''"
    if error["type"] == "extra_forbidden":
        message = f"{where} is unknown or not supported; leave it out"
        return RequestError(message, param=where, code="unsupported_parameter")
    if error["type"] == "missing":
        return RequestError(f"{where} is missing", param=where, code="missing_parameter")
    key = f"[{shorten(error['loc'][-1])}]" if where in _MAPPINGS and error["loc"][-1] != where else ""
    detail = str(error["msg"]).removeprefix("Value error, ")
    message = f"{where}{key}={shorten(error.get('input'))}: {detail[:1].lower()}{detail[1:]}"
    return RequestError(message, param=where, code="invalid_value")


def _why_unread(request: Request, cause: BaseException | None) -> RequestError | None:
    """The error of a body that could not be read because of `cause`.

    None: it was read, or `explain` knows more, such as where its JSON ends.
    """
    headers = request.headers
    if "upgrade" in headers and "upgrade" in headers.get("connection", "").lower():  # the HTTP parser drops its body
        message = f"upgrade is {shorten(headers['upgrade'])}; send HTTP/1.1 without that header"
        return RequestError(message, param="upgrade", code="unsupported_upgrade")
    encoding = headers.get("content-encoding", "identity")
    if isinstance(cause, (ValueError, RecursionError)) and encoding != "identity":
        message = f"content-encoding is {shorten(encoding)}; send the body uncompressed"
        return RequestError(message, param="content-encoding", code="invalid_content_encoding")
    if isinstance(cause, json.JSONDecodeError) or not isinstance(cause, (RecursionError, ValueError)):
        return None
    message = f"body is no valid JSON: {str(cause).partition(';')[0]}"  # such as an integer of thousands of digits
    if isinstance(cause, UnicodeDecodeError):
        message = "body is not UTF-8; send UTF-8"
    elif isinstance(cause, RecursionError):
        message = "body is nested too deeply; send fewer levels of lists and objects"
    return RequestError(message, param="body", code="invalid_json")


@functools.cache
def _field_names() -> frozenset[str]:
    """The fields of all bodies and of their parts, as requests name them."""
    models = [Strict]
    for model in models:
        models += model.__subclasses__()
    return frozenset(field.alias or name for model in models for name, field in model.model_fields.items())


def _specificity(error: Any) -> tuple[Any, ...]:
    """How much an error of pydantic's says about a value."""
    indices = [part for part in error["loc"] if isinstance(part, int)]
    return len(error["loc"]), indices, not error["type"].endswith("_type")
