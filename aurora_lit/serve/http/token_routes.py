"""POST /tokenize and /detokenize, as vLLM has them: what the tokenizer makes of a text or a conversation, and back.

They need the tokenizer only, so they answer in the HTTP process while the engine computes. Leaves out requests to
generate (serve/http/routes.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi.responses import JSONResponse

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.serve.http.detokenizer import TokenDecoder, decode
from aurora_lit.serve.http.schema import DetokenizeRequest, TokenizeRequest
from aurora_lit.serve.http.tokenize import check_model, check_text, render

_MOST_CHARACTERS = 1 << 20
"""Of a text: more takes the tokenizer seconds."""
_MOST_STRINGS = 1 << 16
"""Of tokens, each of which takes microseconds of Python."""
_MOST_AT_ONCE = 2
"""Threads that both routes take of those in which requests for answers are prepared."""
_MOST_WAITING = 256
"""Texts, those at work included."""
T = TypeVar("T")


class TokenRoutes:
    """The two routes of one server."""

    def __init__(self, *, model: str, tokenizer: Tokenizer, status: EngineStatusPage) -> None:
        """model: the only name that requests may ask for. status: has the limits of the model."""
        self._model = model
        self._tokenizer, self._status = tokenizer, status
        self._token_decoder = TokenDecoder(tokenizer)
        self._turns, self._num_waiting = asyncio.Semaphore(_MOST_AT_ONCE), 0

    async def tokenize(self, body: TokenizeRequest) -> JSONResponse:
        """The ids of a text, or of a conversation as its prompt is rendered."""
        check_model(body.model, served=self._model)
        tokens, texts = await self._in_turn(lambda: self._tokenize(body))
        limit = self._status.read().max_seq_len
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": texts})

    async def detokenize(self, body: DetokenizeRequest) -> JSONResponse:
        """The text of ids, special tokens included, as vLLM has it."""
        check_model(body.model, served=self._model)
        vocab_size = self._status.read().vocab_size
        wrong = next((token for token in body.tokens if token >= vocab_size), None)
        if wrong is not None:
            raise RequestError(f"tokens: {wrong} is no token; use 0 to {vocab_size - 1}", param="tokens")
        text = await self._in_turn(lambda: decode(self._tokenizer, body.tokens, skips_special_tokens=False))
        return JSONResponse({"prompt": text})

    async def _in_turn(self, work: Callable[[], T]) -> T:
        """Do work in a thread, after that of earlier requests. Raises RequestError if too many wait."""
        if self._num_waiting >= _MOST_WAITING:
            raise RequestError(
                f"{self._num_waiting} texts wait to be tokenized or detokenized, the most at a time; try again later",
                code="queue_full",
                status=429,
            )
        self._num_waiting += 1
        try:
            async with self._turns:
                return await asyncio.to_thread(work)
        finally:
            self._num_waiting -= 1

    def _tokenize(self, body: TokenizeRequest) -> tuple[list[int], list[str] | None]:
        tokens = self._encode(body)
        if not body.return_token_strs:
            return tokens, None
        if len(tokens) > _MOST_STRINGS:
            raise RequestError(
                f"return_token_strs=true: {len(tokens)} tokens are more than {_MOST_STRINGS}; leave it out",
                param="return_token_strs",
            )
        return tokens, [self._token_decoder.to_text(token) for token in tokens]

    def _encode(self, body: TokenizeRequest) -> list[int]:
        # A template contains the special tokens.
        adds = body.add_special_tokens
        text, default = (body.prompt, True) if body.messages is None else (self._render(body), False)
        assert text is not None, "either prompt or messages is given"
        param = "prompt" if body.messages is None else "messages"
        check_text(text, param=param)
        if len(text) > _MOST_CHARACTERS:
            raise RequestError(
                f"{param}: {len(text)} characters are too many; send at most {_MOST_CHARACTERS}", param=param
            )
        return self._tokenizer.encode(text, add_special_tokens=default if adds is None else adds)

    def _render(self, body: TokenizeRequest) -> str:
        assert body.messages is not None
        return render(body.messages, body, tools=body.tools or (), tokenizer=self._tokenizer)
