"""HumanEval: programs that nobody has read are isolated, and what is made of the problems' answers."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from aurora_lit.errors import AuroraError
from benchmarks import isolation
from benchmarks.human_eval import body_of, compared, passes, program_of
from benchmarks.isolation import check_isolation, run_isolated

PROBLEM: dict[str, Any] = {
    "task_id": "Test/0",
    "prompt": (
        "from typing import List\n\n\ndef double(x):\n    return 2 * x\n\n\n"
        'def total(xs: List[int]) -> int:\n    """Of the doubles."""\n'
    ),
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 6\n",
}
BODY = "    return sum(map(double, xs))\n"
WHOLE = f"def total(xs: List[int]) -> int:\n{BODY}"


@pytest.fixture(scope="module")
def isolated() -> None:
    """Skips where namespaces are not allowed, as in many containers; there the script refuses as well."""
    try:
        check_isolation()
    except AuroraError as error:
        if "cannot be isolated" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.usefixtures("isolated")
def test_a_program_sees_an_empty_folder_and_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "key")
    code = "import os\nprint(os.listdir(), os.environ.get('SECRET'), os.environ['HOME'], os.listdir('/old'))"
    assert run_isolated(code, seconds=10).output == "[] None /scratch []\n"


@pytest.mark.usefixtures("isolated")
def test_limits_that_are_missing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_LIMITS", ("--core=0",))
    with pytest.raises(AuroraError, match="take 4 GB of memory, start processes"):
        check_isolation()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("isolated")
def test_programs_that_do_not_end_are_ended_with_all_that_they_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_isolated("while True: pass", seconds=1).code == 137
    monkeypatch.setattr(isolation, "_LIMITS", ("--nproc=20",))
    code = "import os, time\nprint(os.fork() >= 0, flush=True)\nos.setsid()\ntime.sleep(4242)"
    assert run_isolated(code, seconds=1).code == 137
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in commands if command.endswith("-I /program.py")] == []


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("answer", [BODY, WHOLE])
def test_an_answer_passes_if_its_tests_do(answer: str) -> None:
    assert passes(PROBLEM, answer)
    assert not passes(PROBLEM, answer.replace("sum", "max"))
    assert not passes(PROBLEM, answer + "\nimport os\nos._exit(0)\n")


def test_what_stands_before_a_function_is_given_to_its_answer() -> None:
    program = program_of(PROBLEM, WHOLE, passed="yes")
    assert program.count("def total(") == 1
    assert program.startswith("from typing import List\n\n\ndef double")
    assert program_of(PROBLEM, f"```python{WHOLE}", passed="yes") == program, "some servers repeat what was begun"
    turns = body_of(PROBLEM, max_tokens=5)["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert PROBLEM["prompt"] in turns[1]["content"]


def test_paired_answers_are_compared_exactly() -> None:
    one, other = [True] + [False] * 7 + [True] * 12, [False] + [True] * 7 + [True] * 12
    text = compared(one, other)  # 7 won and 1 lost: p = 2 * (1 + 8) / 2 ** 8
    assert text.startswith("+30.0%")
    assert "7 problems are solved by the second alone, 1 by the first alone" in text
    assert text.endswith("p = 0.070")
    assert compared(one, one).endswith("p = 1.000")
