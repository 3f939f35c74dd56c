"""The prompt of a hole: its layout by family, what is cut, and that a person who types finds most of it again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.models.fim import FimMarks, fim_marks
from aurora_lit.serve.http.fim_prompt import Hole, OtherFile, lay_out

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>", "<|fim_pad|>")
OTHERS = (OtherFile("old.py", "x = 1\n"), OtherFile("new.py", "y = 2\n"))


def marks_of(*names: str) -> FimMarks:
    marks = fim_marks(tiny_tokenizer(names))
    assert marks is not None
    return marks


def text_of(ids: Sequence[int], marks: FimMarks) -> str:
    return str(marks.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


HOLE = Hole(prefix="before:\n  typ", suffix="after")
IN_FILE = replace(HOLE, file_name="a.py", others=OTHERS)
NAMED = "<|file_sep|>old.py\nx = 1\n<|file_sep|>new.py\ny = 2\n<|file_sep|>a.py\n"
AROUND = "<|fim_prefix|>before:\n<|fim_suffix|>after<|fim_middle|>  "
LAYOUTS = [
    # (marks, hole, prompt): the answer must begin with "typ"
    (QWEN, HOLE, AROUND),
    (QWEN, IN_FILE, f"<|repo_name|>myproject\n{NAMED}{AROUND}"),
    (
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<filename>"),
        replace(HOLE, file_name="a.py"),
        "<filename>a.py\n<fim_prefix>before:\n<fim_suffix>after<fim_middle>  ",
    ),
    (
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        IN_FILE,
        "<｜fim▁begin｜>+++++ old.py\nx = 1\n+++++ new.py\ny = 2\n+++++ a.py\nbefore:\n"
        "<｜fim▁hole｜>after<｜fim▁end｜>  ",
    ),
    (("[PREFIX]", "[SUFFIX]"), replace(HOLE, file_name="a.py"), "[SUFFIX]after[PREFIX]before:\n  typ"),
    (
        ("[PREFIX]", "[SUFFIX]"),
        IN_FILE,
        "[SUFFIX]after[PREFIX]+++++ old.py\nx = 1\n+++++ new.py\ny = 2\n+++++ a.py\nbefore:\n  typ",
    ),
]


@pytest.mark.parametrize(("names", "hole", "prompt"), LAYOUTS)
def test_the_parts_are_in_the_familys_order_and_what_stays_comes_first(
    names: tuple[str, ...], hole: Hole, prompt: str
) -> None:
    marks = marks_of(*names)
    laid_out = lay_out(hole, marks, num_tokens=500)
    assert text_of(laid_out.token_ids, marks) == prompt
    assert laid_out.begins_with == ("" if marks.suffix_first else "typ")
    assert not laid_out.was_cut
    assert lay_out(hole, replace(marks, begins=(7,)), num_tokens=500).token_ids == (7, *laid_out.token_ids)


def test_the_word_at_the_cursor_is_looked_for_in_a_few_characters() -> None:
    """In all of such a line it would take hours."""
    marks = marks_of(*QWEN)
    hole = Hole(prefix=f"x\n{'a' * 200_000} b", suffix="")
    assert lay_out(hole, marks, num_tokens=1_000_000).begins_with == "b"
    hole = Hole(prefix=f"x\n{'a' * 200}", suffix="")
    assert lay_out(hole, marks, num_tokens=10_000).begins_with == "a" * 64


def lines(seed: int, number: int = 200) -> str:
    rng = random.Random(seed)
    return "".join(
        f"{'    ' * rng.randrange(3)}v{rng.randrange(999)} = f{rng.randrange(99)}(x)\n" for _ in range(number)
    )


def test_what_is_cut_keeps_a_prefixs_end_a_suffixs_beginning_and_the_newest_files() -> None:
    marks, text, rng = marks_of(*QWEN), lines(1), random.Random(2)
    fixed = len(lay_out(Hole(prefix="", suffix="", file_name="a.py"), marks, num_tokens=9).token_ids)
    for _ in range(60):
        sizes = [rng.choice((0, 30, 300, len(text))) for _ in range(2)]
        files = tuple(OtherFile(f"{number}.py", lines(number, rng.randrange(9))) for number in range(rng.randrange(5)))
        most = rng.choice((None, 40, 400))
        hole = Hole(prefix=text[: sizes[0]], suffix=text[: sizes[1]], file_name="a.py", others=files, most_around=most)
        num_tokens = rng.choice((fixed, 60, 200, 1000, 20_000))
        ids, was_cut, word = lay_out(hole, marks, num_tokens=num_tokens)
        assert len(ids) <= max(num_tokens, fixed)
        head, _, around = text_of(ids, marks).partition("<|fim_prefix|>")
        before, _, after = around.partition("<|fim_suffix|>")
        after, _, typed = after.partition("<|fim_middle|>")
        reserved = len(marks.encode(typed + word))
        before += typed + word
        assert hole.prefix.endswith(before)
        assert hole.suffix.startswith(after)
        kept = [file for file in files if f"<|file_sep|>{file.name}\n{file.text}<|file_sep|>" in head]
        assert tuple(kept) == files[len(files) - len(kept) :]
        assert was_cut == ((before, after, len(kept)) != (hole.prefix, hole.suffix, len(files)))
        room = min(num_tokens - fixed, most or num_tokens)
        if min(len(hole.prefix), len(hole.suffix)) > room > 150:  # of more than fits three quarters are before the hole
            assert (room - reserved) // 4 - room // 32 <= len(marks.encode(after)) <= room // 4
            assert 0.5 * room < len(marks.encode(before)) <= room - room // 4
            assert f"\n{before}" in hole.prefix, "it begins with a line"


def typed(text: str, window: int | None) -> Iterator[Hole]:
    """The hole at each of 50 keystrokes; window: lines that the client sends."""
    for number in range(50):
        at = 3000 + number
        prefix = text[:at] if window is None else "".join(text[:at].splitlines(keepends=True)[-window:])
        yield Hole(prefix=prefix, suffix=text[3200:], file_name="a.py", others=OTHERS)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("names", [QWEN, ("[PREFIX]", "[SUFFIX]")])
def test_the_next_keystroke_finds_nearly_all_of_a_cut_prompt(names: tuple[str, ...], window: int | None) -> None:
    """Also if the client sends the last lines only, so that its text begins elsewhere after each line break."""
    marks, shares = marks_of(*names), list[float]()
    for seed in range(2):
        before: tuple[int, ...] = ()
        for hole in typed(lines(seed), window):
            ids, was_cut, _ = lay_out(hole, marks, num_tokens=800)
            assert was_cut
            if before:
                num_common = len(os.path.commonprefix([before, ids]))
                shares.append(num_common / len(ids))
            before = ids
    num_found = sum(share > 0.9 for share in shares)
    assert num_found >= 0.9 * len(shares), sorted(shares)[:20]


def test_another_file_takes_no_other_away_at_each_keystroke() -> None:
    marks, text = marks_of(*QWEN), lines(3)
    others = tuple(OtherFile(f"{number}.py", lines(number, 3)) for number in range(20))
    heads = list[str]()
    for size in range(1000, 1050):
        hole = Hole(prefix=text[:size], suffix=text[size : size + 100], file_name="a.py", others=others)
        ids, was_cut, _ = lay_out(hole, marks, num_tokens=1600)
        assert was_cut
        heads.append(text_of(ids, marks).partition("<|fim_prefix|>")[0])
    assert heads[0].count("<|file_sep|>") > 3
    assert len(set(heads)) <= 2


def test_megabytes_are_cut_before_they_are_tokenized() -> None:
    marks, numbers = marks_of(*QWEN), list[int]()

    class Counting:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            numbers.append(len(text))
            return list(marks.tokenizer.encode(text, add_special_tokens=add_special_tokens))

        def convert_ids_to_tokens(self, ids: int) -> object:
            return marks.tokenizer.convert_ids_to_tokens(ids)

    text = "v = f(x)\n" * 200_000
    counting: object = Counting()
    hole = Hole(prefix=text, suffix=text, file_name="a.py", others=(OtherFile("b.py", text),))
    ids, was_cut, _ = lay_out(hole, replace(marks, tokenizer=counting), num_tokens=500)  # type: ignore[arg-type]
    assert was_cut
    assert 300 < len(ids) <= 500
    assert sum(numbers) < 20_000
