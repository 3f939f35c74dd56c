"""Fill in the middle: the tokens by which a family marks what is before and after a hole, read from the tokenizer.

A family is known by its tokens alone: a row below whose three marks are in the vocabulary. Leaves out how a prompt is
laid out and cut (serve/http/fim_prompt.py).

    marks = fim_marks(tokenizer)                     # None: the model fills no holes
    (marks.prefix, *marks.encode("def f("), marks.suffix, *marks.encode("):", continues=True), marks.middle)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from aurora_lit.models.tokenizer import Tokenizer, added_ids

_LINE_BREAKS = ("\n", "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}", "<0x0A>")
"""How tokens end that end a line: as text, in byte-level BPE, and as SentencePiece's byte."""
_DUMMY_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space. Some tokenizers put one before every text."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """A row of the table. Of several names the first that a vocabulary has is used."""

    prefix: str
    suffix: str
    middle: str | None
    """None: nothing stands between the prompt and the answer."""
    repository: tuple[str, ...] = ()
    file: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    """What ends an answer beside the marks themselves and the model's end of text."""
    suffix_first: bool = False


_FAMILIES = (
    _Family(  # Qwen2.5-Coder, Granite 4, CodeGemma
        prefix="<|fim_prefix|>",
        suffix="<|fim_suffix|>",
        middle="<|fim_middle|>",
        repository=("<|repo_name|>", "<|reponame|>"),
        file=("<|file_sep|>", "<|filename|>", "<|file_separator|>"),
        ends=("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|fim_pad|>", "<|end_of_text|>", "<end_of_turn>"),
    ),
    _Family(  # StarCoder2, StarCoder, Granite
        prefix="<fim_prefix>",
        suffix="<fim_suffix>",
        middle="<fim_middle>",
        repository=("<repo_name>", "<reponame>"),
        file=("<file_sep>", "<filename>"),
        ends=("<|endoftext|>", "<fim_pad>"),
    ),
    _Family(prefix="▁<PRE>", suffix="▁<SUF>", middle="▁<MID>", ends=("▁<EOT>",)),  # CodeLlama
    _Family(  # DeepSeek-Coder
        prefix="<｜fim▁begin｜>",
        suffix="<｜fim▁hole｜>",
        middle="<｜fim▁end｜>",
        ends=("<｜end▁of▁sentence｜>", "<|EOT|>"),
    ),
    _Family(prefix="[PREFIX]", suffix="[SUFFIX]", middle=None, suffix_first=True),  # Codestral
)


@dataclass(frozen=True, kw_only=True)
class FimMarks:
    """A model's tokens for fill in the middle. Those that a family lacks are None."""

    prefix: int
    suffix: int
    middle: int | None
    repository: int | None
    """Before a repository's name."""
    file: int | None
    """Before a file's name."""
    suffix_first: bool
    """The text after the hole comes first."""
    begins: tuple[int, ...]
    """What the model puts before every text."""
    stops: frozenset[int]
    """An answer ends with any of them; they are no part of what belongs into a hole."""
    tokenizer: Tokenizer = field(repr=False)
    names: re.Pattern[str] = field(repr=False)
    """Finds where the name of an added token begins in a text."""
    adds_space: bool = field(repr=False)
    """The tokenizer puts a space before every text."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The tokens of a text in which names of special tokens are text too: files may hold them, as this one does.

        continues: no space goes before it if the tokenizer adds one.
        """
        ids, at = list[int](), 0
        # Broken after its first character, a name is no name.
        for end in [*(found.start() + 1 for found in self.names.finditer(text)), len(text)]:
            ids += self._encode(text[at:end], continues=continues or at > 0)
            at = end
        return ids

    def _encode(self, text: str, *, continues: bool) -> list[int]:
        if not text:
            return []
        if not (continues and self.adds_space):
            return self.tokenizer.encode(text, add_special_tokens=False)
        ids = self.tokenizer.encode(f"\n{text}", add_special_tokens=False)
        return ids[next(at for at, token_id in enumerate(ids) if self.ends_line(token_id)) + 1 :]

    def ends_line(self, token_id: int) -> bool:
        """True if a line ends with this token."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(piece, str) and piece.endswith(_LINE_BREAKS)

    def marks_hole(self, ids: Sequence[int]) -> bool:
        """True if a prompt that a client has laid out itself asks to fill a hole."""
        return (self.prefix if self.middle is None else self.middle) in ids and self.suffix in ids


def fim_marks(tokenizer: Tokenizer) -> FimMarks | None:
    """The marks of the first family whose prefix, suffix and middle are in the vocabulary; None: of no family."""
    vocab = tokenizer.get_vocab()
    for family in _FAMILIES:
        required = [name for name in (family.prefix, family.suffix, family.middle) if name is not None]
        if not vocab.keys() >= set(required):
            continue
        repository, file = (
            next((vocab[name] for name in names if name in vocab), None) for names in (family.repository, family.file)
        )
        ends = {vocab[name] for name in (*required, *family.ends) if name in vocab}
        plain = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a", add_special_tokens=True)
        texts = {tokenizer.convert_ids_to_tokens(token_id) for token_id in added_ids(tokenizer)} | {*required}
        return FimMarks(
            prefix=vocab[family.prefix],
            suffix=vocab[family.suffix],
            middle=None if family.middle is None else vocab[family.middle],
            repository=repository,
            file=file,
            suffix_first=family.suffix_first,
            begins=tuple(whole[: whole.index(plain[0])]),
            stops=frozenset(ends | {token_id for token_id in (repository, file) if token_id is not None}),
            tokenizer=tokenizer,
            names=re.compile("|".join(f"(?={re.escape(name)})" for name in sorted(texts) if name and len(name) > 1)),
            adds_space=str(tokenizer.convert_ids_to_tokens(plain[0])).startswith(_DUMMY_SPACE),
        )
    return None
