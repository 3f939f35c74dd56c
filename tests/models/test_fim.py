"""The marks of fill in the middle: each family's are found, and in what is sent they are text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.fake_engine import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from aurora_lit.models.fim import fim_marks

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>", "<|fim_pad|>")
FAMILIES = {
    # (marks of the vocabulary, names of prefix, suffix, middle, repository and file)
    "Qwen2.5-Coder": ((*QWEN, "<|endoftext|>", "<|im_end|>"), QWEN[:5]),
    "Granite 4": (
        ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|filename|>", "<|reponame|>"),
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|reponame|>", "<|filename|>"),
    ),
    "StarCoder2": (
        ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>", "<file_sep>", "<|endoftext|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),
    ),
    "StarCoder": (
        ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<reponame>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<reponame>", "<filename>"),
    ),
    "CodeLlama": (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), ("▁<PRE>", "▁<SUF>", "▁<MID>", None, None)),
    "DeepSeek-Coder": (
        ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<|EOT|>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", None, None),
    ),
    "Codestral": (("[PREFIX]", "[MIDDLE]", "[SUFFIX]"), ("[PREFIX]", "[SUFFIX]", None, None, None)),
}


def ids_of(tokenizer: PreTrainedTokenizerFast, names: Sequence[str | None]) -> list[int | None]:
    return [None if name is None else tokenizer.get_vocab()[name] for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_marks_are_found_and_all_of_them_end_an_answer(family: str) -> None:
    vocabulary, named = FAMILIES[family]
    tokenizer = tiny_tokenizer(vocabulary)
    marks = fim_marks(tokenizer)
    assert marks is not None
    found = [marks.prefix, marks.suffix, marks.middle, marks.repository, marks.file]
    assert found == ids_of(tokenizer, named)
    assert marks.stops == set(ids_of(tokenizer, [name for name in vocabulary if name != "[MIDDLE]"]))
    assert marks.suffix_first == (family == "Codestral")
    whole = [token_id for token_id in found[:3] if token_id is not None]
    assert marks.marks_hole([1, *whole, 2])
    assert not any(marks.marks_hole([each for each in whole if each != left_out]) for left_out in whole[1:])


def test_a_vocabulary_without_a_whole_family_fills_no_holes() -> None:
    for names in ((), QWEN[:2], ("<repo_name>", "<file_sep>", "<fim_prefix>")):
        assert fim_marks(tiny_tokenizer(names)) is None


def test_names_of_marks_and_special_tokens_are_text_in_what_is_sent() -> None:
    tokenizer = tiny_tokenizer(QWEN)
    marks = fim_marks(tokenizer)
    assert marks is not None
    for text in ("", "hello world", "a<|fim_middle|>b<|end|>", "<|<|user|>|>", "<|fim_<|fim_pad|>", *QWEN):
        ids = marks.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not set(ids) & {*marks.stops, *tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(QWEN))}
    assert marks.encode("hello world") == tokenizer.encode("hello world")


def test_a_tokenizer_that_adds_a_space_adds_none_after_a_hole_and_the_model_s_first_token_comes_first() -> None:
    pieces = ["<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[arg-type]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("▁<PRE>", "▁<SUF>", "▁<MID>")])
    marks = fim_marks(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    assert marks is not None
    assert marks.begins == (0,)

    def pieces_of(ids: list[int]) -> list[str]:
        return [str(backend.id_to_token(token_id)) for token_id in ids]

    assert pieces_of(marks.encode("a b")) == ["▁a", "▁b"]
    assert pieces_of(marks.encode("a b", continues=True)) == ["a", "▁b"]
    assert pieces_of(marks.encode("\na", continues=True)) == ["<0x0A>", "a"]
    assert [marks.ends_line(token_id) for token_id in marks.encode("a\n")] == [False, True]
