"""`aurora-lit generate` on a fake engine: colours and numbers."""

import subprocess
import sys

import pytest
from rich.console import Console
from support import child_environment
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.cli import generate as generate_module
from aurora_lit.cli.generate import ACCEPTED, OWN, Timing, coloured, generate, summary
from aurora_lit.config import AuroraConfig
from aurora_lit.request import Output
from aurora_lit.serve.http.detokenizer import TextStream


def test_accepted_tokens_and_the_targets_own_have_their_colours() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tuple(tokenizer.encode("abc"))
    output = Output(request_id="a", token_ids=tokens, num_proposed=4, num_accepted=2)
    shown = coloured(TextStream(tokenizer), output)
    assert shown.plain == "abc"
    assert [str(span.style) for span in shown.spans] == [ACCEPTED, ACCEPTED, OWN]
    plain = coloured(TextStream(tokenizer), Output(request_id="a", token_ids=tokens))
    assert not any(str(span.style) for span in plain.spans)


@pytest.mark.parametrize("compare_plain", [True, False])
def test_it_prints_the_answer_and_the_numbers(
    compare_plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(FakeOptions(tokens_per_round=3))
    monkeypatch.setattr(generate_module, "build_engine", lambda config: (engine, tiny_tokenizer()))
    monkeypatch.setattr(generate_module, "Console", lambda **kwargs: Console(width=200, **kwargs))
    generate(AuroraConfig(), prompt="hello world", max_tokens=9, temperature=0.0, compare_plain=compare_plain)
    printed = capsys.readouterr().out
    assert "hello world" in printed
    assert "9 tokens" in printed
    assert "accepted length 3.00" in printed
    assert ("plain decoding" in printed) == compare_plain
    assert not engine.has_work


def test_an_answer_that_the_terminal_has_no_letters_for_is_shown_all_the_same() -> None:
    code = """
from unittest import mock
import aurora_lit.__main__, aurora_lit.cli.main
with mock.patch("aurora_lit.cli.main.main", lambda **_: print("caf\u00e9 \U0001f31f 2\u00d7")):
    aurora_lit.__main__.run()
"""
    environment = child_environment(PYTHONIOENCODING="latin-1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.stdout == "café ? 2×\n".encode("latin-1"), done.stderr


def test_the_ratio_is_that_of_the_median_pair() -> None:
    def timing(seconds: float) -> Timing:
        return Timing(num_tokens=100, seconds=seconds, accepted_length=2.0, num_drafted_rounds=50)

    pairs = [(timing(2.0), timing(1.0)), (timing(0.5), timing(1.0)), (timing(1.0), timing(1.25))]
    printed = summary(timing(2.0), pairs).plain
    assert "100 tokens, 50.0 tokens/s" in printed, "the answer that was shown"
    assert "plain decoding: 100.0 tokens/s; speculation is 1.25× as fast (medians of 3 pairs)" in printed
