"""What the tests share that lose Redis and recover from what is beside an output."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import redis

from service.jobs.record import JobRecord
from service.jobs.recoverystore import RecoveryStore
from service.keys import ANYBODY
from service.running.recovery import Recovery, recover
from tests.e2e.bench import Bench, KilledError, at_step, raising
from tests.e2e.overwriting import PREPARATIONS, SHARD_BYTES, recipe


def lose(bench: Bench, raw: redis.Redis) -> None:
    """Redis comes back empty."""
    found: Any = raw.keys(f"{bench.settings.namespace}:*")
    raw.delete(*found)


def recovered(bench: Bench, output: Path | str, whose: Any = ANYBODY, store: Any = None) -> Recovery:
    """Recover what was at an output."""
    with RecoveryStore(bench.settings.redis_url, bench.settings.namespace) as jobs:
        return recover(str(output), bench.settings, store or bench.store, jobs, whose, time.time())


def submit(bench: Bench, models: Path, out: Path, before: str = "empty") -> str:
    """Queue the merge into a place with something in it."""
    if (prepare := PREPARATIONS[before]) is not None:
        prepare(out)
    return bench.submit(recipe(models), out, shard_bytes=SHARD_BYTES, overwrite=prepare is not None)


def killed(bench: Bench, job: str, step: str, when: str = "before") -> JobRecord:
    """Run a job until it dies at a step; its record then."""
    with pytest.raises(KilledError):
        bench.run(job, at_step(step, raising(KilledError()), when))
    return bench.jobs.get(job)
