"""The target's tokenizer as serving uses it: text to ids and back, the chat template; without transformers or torch.

transformers builds a tokenizer from a dozen kinds of files, by rules that differ between model families. We let it do
so once, and keep what it has built: the state of the `tokenizers` object behind it, its chat template and special
tokens. Later starts load that with `tokenizers` alone, in a fifth of a second instead of three. What is kept is named
after a digest of the model's files and the libraries' versions, so it is never stale.

    keep_tokenizer(folder, cache_dir=...)               # with transformers; nothing is kept if that cannot be done
    tokenizer = load_tokenizer(folder, cache_dir=...)   # what was kept, or transformers' own

Tokenizers of families that have Python code of their own (or no `tokenizers` object) are not kept; they are always
loaded by transformers. Leaves out the rendering of templates (chat_template.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from aurora_lit.durable import sync
from aurora_lit.errors import SourceError
from aurora_lit.models.chat_template import ChatTemplate
from aurora_lit.models.source import loading_error

_FORMAT = 3
"""Part of the name: increase it when something else is kept of the same files."""
_VOCABULARIES = ("tokenizer.*", "vocab.*", "tekken.json", "*.model", "*.tiktoken")
"""Files of which at least one belongs to every tokenizer."""
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
_OWN_CODE = (
    "__call__",
    "_convert_id_to_token",
    "_decode",
    "_encode_plus",
    "apply_chat_template",
    "convert_ids_to_tokens",
    "decode",
    "encode",
    "get_chat_template",
    "get_vocab",
)
"""Methods that a family must not override for its tokenizer to be kept."""


class Tokenizer(Protocol):
    """What serving needs of a tokenizer; transformers' tokenizers have it too (their results have wider types)."""

    chat_template: Any
    """None if the model has no chat template."""

    @property
    def eos_token_id(self) -> Any: ...  # noqa: D102
    @property
    def all_special_ids(self) -> list[int]: ...  # noqa: D102
    def get_vocab(self) -> dict[str, int]: ...  # noqa: D102
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102
    def decode(  # noqa: D102
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> Any: ...
    def convert_ids_to_tokens(self, ids: int) -> Any: ...  # noqa: D102
    def apply_chat_template(  # noqa: D102
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> Any: ...


class KeptTokenizer:
    """A `Tokenizer` made of what was kept; gives the ids and texts of the one it was made from."""

    def __init__(self, backend: BackendTokenizer, kept: Mapping[str, Any]) -> None:
        """kept: the record that `keep_tokenizer` has written."""
        self.backend_tokenizer = backend
        backend.encode_special_tokens = kept["split_special_tokens"]
        self.chat_template: str | dict[str, str] | None = kept["chat_template"]
        """A dictionary of a model with a template of its own for tools: "default" and "tool_use"."""
        self.eos_token_id: int | None = kept["eos_token_id"]
        self.all_special_ids: list[int] = kept["all_special_ids"]
        self._special_tokens: dict[str, Any] = kept["special_tokens"]
        self._templates: dict[str, ChatTemplate] = {}  # by their text

    def get_vocab(self) -> dict[str, int]:
        """The id of each token, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text; add_special_tokens: with those that the model puts around every text."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of some ids, as it is."""
        assert not clean_up_tokenization_spaces, "text is served as the model wrote it"
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The token with this id; None if there is none."""
        return self.backend_tokenizer.id_to_token(ids)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the model's prompt (`ChatTemplate.render`); `tools` decide which of two templates.

        Raises jinja2.TemplateError if the template refuses it.
        """
        assert not tokenize, "a rendered prompt is checked before it is tokenized"
        source = self.chat_template
        assert source is not None, "there is nothing to render"
        if isinstance(source, dict):
            source = source["default" if variables.get("tools") is None else "tool_use"]
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self._special_tokens)
        return self._templates[source].render(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that give no text where special ones are skipped: named ones, and added ones that are marked so."""
    added = _added_tokens(tokenizer)
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def added_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that stand for a text of their own, special or not, such as Qwen's `<tool_call>`."""
    return frozenset(_added_tokens(tokenizer))


def _added_tokens(tokenizer: Tokenizer) -> Mapping[int, AddedToken]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else backend.get_added_tokens_decoder()


def load_tokenizer(folder: Path, *, cache_dir: Path) -> Tokenizer:
    """The tokenizer of a model folder: the kept one if there is one, else transformers' own. Raises SourceError."""
    state_path, record_path = _paths(folder, cache_dir)
    with contextlib.suppress(Exception):  # not kept, or damaged, for which `tokenizers` raises plain exceptions
        kept = json.loads(record_path.read_text(encoding="utf-8"))
        if kept is not None:
            return KeptTokenizer(BackendTokenizer.from_str(state_path.read_text(encoding="utf-8")), kept)
    return cast(Tokenizer, transformers_tokenizer(folder))


def is_kept(folder: Path, *, cache_dir: Path) -> bool:
    """True if `keep_tokenizer` has nothing to do: kept already, cannot be kept, or the cache cannot be written to."""
    paths = _paths(folder, cache_dir)
    existing = next(parent for parent in paths[0].parents if parent.exists())
    return all(path.is_file() for path in paths) or not os.access(existing, os.W_OK)


def keep_tokenizer(folder: Path, *, cache_dir: Path) -> None:
    """Load the tokenizer with transformers and keep it, if that is possible. Raises SourceError or OSError."""
    from transformers import TokenizersBackend

    state_path, record_path = _paths(folder, cache_dir)
    tokenizer = transformers_tokenizer(folder)
    kind: Any = type(tokenizer)
    state, record = "", None
    if isinstance(tokenizer, TokenizersBackend) and all(
        getattr(kind, name) is getattr(TokenizersBackend, name) for name in _OWN_CODE
    ):
        with contextlib.suppress(Exception):  # `tokenizers` cannot read again what it has read of some files
            state = tokenizer_json(tokenizer.backend_tokenizer)
    if state:
        record = {
            "chat_template": _served_templates(tokenizer.chat_template),
            "special_tokens": tokenizer.special_tokens_map,
            "all_special_ids": tokenizer.all_special_ids,
            "eos_token_id": tokenizer.eos_token_id,
            "split_special_tokens": bool(tokenizer.split_special_tokens),
        }
    record_path.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((state_path, state), (record_path, json.dumps(record))):  # the record last: it makes it valid
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)


def _served_templates(templates: Any) -> Any:
    """Of several chat templates the default, with the one for tools if that is Hermes'; None without a default.

    Calls that other ones teach, such as Command R's, are not read: such a model is told of tools as one without them.
    """
    if not isinstance(templates, dict):
        return templates
    served = {name: templates[name] for name in ("default", "tool_use") if name in templates}
    return served if len(served) == 2 and "<tool_call>" in served["tool_use"] else served.get("default")


def tokenizer_json(backend: BackendTokenizer, *, vocab_size: int | None = None) -> str:
    """The state of a `tokenizers` object, without padding and truncation.

    vocab_size: added tokens for which a model of this size has no row are left out, such as one for images.
    """
    copy = BackendTokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    state = copy.to_str()
    if vocab_size is None or copy.get_vocab_size(with_added_tokens=True) <= vocab_size:
        return state
    fields = json.loads(state)
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < vocab_size]
    return json.dumps(fields, ensure_ascii=False)


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers builds it. Raises SourceError."""
    from transformers import AutoTokenizer

    check_vocabulary(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds; `tokenizers` raises plain exceptions
        remedy = "save it there again, with tokenizer.save_pretrained(folder)"
        raise loading_error(folder, error, what="the tokenizer", remedy=remedy) from error


def check_vocabulary(folder: Path) -> None:
    """Raise SourceError if a model folder has no tokenizer: for some families transformers would make an empty one."""
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise SourceError(
            f"target.source: {folder} has no tokenizer; save it there too, with tokenizer.save_pretrained(folder)"
        )


def _paths(folder: Path, cache_dir: Path) -> tuple[Path, Path]:
    """Where the state of the `tokenizers` object and the record of everything else are kept."""
    name = _digest(folder)
    return cache_dir / "tokenizers" / f"{name}.tokenizer.json", cache_dir / "tokenizers" / f"{name}.json"


def _digest(folder: Path) -> str:
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    digest = hashlib.blake2b(json.dumps([_FORMAT, *versions]).encode(), digest_size=16)
    for path in _tokenizer_files(folder):
        digest.update(json.dumps([path.relative_to(folder).as_posix(), path.stat().st_size]).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    """All files that may decide how a tokenizer is built; not the weights."""
    candidates: Sequence[Path] = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
    yield from (path for path in candidates if path.suffix in _SUFFIXES and path.is_file())
