"""Every error as OpenAI's error body `{"error": {"message", "type", "param", "code"}}`, in /openapi.json too.

Leaves out the checks that raise errors. `install_error_handlers` covers our RequestError, FastAPI's validation, the
framework's HTTP errors (404, 405, 413) and any other exception (500).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict, shorten
from aurora_lit.serve.http.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TextPart,
    TokenizeRequest,
)
from aurora_lit.serve.http.structured_fields import JSONSchemaFormat, ResponseFormat, StructuredOutputs
from aurora_lit.serve.http.tool_fields import CalledFunction, CalledTool, Function, FunctionName, NamedTool, Tool

RETRY_AFTER_S = 1
MAX_BODY_BYTES = 16 * 2**20
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MODELS: tuple[type[Strict], ...] = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TextPart,
    ResponseFormat,
    JSONSchemaFormat,
    StructuredOutputs,
    Tool,
    Function,
    NamedTool,
    FunctionName,
    CalledTool,
    CalledFunction,
)
_MAPPINGS = ("metadata", "logit_bias", "chat_template_kwargs")
"""Fields whose keys are the client's."""
_FIELDS = frozenset(field.alias or name for model in _MODELS for name, field in model.model_fields.items())


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body; the type follows from the HTTP status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_event(message: str, *, status: int, param: str | None = None, code: str | None = None) -> str:
    """The same as one complete server-sent event, for a stream that has begun."""
    return f"data: {json.dumps(error_body(message, status=status, param=param, code=code))}\n\n"


def install_error_handlers(app: FastAPI, *, on_error: Callable[[int], None], needs_key: bool) -> None:
    """Register the handlers.

    on_error: called with the HTTP status of every error response. needs_key: an API key is set, for /openapi.json.
    """

    def respond(
        message: str,
        status: int,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> JSONResponse:
        on_error(status)
        more = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
        body = error_body(message, status=status, param=param, code=code)
        return JSONResponse(body, status_code=status, headers={**more, **(headers or {})})

    async def on_request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return respond(error.message, error.status, error.param, error.code, headers)

    async def on_invalid_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        unread = _why_unread(request, error.__cause__)
        return respond(*unread or explain(error.errors(), content_type=request.headers.get("content-type")))

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        unread = _why_unread(request, error.__cause__) if error.status_code == 400 else None
        if unread is not None:
            return respond(*unread)
        detail = str(error.detail)
        if error.status_code == 413:
            detail = f"the body is larger than {MAX_BODY_BYTES >> 20} MiB; send a smaller one"
        text = {
            404: f"{request.method} {request.url.path} does not exist; see /docs",
            405: f"{request.url.path} does not answer {request.method}; see /docs",
        }.get(error.status_code, detail)
        code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code)
        param = "body" if error.status_code in (400, 413) else None
        return respond(text, error.status_code, param, code, error.headers)

    async def on_other_error(request: Request, error: Exception) -> JSONResponse:
        return respond("internal error; the server's log has the details", 500, None, "internal_error")

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
            elif method == "post" and path.startswith("/v1/"):
                success["content"]["text/event-stream"] = text
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def explain(errors: list[Any] | Any, *, content_type: str | None) -> tuple[str, int, str | None, str | None]:
    """Message, status, param and code for pydantic's list of errors; only the most specific error is reported."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        shown = shorten(content_type) if content_type else "missing"
        return f"content-type is {shown}; send application/json", 400, "content-type", "invalid_content_type"
    # Each branch of a union (such as prompt) reports an error; the one that got furthest into the value is best, and
    # then one of a branch for such a value.
    error = max(errors, key=_specificity)
    # Names of union branches ("list[str]") are not fields. The name of an unknown field is the last part.
    named = _FIELDS | ({error["loc"][-1]} if error["type"] == "extra_forbidden" else set())
    location = [part for part in error["loc"][1:] if isinstance(part, int) or part in named]
    if error["type"] == "json_invalid":
        detail = error.get("ctx", {}).get("error", "")
        return f"body is no valid JSON: {detail} at character {error['loc'][-1]}", 400, "body", "invalid_json"
    if not location:
        return "body must be a JSON object", 400, "body", "invalid_type"
    where = str(location[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[1:])
    if error["type"] == "extra_forbidden":
        return f"{where} is unknown or not supported; leave it out", 400, where, "unsupported_parameter"
    if error["type"] == "missing":
        return f"{where} is missing", 400, where, "missing_parameter"
    key = f"[{shorten(error['loc'][-1])}]" if where in _MAPPINGS and error["loc"][-1] != where else ""
    detail = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}{key}={shorten(error.get('input'))}: {detail[:1].lower()}{detail[1:]}", 400, where, "invalid_value"


def _why_unread(request: Request, cause: BaseException | None) -> tuple[str, int, str, str] | None:
    """Message, status, param and code for a body that could not be read because of `cause`.

    None: it was read, or `explain` knows more, such as where its JSON ends.
    """
    headers = request.headers
    if "upgrade" in headers and "upgrade" in headers.get("connection", "").lower():  # the HTTP parser drops its body
        message = f"upgrade is {shorten(headers['upgrade'])}; send HTTP/1.1 without that header"
        return message, 400, "upgrade", "unsupported_upgrade"
    encoding = headers.get("content-encoding", "identity")
    if isinstance(cause, (ValueError, RecursionError)) and encoding != "identity":
        message = f"content-encoding is {shorten(encoding)}; send the body uncompressed"
        return message, 400, "content-encoding", "invalid_content_encoding"
    if isinstance(cause, json.JSONDecodeError):
        return None
    if isinstance(cause, UnicodeDecodeError):
        return "body is not UTF-8; send UTF-8", 400, "body", "invalid_json"
    if isinstance(cause, RecursionError):
        return "body is nested too deeply; send fewer levels of lists and objects", 400, "body", "invalid_json"
    if isinstance(cause, ValueError):  # such as an integer of thousands of digits
        return f"body is no valid JSON: {str(cause).partition(';')[0]}", 400, "body", "invalid_json"
    return None


def _specificity(error: Any) -> tuple[Any, ...]:
    """How much an error of pydantic's says about a value."""
    indices = [part for part in error["loc"] if isinstance(part, int)]
    return len(error["loc"]), indices, not error["type"].endswith("_type")
