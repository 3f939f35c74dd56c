"""Compiles the CPU kernels (csrc/) and caches the shared library.

The library is compiled once on each machine with the system's C++ compiler, into
`$AURORA_LIT_CACHE/kernels` (default `~/.cache/aurora-lit/kernels`). Its name contains hashes of everything that
determines its contents: one of sources, flags and processor, and one of the compiler. Where there is no compiler, the
newest library with the first is used.

Leaves out: loading and calling the library (native.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

_MAIN_SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
_SOURCES = (_MAIN_SOURCE, *sorted(_MAIN_SOURCE.parent.glob("*.hpp")))
_MAX_ERRORS, _MAX_ERROR_LENGTH = 2, 500
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-std=c++17")
_OPENMP = ("libgomp", "libiomp5", "libomp.")
"""How the names of OpenMP runtimes begin that serve code of g++: its own, which pip's torch has, and those of Intel and
LLVM, which conda's torch has and which contain g++'s functions too."""


class ClangError(Exception):
    """The compiler is clang++, whose parallel regions are not those of the OpenMP runtime that torch has loaded."""


def compiler() -> str | None:
    """Path of the C++ compiler to use: `$CXX` or g++; None if there is none."""
    for name in (os.environ.get("CXX"), "g++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def built_library(command: str) -> Path:
    """Path of the shared library, compiled with `command` unless it is in the cache.

    Raises ClangError, OSError or CalledProcessError if it cannot be compiled or the cache folder cannot be written.
    """
    version = subprocess.run([command, "--version"], check=True, capture_output=True).stdout
    if b"clang" in version:
        raise ClangError
    # A wrapper around a compiler has its version, and -march=native asks what the system permits.
    macros = _run([command, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    openmp = _torch_openmp()
    folder = _folder()
    path = folder / f"{_name(openmp)}-{_hash(version, macros)}.so"
    _share(openmp)
    if _is_ours(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise OSError(f"{folder} belongs to another user, or all may write to it")
    # One process compiles, and others that need the same library wait for it.
    with FileLock(folder / "build.lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if _is_ours(path):
            return path
        obj, lib = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([command, *_FLAGS, "-c", str(_MAIN_SOURCE), "-o", str(obj)])
        # Not linked against OpenMP if torch has loaded its own runtime: two runtimes would compete for the cores.
        _run([command, "-shared", str(obj), "-o", str(lib), *(["-fopenmp"] if openmp is None else [])])
        os.replace(lib, path)
    return path


def kept_library() -> Path | None:
    """Path of the newest library in the cache that any compiler made of these sources for this processor, if any."""
    openmp = _torch_openmp()
    _share(openmp)
    kept = filter(_is_ours, _folder().glob(f"{_name(openmp)}-*.so"))
    return max(kept, key=lambda path: path.stat().st_mtime_ns, default=None)


def _is_ours(path: Path) -> bool:
    """True for a file or folder of this user's or root's that others cannot write to: its code runs as this user."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & stat.S_IWOTH


def _name(openmp: str | None) -> str:
    """Beginning of a library's name: what determines its contents beside the compiler."""
    sources = (path.read_bytes() for path in _SOURCES)
    return f"kernels-{_hash(*sources, ' '.join(_FLAGS).encode(), _processor().encode(), str(openmp is None).encode())}"


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _share(openmp: str | None) -> None:
    """Let libraries that are loaded from now on use the OpenMP runtime of torch."""
    if openmp is not None:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)


def _folder() -> Path:
    """In the cache folder, as models/source.py has it without a setting. Raises OSError if it cannot be named."""
    try:
        root = Path(os.environ.get("AURORA_LIT_CACHE") or "~/.cache/aurora-lit").expanduser()
    except RuntimeError as error:  # neither HOME nor an account says where it is
        raise OSError("the home folder is not known") from error
    return root.absolute() / "kernels"


def first_errors(error: subprocess.CalledProcessError) -> str:
    """What the compiler said first, in a line: up to two messages with "error" in them, else its first lines."""
    said = (error.stderr or b"") + (error.stdout or b"")
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if "error" in line.lower()] or lines
    return " | ".join(lines[:_MAX_ERRORS])[:_MAX_ERROR_LENGTH] or f"exit code {error.returncode}, without a message"


def _run(command: list[str]) -> bytes:
    # In English, so that errors are found in what it says.
    return subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"}).stdout


def _torch_openmp() -> str | None:
    """Path of the OpenMP runtime that torch has loaded, on Linux; otherwise None."""
    if sys.platform != "linux":
        return None
    torch.empty(1)
    return _openmp_in(Path("/proc/self/maps").read_text(errors="surrogateescape"))


def _openmp_in(maps: str) -> str | None:
    """Path of the first of _OPENMP that a process has loaded, by its /proc/PID/maps; None if there is none."""
    paths = [line.split(maxsplit=5)[-1] for line in maps.splitlines()]
    return next((path for name in _OPENMP for path in paths if Path(path).name.startswith(name)), None)


def processor_name() -> str:
    """What the processor calls itself; its architecture if it does not say, as ARM's do not. Raises OSError."""
    return _cpuinfo("model name").partition(":")[2].strip() or platform.machine()


def _processor() -> str:
    """The processor features that -march=native depends on."""
    return _cpuinfo("flags", "Features")


def _cpuinfo(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; elsewhere what the system calls the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(names):
                return line
    return platform.processor()
