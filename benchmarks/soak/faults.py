"""What is done to a server while clients use it, and in which order.

    for name in schedule(seed=0, number=60, names=[fault.name for fault in FAULTS]):
        note = BY_NAME[name].act(scene)

Each fault ends what it did before it returns: what it stopped goes on, and what it filled is empty again. Leaves out
hostile requests themselves (attacks.py) and whether the server stood it (watch.py).
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
from safetensors.torch import load_file, save_file

from aurora_lit.drafts.centroid_file import CENTROIDS_NAME
from aurora_lit.drafts.checkpoint import MANIFEST_NAME, WEIGHTS_NAME
from aurora_lit.drafts.store import lock
from aurora_lit.drafts.versions import CURRENT_NAME, RETIRED_NAME, PublishedVersions, version_name, version_number
from aurora_lit.learn.online.build import STATE_NAME

from .attacks import ATTACKS, run_attack
from .server import Supervised, has_mounts

_ATTACK_S = 12.0
_WATCHED_S = 12.0
"""How long spoiled files lie there: the server looks for new versions every second or so."""
_FULL_S = 25.0
_LIMITED_S = 15.0


class Scene(NamedTuple):
    """What faults are done to."""

    server: Supervised
    versions: Path
    """The folder with the published drafts."""
    draft: Path
    """The one that the server begins with."""
    has_small_disk: bool
    """The former is on a small file system of its own."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of the list."""

    name: str
    act: Callable[[Scene], str]
    """Does it, and tells what there is to tell."""
    fails_calls: bool = False
    """Calls may fail while it lasts."""
    restarts: bool = False
    """The server may end, and is started again."""
    spoils: bool = False
    """CURRENT or what it names cannot be read while it lasts."""
    traces: bool = False
    """A traceback in the log is expected."""
    missing: Callable[[Scene], str] = lambda scene: ""
    """Why it cannot be done here; empty if it can."""


def schedule(*, seed: int, number: int, names: Sequence[str]) -> list[str]:
    """So many faults: all in an order drawn by the seed, then all again in another one."""
    draws = random.Random(seed)
    found: list[str] = []
    while len(found) < number:
        found += draws.sample(names, len(names))
    return found[:number]


# -- processes ---------------------------------------------------------------------------------------------------------


def _stop(role: str, seconds: float, scene: Scene) -> str:
    member = scene.server.member(role)
    member.suspend()
    try:
        time.sleep(seconds)
    finally:
        with suppress(psutil.NoSuchProcess):
            member.resume()
    return f"{seconds:.0f} s"


def _kill(role: str, scene: Scene) -> str:
    scene.server.member(role).kill()
    time.sleep(1.0)
    return ""


def _signal(number: signal.Signals, scene: Scene) -> str:
    lives = scene.server.lives
    scene.server.main().send_signal(number)
    deadline = time.monotonic() + 60
    while scene.server.lives == lives and time.monotonic() < deadline:
        time.sleep(0.05)
    return f"exit code {scene.server.exits[-1][1]}" if scene.server.lives > lives else "it did not end"


def _term_while_writing(scene: Scene) -> str:
    deadline, writes = time.monotonic() + 45, False
    while time.monotonic() < deadline and not writes:
        writes = any(scene.versions.glob(".new.draft-*"))
        time.sleep(0.002)
    return f"{'' if writes else 'no '}version was being written; {_signal(signal.SIGTERM, scene)}"


def _little_cpu(scene: Scene) -> str:
    """What a quota of 20 % does: all processes run for 20 ms of every 100."""
    assert scene.server.server is not None
    members = [each for each in scene.server.server.members() if each.pid != os.getpid()]
    deadline = time.monotonic() + _LIMITED_S
    while time.monotonic() < deadline:
        for act, seconds in ((psutil.Process.suspend, 0.08), (psutil.Process.resume, 0.02)):
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    act(member)
            time.sleep(seconds)
    return ""


@contextmanager
def _limited(member: psutil.Process, what: int, most: int) -> Iterator[None]:
    before = member.rlimit(what)
    member.rlimit(what, (most, before[1]))
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            member.rlimit(what, before)


def _little_memory(scene: Scene) -> str:
    with ExitStack() as limits:
        for role in ("engine worker", "HTTP", "learner"):
            member = scene.server.member(role)
            limits.enter_context(_limited(member, psutil.RLIMIT_AS, member.memory_info().vms + (16 << 20)))
        time.sleep(_LIMITED_S)
    return "16 MiB more than each process had"


def _few_files(scene: Scene) -> str:
    with _limited(scene.server.member("HTTP"), psutil.RLIMIT_NOFILE, 256), ExitStack() as connections:
        for _ in range(400):
            with suppress(OSError):
                address = ("127.0.0.1", int(scene.server.url.rpartition(":")[2]))
                connections.enter_context(socket.create_connection(address, timeout=1))
        time.sleep(_LIMITED_S)
    return "beside 400 connections"


# -- files -------------------------------------------------------------------------------------------------------------


def _fill(folder: Path, seconds: float) -> str:
    filler, written = folder / "filler", 0
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                written += file.write(bytes(1 << 16))
        time.sleep(seconds)
    finally:
        filler.unlink(missing_ok=True)
    return f"{written >> 20} MiB"


def _garble_current(scene: Scene) -> str:
    path = scene.versions / CURRENT_NAME
    before = path.read_bytes() if path.exists() else None
    garbled = b"draft-\xff\x00garbled"
    path.write_bytes(garbled)
    time.sleep(_WATCHED_S)
    return "published over" if _put_back(path, garbled, before) else "put back"


def _put_back(path: Path, ours: bytes, before: bytes | None) -> bool:
    """Undo what was written to CURRENT; True if another version has been published meanwhile."""
    if path.exists() and path.read_bytes() != ours:
        return True
    if before is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(before)
    return False


def _publish_spoiled(spoil: Callable[[Path], None], scene: Scene) -> str:
    """Publish a copy of the current draft that must be refused, as a version of its own; then mark it as retired."""
    versions, path = PublishedVersions(scene.versions), scene.versions / CURRENT_NAME
    scene.versions.mkdir(exist_ok=True)
    with (scene.versions / ".lock").open("a") as file:
        lock(file.fileno(), scene.versions)
        current = versions.current()
        number = 1 + max(map(version_number, [*versions.names(), current or ""]))
        folder = scene.versions / version_name(number)
        before = path.read_bytes() if path.exists() else None
        shutil.copytree(scene.versions / current if current else scene.draft, folder)
        spoil(folder)
        ours = f"{folder.name}\n".encode()
        path.write_bytes(ours)
    time.sleep(_WATCHED_S)
    is_over = _put_back(path, ours, before)
    with suppress(OSError):  # it has been deleted for newer ones
        (folder / RETIRED_NAME).write_text("spoiled\n")
    return f"{folder.name}{', published over' if is_over else ''}"


def _truncate(folder: Path) -> None:
    weights = folder / WEIGHTS_NAME
    os.truncate(weights, weights.stat().st_size - 1000)


def _without_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def _garble(path: Path) -> str:
    """Replace a stretch in the middle of a file, if there is one."""
    if not path.exists():
        return "there was none"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = os.urandom(64)
    content[8:40] = os.urandom(32)
    other = path.with_name(f"{path.name}.garbled")
    other.write_bytes(content)
    os.replace(other, path)
    return f"{len(content)} bytes"


def _garble_centroids(scene: Scene) -> str:
    note = _garble(scene.versions / CENTROIDS_NAME)
    time.sleep(_WATCHED_S)
    return note


def _garble_state(scene: Scene) -> str:
    """The learner reads it when it is started again."""
    member = scene.server.member("learner")
    note = _garble(scene.versions / STATE_NAME)
    member.kill()
    time.sleep(_WATCHED_S)
    return note


# -- requests ----------------------------------------------------------------------------------------------------------


def _attack(name: str, scene: Scene) -> str:
    return json.dumps(run_attack(name, scene.server.url, _ATTACK_S))


# -- the list ----------------------------------------------------------------------------------------------------------


def _nothing(scene: Scene) -> str:
    return ""


def _without_small_disk(scene: Scene) -> str:
    return "" if scene.has_small_disk else "a mount namespace needs root"


def _without_own_memory(scene: Scene) -> str:
    return "" if has_mounts() else "a mount namespace needs root"


FAULTS: tuple[Fault, ...] = (
    Fault(name="STOP learner", act=functools.partial(_stop, "learner", 30.0)),
    Fault(name="STOP HTTP", act=functools.partial(_stop, "HTTP", 20.0), fails_calls=True),
    Fault(name="STOP worker", act=functools.partial(_stop, "engine worker", 12.0), fails_calls=True),
    Fault(name="KILL learner", act=functools.partial(_kill, "learner")),
    *(
        Fault(name=f"KILL {name}", act=functools.partial(_kill, role), fails_calls=True, restarts=True)
        for name, role in (("HTTP", "HTTP"), ("worker", "engine worker"), ("main", "main"))
    ),
    Fault(name="TERM while writing", act=_term_while_writing, fails_calls=True, restarts=True),
    Fault(name="HUP", act=functools.partial(_signal, signal.SIGHUP), fails_calls=True, restarts=True),
    Fault(
        name="full checkpoint disk",
        act=lambda scene: _fill(scene.versions.parent, _FULL_S),
        missing=_without_small_disk,
        traces=True,
    ),
    Fault(name="full /dev/shm", act=lambda scene: _fill(Path("/dev/shm"), _FULL_S), missing=_without_own_memory),
    Fault(name="garbled CURRENT", act=_garble_current, spoils=True),
    Fault(name="truncated draft", act=functools.partial(_publish_spoiled, _truncate), spoils=True),
    Fault(name="NaN draft", act=functools.partial(_publish_spoiled, _without_numbers), spoils=True),
    Fault(name="garbled centroids", act=_garble_centroids),
    Fault(name="garbled state", act=_garble_state),
    Fault(name="CPU quota 20 %", act=_little_cpu, fails_calls=True),
    Fault(name="memory limit", act=_little_memory, fails_calls=True, restarts=True, traces=True),
    Fault(name="256 files", act=_few_files, fails_calls=True, traces=True),
    Fault(name="memory limit by cgroup", act=_nothing, missing=lambda scene: "there is one by rlimit instead"),
    Fault(name="clock ±1 day", act=_nothing, missing=lambda scene: "the clock is the whole machine's"),
    *(Fault(name=name.replace("_", " "), act=functools.partial(_attack, name)) for name in ATTACKS),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
