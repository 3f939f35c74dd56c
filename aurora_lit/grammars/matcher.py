"""An output's place in its grammar: which tokens may follow, and which must.

    compiler = GrammarCompiler(tokenizer_json, vocab_size=49152, eos_token_ids=frozenset([2]))
    grammar = compiler.compile(asked, end_tokens=frozenset([2])).result()     # in a thread: may take a second
    grammar.allowed, grammar.forced                                           # a bit for every token; what must follow
    grammar.advance([81, 19])                                                 # the output goes on with these tokens
    branch = grammar.branch()
    branch.enter(81), branch.allowed(), branch.leave()                        # what would be allowed after another one

The tokens that end an output are allowed where the grammar may end, and wherever the grammar itself allows them. Left
out: the grammar's definition (definition.py), and what a round makes of the masks
(serve/speculation/sources/grammar.py, serve/engine/token_choice.py).

Shapes: W bytes of a mask: one bit for each token, the first in the lowest bit.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from aurora_lit.errors import RequestError
from aurora_lit.grammars.definition import LIMITS, grammar_of, grammar_thread
from aurora_lit.request import StructuredOutputsParams

_MOST_KEPT = 8
"""Compiled grammars that are kept for requests that ask for the same."""
_MOST_BEGUN = 16
"""Outputs that begin with one compiled grammar. They share a lexer, which keeps what it has computed, up to 1 MiB an
output, and at a limit fails for all. Most grammars compile in 1 to 10 ms, and a first output's masks take as much."""
_MOST_RENEWED = 2
"""How often an output's grammar is compiled again before it takes no proposals any more, which reach the limits."""
_LONGEST_AGAIN_S = 0.1
"""Of the compilation of a grammar that a round may wait for."""
_IN_NO_TEXT = "\U0010fffd"
"""A character for private use, the last there is."""
_IN_BRACKETS = re.compile(r"<[!-~]*>")
Mask = NDArray[np.uint8]
"""[W]: which tokens are allowed."""


class Branch:
    """What is allowed after tokens; walks down a tree of them and back."""

    def __init__(
        self, matcher: LLMatcher, *, vocab_size: int, end_tokens: frozenset[int], begins_only: bool = False
    ) -> None:
        """`end_tokens`: those that end the output. `begins_only`: where it may end, all that follows is free."""
        self._matcher, self._end_tokens, self._begins_only = matcher, end_tokens, begins_only
        self._num_free = 0
        """Tokens since then."""
        self._vocab_size, self._mask_bytes = vocab_size, 4 * -(-vocab_size // 32)

    def allowed(self) -> Mask | None:
        """The tokens that may follow; None: llguidance has failed, and the branch cannot be used any more."""
        if self.is_done:
            return np.full(self._mask_bytes, 0xFF, dtype=np.uint8)
        mask_W = np.zeros(self._mask_bytes, dtype=np.uint8)
        self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, self._mask_bytes)
        if self._matcher.is_accepting():
            for token in self._end_tokens:
                mask_W[token >> 3] |= 1 << (token & 7)
        return None if self._matcher.is_error() or not mask_W.any() else mask_W

    @property
    def is_done(self) -> bool:
        """True if all that may follow is free."""
        return self._begins_only and (self._num_free > 0 or self._matcher.is_accepting())

    def enter(self, token: int) -> None:
        """Go on with a token that is allowed here."""
        if self.is_done:
            self._num_free += 1
        else:
            self._matcher.consume_token(token)

    def leave(self) -> None:
        """Go back by one token."""
        if self._num_free:
            self._num_free -= 1
        else:
            self._matcher.rollback(1)

    def copy(self) -> Branch:
        """The same place, from which to walk on. Both share a lexer, and fail where one of them reaches its limits."""
        matcher = self._matcher.deep_copy()
        return Branch(matcher, vocab_size=self._vocab_size, end_tokens=self._end_tokens, begins_only=self._begins_only)

    def forced(self) -> list[int]:
        """The tokens that must follow, with the end if that must."""
        if self.is_done:
            return []
        tokens = self._matcher.compute_ff_tokens()
        after = self._matcher.deep_copy()
        after.consume_tokens(tokens)
        if after.is_stopped() and not after.is_error():
            # Of several ends the highest: most vocabularies have added the end of a turn after that of a text.
            tokens.append(max(self._end_tokens))
        return tokens

    @property
    def error(self) -> str:
        """Why llguidance has failed; "" if it has not."""
        return self._matcher.get_error().partition("\n")[0]  # its state and the grammar follow

    @property
    def is_dead_end(self) -> bool:
        """True if no token may follow, though no limit was reached: the same after compiling the grammar again."""
        return self.error in ("", "NoExtensionBias")


class CompileAgain(Protocol):
    """Gives the beginning of an output, with a lexer of its own."""

    def __call__(self, *, in_round: bool) -> Branch:
        """`in_round`: a round waits for that."""


class Grammar:
    """The place of one output in its grammar.

    A limit of llguidance may have been reached by another output, which shares its lexer, or by a proposal. So the
    grammar is then compiled again, for this output alone, and only what fails there too is an error. A grammar that a
    round cannot wait for shares no lexer, and takes no proposals.
    """

    def __init__(self, start: Branch, *, compile_again: CompileAgain | None) -> None:
        """At the beginning of the output.

        `compile_again` None: a round cannot wait for that. Raises RequestError if llguidance cannot go on.
        """
        self._here, self._compile_again = start, compile_again
        self._output: list[int] = []
        self._num_renewed = 0
        self._look_ahead()

    def advance(self, tokens: Sequence[int]) -> None:
        """Go on with tokens that were allowed. Raises RequestError if llguidance cannot go on."""
        self._output += tokens
        for token in tokens:
            self._here.enter(token)
        after = self.forced[len(tokens) :]
        self._look_ahead(after if self.forced[: len(tokens)] == list(tokens) else [])

    @property
    def is_done(self) -> bool:
        """True if all that may follow is free."""
        return self._here.is_done

    @property
    def takes_proposals(self) -> bool:
        """False: walks down proposals have reached limits too often, or a round could not wait if one did."""
        return self._compile_again is not None and self._num_renewed < _MOST_RENEWED

    def branch(self) -> Branch:
        """A copy to walk on, which leaves this one where it is."""
        return self._here.copy()

    def _look_ahead(self, forced: list[int] | None = None) -> None:
        """`forced`: what is known to follow, since finding it out takes as long as it is long."""
        allowed_W = self._here.allowed()
        for with_masks in (False, True):
            if allowed_W is None and not self._here.is_dead_end and self._follow_again(with_masks=with_masks):
                allowed_W = self._here.allowed()
        if allowed_W is None:
            dead_end = "no token of the vocabulary goes on with the output"
            reason = dead_end if self._here.is_dead_end else self._here.error
            raise RequestError(f"no answer can follow the grammar: {reason}", param="structured_outputs")
        self.allowed: Mask = allowed_W
        """The tokens that may follow."""
        self.forced = forced or self._here.forced()

    def _follow_again(self, *, with_masks: bool) -> bool:
        """Compile the grammar again, and follow the output so far. False: a round could not wait for that.

        with_masks: as plain decoding does. What may be computed is limited from mask to mask, so this fails only where
        plain decoding would, but takes as long as all masks so far.
        """
        if self._compile_again is None:
            return False
        self._here = self._compile_again(in_round=bool(self._output))
        self._num_renewed += not with_masks
        for token in self._output:
            if with_masks:
                self._here.allowed()
            self._here.enter(token)
        return True


@dataclass(eq=False)
class _Compiled:
    """A compiled grammar, for requests that ask for the same."""

    asked: StructuredOutputsParams
    start: LLMatcher
    owner: Hashable
    """For whom it was compiled."""
    seconds: float
    """What compiling it took its thread, without the tokenizer."""
    num_begun: int = 1

    @property
    def is_quick(self) -> bool:
        """True if a round may wait until it is compiled again."""
        return self.seconds <= _LONGEST_AGAIN_S


class GrammarCompiler:
    """Compiles grammars for one target in a thread of its own, so that rounds go on meanwhile."""

    def __init__(self, tokenizer_json: Callable[[], str], *, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """`tokenizer_json`: gives the state of a `tokenizers` object, without tokens beyond `vocab_size`, when the
        first grammar is compiled.

        `eos_token_ids`: those of every output's end, at least one: otherwise llguidance would guess.
        """
        self._tokenizer_json, self._vocab_size, self._eos = tokenizer_json, vocab_size, sorted(eos_token_ids)
        self._tokenizers: dict[bool, LLTokenizer] = {}
        self._compiled: deque[_Compiled] = deque(maxlen=_MOST_KEPT)
        self._changing_compiled = threading.Lock()
        self._thread, self._beginning = grammar_thread(), grammar_thread()
        self._compiling_again = grammar_thread()
        """Waits for no other grammar, since a round waits for it."""

    def prepare(self) -> None:
        """Make now what the first grammars would make, in which time this process gives no sign of life."""
        with contextlib.suppress(Exception):  # a tokenizer that llguidance cannot read: requests will be told
            for named in (False, True):
                self._tokenizer(named=named)

    def compile(
        self, asked: StructuredOutputsParams, *, end_tokens: frozenset[int], owners: Sequence[Hashable] = ("",)
    ) -> Future[Grammar]:
        """The beginning of an output that `end_tokens` may end. The future raises RequestError.

        What is kept does not wait for other grammars, nor does one that says only how the output begins. `owners`: what
        was compiled for one of them may be used; what is compiled now is for the first one.
        """
        kept = self._kept(asked, owners)
        if kept is None:
            thread = self._thread if asked.begins_with is None else self._beginning  # it compiles in a millisecond
            return thread.submit(self._compile, asked, end_tokens, owners)
        return self._beginning.submit(self._begin, kept, end_tokens)

    def _compile(
        self, asked: StructuredOutputsParams, end_tokens: frozenset[int], owners: Sequence[Hashable]
    ) -> Grammar:
        kept = self._kept(asked, owners)  # perhaps since it was asked for
        if kept is not None:
            return self._begin(kept, end_tokens)
        matcher, seconds = self._matcher(asked)
        compiled = _Compiled(asked, matcher, owners[0], seconds)
        grammar = self._begin(compiled, end_tokens)  # one that cannot begin is not kept
        # Otherwise what one output reaches would end all that share it; and few begin with the same text.
        if compiled.is_quick and asked.begins_with is None:
            with self._changing_compiled:
                self._compiled.append(compiled)
        return grammar

    def _kept(self, asked: StructuredOutputsParams, owners: Sequence[Hashable]) -> _Compiled | None:
        # Choices of one request have the same grammar, and so have most requests of one application.
        with self._changing_compiled:
            for kept in self._compiled:
                if kept.owner in owners and kept.asked == asked:
                    kept.num_begun += 1
                    if kept.num_begun == _MOST_BEGUN:
                        self._compiled.remove(kept)
                    return kept
        return None

    def _begin(self, compiled: _Compiled, end_tokens: frozenset[int]) -> Grammar:
        def beginning(start: LLMatcher) -> Branch:
            begins_only = compiled.asked.begins_with is not None
            return Branch(start, vocab_size=self._vocab_size, end_tokens=end_tokens, begins_only=begins_only)

        def compile_again(*, in_round: bool) -> Branch:
            with self._changing_compiled:  # whatever begins with it would fail too
                if compiled in self._compiled:
                    self._compiled.remove(compiled)
            if not in_round:  # in one of our threads, with the stack that this takes
                return beginning(self._matcher(compiled.asked)[0])
            return beginning(self._compiling_again.submit(self._matcher, compiled.asked).result()[0])

        start = beginning(compiled.start.deep_copy())
        return Grammar(start, compile_again=compile_again if compiled.is_quick else None)

    def _matcher(self, asked: StructuredOutputsParams) -> tuple[LLMatcher, float]:
        """A compiled grammar, and the seconds that this took the thread, without the tokenizer."""
        seconds = 0.0
        for named in (False, True):
            tokenizer = self._tokenizer(named=named)
            started = time.thread_time()
            matcher = LLMatcher(tokenizer, grammar_of(asked), log_level=0, limits=LIMITS)
            seconds += time.thread_time() - started
            if asked.grammar is None or not matcher.is_error():  # it may name a special token
                break
        return matcher, seconds

    def _tokenizer(self, *, named: bool) -> LLTokenizer:
        """The target's tokenizer as llguidance has it; made on first use, or by `prepare`.

        Making it holds the interpreter's lock, so that rounds wait: for 0.6 s with a vocabulary of 49,152, and for two
        to three with one of 151,000.

        named: special tokens have their names, so that a grammar can name them. Then a text that is written like one
        is taken for it too.
        """
        if named not in self._tokenizers:
            state = self._tokenizer_json()
            state = state if named else _without_special_texts(state)
            self._tokenizers[named] = LLTokenizer(state, n_vocab=self._vocab_size, eos_token=self._eos)
        return self._tokenizers[named]


def _without_special_texts(state: str) -> str:
    """The state of a tokenizer in which no text is a special token: these keep their ids, under names that no text has.

    What a client asks for may contain the text of a special token, which is then a text as any other. An added token
    that is text, such as Qwen's `<tool_call>`, goes into the vocabulary: llguidance takes one in angle brackets for a
    special token, refuses it where its text must follow, and yet says that it must.
    """
    plain = json.loads(state)
    special = [token for token in plain["added_tokens"] if token["special"]]
    name_of = {token["content"]: f"{_IN_NO_TEXT}{token['id']}" for token in special}
    for token in special:
        token["content"] = name_of[token["content"]]
    model = plain["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name_of.get(text, text): token_id for text, token_id in model["vocab"].items()}
        # All of them: an added token that is not in the vocabulary has the next id after it.
        model["vocab"] |= {token["content"]: token["id"] for token in plain["added_tokens"]}
        plain["added_tokens"] = [each for each in plain["added_tokens"] if not _IN_BRACKETS.fullmatch(each["content"])]
    else:  # Unigram: texts and scores
        model["vocab"] = [[name_of.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in name_of:
        model["unk_token"] = name_of[model["unk_token"]]
    return json.dumps(plain, ensure_ascii=False)
