"""Token ids to text, while the tokens are generated: whole characters only, cut before what is to end it.

Left out: stop *tokens* and end of text (serve/engine/sequence.py), several choices and their ends
(serve/http/answer_stream.py), and the format of responses (serve/http/responses.py).

    stream = TextStream(tokenizer, stop=("\\n\\n",))
    stream.push([1, 2])        # the text that later tokens cannot change any more, perhaps ""
    stream.stopped             # True once a stop string or a line has ended it: no text follows
    stream.finish()            # the text held back for a stop string, after the last token
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence

from aurora_lit.models.tokenizer import Tokenizer, special_ids

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 5
"""Decoded again together with new tokens: in some tokenizers the space before a token depends on its left neighbour."""
_CHARACTER_TOKENS = 4
"""Tokens that one character may be made of."""
_INDENTED = re.compile(r"\r?\n([ \t]*)(?=[^ \t])")
"""A line break, and the whole indentation of the line after it."""
_OPEN_LINE = re.compile(r"(?:\r?\n[ \t]*|\r)?\Z")
"""The same at the end of a text, as far as it is known."""
_WINDOW_TOKENS = 32
"""The window is cut beyond this length even inside a broken character: a model may emit nothing but broken bytes."""


class TextStream:
    """The text of one sequence.

    Bytes that can no longer become a character are dropped. So is a generated U+FFFD, because decoders write the same
    character for broken bytes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        follows: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        keeps_stop: bool = False,
        skips_special_tokens: bool = True,
        min_indent: int = 0,
        begins_with: str = "",
    ) -> None:
        """Create an empty stream, to be fed from the first generated token on.

        follows: tokens whose text goes before, since some decoders leave out a space at the beginning of a text.
        min_tokens: stop strings that so many tokens complete do not count. keeps_stop: the stop string that ends the
        text is part of it. skips_special_tokens: they give no text. min_indent: the text ends before the first line
        break that is followed by fewer spaces and tabs; an empty line has none. begins_with: how the text begins, which
        is left out.
        """
        self._tokenizer, self._skips_special_tokens = tokenizer, skips_special_tokens
        self._stop, self._keeps_stop = tuple(stop), keeps_stop
        self._min_tokens, self._num_left_out = min_tokens, len(begins_with)
        self._num_tokens = 0
        self._window: list[int] = []
        self._num_done = 0
        """Characters of the decoded window that were returned already."""
        if follows:
            self._add_in_parts(follows[-_WINDOW_TOKENS:])
        self._held = ""
        """Text that may be the start of a stop string."""
        self._min_indent, self._indent = min_indent, ""
        """The last line's indentation so far, after its line break, while nothing else of that line is known."""
        self.stopped = False
        self.stop_string = ""
        """The one that has ended the text; "": none."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Returns the new text that later tokens cannot change."""
        if self.stopped:
            return ""
        self._num_tokens += len(token_ids)
        fresh = self._add_in_parts(token_ids)
        if self._num_left_out:
            self._num_left_out, fresh = max(0, self._num_left_out - len(fresh)), fresh[self._num_left_out :]
        if self._stop:
            fresh = self._cut(fresh)
        return self._cut_line(fresh) if self._min_indent else fresh

    def finish(self) -> str:
        """End the stream. Returns the text that was held back; an incomplete character is dropped."""
        held, self._held = self._held, ""
        if self._min_indent:
            held = self._cut_line(held)
            held, self._indent = held + self._indent, ""
        return held

    def _add_in_parts(self, token_ids: Sequence[int]) -> str:
        """Add tokens, and return the new text before stop strings are looked for.

        Decoders take a run of byte tokens as a whole: one that is no text yet, or not any more, has no text at all. So
        these come one by one, or the text would depend on how many tokens a round brings.
        """
        one_by_one = len(token_ids) > 1 and any(map(self._is_byte, token_ids))
        return "".join(map(self._add, [[token_id] for token_id in token_ids] if one_by_one else [token_ids]))

    def _is_byte(self, token_id: int) -> bool:
        """True for a token of SentencePiece's byte fallback."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(piece, str) and len(piece) == 6 and piece.startswith("<0x")

    def _add(self, token_ids: Sequence[int]) -> str:
        """The new text."""
        self._window.extend(token_ids)
        decoded = self._decode(self._window)
        whole = decoded.rstrip(_BROKEN)
        fresh = whole[self._num_done :].replace(_BROKEN, "")
        self._num_done = max(self._num_done, len(whole))
        if whole == decoded or len(self._window) > _WINDOW_TOKENS:
            self._shorten_window(decoded)
        return fresh

    def _shorten_window(self, decoded: str) -> None:
        """Keep what is needed as context, from the beginning of a character on."""
        for size in range(_CONTEXT_TOKENS, min(_CONTEXT_TOKENS + _CHARACTER_TOKENS, len(self._window))):
            text = self._decode(self._window[-size:])
            if decoded.endswith(text) and not text.startswith(_BROKEN):
                break
        else:
            if len(self._window) <= _WINDOW_TOKENS:
                return
            size = _CONTEXT_TOKENS
            text = self._decode(self._window[-size:])
        del self._window[:-size]
        self._num_done = len(text.rstrip(_BROKEN))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids, skips_special_tokens=self._skips_special_tokens)

    def _cut(self, fresh: str) -> str:
        pending, num_held = self._held + fresh, len(self._held)
        # The stop string completed first decides, however the text was split; of two that end together, the longer one.
        # What was held back may contain one that did not count; it does not count later either.
        found = ((word, pending.find(word, max(0, num_held - len(word) + 1))) for word in self._stop)
        ends = [(at + len(word), at) for word, at in found if at >= 0]
        if ends and self._num_tokens > self._min_tokens:
            self.stopped, self._held = True, ""
            end, begin = min(ends)
            self.stop_string = pending[begin:end]
            return pending[: end if self._keeps_stop else begin]
        keep = _stop_prefix_length(pending, self._stop)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def _cut_line(self, fresh: str) -> str:
        pending = self._indent + fresh
        self._indent = ""
        for line in _INDENTED.finditer(pending):
            if len(line[1]) < self._min_indent:
                self.stopped, self.stop_string = True, ""
                return pending[: line.start()]
        if self.stopped:  # by a stop string, so that nothing follows
            return pending
        is_open = _OPEN_LINE.search(pending)
        assert is_open is not None, "it may be empty"
        self._indent = is_open[0]
        return pending[: is_open.start()]


def _stop_prefix_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = min(len(text), max(map(len, stop)) - 1)
    return next((n for n in range(longest, 0, -1) if any(word.startswith(text[-n:]) for word in stop)), 0)


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], *, skips_special_tokens: bool = True) -> str:
    """Text of the tokens."""
    how = {"skip_special_tokens": skips_special_tokens, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(list(token_ids), **how)
    assert isinstance(text, str)
    return text


class TokenDecoder:
    """Converts single tokens to bytes and to text, for log-probabilities: a token may be part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out how the tokenizer represents bytes: byte-level BPE, or byte fallback as SentencePiece has it."""
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._byte_of = _byte_alphabet() if "ByteLevel" in json.dumps(decoder) else None
        self._special = special_ids(tokenizer)

    def is_special(self, token_id: int) -> bool:
        """True for tokens that give no text where special ones are skipped."""
        return token_id in self._special

    def to_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id that the tokenizer does not have."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if token_id in self._special:
            return piece.encode()
        if self._byte_of is not None and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):  # byte fallback of SentencePiece
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def to_first_bytes(self, token_id: int) -> bytes:
        """Bytes of a token that begins a text, where some decoders leave out its space."""
        raw = self.to_bytes(token_id)
        drops_space = raw.startswith(b" ") and not decode(self._tokenizer, [token_id]).startswith(" ")
        return raw[1:] if drops_space else raw

    def to_text(self, token_id: int) -> str:
        """Text of one token; part of a character is written `bytes:\\xe2\\x82`, as in OpenAI's API."""
        raw = self.to_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Where the tokens of a text begin in it, in characters; the tokens of one character begin where that does."""

    def __init__(self, token_decoder: TokenDecoder, *, echoed: str = "", skips_special_tokens: bool = True) -> None:
        """echoed: the prompt, with which the text begins. skips_special_tokens: they give no text after it."""
        self._token_decoder, self._echoed, self._skips = token_decoder, echoed, skips_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("ignore")
        self._at = 0
        self._begins_text = bool(echoed)
        """False where a prompt that is not echoed goes before."""

    def next(self, token_id: int) -> int:
        """Where the next token begins."""
        at, decoder = self._at, self._token_decoder
        raw = decoder.to_first_bytes(token_id) if self._begins_text else decoder.to_bytes(token_id)
        hidden = self._skips and decoder.is_special(token_id)
        if not hidden or self._echoed.startswith(raw.decode(), at):
            self._at += len(self._characters.decode(raw))
            self._begins_text = False
        return at


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level BPE: visible bytes stand for themselves, others from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, spare = {}, 0x100
    for byte in range(256):
        alphabet[chr(byte if byte in visible else spare)] = byte
        spare += byte not in visible
    return alphabet
