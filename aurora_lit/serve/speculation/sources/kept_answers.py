"""Keeps what the traffic memory remembers in a folder (memory.keep), so that it survives a restart.

    FOLDER/key              32 random bytes
    FOLDER/lock             held while a server uses the folder
    FOLDER/HASH.answers     one scope and salt: a header that names format and target, then a record for each answer
    FOLDER/HASH.set-aside   a file that could not be used at the last start

HASH is that of scope and salt with the key, so neither stands in a file or in its name. A thread reads all answers
after the start, then appends finished ones, flushed to disk; what a crash leaves is read up to the first record that is
not whole. When all files together have twice their size limit, the oldest answers are dropped and the files replaced.
Whatever fails on disk is warned about, and serving continues.

Leaves out what a request may read (memory.py) and what is in no answer here: those with `store: false`, which never
reach the memory.

    kept = KeptAnswers(folder, target=model_digest(model_folder), max_bytes=8 << 20)
    kept.start(insert)                       # reads what is kept, in a thread
    kept.add(scope, domain="code", tokens=[7, 5, 6, 8, 9], answer=4)
    kept.close()                             # writes what is pending
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import struct
import threading
import time
import weakref
import zlib
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from aurora_lit.durable import lock_file, replace_file, sync
from aurora_lit.errors import ConfigError
from aurora_lit.request import Scope
from aurora_lit.settings import MemorySettings

_SUFFIX, _ASIDE = ".answers", ".set-aside"
_MAGIC = b"aurora-lit answers 1\n"
_RECORD = struct.Struct("<IIdHI")
"""CRC-32 of all that follows; bytes of the body, seconds since 1970, bytes of the domain's name (which the body begins
with; int32 tokens follow), and how many of the tokens are the answer."""
_CRC_BYTES = 4
_FILE_BYTES = 4096
"""What a file counts besides its content, so that many small ones are bounded too."""
_WRITE_EVERY_S = 20.0
_MAX_PENDING = 4096
"""Answers that wait to be written; where the disk is slower, the oldest of them are not kept."""
_SAMPLED_BYTES = 1 << 16
_OWNER_ONLY = 0o600
_log = logging.getLogger(__name__)


class KeptAnswer(NamedTuple):
    """One record."""

    file: str
    """Hash of its scope and salt."""
    ended_s: float
    """Seconds since 1970."""
    domain: str
    answer: int
    """So many tokens at the end are the answer; before them is the end of its prompt."""
    token_bytes: bytes
    """int32."""

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens."""
        return memoryview(self.token_bytes).cast("i")


class KeptAnswers:
    """The folder of one server; see the file's example."""

    def __init__(self, folder: Path, *, target: bytes, max_bytes: int, write_every_s: float = _WRITE_EVERY_S) -> None:
        """Make and lock the folder. target: digest of the model whose tokens these are.

        max_bytes: what is left of the answers whenever there are twice as many. Raises BlockingIOError if another
        process uses the folder, and another OSError if it cannot be used.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, lock_file(folder / "lock"))
        self._folder, self._max_bytes, self._write_every_s = folder, max_bytes, write_every_s
        self._header = _MAGIC + target
        self._key = _read_key(folder)
        for left in _leftovers(folder):
            left.unlink()
        self._bytes_of = {path.stem: path.stat().st_size for path in folder.glob(f"*{_SUFFIX}")}
        """Of each file, without what a crash or a full disk has left at its end."""
        self.is_read = False
        """True once what was kept has been read."""
        self._pending: deque[KeptAnswer] = deque(maxlen=_MAX_PENDING)
        self._has_warned = False
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def file(self, scope: Scope) -> str:
        """The hash by which a scope's file is named."""
        text = json.dumps(scope).encode()
        return hashlib.blake2b(text, key=self._key, person=b"scope", digest_size=32).hexdigest()

    @property
    def files(self) -> list[str]:
        """The names of all files that are kept, without suffix."""
        return list(self._bytes_of)

    @property
    def num_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(self._bytes_of.values()) + _FILE_BYTES * len(self._bytes_of)

    def start(self, insert: Callable[[KeptAnswer], object]) -> None:
        """Begin to read and write, in a thread; `insert` gets there what was kept before, oldest first."""
        self._thread = threading.Thread(target=self._run, args=(insert,), name="kept-answers", daemon=True)
        self._thread.start()

    def add(self, scope: Scope, *, domain: str, tokens: Sequence[int], answer: int) -> None:
        """Keep an answer, within seconds. Never waits."""
        content = array("i", tokens).tobytes()
        self._pending.append(KeptAnswer(self.file(scope), time.time(), domain, answer, content))

    def close(self) -> None:
        """Write what is pending, end the thread and unlock the folder."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        self._unlock()

    def _run(self, insert: Callable[[KeptAnswer], object]) -> None:
        answers = self._read_all()
        for each in answers:
            if self._ending.is_set():
                break
            insert(each)
        del answers
        self.is_read = True
        while not self._ending.wait(self._write_every_s):
            self._write()
        self._write()

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read_all(self) -> list[KeptAnswer]:
        """The answers of all files, oldest first."""
        answers = [each for file in self.files for each in self._read(file)]
        return sorted(answers, key=lambda each: each.ended_s)

    def _read(self, file: str) -> list[KeptAnswer]:
        """The answers of a file; one that cannot be used is set aside, and a damaged end is cut off."""
        path = self._path(file)
        try:
            content = path.read_bytes()[: self._bytes_of[file]]
            if not content.startswith(self._header):
                is_whole = content.startswith(_MAGIC) and len(content) >= len(self._header)
                reason = "is of another target" if is_whole else "is damaged, or of another version"
                _log.warning("%s %s; it is set aside and ignored", path, reason)
                del self._bytes_of[file]
                os.replace(path, path.with_suffix(_ASIDE))
                return []
            answers, end = _parse(file, content, start=len(self._header))
            if end < len(content):
                _log.warning("%s: its last %d bytes are damaged and dropped", path, len(content) - end)
                os.truncate(path, end)
            self._bytes_of[file] = end
        except OSError as error:
            self._bytes_of.pop(file, None)
            _log.warning("%s cannot be read and is ignored (%s)", path, error)
            return []
        return answers

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write what is pending; if the disk refuses it, it is dropped."""
        answers = [self._pending.popleft() for _ in range(len(self._pending))]
        records = _by_file(answers)
        num_new = sum(map(len, records.values())) + _FILE_BYTES * len(records.keys() - self._bytes_of.keys())
        try:
            if self.num_bytes + num_new > 2 * self._max_bytes:
                self._replace(sorted([*self._read_all(), *answers], key=lambda each: each.ended_s))
            else:
                for file, content in records.items():
                    self._append(file, content)
        except Exception as error:  # such as a full disk; whatever it is, later answers may be kept
            if not self._has_warned:
                _log.warning("%s: answers cannot be kept (%s); serving continues without", self._folder, error)
            self._has_warned = True
        else:
            self._has_warned = False

    def _append(self, file: str, content: bytes) -> None:
        path, size = self._path(file), self._bytes_of.get(file, 0)
        content = content if size else self._header + content
        with open(path, "ab", buffering=0, opener=_open_for_owner) as log:
            log.truncate(size)
            if log.write(content) != len(content):
                raise OSError(f"{path}: the disk is full")
            os.fsync(log.fileno())
        if not size:
            sync(self._folder)
        self._bytes_of[file] = size + len(content)

    def _replace(self, answers: list[KeptAnswer]) -> None:
        """Keep the newest of these answers, as far as there is room, and nothing else."""
        files, num_bytes, kept = set[str](), 0, deque[KeptAnswer]()
        for each in reversed(answers):
            num_bytes += len(_record(each)) + (0 if each.file in files else _FILE_BYTES + len(self._header))
            if num_bytes > self._max_bytes:
                break
            files.add(each.file)
            kept.appendleft(each)
        for file in self._bytes_of.keys() - files:
            self._path(file).unlink(missing_ok=True)
            del self._bytes_of[file]
        for file, content in _by_file(kept).items():
            replace_file(self._path(file), self._header, content, mode=_OWNER_ONLY)
            self._bytes_of[file] = len(self._header) + len(content)

    def _path(self, file: str) -> Path:
        return self._folder / f"{file}{_SUFFIX}"


def model_digest(folder: Path) -> bytes:
    """32 bytes that tell a model's files, its tokenizer among them, from another's: of names, sizes and last bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(json.dumps([path.name, size]).encode() + file.read())
    return digest.digest()


def client_key(memory: MemorySettings) -> bytes:
    """The key of clients' pseudonyms: the same after a restart if clients' memories are, else a new one.

    `memory`: as config.py resolves it. Call it once the engine worker has made the folder.
    """
    if memory.keep is not None and memory.scope == "client":
        with contextlib.suppress(OSError):  # there is no folder, since nothing is remembered
            key = (kept_folder(memory.keep) / "key").read_bytes()
            return hashlib.blake2b(key, person=b"clients", digest_size=16).digest()
    return secrets.token_bytes(16)


def forget(keep: str | None) -> int:
    """Delete what memory.keep holds; returns the number of files. Raises ConfigError while a server uses the folder."""
    if keep is None:
        raise ConfigError("memory.keep=null: nothing is kept on disk; name the folder, as memory.keep=FOLDER")
    folder = kept_folder(keep)
    if not (folder / "lock").exists():
        raise ConfigError(f"memory.keep={keep} holds no memory; name the folder that the server had")
    try:
        descriptor = lock_file(folder / "lock")
    except BlockingIOError as error:
        raise ConfigError(
            f"memory.keep={keep}: a server uses it, which would go on with what it remembers; stop it first"
        ) from error
    try:
        paths = list(folder.glob(f"*{_SUFFIX}"))
        for path in [*paths, *_leftovers(folder), folder / "key"]:
            path.unlink(missing_ok=True)
        sync(folder)
    finally:
        os.close(descriptor)
    return len(paths)


def kept_folder(keep: str) -> Path:
    """The folder that memory.keep names."""
    return Path(keep).expanduser()


def _read_key(folder: Path) -> bytes:
    """The folder's key, which is made if there is none, or half of one."""
    path = folder / "key"
    key = path.read_bytes() if path.exists() else b""
    if len(key) != 32:
        key = secrets.token_bytes(32)
        replace_file(path, key, mode=_OWNER_ONLY)
    return key


def _leftovers(folder: Path) -> list[Path]:
    """What an earlier server has set aside, or was killed while it replaced it."""
    return [*folder.glob(f"*{_ASIDE}"), *folder.glob(f".*{_SUFFIX}.tmp"), *folder.glob(".key.tmp")]


def _record(each: KeptAnswer) -> bytes:
    domain = each.domain.encode(errors="surrogatepass")
    body = domain + each.token_bytes
    head = _RECORD.pack(0, len(body), each.ended_s, len(domain), each.answer)[_CRC_BYTES:]
    return zlib.crc32(head + body).to_bytes(_CRC_BYTES, "little") + head + body


def _by_file(answers: Iterable[KeptAnswer]) -> dict[str, bytes]:
    records = defaultdict[str, list[bytes]](list)
    for each in answers:
        records[each.file].append(_record(each))
    return {file: b"".join(pieces) for file, pieces in records.items()}


def _parse(file: str, content: bytes, *, start: int) -> tuple[list[KeptAnswer], int]:
    """The answers of a file's content from `start` on, and where the last whole record ends."""
    answers = []
    while start + _RECORD.size <= len(content):
        crc, num_bytes, ended_s, domain_bytes, answer = _RECORD.unpack_from(content, start)
        body, end = start + _RECORD.size, start + _RECORD.size + num_bytes
        if end > len(content) or zlib.crc32(memoryview(content)[start + _CRC_BYTES : end]) != crc:
            break
        domain = content[body : body + domain_bytes].decode(errors="surrogatepass")
        answers.append(KeptAnswer(file, ended_s, domain, answer, content[body + domain_bytes : end]))
        start = end
    return answers, start


def _open_for_owner(name: str, flags: int) -> int:
    return os.open(name, flags, _OWNER_ONLY)
