"""Makes an environment for arctic-inference's suffix cache, without the rest of that package.

pip cannot install it alone: the package has no wheels, and building it asks for a GPU build of torch. Its suffix cache
needs NumPy and one C++ extension, which is compiled here from the source distribution, as that builds it (CMake,
Release). Needs a C++20 compiler, a package index for pip, and torch in the running interpreter, which the package's
setup.py imports.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from aurora_lit.errors import AuroraError

ARCTIC = "arctic-inference==0.3.0"
_TOOLS = ("numpy", "nanobind==2.9.2", "cmake", "ninja")


def prepare(folder: Path) -> Path:
    """Install into `folder` unless that is done; returns the environment's interpreter."""
    python, stamp = folder / "bin" / "python", folder / "complete"
    if stamp.is_file() and stamp.read_text() == ARCTIC:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    _run([sys.executable, "-m", "venv", folder], log=log)
    _run([python, "-m", "pip", "install", *_TOOLS], log=log)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    _run([*download, "--dest", folder, ARCTIC], log=log)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.glob("*/csrc/suffix_decoding")
    cmake, build = folder / "bin" / "cmake", folder / "build"
    (packages,) = folder.glob("lib/python*/site-packages")
    package = packages / "arctic_inference" / "suffix_decoding"
    shutil.copytree(source.parents[1] / "arctic_inference" / "suffix_decoding", package)
    options = [f"-DPYTHON_EXECUTABLE={python}", f"-DPython_EXECUTABLE={python}", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}", f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"]
    _run([cmake, "-S", source, "-B", build, "-G", "Ninja", *options], log=log)
    _run([cmake, "--build", build], log=log)
    _run([python, "-c", "from arctic_inference.suffix_decoding import SuffixDecodingCache"], log=log)
    stamp.write_text(ARCTIC)
    return python


def _run(command: Sequence[str | Path], *, log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(list(map(str, command)), stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise AuroraError(f"{Path(command[0]).name} failed with {done.returncode}; {log} says why")
