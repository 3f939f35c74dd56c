"""Traces on disk: what the target computed over token sequences, kept so that a draft can learn from it later.

A log is a folder of safetensors shards plus `index.jsonl`. A shard holds many sequences end to end; it is written
to a temporary name and moved into place, so a reader sees whole shards only and a crash loses at most one shard.
What this file leaves out: who produces traces (learn/reading.py, learn/answering.py) and how batches are made of
them (learn/dataset.py).

Shapes: N positions of a shard, S sequences, H target hidden size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX_NAME = "index.jsonl"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One token sequence as the target saw it."""

    token_ids_T: torch.Tensor
    """int32. The sequence: text that was read, or prompt and answer."""
    aux_T3H: torch.Tensor
    """bf16. The three auxiliary hidden states, side by side."""
    last_TH: torch.Tensor
    """bf16. The hidden state the target's head sees; times the head it gives the logits for the next token."""
    lse_T: torch.Tensor
    """fp32. Log of the sum of exponentials of those logits over the whole vocabulary."""
    domain: str
    """Label of the prompt file or text, for reports."""
    answer_start: int
    """First position that belongs to an answer; the length when there is none."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A line of the index."""

    name: str
    num_positions: int
    num_sequences: int
    kind: str


class TraceLogWriter:
    """Appends traces to a log; `flush` closes the shard in hand, which also happens at `shard_positions`.

    Opened on a folder that already holds shards, it continues behind them.
    """

    def __init__(self, folder: Path, *, kind: str, shard_positions: int = 65_536) -> None:
        self.folder = folder
        self.kind = kind
        self.shard_positions = shard_positions
        folder.mkdir(parents=True, exist_ok=True)
        self.num_positions = sum(shard.num_positions for shard in read_index(folder) if shard.kind == kind)
        self._pending: list[Trace] = []
        self._pending_positions = 0

    def append(self, trace: Trace) -> None:
        """Add one sequence; writes a shard when enough positions are pending."""
        self._pending.append(trace)
        self._pending_positions += len(trace.token_ids_T)
        self.num_positions += len(trace.token_ids_T)
        if self._pending_positions >= self.shard_positions:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard, durably, then name it in the index."""
        if not self._pending:
            return
        traces, self._pending, self._pending_positions = self._pending, [], 0
        index_path = self.folder / INDEX_NAME
        known = index_path.read_text(encoding="utf-8") if index_path.exists() else ""
        name = f"{self.kind}-{len(known.splitlines()):05d}.safetensors"  # a number that no line of the index has
        tensors = {
            "token_ids": torch.cat([t.token_ids_T.to(torch.int32) for t in traces]),
            "aux": torch.cat([t.aux_T3H.to(torch.bfloat16) for t in traces]),
            "last": torch.cat([t.last_TH.to(torch.bfloat16) for t in traces]),
            "lse": torch.cat([t.lse_T.float() for t in traces]),
            "lengths": torch.tensor([len(t.token_ids_T) for t in traces], dtype=torch.int32),
            "answer_starts": torch.tensor([t.answer_start for t in traces], dtype=torch.int32),
        }
        temporary = self.folder / f".{name}.tmp"
        save_file(tensors, temporary, metadata={"domains": json.dumps([t.domain for t in traces])})
        with temporary.open("rb") as shard:
            os.fsync(shard.fileno())
        os.replace(temporary, self.folder / name)
        info = ShardInfo(name=name, num_positions=len(tensors["token_ids"]), num_sequences=len(traces), kind=self.kind)
        with index_path.open("a", encoding="utf-8") as index:
            # A line that a crash cut short is ended first, so that it does not spoil this one.
            index.write("\n" if known and not known.endswith("\n") else "")
            index.write(json.dumps(info.__dict__) + "\n")
            index.flush()
            os.fsync(index.fileno())


def read_index(folder: Path) -> list[ShardInfo]:
    """Return the whole shards of a log, oldest first; a line cut short by a crash is left out."""
    path = folder / INDEX_NAME
    if not path.exists():
        return []
    shards = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            info = ShardInfo(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        if (folder / info.name).exists():
            shards.append(info)
    return shards


def read_shard(path: Path) -> Iterator[Trace]:
    """Yield the traces of one shard, as views of its tensors."""
    with safe_open(path, framework="pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118  (not a dict)
        domains = json.loads(shard.metadata()["domains"])
    lengths = tensors["lengths"].tolist()
    parts = {key: tensors[key].split(lengths) for key in ("token_ids", "aux", "last", "lse")}
    for i, (domain, answer_start) in enumerate(zip(domains, tensors["answer_starts"].tolist(), strict=True)):
        yield Trace(
            token_ids_T=parts["token_ids"][i],
            aux_T3H=parts["aux"][i],
            last_TH=parts["last"][i],
            lse_T=parts["lse"][i],
            domain=domain,
            answer_start=answer_start,
        )
