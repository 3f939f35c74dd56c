"""From token ids to text, as the tokens come: whole characters only, cut before stop strings.

Leaves out stop *tokens* and the end of text (the engine's) and the wording of responses (serve/http/responses.py).

    stream = TextStream(tokenizer, stop=("\\n\\n",))
    stream.push([1, 2])        # text that is certain by now, perhaps ""
    stream.stopped             # True once a stop string was completed: nothing follows
    stream.finish()            # what was held back, when the tokens end
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 5  # decoded again with what follows, since some tokenizers decide about spaces by the left neighbour
_WINDOW_TOKENS = 32  # shrink by force past this many, for models that emit broken bytes only


class TextStream:
    """The text of one sequence.

    Bytes that can no longer become a character are left out, and so is U+FFFD itself: decoders use it for both.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        """Start at the first generated token; special tokens never show."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._num_done = 0  # characters of the decoded window that were passed on
        self._held = ""  # could still become a stop string
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that is certain now and was not returned before."""
        if self.stopped:
            return ""
        self._window.extend(token_ids)
        decoded = decode(self._tokenizer, self._window)
        whole = decoded.rstrip(_BROKEN)
        fresh = whole[self._num_done :].replace(_BROKEN, "")
        self._num_done = max(self._num_done, len(whole))
        if len(self._window) > (_CONTEXT_TOKENS if whole == decoded else _WINDOW_TOKENS):
            del self._window[:-_CONTEXT_TOKENS]
            self._num_done = len(decode(self._tokenizer, self._window).rstrip(_BROKEN))
        return self._cut(fresh) if self._stop else fresh

    def finish(self) -> str:
        """The tokens have ended: what was held back for a stop string is plain text; a half character is dropped."""
        held, self._held = self._held, ""
        return held

    def _cut(self, fresh: str) -> str:
        pending = self._held + fresh
        # The stop string completed first wins, whatever the pieces; of two that end together, the longer.
        ends = [(at + len(word), at) for word in self._stop if (at := pending.find(word)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return pending[: min(ends)[1]]
        keep = _longest_beginning(pending, self._stop)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


def _longest_beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = min(len(text), max(map(len, stop)) - 1)
    return next((n for n in range(longest, 0, -1) if any(word.startswith(text[-n:]) for word in stop)), 0)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of some tokens, special ones left out."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class TokenSpeller:
    """Single tokens as bytes and as text, for log-probabilities, where a token may be a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Look once at how this tokenizer writes bytes."""
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._byte_of = _byte_alphabet() if "ByteLevel" in json.dumps(decoder) else None
        self._special = frozenset(tokenizer.all_special_ids)

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id without an entry."""
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

    def show(self, token_id: int) -> str:
        """The token as text; a part of a character as `bytes:\\xe2\\x82`, the way OpenAI writes it."""
        raw = self.spell(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, spare = {}, 0x100
    for byte in range(256):
        alphabet[chr(byte if byte in visible else spare)] = byte
        spare += byte not in visible
    return alphabet
