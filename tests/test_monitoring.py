"""The Grafana dashboard and the alert rules ask for metrics that a server exports. They are not evaluated here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support import ROOT

GRAFANA = ROOT / "docs" / "grafana"
DASHBOARD = GRAFANA / "aurora-lit.json"
RULES = GRAFANA / "alerts.yml"


def exported() -> dict[str, str]:
    """Metric → kind, as docs/metrics.md lists them; a test holds that list to the server."""
    text = (ROOT / "docs" / "metrics.md").read_text().split("## Exported", 1)[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (\w+) \|", text, flags=re.MULTILINE))


def expressions() -> list[str]:
    """Those of the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression names."""
    return set(re.findall(r"(?:vllm:|aurora_)\w+", re.sub(r'"[^"]*"', "", expression)))


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_expression_asks_for_exported_metrics() -> None:
    asked = expressions() + [rule["expr"] for rule in rules()]
    assert len(asked) > 50
    known = exported()
    series = {
        f"{name}{suffix}"
        for name, kind in known.items()
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }
    for expression in asked:
        assert metrics_in(expression) <= series, expression
        for name in re.findall(r"(?:rate|increase)\(([\w:]+)", expression):
            assert name not in known or known[name] == "counter", f"{name} in {expression} does not only grow"


def test_every_alert_has_a_test_and_says_what_to_do() -> None:
    tested = (GRAFANA / "alerts_test.yml").read_text()
    for rule in rules():
        assert rule["alert"] in tested
        assert rule["labels"]["severity"] in ("critical", "warning", "info")  # type: ignore[index]
        assert {"summary", "description"} == set(rule["annotations"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *arguments], cwd=GRAFANA, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_servers_compose_file_uses_these_files() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert not source.startswith(".") or Path(ROOT, source).exists(), source
    (scrape,) = yaml.safe_load((ROOT / "docs" / "grafana" / "prometheus.yml").read_text())["scrape_configs"]
    (host,) = scrape["static_configs"][0]["targets"]
    assert host.split(":")[0] in services
    assert all(scrape["job_name"] == name for name in re.findall(r'job="([^"]+)"', RULES.read_text()))
