"""Structured outputs of a server: are they valid, and what does a schema cost, with and without speculation?

    python -m benchmarks.structured --answers 20 -- learn.enabled=false

For each schema of benchmarks/structured_schemas.py a chat asks for JSON about its subject, --answers times, greedily
and at temperature 1, in turns: with the schema and speculation, with the schema and without speculation, and without
the schema and with speculation. --part 2/5 asks for the second fifth of the schemas only; --out FILE adds a JSON line
for each answer, from which --report FILE … makes the table of several parts.

The prompt does not show the schema: an answer without it would copy that. Every answer that ended by itself must be
valid, by the library jsonschema with the formats that it knows: otherwise the exit code is 1. Those cut at --max-tokens
are counted apart. Tokens a second are those of answers from the request to the last byte, one client at a time, with
the prompt read before; with the schema over without it is their quotient over the same prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jsonschema

from aurora_lit.bench.load import ask, chat
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config
from benchmarks.structured_schemas import SCHEMAS

WAYS: dict[str, tuple[bool, bool]] = {"schema": (True, True), "schema, plain": (True, False), "free": (False, True)}
"""With the schema? With speculation?"""
TOPICS = ("", " in Spain", " from the future", " for children", " of the year 1900")
Record = dict[str, Any]


def describe(url: str, name: str, number: int, *, way: str, temperature: float, max_tokens: int) -> Record:
    """One answer, as a record of the table."""
    schema, (has_schema, speculates) = SCHEMAS[name], WAYS[way]
    topic = TOPICS[number % len(TOPICS)]
    answer = ask(
        url,
        chat(
            f"Describe {name}{topic}. Answer with JSON only.",
            temperature=temperature,
            seed=number,
            max_tokens=max_tokens,
            speculate=speculates,
            store=False,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            if has_schema
            else None,
        ),
    )
    return {
        "name": name,
        "way": way,
        "temperature": temperature,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "reason": answer.finish_reason,
        "fault": fault_of(answer.text, schema),
        "text": answer.text,
    }


def _number(digits: str) -> Decimal | float:
    """Exact, unless the exponent is too large for that."""
    try:
        return Decimal(digits)
    except InvalidOperation:
        return float(digits)


def fault_of(text: str, schema: Record) -> str:
    """Why the text does not fit the schema; "" if it does. In decimals, in which 650.18 is a multiple of 0.01."""
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        exact, answer = (json.loads(each, parse_float=_number) for each in (json.dumps(schema), text))
        jsonschema.validate(answer, exact, jsonschema.Draft202012Validator, format_checker=checker)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def report(records: list[Record]) -> bool:
    """Print the table; False if an answer that ended by itself and had a schema is not valid."""
    by_way: defaultdict[tuple[float, str], list[Record]] = defaultdict(list)
    for record in records:
        by_way[record["temperature"], record["way"]].append(record)
    print(f"{len({record['name'] for record in records})} schemas")
    print(
        "| temperature | way | answers | ended | of these valid | cut | tokens/s | s an answer | tokens/s over free |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (temperature, way), each in sorted(by_way.items()):
        ended = [record for record in each if record["reason"] == "stop"]
        speed, free = tokens_per_s(each), tokens_per_s(by_way[temperature, "free"])
        print(
            f"| {temperature:g} | {way} | {len(each)} | {len(ended)} | {sum(not r['fault'] for r in ended)} "
            f"| {len(each) - len(ended)} | {speed:.1f} | {sum(r['seconds'] for r in each) / len(each):.2f} "
            f"| {speed / free:.2f} |"
        )
    wrong = [r for r in records if r["way"] != "free" and r["reason"] == "stop" and r["fault"]]
    for record in wrong:
        print(f"not valid: {record['name']}: {record['fault']}: {record['text']}")
    return not wrong


def tokens_per_s(records: list[Record]) -> float:
    """Of all of them together."""
    return sum(r["tokens"] for r in records) / max(sum(r["seconds"] for r in records), 1e-9)


def main() -> None:
    """Ask, report, and end with 1 if an answer is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20, help="of each schema, temperature and way")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the schemas")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--out", type=Path, help="a file of JSON lines to add the answers to")
    parser.add_argument("--report", type=Path, nargs="+", help="report these files instead of asking")
    parser.add_argument("overrides", nargs="*", help="settings of the server")
    options = parser.parse_args()
    if options.report:
        records = [json.loads(line) for path in options.report for line in path.read_text().splitlines()]
        sys.exit(0 if report(records) else 1)
    part, parts = map(int, options.part.split("/"))
    config = load_config(None, [*options.overrides, f"server.port={free_port()}"])
    records = []
    with tempfile.TemporaryDirectory() as folder, running_server(config, Path(folder) / "log") as url:
        for name in list(SCHEMAS)[part - 1 :: parts]:
            for number in range(options.answers):
                describe(
                    url, name, number, way="free", temperature=0.0, max_tokens=1
                )  # so that all find the prompt read
                for temperature in (0.0, 1.0):
                    for way in WAYS:
                        how = {"way": way, "temperature": temperature, "max_tokens": options.max_tokens}
                        records.append(describe(url, name, number, **how))
                        if options.out is not None:
                            with options.out.open("a") as file:
                                file.write(json.dumps(records[-1]) + "\n")
    sys.exit(0 if report(records) else 1)


if __name__ == "__main__":
    main()
