"""Redis comes back empty: what was known is seen once more, and all that is not over is recovered from its outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import redis
from typer.testing import CliRunner

from mergemill import cli
from service.jobs.pages import JobStatus
from tests.chaos.stack import LEASE_S, NAMESPACE, Stack
from workers.errors import JobStoreUnavailableError

RECOVERED_WITHIN_S: Final = 60.0
"""How long ``mergemill recover`` may be tried for: the store may be struck, too."""

NOTHING: Final = "is claimed by no job"
"""What it says where nothing is to be recovered."""


@dataclass(frozen=True, slots=True)
class Known:
    """What was known of a job at the moment of the loss, and what was recovered."""

    status: JobStatus
    """How it stood."""
    recorded: frozenset[str]
    """Its recorded parts."""
    kept: frozenset[str] | None = None
    """Those that are recorded again, of a job that was recovered."""


def empty(stack: Stack, outputs: Mapping[str, str]) -> Mapping[str, Known]:
    """Lose all that Redis knows but the API keys, which an operator would make again, and recover what there is.

    Nobody else reaches it meanwhile, and leases that somebody may still believe in run out before that.

    :param outputs: the outputs of the jobs that are there, by id.
    """
    with stack.without_redis(), redis.Redis.from_url(stack.valkey.url) as client:
        _wait_until_up(stack)
        jobs = stack.jobs
        known = {job: (jobs.status(job), frozenset(jobs.parts(job))) for job in outputs}
        unswept = {job for job in outputs if client.hexists(f"{NAMESPACE}:job:{job}", "left")}
        found: Any = client.keys(f"{NAMESPACE}:*")
        client.delete(*(key for key in found if not key.startswith(f"{NAMESPACE}:key".encode())))
        time.sleep(LEASE_S)
        # One that could not clear its output away is nobody's now but who goes on with it.
        open_ = {
            outputs[job]
            for job, (status, _) in known.items()
            if job in unswept or not status.record.state.is_terminal
        }
        recovered = {job: frozenset(jobs.parts(job)) for output in open_ if (job := _recover(stack, output))}
    return {job: Known(*each, recovered.get(job)) for job, each in known.items()}


def _wait_until_up(stack: Stack) -> None:
    deadline = time.monotonic() + RECOVERED_WITHIN_S
    while True:
        try:
            return stack.jobs.ping()
        except JobStoreUnavailableError:  # something else killed it
            if time.monotonic() > deadline:
                raise


def _recover(stack: Stack, output: str) -> str | None:
    """``mergemill recover OUTPUT``, until it says something; the id of the job that goes on, if one does.

    :raises RuntimeError: it never did.
    """
    told = {**stack.environment("recover"), "MERGEMILL_REDIS_URL": stack.valkey.url}
    env = {name: value for name, value in told.items() if name.startswith(("MERGEMILL_", "AWS_"))}
    deadline = time.monotonic() + RECOVERED_WITHIN_S
    while True:
        # In this process: what it imports is here already.
        done = CliRunner().invoke(cli.app, ["recover", output, "--key", stack.key_id, "--json"], env=env)
        if done.exit_code == 0:
            return str(json.loads(done.stdout)["id"])
        if NOTHING in done.stderr:
            return None
        if time.monotonic() > deadline:
            raise RuntimeError(f"mergemill recover {output}: {done.stderr} {done.exception!r}")
        time.sleep(0.2)
