"""An HTTP server around transformers' `generate`, which has none that batches on a CPU: OpenAI's chat route, streamed.

    python transformers_server.py --model FOLDER --port 8000 --threads 2

Batches are static: waiting requests are left-padded and decoded together until all have ended; requests that arrive in
the meantime wait for the next batch. After a batch of several requests it waits 20 ms, so that clients that got their
last token at the same time are in one batch again; a single client never waits. Greedy only. It runs in the peer's
environment, so it imports only torch, transformers and the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

_GATHER_S = 0.02


class PendingRequest:
    """One request: its prompt, and a queue of its tokens; None ends it."""

    def __init__(self, messages: list[dict[str, str]], max_tokens: int) -> None:
        self.messages = messages
        self.max_tokens = max_tokens
        self.tokens: queue.Queue[list[int] | None] = queue.Queue()


class BatchStreamer(BaseStreamer):
    """Puts the tokens of a batch into the queues of its requests, up to each request's end."""

    def __init__(self, batch: list[PendingRequest], eos_ids: set[int]) -> None:
        self._left = {row: request.max_tokens for row, request in enumerate(batch)}
        self._batch, self._eos_ids, self._prompt = batch, eos_ids, True

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompts, then with each step's tokens: one per request, or several of a single request."""
        if self._prompt:
            self._prompt = False
            return
        for row, tokens in enumerate(value.reshape(len(self._batch), -1).tolist()):
            given = []
            for token in tokens:
                if row in self._left:
                    given.append(token)
                    self._left[row] -= 1
                    if token in self._eos_ids or not self._left[row]:
                        del self._left[row]
            if given:
                self._batch[row].tokens.put(given)
                if row not in self._left:
                    self._batch[row].tokens.put(None)

    def end(self) -> None:
        """End the requests that have not ended yet."""
        for row in list(self._left):
            self._batch[row].tokens.put(None)


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--most", type=int, default=8, help="requests in a batch")
    parser.add_argument("--prompt-lookup", type=int, default=0, help="tokens proposed from the prompt; batches of one")
    arguments = parser.parse_args()
    cores = os.sched_getaffinity(0)
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    waiting: queue.Queue[PendingRequest] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        """Each request runs in its own thread; the model runs in the main thread."""

        def do_GET(self) -> None:
            self._json({"data": [{"id": "transformers"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = PendingRequest(body["messages"], body["max_tokens"])
            waiting.put(request)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            ids: list[int] = []
            shown = ""
            while (given := request.tokens.get()) is not None:
                ids += given
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                if len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    self._event({"choices": [{"index": 0, "delta": {"content": text[len(shown) :]}}]})
                    shown = text
            self._event({"choices": [], "usage": {"completion_tokens": len(ids)}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, fields: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\n\n")

        def _json(self, fields: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(fields).encode())

        def log_message(self, format: str, *words: Any) -> None:
            """Log nothing."""

    def listen() -> None:
        os.sched_setaffinity(0, cores)  # OpenMP has bound the main thread, and this one would be bound with it
        ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()

    threading.Thread(target=listen, daemon=True).start()
    _decode(
        model,
        tokenizer,
        waiting,
        most=1 if arguments.prompt_lookup else arguments.most,
        lookup_tokens=arguments.prompt_lookup,
    )


def _decode(model: Any, tokenizer: Any, waiting: queue.Queue[PendingRequest], *, most: int, lookup_tokens: int) -> None:
    options = {"prompt_lookup_num_tokens": lookup_tokens} if lookup_tokens else {}
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    together = 1
    while True:
        batch = [waiting.get()]
        until = time.monotonic() + (_GATHER_S if together > 1 else 0.0)
        while len(batch) < most:
            try:
                batch.append(waiting.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        together = len(batch)
        prompts = [tokenizer.apply_chat_template(a.messages, tokenize=False, add_generation_prompt=True) for a in batch]
        encoded = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            model.generate(
                **encoded,
                do_sample=False,
                max_new_tokens=max(a.max_tokens for a in batch),
                streamer=BatchStreamer(batch, eos_ids),
                **options,
            )


if __name__ == "__main__":
    main()
