"""`aurora-lit doctor`: reports whether this machine can serve the configuration, what to do if not, and memory needs.

It changes nothing, except that it builds the native kernels if they have not been built before.

Leaves out the checks (cli/checks.py) and the computation of memory needs (cli/footprint.py).
"""

import json
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from aurora_lit.cli.checks import run_checks
from aurora_lit.config import AuroraConfig
from aurora_lit.models.source import cache_root, cached

_GIB = 1 << 30


def doctor(config: AuroraConfig, *, as_json: bool = False) -> bool:
    """Print the report on standard output; True if no check failed."""
    checks = list(run_checks(config))
    can_serve = all(check.state != "fail" for check in checks)
    memory = _memory(config)
    if as_json:
        print(json.dumps({"ok": can_serve, "checks": [asdict(check) for check in checks], "memory": memory}, indent=2))
        return can_serve
    table = Table("", "check", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    for check in checks:
        table.add_row(marks[check.state], check.name, escape(check.found), escape(check.remedy))
    console = Console()
    console.print(table)
    if memory is not None:
        _print_memory(console, config, memory)
    console.print("This machine can serve." if can_serve else "Serving would not start: see the lines marked FAIL.")
    return can_serve


def _memory(config: AuroraConfig) -> dict[str, Any] | None:
    """The memory table's lines and sums; None if the model's sizes are not known."""
    from aurora_lit.cli.footprint import Place, gguf_bytes, model_shape, needs, total

    target = config.target
    try:
        folder = cached(target.source, cache_dir=cache_root(), sha256=target.sha256)
        if folder is None:
            return None
        lines = needs(config, model_shape(config, folder), gguf_bytes=gguf_bytes(folder))
        return {
            "needs": [asdict(need) for need in lines],
            "totals": {place: total(lines, place) for place in get_args(Place)},
        }
    except Exception:  # check_memory, which computes the same, has reported it
        return None


def _print_memory(console: Console, config: AuroraConfig, memory: dict[str, Any]) -> None:
    engine = config.engine
    shared = "" if engine.devices == 1 else f" over {engine.devices} devices with {engine.strategy}"
    table = Table(
        "where", "what", Column("GiB", justify="right"), Column("how", overflow="fold"), title=f"Memory{shared}"
    )
    for place, num_bytes in memory["totals"].items():
        for need in memory["needs"]:
            if need["where"] == place:
                table.add_row(place, need["what"], f"{need['num_bytes'] / _GIB:.2f}", need["how"])
        table.add_row(place, "[bold]total[/]", f"[bold]{num_bytes / _GIB:.2f}[/]", "", end_section=True)
    console.print(table)
