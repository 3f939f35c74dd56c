"""How often does a served model call the right function with the right arguments?

    python -m benchmarks.tool_calls --url http://127.0.0.1:8000 --out answers.jsonl

Asks the 60 prompts of benchmarks/tool_calls.json, of which 6 ask for two calls and 5 for none, greedily, once for each
--choice: with `auto` the model decides whether it calls; with `required` it has to, and the 5 are left out. Every other
request is streamed. An answer is *parsed* if the server has found the asked number of calls in it, whose arguments are
JSON objects. It has the *right tool* if they are also of the asked functions, and *right arguments* if these also have
the values that the prompt names, and besides only arguments that the function knows. Text is compared without regard to
case; "a|b" in the file is either, "~a b" any text with both words. --report FILE prints the table of stored answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI

Json = dict[str, Any]
CHOICES = ("auto", "required")
GRADES = ("parsed", "right tool", "right arguments")


def read_prompts() -> tuple[dict[str, Json], list[Json]]:
    """The functions by name, and the prompts."""
    stored = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {function["name"]: function for function in stored["tools"]}, stored["prompts"]


def answer(client: OpenAI, prompt: Json, functions: dict[str, Json], *, choice: str, streamed: bool, most: int) -> Json:
    """One answer: its content, calls as (name, arguments as text), and finish reason."""
    request: Json = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": prompt["ask"]}],
        "tools": [{"type": "function", "function": functions[name]} for name in prompt["tools"]],
        "tool_choice": choice,
        "parallel_tool_calls": len(prompt["calls"]) > 1,
        "temperature": 0,
        "max_tokens": most,
    }
    if not streamed:
        whole = client.chat.completions.create(**request).choices[0]
        calls = [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or ()]
        return {"content": whole.message.content, "calls": calls, "finish_reason": whole.finish_reason}
    content, calls, reason = "", [], None
    for chunk in client.chat.completions.create(**request, stream=True):
        for part in chunk.choices:
            content, reason = content + (part.delta.content or ""), part.finish_reason or reason
            for piece in part.delta.tool_calls or ():
                if piece.index == len(calls):
                    calls.append([piece.function.name, ""])
                calls[piece.index][1] += piece.function.arguments or ""
    return {"content": content, "calls": calls, "finish_reason": reason}


def is_equal(value: Any, asked: Any) -> bool:
    """True if an argument has the asked value."""
    if not isinstance(asked, str) or not isinstance(value, str):
        return type(value) is type(asked) and value == asked or (_is_number(value, asked) and value == asked)
    text = value.casefold().strip()
    if asked.startswith("~"):
        return all(word in text for word in asked[1:].casefold().split())
    return text in asked.casefold().split("|")


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def grade(calls: Sequence[Sequence[str]], asked: Sequence[Sequence[Any]], functions: dict[str, Json]) -> int:
    """How many of GRADES the calls reach, in whatever order they are."""
    try:
        found = [(name, json.loads(arguments)) for name, arguments in calls]
    except ValueError:
        return 0
    if len(found) != len(asked) or not all(isinstance(arguments, dict) for _, arguments in found):
        return 0
    if sorted(name for name, _ in found) != sorted(name for name, _ in asked):
        return 1
    for name, arguments in found:
        known = functions[name]["parameters"]["properties"].keys()
        if not any(
            name == of
            and arguments.keys() <= known
            and all(is_equal(arguments.get(key), values[key]) for key in values)
            for of, values in asked
        ):
            return 2
    return 3 if len({arguments for _, arguments in calls}) == len(calls) else 2


def table(answers: Sequence[Json]) -> str:
    """Shares by choice."""
    functions, prompts = read_prompts()
    lines = ["| `tool_choice` | asked for | answers | " + " | ".join(GRADES) + " |", "|---|---|---|---|---|---|"]
    for choice in CHOICES:
        for count, words in ((1, "one call"), (2, "two calls"), (0, "no call")):
            of = [each for each in answers if each["choice"] == choice]
            of = [each for each in of if len(prompts[each["prompt"]]["calls"]) == count]
            if of:
                reached = [grade(each["calls"], prompts[each["prompt"]]["calls"], functions) for each in of]
                shares = " | ".join(str(sum(at > least for at in reached)) for least in range(len(GRADES)))
                lines.append(f"| {choice} | {words} | {len(of)} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Command line; see the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--choice", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="add a JSON line for each answer to this file")
    parser.add_argument("--report", type=Path, help="only print the table of this file")
    options = parser.parse_args()
    if options.report:
        print(table([json.loads(line) for line in options.report.read_text(encoding="utf-8").splitlines()]))
        return
    functions, prompts = read_prompts()
    client, answers = OpenAI(base_url=f"{options.url}/v1", api_key="none"), list[Json]()
    for choice in options.choice:
        for number, prompt in enumerate(prompts):
            if choice == "required" and not prompt["calls"]:
                continue
            how: Json = {"choice": choice, "streamed": bool(number % 2), "most": options.max_tokens}
            found = answer(client, prompt, functions, **how)
            answers.append({"choice": choice, "prompt": number, **found})
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(answers[-1], ensure_ascii=False) + "\n")
    print(table(answers))


if __name__ == "__main__":
    main()
