"""What was served is counted by domain, in a bounded number of rows."""

from __future__ import annotations

from pathlib import Path

from aurora_lit.ipc.engine_status import MAX_LABELS, EngineStatusPage
from aurora_lit.request import Output
from aurora_lit.serve.worker.domain_counts import DomainCounts
from aurora_lit.settings import MAX_DOMAINS


def output(domain: str, *, tokens: int = 3, proposed: int = 4, first: bool = False) -> Output:
    return Output(
        request_id="a",
        token_ids=tuple(range(tokens)),
        num_proposed=proposed,
        num_accepted=tokens - 1,
        is_first=first,
        domain=domain,
    )


def test_every_domain_has_its_own_totals(tmp_path: Path) -> None:
    counts, page = DomainCounts(), EngineStatusPage.create(tmp_path / "status")
    counts.add([output("code"), output(""), output("auto-1", tokens=1, proposed=0)])
    counts.add([output("code", first=True), output("auto-1", tokens=1, proposed=2)])
    page.write(domain_names="\n".join(counts.names), domain_numbers=counts.numbers)
    domains = page.read().domains
    assert domains == {"code": (1, 6, 2, 8, 4), "unknown": (0, 3, 1, 4, 2), "auto-1": (0, 2, 1, 2, 0)}
    assert (domains["code"].acceptance_rate, domains["code"].mean_accepted_length) == (0.5, 3.0)
    assert (domains["auto-1"].acceptance_rate, domains["auto-1"].mean_accepted_length) == (0.0, 1.0)


def test_a_client_cannot_add_rows_without_end(tmp_path: Path) -> None:
    counts, page = DomainCounts(), EngineStatusPage.create(tmp_path / "status")
    labels = [f"{'🌍' * 60}{number:04d}" for number in range(500)]
    for label in labels:
        counts.add([output(label)])
    for number in range(500):
        counts.add([output(f"auto-{number}")])
    counts.add([output(labels[0]), output(labels[-1]), output("other"), output("unknown"), output("")])
    page.write(domain_names="\n".join(counts.names), domain_numbers=counts.numbers)
    domains = page.read().domains
    assert len(domains) == MAX_LABELS + MAX_DOMAINS + 2
    assert [name for name in domains if name.endswith("0000")] == [labels[0]], "the first labels have the rows"
    assert {f"auto-{number}" for number in range(500 - MAX_DOMAINS, 500)} < set(domains), "the latest domains have"
    of_labels = 3 * (500 - MAX_LABELS + 2)
    assert domains["other"].generated_tokens == of_labels, "a counter: it does not leap by what had another name"
    assert domains["unknown"].generated_tokens == 6


def test_a_domain_with_requests_keeps_its_row(tmp_path: Path) -> None:
    counts = DomainCounts()
    for number in range(100):
        counts.add([output("auto-0"), output(f"auto-{number + 1}")])
    assert "auto-0" in counts.names
    assert counts.numbers[1] == 300, "the first row is still its own"
