"""Requests meant to harm a server, sent by a process of their own at low priority, so that it takes little from it.

    python -m benchmarks.soak.attacks nested_body --url http://127.0.0.1:8000 --seconds 15

The key, if there is one, is read from AURORA_LIT_API_KEY: all but the first two attacks come from a client who has it.
Prints one line of JSON: connections made and the statuses that were answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from aurora_lit.errors import AuroraError

from .server import KEY_VARIABLE

Json = dict[str, Any]
_CHAT = {"messages": [{"role": "user", "content": "Count to a thousand."}]}
_VOWELS = "aeiou", "aeiouy", "bcdfg", "hjklm", "npqrs", "tvwxz", "abcde", "uvwxy"


class Attack:
    """Where an attack goes, and what it came to."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.key = parts.hostname or "", parts.port or 80, key
        self.count: Counter[str] = Counter()
        """Connections, and answers by status."""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        self.count["connections"] += 1
        return await asyncio.open_connection(self.host, self.port)

    def head(self, path: str, length: int) -> bytes:
        """That of a POST."""
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{key}Content-Type: application/json\r\n"
        return f"{lines}Content-Length: {length}\r\n\r\n".encode()

    def saw(self, answer: bytes) -> None:
        """Count an answer by its first line."""
        self.count[answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "none"] += 1

    async def post(self, path: str, content: bytes) -> None:
        """Send a body, and read the whole answer."""
        reader, writer = await self.connect()
        try:
            writer.write(self.head(path, len(content)) + content)
            self.saw(await reader.read(1 << 12))
        finally:
            writer.close()

    async def keep_posting(self, path: str, content: Callable[[int], bytes], *, at_once: int) -> None:
        """Send one body after the other on so many connections. content: of a number."""

        async def client(first: int) -> None:
            number = first
            while True:
                with suppress(OSError):
                    await self.post(path, content(number))
                number += at_once
                await asyncio.sleep(0.02)

        await asyncio.gather(*map(client, range(at_once)))

    async def drip(self, begin: bytes, piece: bytes, *, connections: int, every_s: float) -> None:
        """Send a beginning, then a piece again and again, on so many connections, each made again when it is closed."""

        async def client() -> None:
            while True:
                with suppress(OSError):
                    reader, writer = await self.connect()
                    try:
                        writer.write(begin)
                        answer = asyncio.ensure_future(reader.read(1 << 12))
                        while not answer.done():
                            writer.write(piece)
                            await writer.drain()
                            await asyncio.wait([answer], timeout=every_s)
                        with suppress(OSError):
                            self.saw(answer.result())
                    finally:
                        writer.close()
                await asyncio.sleep(0.05)

        await asyncio.gather(*(client() for _ in range(connections)))


# -- the attacks -------------------------------------------------------------------------------------------------------


async def endless_head(attack: Attack) -> None:
    """A head of which there is always more, on four connections."""
    await attack.drip(b"POST /v1/completions HTTP/1.1\r\nX-A: ", b"a" * 4096, connections=4, every_s=0.001)


async def slow_heads(attack: Attack) -> None:
    """A head that comes byte by byte, on 200 connections."""
    await attack.drip(b"GET / HTTP/1.1\r\nX-A: ", b"a", connections=200, every_s=1.0)


async def slow_bodies(attack: Attack) -> None:
    """A body that comes byte by byte, on 100 connections."""
    head = attack.head("/v1/completions", 1 << 20)
    await attack.drip(head + b'{"prompt": "', b"a", connections=100, every_s=1.0)


async def nested_body(attack: Attack) -> None:
    """Millions of lists, wide and deep in turn."""
    wide = b'{"model": "none", "prompt": [' + b"[1]," * 1_000_000 + b"[1]]}"
    deep = b'{"model": "none", "prompt": ' + b"[" * 60_000 + b"]" * 60_000 + b"}"
    strings = b'{"model": "none", "prompt": [' + b'"a",' * 1_000_000 + b'"a"]}'
    bodies = (wide, deep, strings)
    await attack.keep_posting("/v1/completions", lambda number: bodies[number % 3], at_once=2)


async def schema_bomb(attack: Attack) -> None:
    """A schema of 2,000 parts and 700 definitions whose last part is wrong."""
    definitions = {f"d{number}": {"type": "object", "properties": {"a": {"type": "string"}}} for number in range(700)}
    schema = {"anyOf": [*[{}] * 2000, {"type": "strin"}], "$defs": definitions}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = json.dumps({**_CHAT, "max_tokens": 8, "response_format": form}).encode()
    await attack.keep_posting("/v1/chat/completions", lambda number: body, at_once=2)


async def expression_bombs(attack: Attack) -> None:
    """Regular expressions of many states, each another one."""

    def body(number: int) -> bytes:
        letters, times = _VOWELS[number % len(_VOWELS)], 150 + number // len(_VOWELS)
        return json.dumps({**_CHAT, "max_tokens": 32, "guided_regex": f"(.*[{letters}].{{{times}}}){{3}}z"}).encode()

    await attack.keep_posting("/v1/chat/completions", body, at_once=8)


async def infill_extras(attack: Attack) -> None:
    """Holes with a hundred files of 20 kB beside each."""
    extra = [{"filename": f"{number}.py", "text": "value = other + 1\n" * 1100} for number in range(100)]
    hole = {"input_prefix": "def f(", "input_suffix": "):\n", "input_extra": extra, "n_predict": 8}
    body = json.dumps(hole).encode()
    await attack.keep_posting("/infill", lambda number: body, at_once=2)


async def idle(attack: Attack) -> None:
    """10,000 connections on which nothing is sent, each made again when it is closed; fewer if not so many may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_000 if most == resource.RLIM_INFINITY else min(10_000, most - 64)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + 64, most))
    wanted = min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64)
    attack.count["idle at once"] = wanted

    async def client(number: int) -> None:
        await asyncio.sleep(number / 2000)
        while True:
            with suppress(OSError):
                reader, writer = await attack.connect()
                try:
                    attack.saw(await reader.read(1 << 12))
                finally:
                    writer.close()
            await asyncio.sleep(0.5)

    await asyncio.gather(*map(client, range(wanted)))


async def unread(attack: Attack) -> None:
    """Streams and large whole answers of which nothing is read, on 16 connections."""
    texts = "all work and no play " * 300

    async def client(number: int) -> None:
        stream = {**_CHAT, "stream": True, "max_tokens": 1500, "ignore_eos": True}
        whole = {"prompt": [texts] * 4, "prompt_logprobs": 20, "max_tokens": 1}
        path, body = ("/v1/chat/completions", stream) if number % 4 else ("/v1/completions", whole)
        content = json.dumps(body).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        try:
            attack.count["connections"] += 1
            await asyncio.get_running_loop().sock_connect(connection, (attack.host, attack.port))
            await asyncio.get_running_loop().sock_sendall(connection, attack.head(path, len(content)) + content)
            await asyncio.Event().wait()
        finally:
            connection.close()

    await asyncio.gather(*map(client, range(16)))


async def resets(attack: Attack) -> None:
    """Streams that are reset after a moment, on eight connections."""
    content = json.dumps({**_CHAT, "stream": True, "max_tokens": 400}).encode()
    draws = random.Random(0)

    async def client() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await attack.connect()
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.write(attack.head("/v1/chat/completions", len(content)) + content)
                with suppress(TimeoutError):
                    attack.saw(await asyncio.wait_for(reader.read(1 << 12), 2 * draws.random()))
                writer.transport.abort()
            await asyncio.sleep(0.01)

    await asyncio.gather(*(client() for _ in range(8)))


ATTACKS: dict[str, Callable[[Attack], Awaitable[None]]] = {
    each.__name__: each
    for each in (
        *(endless_head, slow_heads, slow_bodies, nested_body, schema_bomb, expression_bombs),
        *(infill_extras, idle, unread, resets),
    )
}


# -- running them ------------------------------------------------------------------------------------------------------


def run_attack(name: str, url: str, seconds: float, *, timeout_s: float = 60.0) -> Json:
    """Attack from another process; what it came to. Raises AuroraError if that process fails."""
    command = [sys.executable, "-m", "benchmarks.soak.attacks", name, "--url", url, "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + timeout_s, check=True)
    except subprocess.SubprocessError as error:
        raise AuroraError(f"the attack {name} failed: {error}: {getattr(error, 'stderr', '')}") from error
    found: Json = json.loads(done.stdout)
    return found


async def _attack_for(name: str, attack: Attack, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(ATTACKS[name](attack), seconds)


def main() -> None:
    """Attack, and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ATTACKS)
    parser.add_argument("--url", required=True)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    os.nice(19)
    attack = Attack(options.url, os.environ.get(KEY_VARIABLE))
    asyncio.run(_attack_for(options.name, attack, options.seconds))
    print(json.dumps(dict(attack.count)))


if __name__ == "__main__":
    main()
