"""Every metric of ours, as Prometheus sees it: what the guide, the dashboard and the alerts may name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from prometheus_client.parser import text_string_to_metric_families

from service.cluster.driver import Capacity
from service.watching import metrics
from service.watching.deployment import Deployment


@dataclass
class Fleet:
    known_capacity: Capacity | None = None
    in_flight: int = 0


@cache
def every_metric() -> dict[str, tuple[str, set[str]]]:
    """All that we name ourselves: type and labels by name."""
    lost = metrics.DeploymentCollector(Deployment("redis://127.0.0.1:1"))
    shown = metrics.render(metrics.API, metrics.SCHEDULER, metrics.FleetCollector(Fleet()), lost).decode()
    found = {
        family.name: (family.type, {label for each in family.samples for label in each.labels})
        for family in text_string_to_metric_families(shown)
        if family.name.startswith("mergemill_")
    }
    for counted in (metrics.HTTP_REQUESTS, metrics.HTTP_SECONDS):  # nothing was counted yet
        found[counted._name] = (counted._type, set(counted._labelnames))
    for name in ("queue_age_seconds", "schedulers"):
        found[f"mergemill_{name}"] = ("gauge", set())
    return found | {"mergemill_jobs": ("gauge", {"state"})}
