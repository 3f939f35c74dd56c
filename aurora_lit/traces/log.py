"""Trace logs: traces on disk, for a draft to learn from later.

A log is a folder of safetensors shards and an `index.jsonl`. A shard holds many traces, concatenated. It is written
under a temporary name and then renamed, so readers see only whole shards and a crash loses at most one. A log can have
a size limit, beyond which the oldest shards are deleted. Only their owner can read the files: they hold what was said.
One writer at a time has a log: it holds a lock on the folder's `.lock`, which the kernel frees however it ends.

Leaves out making traces (serve/engine/trace_recorder.py, learn/pretrain/) and batches (learn/data/).
"""

from __future__ import annotations

import errno
import json
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import pad

from aurora_lit.durable import lock_file
from aurora_lit.traces.record import ROUND_FIELDS, Trace

INDEX_NAME, _LOCK_NAME = "index.jsonl", ".lock"

_OWNER_ONLY = 0o600
_UNKNOWN = float("nan")
_POSITION_FIELDS = {"token_ids": "token_ids_T", "aux": "aux_T3H", "last": "last_TH"}
"""Name in a shard and field of the trace, for tensors with a row for each position."""
_SHARD_NAME = re.compile(r"[a-z]+-\d{5,}\.safetensors")
"""Other files in the folder are the user's."""
_LEFTOVERS = (".tmp??????", ".*-?????*.safetensors.tmp", f".{INDEX_NAME}.tmp")
"""Files that a killed writer had begun, named by safetensors and by us."""
_PLAIN_FIELDS = ("request_id", "served_domain", "client", "verify", "temperature", "first_position", "prompt_length")


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard: a line of the index."""

    name: str
    num_positions: int
    num_sequences: int
    kind: str


class TraceLogWriter:
    """Appends traces to a log; `flush` writes the pending ones as a shard, as do `shard_positions` pending positions.

    On a folder that already has shards, it continues after them. `close` ends it, and so does deleting it, but then
    what is pending is lost.
    """

    def __init__(self, folder: Path, *, kind: str, shard_positions: int = 65_536, max_bytes: int | None = None) -> None:
        """`max_bytes`: size limit for the shards of all kinds; the oldest are deleted beyond it. None: no limit.

        Raises BlockingIOError if the folder has a writer, which would overwrite this one's shards; another OSError if
        it cannot be made.
        """
        self.folder = folder
        self.kind = kind
        self.shard_positions = shard_positions
        self.max_bytes = max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, lock_file(folder / _LOCK_NAME))
        for leftover in (path for pattern in _LEFTOVERS for path in folder.glob(pattern)):
            if leftover.is_file():
                leftover.unlink()
        self.num_positions = sum(shard.num_positions for shard in read_index(folder) if shard.kind == kind)
        self._pending: list[Trace] = []
        self._pending_positions = 0

    def close(self) -> None:
        """Write the pending traces, as `flush` does, and let others write to the folder."""
        try:
            self.flush()
        finally:
            self._unlock()

    def append(self, trace: Trace) -> None:
        """Add one trace; writes a shard if enough positions are pending."""
        self._pending.append(trace)
        self._pending_positions += len(trace.token_ids_T)
        self.num_positions += len(trace.token_ids_T)
        if self._pending_positions >= self.shard_positions:
            self.flush()

    def flush(self) -> None:
        """Write the pending traces as one shard, flush it to disk, then add it to the index.

        Raises OSError if that fails; the pending traces are then lost, and the writer can be used for further ones.
        """
        if not self._pending:
            return
        traces, self._pending, self._pending_positions = self._pending, [], 0
        name = f"{self.kind}-{self._next_number():05d}.safetensors"
        temporary = self.folder / f".{name}.tmp"
        tensors, metadata = _shard_of(traces)
        try:
            temporary.touch(_OWNER_ONLY)
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise OSError(errno.EIO, f"cannot be written: {error}", str(temporary)) from error
            with temporary.open("rb") as shard:
                os.fsync(shard.fileno())
            if self.max_bytes is not None:
                self._delete_oldest(self.max_bytes - temporary.stat().st_size)
            os.replace(temporary, self.folder / name)
            self._add_to_index(
                ShardInfo(name=name, num_positions=len(tensors["token_ids"]), num_sequences=len(traces), kind=self.kind)
            )
        finally:
            temporary.unlink(missing_ok=True)

    def _next_number(self) -> int:
        """A number that no shard has, in the index or in the folder."""
        names = [*(shard.name for shard in _index_lines(self.folder)), *(p.name for p in self.folder.iterdir())]
        numbers = [name.removesuffix(".safetensors").rpartition("-")[2] for name in names]
        return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)

    def _add_to_index(self, info: ShardInfo) -> None:
        path = self.folder / INDEX_NAME
        known = path.read_text(encoding="utf-8") if path.exists() else ""
        path.touch(_OWNER_ONLY)
        with path.open("a", encoding="utf-8") as index:
            # A line that a crash cut short is ended first, so that this one stays readable.
            index.write("\n" if known and not known.endswith("\n") else "")
            index.write(json.dumps(info.__dict__) + "\n")
            index.flush()
            os.fsync(index.fileno())

    def _delete_oldest(self, room: int) -> None:
        """Delete the oldest shards until the others take at most `room` bytes, and rewrite the index."""
        if room < 0:
            raise OSError(errno.EFBIG, f"a shard is larger than the {self.max_bytes} bytes the whole log may take")
        shards = read_index(self.folder)
        own = {path.name for path in self.folder.glob("*.safetensors") if _SHARD_NAME.fullmatch(path.name)}
        for unlisted in own - {shard.name for shard in shards}:
            (self.folder / unlisted).unlink()  # a crash came between the shard and its line in the index
        sizes = [(self.folder / shard.name).stat().st_size for shard in shards]
        num_deleted = 0
        while num_deleted < len(shards) and sum(sizes[num_deleted:]) > room:
            (self.folder / shards[num_deleted].name).unlink()
            num_deleted += 1
        if num_deleted:
            temporary = self.folder / f".{INDEX_NAME}.tmp"
            lines = [json.dumps(shard.__dict__) + "\n" for shard in shards[num_deleted:]]
            temporary.touch(_OWNER_ONLY)
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, self.folder / INDEX_NAME)


def read_index(folder: Path) -> list[ShardInfo]:
    """The shards of a log, oldest first; a line of the index that a crash cut short is skipped."""
    return [info for info in _index_lines(folder) if (folder / info.name).exists()]


def read_shard(path: Path) -> Iterator[Trace]:
    """The traces of one shard, as views of its tensors. Tensors that traces no longer have are left out."""
    with safe_open(path, framework="pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118  (not a dict)
        metadata = shard.metadata()
    domains, plain = json.loads(metadata["domains"]), json.loads(metadata["plain"])
    parts: dict[str, Any] = {
        name: tensors[key].split(tensors["lengths"].tolist()) for key, name in _POSITION_FIELDS.items()
    }
    lse = tensors["lse"].split(tensors["lengths"].tolist())
    parts |= {name: tensors[name].split(tensors["num_rounds"].tolist()) for name in ROUND_FIELDS}
    for i, (domain, answer_start) in enumerate(zip(domains, tensors["answer_starts"].tolist(), strict=True)):
        fields = {name: part[i] for name, part in parts.items()}
        longest = int(fields["num_proposed_R"].max()) if len(fields["num_proposed_R"]) else 0
        fields["proposal_RK"] = fields["proposal_RK"][:, :longest]
        yield Trace(
            **plain[i],
            **fields,
            domain=domain,
            answer_start=answer_start,
            lse_T=None if bool(lse[i].isnan().any()) else lse[i],
        )


def _index_lines(folder: Path) -> list[ShardInfo]:
    path = folder / INDEX_NAME
    shards = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            info = ShardInfo(**json.loads(line))
            if _SHARD_NAME.fullmatch(info.name):  # another's log may name files outside of it
                shards.append(info)
        except (json.JSONDecodeError, TypeError):
            continue
    return shards


def _shard_of(traces: list[Trace]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a shard."""
    tensors = {key: torch.cat([getattr(trace, name) for trace in traces]) for key, name in _POSITION_FIELDS.items()}
    tensors["lse"] = torch.cat(
        [t.lse_T.float() if t.lse_T is not None else torch.full((len(t.token_ids_T),), _UNKNOWN) for t in traces]
    )
    tensors["lengths"] = torch.tensor([len(t.token_ids_T) for t in traces], dtype=torch.int32)
    tensors["answer_starts"] = torch.tensor([t.answer_start for t in traces], dtype=torch.int32)
    tensors["num_rounds"] = torch.tensor([len(t.round_root_R) for t in traces], dtype=torch.int32)
    longest = max(t.proposal_RK.shape[1] for t in traces)
    for name in ROUND_FIELDS:
        parts = [getattr(trace, name) for trace in traces]
        if name == "proposal_RK":
            parts = [pad(part, (0, longest - part.shape[1]), value=-1) for part in parts]
        tensors[name] = torch.cat(parts)
    return tensors, {
        "domains": json.dumps([t.domain for t in traces]),
        "plain": json.dumps([{name: getattr(t, name) for name in _PLAIN_FIELDS} for t in traces]),
    }
