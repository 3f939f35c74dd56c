"""`aurora-lit doctor`: can this machine serve this configuration, what is to be done if not, and what goes where.

Leaves out mending anything, except that the native kernels are built here when they were not built before, and the
looking (checks.py) and reckoning (memory.py) themselves.
"""

import json
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console
from rich.table import Column, Table

from aurora_lit.cli.checks import run_checks
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError
from aurora_lit.models.source import cache_root, cached

_GIB = 1 << 30


def doctor(config: AuroraConfig, *, as_json: bool = False) -> bool:
    """Print the report on standard output; True when nothing blocks serving."""
    checks = list(run_checks(config))
    fit = all(check.state != "fail" for check in checks)
    memory = _memory(config)
    if as_json:
        print(json.dumps({"ok": fit, "checks": [asdict(check) for check in checks], "memory": memory}, indent=2))
        return fit
    table = Table("", "check", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    for check in checks:
        table.add_row(marks[check.state], check.name, check.found, check.remedy)
    console = Console()
    console.print(table)
    if memory is not None:
        _print_memory(console, config, memory)
    console.print("This machine can serve." if fit else "Serving would not start: see the lines marked FAIL.")
    return fit


def _memory(config: AuroraConfig) -> dict[str, Any] | None:
    """The table's lines and sums, and the smallest GPU sets; None where the model's measures are not known."""
    from aurora_lit.cli.footprint import CARDS_GB, Place, fewest_devices, model_shape, needs, total

    target = config.target
    try:
        folder = cached(target.source, cache_dir=cache_root(target.cache_dir), sha256=target.sha256)
        shape = model_shape(config, folder=folder)
        if shape is None:
            return None
        lines = needs(config, shape, devices=config.engine.devices)
        return {
            "needs": [asdict(need) for need in lines],
            "totals": {place: total(lines, place) for place in get_args(Place)},
            "smallest": {f"{card} GB": fewest_devices(config, shape, card_gb=card) for card in CARDS_GB},
        }
    except AuroraError:  # a check has said it
        return None


def _print_memory(console: Console, config: AuroraConfig, memory: dict[str, Any]) -> None:
    engine = config.engine
    shared = "" if engine.devices == 1 else f" over {engine.devices} devices by {engine.strategy}"
    table = Table(
        "where", "what", Column("GiB", justify="right"), Column("how", overflow="fold"), title=f"Memory{shared}"
    )
    for place, num_bytes in memory["totals"].items():
        for need in memory["needs"]:
            if need["where"] == place:
                table.add_row(place, need["what"], f"{need['num_bytes'] / _GIB:.2f}", need["how"])
        table.add_row(place, "[bold]together[/]", f"[bold]{num_bytes / _GIB:.2f}[/]", "", end_section=True)
    console.print(table)
    sets = []
    for card, found in memory["smallest"].items():
        if found is None:
            sets.append(f"{card}: not by {engine.strategy}")
        else:
            sets.append(f"{card}: {found[0]}" + (" and one for the learner" if found[1] else ""))
    console.print(f"Smallest set of GPUs by engine.strategy={engine.strategy}: {'; '.join(sets)}.")
