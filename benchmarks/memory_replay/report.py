"""Tables of replays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from .replay import Replayed, Tally


def tokens_a_round(tallies: Iterable[Tally]) -> float:
    """Tokens that a round gives, the target's own one included; 1 without any proposal."""
    listed = list(tallies)
    return sum(tally.tokens for tally in listed) / max(1, sum(tally.rounds for tally in listed))


def learning_curve(tallies: Sequence[Tally], parts: int) -> list[float]:
    """Tokens a round by part of the requests, in their order."""
    bounds = [part * len(tallies) // parts for part in range(parts + 1)]
    return [tokens_a_round(tallies[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def by_domain(replays: Iterable[Replayed]) -> dict[str, dict[str, list[Tally]]]:
    """The tallies of each arm and domain."""
    found: dict[str, dict[str, list[Tally]]] = {}
    for replayed in replays:
        for tally in replayed.tallies:
            found.setdefault(replayed.arm, {}).setdefault(tally.domain, []).append(tally)
    return found


def token_table(replays: Sequence[Replayed], repeated: dict[str, float]) -> Table:
    """Tokens a round of each arm and domain, in brackets of the second half of the requests; of one temperature.

    `repeated`: the share of repeated n-grams in a domain's answers.
    """
    arms = by_domain(replays)
    domains = list(next(iter(arms.values())))
    table = Table(title=f"tokens a round (second half), temperature {replays[0].temperature:g}")
    table.add_column("")
    for domain in domains:
        table.add_column(domain, justify="right")
    table.add_column("mean", justify="right")
    for arm, tallies in arms.items():
        curves = [(tokens_a_round(tallies[d]), learning_curve(tallies[d], 2)[1]) for d in domains]
        means = [sum(values) / len(domains) for values in zip(*curves, strict=True)]
        table.add_row(arm, *(f"{whole:.2f} ({half:.2f})" for whole, half in [*curves, (means[0], means[1])]))
    table.add_section()
    table.add_row("requests", *(str(len(arms[next(iter(arms))][domain])) for domain in domains), "")
    table.add_row("repeated n-grams", *(f"{repeated[domain]:.0%}" for domain in domains), "")
    return table


def curve_table(replays: Sequence[Replayed], parts: int = 6) -> Table:
    """Tokens a round by part of the requests, all domains together; of one temperature."""
    table = Table(title=f"tokens a round by sixth of the requests, temperature {replays[0].temperature:g}")
    for name in ("", *(str(part + 1) for part in range(parts))):
        table.add_column(name, justify="right" if name else "left")
    for arm, domains in by_domain(replays).items():
        curves = [learning_curve(tallies, parts) for tallies in domains.values()]
        table.add_row(arm, *(f"{sum(values) / len(curves):.2f}" for values in zip(*curves, strict=True)))
    return table


def cost_table(replays: Sequence[Replayed]) -> Table:
    """What proposals cost: how many there are, and times, the worst of the replays."""
    table = Table(title=f"costs, temperature {replays[0].temperature:g}; times: median, 99th percentile in µs")
    columns = (
        "proposals a round",
        "accepted",
        "look-up",
        "accept, a token",
        "finish, a token",
        "begin, a prompt token",
    )
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for arm in dict.fromkeys(replayed.arm for replayed in replays):
        own = [replayed for replayed in replays if replayed.arm == arm]
        tallies = [tally for replayed in own for tally in replayed.tallies]
        proposed, accepted = sum(t.proposed for t in tallies), sum(t.accepted for t in tallies)
        times = [[getattr(replayed, name) for replayed in own] for name in ("look_up", "accept", "finish", "begin")]
        table.add_row(
            arm,
            f"{proposed / sum(tally.rounds for tally in tallies):.2f}",
            f"{accepted / max(1, proposed):.0%}",
            *(f"{max(q.median for q in each):.2f}, {max(q.p99 for q in each):.2f}" for each in times),
        )
    return table
