"""Small tokenizers, what texts of a finite language allow after a prefix, and the law that this makes.

The reference knows nothing of llguidance: a token may follow if some text of the language goes on with it.
"""

from __future__ import annotations

import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aurora_lit.grammars.definition import grammar_of
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.models.interface import Target
from aurora_lit.modules.sampling.distribution import apply_bias_and_penalties, probabilities
from aurora_lit.request import SamplingParams, StructuredOutputsParams

TOKENS = ("a", "b", "c", "0", "1", '"', ",", "ab")
END = len(TOKENS)
"""The token that ends an output."""
VOCAB_SIZE = 12
"""Of the target: three more than the tokenizer has."""


def backend() -> Tokenizer:
    """One token a character, "ab", and the end."""
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(TOKENS)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_tokenizer(*special: str) -> Tokenizer:
    """A token for each byte, and special ones."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", *special])
    return made


def takes(grammar: str, text: str, *special: str) -> bool:
    """True if the grammar allows the text, and an end after it."""
    made = byte_tokenizer(*special)
    end = made.token_to_id("<end>")
    tokens = LLTokenizer(made.to_str(), eos_token=[end])
    matcher = LLMatcher(tokens, grammar_of(StructuredOutputsParams(grammar=grammar)), log_level=0)
    token_ids = made.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def compiler() -> GrammarCompiler:
    return GrammarCompiler(backend().to_str, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset([END]))


def text_of(token_ids: list[int]) -> str:
    return "".join(TOKENS[i] for i in token_ids if i < END)


def allowed_after(language: set[str], token_ids: list[int]) -> set[int]:
    """The tokens that may follow."""
    text = text_of(token_ids)
    found = {i for i, token in enumerate(TOKENS) if any(each.startswith(text + token) for each in language)}
    return found | ({END} if text in language else set())


def law(target: Target, prompt: list[int], language: set[str], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every output of at most `max_tokens`, by the target's distribution and nothing else."""
    found: dict[tuple[int, ...], float] = {}

    def walk(output: list[int], probability: float) -> None:
        if len(output) == params.max_tokens or output[-1:] == [END]:
            found[tuple(output)] = probability
            return
        ids = torch.tensor([prompt + output])
        logits_V = target.logits(target.in_torch.forward_uncached(ids)[1])[0, -1].double()
        forbidden = [i for i in range(VOCAB_SIZE) if i not in allowed_after(language, output)]
        logits_V[forbidden] = float("-inf")
        logits_V = apply_bias_and_penalties(logits_V, params, context_L=ids[0], prompt_length=len(prompt))
        p_V = probabilities(logits_V, params, temperature=params.temperature)
        for token in p_V.nonzero()[:, 0].tolist():
            walk([*output, token], probability * float(p_V[token]))

    with torch.no_grad():
        walk([], 1.0)
    return found
