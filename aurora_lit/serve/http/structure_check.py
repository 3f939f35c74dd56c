"""Whether a grammar that a client asks for can be used with the model's tokenizer.

Leaves out the fields (serve/http/structured_fields.py), and what is wrong with a grammar (grammars/definition.py).
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from llguidance import LLTokenizer
from tokenizers import Tokenizer as BackendTokenizer

from aurora_lit.errors import RequestError
from aurora_lit.grammars.definition import fault_of, names_special_tokens
from aurora_lit.models.tokenizer import Tokenizer, tokenizer_json
from aurora_lit.serve.http.structured_fields import Structured

_naming_tokenizers = WeakKeyDictionary[Tokenizer, LLTokenizer]()
"""llguidance's, by the tokenizers that they were made of."""
_making_tokenizer = threading.Lock()


def check_structure(body: Structured, tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Raise RequestError if what the answer must be cannot be served, with the place in the schema or grammar."""
    if body.structure is None:
        return
    place, asked = body.structure
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(
            f"{place}: structured outputs need a tokenizer of the tokenizers library, which this model has not; "
            "leave it out",
            param=place,
            code="unsupported_parameter",
        )
    fault = fault_of(asked)
    if fault is None and names_special_tokens(asked):
        fault = fault_of(asked, _naming_tokenizer(tokenizer, backend, vocab_size=vocab_size))
    if fault is not None:
        where = place + fault.place
        raise RequestError(f"{where} cannot be used: {fault.reason}", param=where, code="invalid_value")


def _naming_tokenizer(tokenizer: Tokenizer, backend: BackendTokenizer, *, vocab_size: int) -> LLTokenizer:
    """llguidance's tokenizer, in which special tokens have their names; made when the first grammar names one.

    Kept, since making it holds the interpreter's lock: for half a second with a vocabulary of 49,152.
    """
    with _making_tokenizer:
        made = _naming_tokenizers.get(tokenizer)
        if made is None or made.vocab_size != vocab_size:
            made = LLTokenizer(tokenizer_json(backend, vocab_size=vocab_size), n_vocab=vocab_size)
            _naming_tokenizers[tokenizer] = made
    return made
