"""Prompts out of git repositories' histories as files for the other benchmarks, oldest commit first.

    python -m benchmarks.repository_prompts --repository ~/code/mine ~/code/other --out traffic

Writes a JSONL file for each repository (aurora_lit/bench/repository_traffic.py): chats, and holes as raw prompts with
Qwen2.5-Coder's marks. Their last lines are of the newest commits, which whoever holds them out needs: code of an older
commit would come again in younger ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from aurora_lit.bench.repository_traffic import repository_requests
from aurora_lit.errors import AuroraError


def line_of(body: dict[str, Any]) -> dict[str, Any]:
    """A request's body as a line of a prompt file."""
    if "messages" in body:
        return {"messages": body["messages"]}
    return {"prompt": f"<|fim_prefix|>{body['prompt']}<|fim_suffix|>{body['suffix']}<|fim_middle|>"}


def main() -> int:
    """Write the files; exit code 1 if a repository cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", nargs="+", type=Path, required=True, help="folders of git repositories")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--commits", type=int, default=1500, help="newest ones that are read")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for folder in options.repository:
            requests = repository_requests(folder, seed=options.seed, most_commits=options.commits)
            lines = [json.dumps(line_of(each.body)) for each in requests if "<|" not in json.dumps(each.body)]
            name = folder.absolute().name
            (options.out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            print(f"{name}: {len(lines)} prompts of {len({each.commit for each in requests})} commits")
    except AuroraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
