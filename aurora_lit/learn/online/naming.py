"""Domains in words: what stands in many of a domain's prompts and in few others. A comfort; ids stay the truth.

What is left out: which tokens those are (modules/domains/detector.py), and who needs words (modules/domains/controller.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aurora_lit.modules.domains.detector import DomainDetector

_WORDS = 3
_LOOKED_AT = 64
"""Most typical tokens among which words are looked for; many are parts of words or marks."""
_EVERY_REQUESTS = 64
"""Requests after which words are looked for again."""

Speller = Callable[[int], str]
"""A token's text."""


class DomainWords:
    """Words for the domains of a detector.

    >>> words = DomainWords(detector, spell)
    >>> words.of("auto-1")          # "def, return, int"; "" where there is nothing typical, or nothing to compare with
    """

    def __init__(self, detector: DomainDetector, spell: Speller) -> None:
        self._detector, self._spell = detector, spell
        self._found: dict[str, str] = {}
        self._found_at = -_EVERY_REQUESTS

    def of(self, domain: str) -> str:
        """Its most typical words."""
        if self._detector.num_requests - self._found_at >= _EVERY_REQUESTS:
            self._found_at = self._detector.num_requests
            names = list(self._detector.domains)
            # A single domain's words would be those of the chat template.
            self._found = {name: self._look_for(name) for name in names} if len(names) > 1 else {}
        return self._found.get(domain, "")

    def _look_for(self, domain: str) -> str:
        words: dict[str, None] = {}
        for token in self._detector.typical_tokens(domain, _LOOKED_AT):
            word = self._spell(token).strip()
            if len(word) > 1 and word.isalpha():
                words.setdefault(word.lower())
        return ", ".join(list(words)[:_WORDS])


def speller(folder: Path) -> Speller | None:
    """The tokenizer of the target in `folder`; None when there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError):  # a learner needs none
        return None
    vocab_size = len(tokenizer)
    return lambda token: str(tokenizer.decode([token])) if token < vocab_size else ""
