"""Plan a job: find its models, and look for everything that can be wrong with it and with the place of its output."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from service.access import size_problems
from service.cluster.driver import Capacity
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import Planned as PlanRecorded
from service.planning.plan import PlanOptions, plan_summary
from service.planning.planner import Planned, examine
from service.planning.price import Price
from service.recipe import parse_documents
from service.running.capacity import capacity_problems
from service.running.commit import output_problems
from service.running.work import Tools
from workers import tracing
from workers.errors import FleetError, PlanError
from workers.store.base import ObjectStore

CLUSTER_WAIT_S: Final = 180.0
"""How long a job waits for the compute cluster to come up, in seconds, before it fails."""


@tracing.traced("plan")
def plan_job(record: JobRecord, store: ObjectStore, tools: Tools, check: Callable[[], None]) -> Planned:
    """Plan; in the planning state with everything that can be wrong about the output and the cluster, too.

    :param store: object storage as far as the job may see it.
    :param check: raises when the job is not to go on here.
    :raises PlanError: lists every problem.
    :raises StoreUnavailableError: the store is out of reach.
    :raises FleetError: no cluster comes up.
    """
    settings, options = tools.settings, PlanOptions.model_validate(record.options)
    outcome = examine(
        parse_documents(record.recipe),
        options,
        store,
        settings.model_roots,
        settings.worker_baseline_bytes,
        record.output,
    )
    if record.state != JobState.PLANNING:
        return outcome.result()  # the job waits for a store that is out of reach
    # As long as nothing is made, it had better say so at once.
    occupied = output_problems(store, record.output, options.overwrite)
    problems = [*outcome.problems, *outcome.away, *occupied]
    if outcome.price is not None:
        problems.extend(size_problems(record.access, outcome.price))
        wait_s = CLUSTER_WAIT_S if not problems else 0
        problems.extend(_capacity_problems(outcome.price, tools, check, wait_s))
    if problems:
        raise PlanError(*problems)
    return outcome.result()


def facts(planned: Planned, gpu_memory_bytes: int) -> PlanRecorded:
    """What is recorded of a job's plan."""
    plan = planned.plan
    return PlanRecorded(
        plan.digest,
        plan.semantics_version,
        plan_summary(plan, gpu_memory_bytes)["price"],
        plan.notices,
        plan.total.bytes_written,
        plan.total.parts,
        sum(survey.passes for each in plan.whole for survey in each.surveys),
    )


def _capacity_problems(price: Price, tools: Tools, check: Callable[[], None], wait_s: float) -> list[str]:
    """Whether no node can take the biggest task; nothing, when the job fails anyhow and no cluster is up."""
    try:
        capacity = _capacity(tools, check, wait_s)
    except FleetError:
        if wait_s:
            raise
        return []
    return capacity_problems(price, capacity, tools.settings.gpu_memory_bytes)


def _capacity(tools: Tools, check: Callable[[], None], wait_s: float) -> Capacity:
    """What the cluster offers; a cancel or a stop does not wait for a cluster that is not up."""
    deadline = time.monotonic() + wait_s
    while True:
        check()
        try:
            return tools.driver.capacity(tools.settings.poll_seconds)
        except FleetError:
            if time.monotonic() > deadline:
                raise
