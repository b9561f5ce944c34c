"""The dashboard and the alert rules name only metrics and labels that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.service.metric_names import every_metric

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(f"alert {rule['alert']}", rule["expr"]) for rule in RULES] + [
    (f"panel {panel['title']}, {target['refId']}", target["expr"])
    for panel in PANELS
    for target in panel["targets"]
]
FOREIGN = {"job", "instance"}
"""Labels that Prometheus adds to what it scrapes."""

_WORDS = {
    "sum", "max", "min", "count", "rate", "increase", "histogram_quantile", "by", "on", "ignoring", "group_left",
    "and",
}  # fmt: skip
_SERIES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def _series() -> dict[str, set[str]]:
    """The labels of each name that may be asked for."""
    return {
        f"{name}{suffix}": labels | FOREIGN | ({"le"} if suffix == "_bucket" else set())
        for name, (kind, labels) in every_metric().items()
        for suffix in _SERIES[kind]
    } | {"process_resident_memory_bytes": FOREIGN}


def _selectors(expr: str) -> list[tuple[str, set[str]]]:
    """Each metric that a query names, with the labels that it selects by."""
    plain = re.sub(r"\b(?:by|on|ignoring|group_left) \([^)]*\)", "", expr)
    found = re.findall(r"([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?(\()?", re.sub(r"\[[^]]*\]", "", plain))
    return [
        (name, set(re.findall(r"(\w+)\s*[=!]~?\s*\"", labels)))
        for name, labels, _ in found
        if name not in _WORDS and name != "le"
    ]


@pytest.mark.parametrize(("where", "expr"), QUERIES, ids=[where for where, _ in QUERIES])
def test_a_query_names_what_there_is(where: str, expr: str) -> None:
    series = _series()
    selectors = _selectors(expr)
    assert selectors, where
    for name, labels in selectors:
        assert name in series, name
        assert labels <= series[name], (name, labels)
    grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expr) for label in group.split(",")}
    assert grouped <= set.union(*(series[name] for name, _ in selectors))
    for name, _ in selectors:
        if name.endswith("_total") or "_duration_seconds_" in name or "_ratio_" in name:
            assert re.search(rf"(?:rate|increase)\({name}(?:\{{[^}}]*\}})?\[", expr), (
                f"{name} only ever grows"
            )


def test_values_that_are_selected_by_occur() -> None:
    expressions = "\n".join(expr for _, expr in QUERIES)
    states = set(re.findall(r"state=~?\"([^\"]*)\"", expressions))
    known = {"queued", "planning", "running", "committing", "succeeded", "failed", "cancelled"}
    assert {state for value in states for state in value.split("|")} <= known
    assert set(re.findall(r"le=\"([^\"]*)\"", expressions)) == {"1.0"}


def test_the_names_in_legends_and_texts_are_kept_by_their_queries() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - FOREIGN
            assert named <= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
    for rule in RULES:
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert named <= set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert re.fullmatch(r"Mergemill[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
    wanted = {"schedulers", "queue_age_seconds", "lease_losses_total", "job_duration_seconds_count"}
    wanted |= {"task_retries_total", "worker_peak_memory_ratio_bucket"}
    asked = " ".join(rule["expr"] for rule in RULES)
    assert not [name for name in wanted if f"mergemill_{name}" not in asked]


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD["panels"])
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"} <= variables
