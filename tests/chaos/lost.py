"""Redis comes back empty: what was known is seen once more, and all that is not over is recovered from its outputs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import redis

from service.jobpages import JobStatus
from tests.chaos.stack import LEASE_S, NAMESPACE, Stack
from workers.errors import JobStoreUnavailableError

RECOVERED_WITHIN_S: Final = 60.0
"""How long ``mergemill recover`` may be tried for: the store may be struck, too."""

NOTHING: Final = "is claimed by no job"
"""What it says where nothing is to be recovered."""


@dataclass(frozen=True, slots=True)
class Known:
    """What was known of a job at the moment of the loss."""

    status: JobStatus
    """How it stood."""
    recorded: frozenset[str]
    """Its recorded parts."""


def empty(stack: Stack, jobs: Iterable[str]) -> Mapping[str, Known]:
    """Lose all that Redis knows but the API keys, which an operator would make again; what it knew of these jobs.

    Nobody reaches it meanwhile, and leases that somebody may still believe in run out before it is back.
    """
    with stack.without_redis(), redis.Redis.from_url(stack.valkey.url) as client:
        _wait_until_up(stack)
        known = {job: Known(stack.jobs.status(job), frozenset(stack.jobs.parts(job))) for job in jobs}
        found: Any = client.keys(f"{NAMESPACE}:*")
        client.delete(*(key for key in found if not key.startswith(f"{NAMESPACE}:key".encode())))
        time.sleep(LEASE_S)
    return known


def _wait_until_up(stack: Stack) -> None:
    deadline = time.monotonic() + RECOVERED_WITHIN_S
    while True:
        try:
            return stack.jobs.ping()
        except JobStoreUnavailableError:  # something else killed it
            if time.monotonic() > deadline:
                raise


def recover(stack: Stack, output: str) -> str | None:
    """``mergemill recover OUTPUT``, until it says something; the id of the job that goes on, if one does.

    :raises RuntimeError: it never did.
    """
    command = [sys.executable, "-m", "mergemill", "recover", output, "--key", stack.key_id, "--json"]
    deadline = time.monotonic() + RECOVERED_WITHIN_S
    while True:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=stack.environment("recover"), timeout=60
        )
        if done.returncode == 0:
            return str(json.loads(done.stdout)["id"])
        if NOTHING in done.stderr:
            return None
        if time.monotonic() > deadline:
            raise RuntimeError(f"mergemill recover {output}: {done.stderr[-2000:]}")
        time.sleep(0.2)
