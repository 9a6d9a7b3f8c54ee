"""Every expression of dashboard, rules, scalers and documents returns data from a server under load.

Where a busy machine lets Prometheus miss a scrape, what is asked for is there a little later.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.live import LEVELS, ROOT, Prometheus, wait_for
from tests.deploy.live import live as live  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus")]
DEPLOY = ROOT / "deploy"
BOUND = re.compile(r"\s(==|!=|>=?|<=?)\s[\d.]+$")


def rules(name: str) -> list[dict[str, str]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> Iterator[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana/espalier.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["definition"].removeprefix("label_values(").rpartition(",")[0]


def adapted() -> Iterator[tuple[str, str]]:
    """What prometheus-adapter asks for each metric of the HPA, by pod."""
    folder = DEPLOY / "kubernetes/components/hpa"
    (rule,) = yaml.safe_load((folder / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    for metric in yaml.safe_load((folder / "hpa.yaml").read_text())["spec"]["metrics"]:
        name = metric["pods"]["metric"]["name"]
        filled = {"<<.GroupBy>>": "pod", "<<.Series>>": name, "<<.LabelMatchers>>": 'namespace="espalier",pod=~".+"'}
        query = rule["metricsQuery"]
        for template, value in filled.items():
            query = query.replace(template, value)
        yield name, query
        yield f"{name} found", rule["seriesQuery"]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression), with Grafana's variables filled in and the bounds of alerts left out: a healthy server crosses none."""
    for where, expression in panels():
        filled = {"$__rate_interval": "1m", "$instance": ".*", "$level": ".*"}
        for variable, value in filled.items():
            expression = expression.replace(variable, value)
        yield where, expression
    for rule in rules("recording.yml"):
        yield f"rule {rule['record']}", rule["expr"]
        yield f"recorded {rule['record']}", rule["record"]
    for rule in rules("alerts.yml"):
        assert BOUND.search(rule["expr"]), "an alert is a quantity and a bound"
        yield f"alert {rule['alert']}", BOUND.sub("", rule["expr"])
    for path in DEPLOY.rglob("*.yaml"):
        for query in re.findall(r"^\s*query: (.+)$", path.read_text(), re.MULTILINE):
            yield f"scaler {path.name}", yaml.safe_load(query)
    for metric, query in adapted():
        yield f"HPA {metric}", query
    for name in re.findall(r"Spec: (\S+)", (DEPLOY / "kubernetes/components/inference-pool/picker.yaml").read_text()):
        yield f"picker {name}", name
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.strip().splitlines():
                yield f"{path.name}", line


@pytest.mark.parametrize("expression", [pytest.param(what, id=f"{where}: {what}") for where, what in expressions()])
def test_it_returns_data(live: Prometheus, expression: str) -> None:
    wait_for(lambda: any(math.isfinite(float(sample["value"][1])) for sample in live.query(expression)), seconds=30)


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((DEPLOY / "grafana/espalier.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [(x, y) for panel in dashboard["panels"] for box in [panel["gridPos"]]
             for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_each_level_has_its_own_series(live: Prometheus) -> None:
    for metric in ("requests_total", "time_to_first_token_seconds_count", "flops_ratio_count"):
        by_level = f"sum by (level) (espalier_{metric}) > 0"
        wait_for(lambda: {one["metric"]["level"] for one in live.query(by_level)} == set(LEVELS), seconds=30)  # noqa: B023


def test_no_alert_fires_on_a_healthy_server(live: Prometheus) -> None:
    assert live.query('ALERTS{alertstate="firing"}') == []


def test_the_configuration_is_sound_and_the_alerts_fire() -> None:
    for check in (["check", "config", "prometheus.yml"], ["test", "rules", "tests.yml"]):
        subprocess.run(["promtool", *check], cwd=DEPLOY / "prometheus", check=True, capture_output=True)


def test_every_alert_has_a_unit_test_and_tells_what_to_do() -> None:
    tests = (DEPLOY / "prometheus/tests.yml").read_text()
    operations = (ROOT / "docs/operations.md").read_text()
    for rule in rules("alerts.yml"):
        assert f"alertname: {rule['alert']}" in tests
        document, _, heading = rule["annotations"]["runbook"].partition("#")  # type: ignore[attr-defined]
        assert Path(document) == Path("docs/operations.md")
        assert heading == rule["alert"].lower() and f"### {rule['alert']}\n" in operations
