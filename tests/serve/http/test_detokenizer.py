"""TextStream: however tokens are split, the same whole characters, cut before the same stop string. TokenDecoder."""

import random

import pytest
from support.fake_engine import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from aurora_lit.serve.http.detokenizer import TextOffsets, TextStream, TokenDecoder

TEXT = "hello world, ça va? 今日は 🌍🚀 naïve — the end ✓ e\u0301 👩‍👩‍👧 done"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def in_pieces(stream, ids, rng):
    """Push the ids in random groups; returns the pieces of text."""
    pieces, at = [], 0
    while at < len(ids):
        size = rng.randint(1, 5)
        pieces.append(stream.push(ids[at : at + size]))
        at += size
    return [*pieces, stream.finish()]


def test_text_is_the_same_however_it_is_split(tokenizer):
    for seed in range(20):
        pieces = in_pieces(TextStream(tokenizer), tokenizer.encode(TEXT), random.Random(seed))
        assert "".join(pieces) == TEXT, seed


def test_a_character_is_held_back_until_it_is_complete(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("🌍")
    assert [stream.push([token_id]) for token_id in ids] == ["", "", "", "🌍"]


def test_random_bytes_never_give_a_broken_character(tokenizer):
    for seed in range(30):
        rng = random.Random(seed)
        ids = [rng.randrange(256) for _ in range(200)]
        stream = TextStream(tokenizer)
        text = "".join(in_pieces(stream, ids, rng))
        raw = b"".join(TokenDecoder(tokenizer).to_bytes(token_id) for token_id in ids)
        assert "\ufffd" not in text
        assert text == raw.decode(errors="ignore"), seed
        assert len(stream._window) <= 40, "the window must not grow with the text"


@pytest.fixture(scope="module")
def byte_fallback():
    """As Llama 2's: a character without a token of its own is its bytes, whose runs are decoded as a whole."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁a", "a", "b", "▁"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_runs_of_byte_tokens_are_text_however_they_are_split(byte_fallback):
    text = "Hello 你好世界, 😀😀😀! a b 今日は"
    ids = byte_fallback.encode(text)
    follows, rest = ids[:9], ids[9:]  # in the middle of a character
    assert byte_fallback.decode(follows).endswith("\ufffd")
    for seed in range(20):
        rng = random.Random(seed)
        assert "".join(in_pieces(TextStream(byte_fallback), ids, rng)) == text
        assert "".join(in_pieces(TextStream(byte_fallback, follows=follows), rest, rng)) == text[text.index("你") :]
        broken = [rng.choice([*ids, 1 + 0xE4, 1 + 0xFF, 1 + 0x80]) for _ in range(120)]
        one_by_one = TextStream(byte_fallback)
        expected = "".join(one_by_one.push([token_id]) for token_id in broken)
        assert "".join(in_pieces(TextStream(byte_fallback), broken, rng)) == expected
        assert "\ufffd" not in expected


def test_an_incomplete_character_at_the_end_is_dropped(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("ab€")[:-1]) + stream.finish() == "ab"


def test_special_tokens_give_no_text(tokenizer):
    stream = TextStream(tokenizer)
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id, *tokenizer.encode("b")]
    assert stream.push(ids) == "ab"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("🌍",), "hello world, ça va? 今日は "),
        ((" the end",), "hello world, ça va? 今日は 🌍🚀 naïve —"),
        (("ld, ça", "zzz"), "hello wor"),
        (("h",), ""),
        (("nowhere", "dones"), TEXT),
        (("今日は 🌍🚀 n", "は"), "hello world, ça va? 今日"),  # the one completed first wins, though it begins later
        (("日は", "今日は"), "hello world, ça va? "),  # completed together: the longer
    ],
)
def test_output_is_cut_before_the_stop_string(tokenizer, stop, expected):
    for seed in range(20):
        stream, text = TextStream(tokenizer, stop=stop), ""
        for piece in in_pieces(stream, tokenizer.encode(TEXT), random.Random(seed)):
            text += piece
            assert expected.startswith(text), "text was returned that had to be held back"
        assert text == expected
        assert stream.stopped == (expected != TEXT)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [("x", "abx"), ("xb", "abx"), ("c", ""), ("b", "ab"), ("xabc", "abxa")],
)
def test_a_stop_string_that_came_too_early_to_count_does_not_count_later_either(tokenizer, rest, expected):
    """It may still be held back then, as the beginning of a longer one."""
    stream = TextStream(tokenizer, stop=("abc", "b"), min_tokens=2)
    text = "".join(stream.push([token_id]) for token_id in tokenizer.encode("ab" + rest))
    assert text + stream.finish() == expected
    assert stream.stopped == (rest != "x")


def test_the_space_between_a_prompt_and_its_continuation_is_not_lost():
    """Decoders of SentencePiece leave out the space at the beginning of a text."""
    pieces = ["\u2581The", "\u2581capital", "\u2581is", "\u2581Paris"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="\u2581The"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert TextStream(tokenizer, follows=(0, 1, 2)).push([3]) == " Paris"
    assert TextStream(tokenizer).push([3]) == "Paris"


def test_offsets_are_those_of_the_text(tokenizer):
    token_decoder, special = TokenDecoder(tokenizer), tokenizer.eos_token_id
    ids = tokenizer.encode("a😀b")
    offsets = TextOffsets(token_decoder)
    assert [offsets.next(i) for i in [special, *ids, special, *ids]] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 5]
    shown = TextOffsets(token_decoder, skips_special_tokens=False)
    assert [shown.next(i) for i in [special, *tokenizer.encode("a")]] == [0, len("<|end|>")]
    echoed = TextOffsets(token_decoder, echoed="<|end|>a")
    assert [echoed.next(i) for i in [special, *tokenizer.encode("ab")]] == [0, 7, 8]


@pytest.mark.parametrize(("text", "expected"), [("a b", [0, 0, 1, 2]), (" a b", [0, 0, 1, 2, 3]), ("ab", [0, 0, 1])])
def test_offsets_in_an_echoed_prompt_count_no_space_that_decoders_leave_out(byte_fallback, text, expected):
    ids = byte_fallback.encode(text)
    assert byte_fallback.decode(ids) == text
    echoed = TextOffsets(TokenDecoder(byte_fallback), echoed=text)
    assert [echoed.next(i) for i in ids] == expected
    generated = TextOffsets(TokenDecoder(byte_fallback))
    assert [generated.next(i) for i in byte_fallback.convert_tokens_to_ids(["▁a", "▁a"])] == [0, 2]


def test_a_token_is_converted_to_its_bytes_and_text(tokenizer):
    token_decoder = TokenDecoder(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(token_decoder.to_bytes(token_id) for token_id in ids).decode() == TEXT
    assert token_decoder.to_text(tokenizer.encode("€")[0]) == "bytes:\\xe2"
    assert token_decoder.to_text(tokenizer.encode("hello world")[1]) == " world"
    assert token_decoder.to_text(tokenizer.eos_token_id) == "<|end|>"
