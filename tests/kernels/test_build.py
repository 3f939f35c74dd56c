"""Building the kernels: which compiler, and what a kept library is named after."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_lit.kernels import build
from aurora_lit.models.source import cache_root


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for compilers, with a cache of its own."""
    monkeypatch.setenv("AURORA_LIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def made(
    folder: Path, name: str, *, version: str = "g++ 12.4.0", macros: str = "#define __AVX512F__ 1", compiled: str = ":"
) -> str:
    """A compiler that runs the shell command `compiled` whenever it makes a file."""
    path = folder / name
    path.write_text(
        f"""#!/bin/sh
case "$*" in
*--version*) echo "{version}" ;;
*-dM*) echo "{macros}" ;;
*) {compiled}; while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done ;;
esac
"""
    )
    path.chmod(0o700)
    return str(path)


def test_a_library_is_kept_by_what_the_compiler_defines(compilers: Path) -> None:
    """A wrapper that changes -march says the version of the compiler that it calls."""
    plain = build.built_library(made(compilers, "plain"))
    assert plain.parent == compilers / "cache" / "kernels"
    assert build.built_library(made(compilers, "again")) == plain
    assert build.built_library(made(compilers, "wrapper", macros="#define __AVX2__ 1")) != plain


def test_processes_that_need_the_same_library_compile_it_once(compilers: Path) -> None:
    command = made(compilers, "slow", compiled=f"echo x >> {compilers / 'compiled'}; sleep 0.2")
    code = f"from aurora_lit.kernels import build; print(build.built_library({command!r}))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({each.communicate()[0] for each in started}) == 1
    assert [each.returncode for each in started] == [0, 0, 0]
    assert (compilers / "compiled").read_text() == "x\nx\n", "one object, one library"


def test_a_library_is_kept_by_its_sources(compilers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = made(compilers, "plain")
    before = build.built_library(command)
    for path in build._SOURCES:
        assert path.suffix in (".cpp", ".hpp")
    changed = tmp_path / "changed.hpp"
    changed.write_bytes(build._SOURCES[0].read_bytes() + b"// one more line")
    monkeypatch.setattr(build, "_SOURCES", [changed, *build._SOURCES[1:]])
    assert build.built_library(command) != before


def test_a_kept_library_is_found_without_a_compiler(
    compilers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the second stage of a container image. It must be of these sources and flags, and for this processor."""
    assert build.kept_library() is None
    older, newer = (build.built_library(made(compilers, name, version=name)) for name in ("g++ 12", "g++ 13"))
    os.utime(older, (1, 1))
    assert build.kept_library() == newer
    newer.unlink()
    assert build.kept_library() == older
    changed = tmp_path / "changed.hpp"
    changed.write_bytes(b"")
    changes = {
        "_SOURCES": [changed, *build._SOURCES[1:]],
        "_FLAGS": ("-O2",),
        "_processor": lambda: "another",
        "_torch_openmp": lambda: None if build.sys.platform == "linux" else str(changed),
    }
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            assert build.kept_library() is None, name


@pytest.mark.parametrize(
    ("loaded", "found"),
    [
        (["libm.so.6", "libgomp-a34b3233.so.1.0.0"], "libgomp-a34b3233.so.1.0.0"),
        (["libm.so.6", "libiomp5.so"], "libiomp5.so"),
        (["libompi.so", "libomp.so"], "libomp.so"),
        (["libiomp5.so", "libgomp.so.1"], "libgomp.so.1"),  # MKL's, and torch's
        (["libm.so.6"], None),
    ],
)
def test_the_openmp_runtime_that_torch_has_loaded_is_used_whoever_made_it(loaded: list[str], found: str | None) -> None:
    """Or the kernels have one of their own, which knows nothing of the threads that torch was told to use."""
    lines = [f"7f00-7f01 r-xp 00000000 08:01 1234   /opt/the libgomp folder/{name}" for name in loaded]
    maps = "\n".join(["7f00-7f01 rw-p 00000000 00:00 0 ", *lines])
    assert build._openmp_in(maps) == (None if found is None else f"/opt/the libgomp folder/{found}")


def test_a_library_that_another_user_could_have_written_is_not_loaded(
    compilers: Path,
) -> None:
    command = made(compilers, "plain")
    path = build.built_library(command)
    path.chmod(0o777)
    assert build.kept_library() is None
    path.write_text("another's")
    assert build.built_library(command).read_text() == "made\n", "it is made again"
    assert build.kept_library() == path
    path.parent.chmod(0o777)
    path.unlink()
    with pytest.raises(OSError, match="belongs to another user, or all may write to it"):
        build.built_library(command)


def test_clang_is_refused_with_what_to_use(compilers: Path) -> None:
    with pytest.raises(build.ClangError):
        build.built_library(made(compilers, "c++", version="Debian clang version 14.0.6"))


@pytest.mark.parametrize(
    ("given", "expected"), [("", "~/.cache/aurora-lit"), (None, "~/.cache/aurora-lit"), ("~/c", "~/c")]
)
def test_the_cache_folder_is_that_of_models(
    given: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AURORA_LIT_CACHE", raising=False)
    if given is not None:
        monkeypatch.setenv("AURORA_LIT_CACHE", given)
    assert build._folder() == cache_root() / "kernels" == Path(os.path.expanduser(expected)) / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("name", ["choose.hpp", "sampler.hpp"])
def test_a_header_includes_what_it_uses(name: str) -> None:
    header = Path(build.__file__).parent / "csrc" / name
    command = ["g++", *build._FLAGS, "-w", "-fsyntax-only", "-x", "c++", str(header)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
