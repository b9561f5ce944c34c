"""What is going on in all of a deployment, in Redis: which schedulers are alive, and how long the queue is.

Every key, after the namespace, beside those of :mod:`service.jobs.jobstore`:

===========================  ==========  ===============================================================
``schedulers``               set         owners of the schedulers that are alive, and maybe of some that were
``scheduler:<owner>``        string      JSON of the :class:`Heartbeat`; expires when it is not renewed in time
===========================  ==========  ===============================================================

Ages are told by the keys' remaining life, so nobody's clock is compared with anybody else's. Both scripts do
the same when they are run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from service.jobs.record import JobState, created_at_ms
from service.redis_connection import RedisKeys, connect, guarded

TRIES: Final = 1
"""How often a broken connection is tried again: who asks wants to know it now."""

TIMEOUT_S: Final = 2.0
"""Longest wait for a connection or an answer, in seconds."""

# The sign of life and its place in the index are one fact; and whoever is alive forgets the dead, or the index
# would grow with every start.
BEAT: Final = """
for _, owner in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if redis.call('EXISTS', KEYS[2] .. ':' .. owner) == 0 then redis.call('SREM', KEYS[1], owner) end
end
redis.call('SET', KEYS[2] .. ':' .. ARGV[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[1], ARGV[1])
"""

# All of one moment; none of it takes longer the more jobs there are.
LOOK: Final = """
local counts, found = {}, {}
for place, state in ipairs(ARGV) do counts[place] = redis.call('ZCARD', KEYS[1] .. ':' .. state) end
for _, owner in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local key = KEYS[3] .. ':' .. owner
  local beat = redis.call('GET', key)
  if beat then found[#found + 1] = {beat, redis.call('PTTL', key)} end
end
return {counts, redis.call('ZRANGE', KEYS[1] .. ':queued', 0, 0), found}
"""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a scheduler says about itself."""

    owner: str
    """Its name, as in its leases."""
    version: str
    """Mergemill's."""
    nodes: int
    """Nodes of its compute cluster; 0 while that is not up."""
    cpus: float
    """CPU cores of all of them."""
    gpus: float
    """GPUs of all of them."""
    jobs: int
    """Jobs that it runs."""
    ttl_s: float
    """After how long without another heartbeat it counts as gone, in seconds."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A scheduler that is alive."""

    beat: Heartbeat
    """The last that it said."""
    age_s: float
    """How long ago, in seconds."""


@dataclass(frozen=True, slots=True)
class View:
    """A deployment, all of one moment."""

    jobs: Mapping[JobState, int]
    """How many jobs there are in each state."""
    oldest_queued_ms: int | None
    """When the oldest queued job was submitted, in Unix milliseconds; ``None`` when none is queued."""
    schedulers: tuple[Scheduler, ...]
    """Those that are alive."""

    def queue_age_s(self, now: float) -> float:
        """How long the oldest queued job has waited at ``now`` (Unix seconds); 0 when none does."""
        return 0.0 if self.oldest_queued_ms is None else max(0.0, now - self.oldest_queued_ms / 1000)


class Deployment(RedisKeys):
    """Reads and writes what the table above lists. Safe to share between threads.

    Every method raises :class:`JobStoreUnavailableError` soon when Redis cannot be reached.
    """

    def __init__(self, url: str, namespace: str = "mergemill") -> None:
        super().__init__(connect(url, TRIES, TIMEOUT_S), namespace)

    @guarded
    def beat(self, beat: Heartbeat) -> None:
        """Say that this scheduler is alive."""
        text = json.dumps(asdict(beat))
        keys = (self._key("schedulers"), self._key("scheduler"))
        self._run(BEAT, keys, beat.owner, text, max(1, round(beat.ttl_s * 1000)))

    @guarded
    def leave(self, owner: str) -> None:
        """Say that this scheduler ends; it is no error when it is not known."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._key("scheduler", owner))
            pipe.srem(self._key("schedulers"), owner)
            pipe.execute()

    @guarded
    def look(self) -> View:
        """How things are now."""
        keys = (self._key("jobs"), self._key("schedulers"), self._key("scheduler"))
        counts, oldest, found = self._run(LOOK, keys, *JobState)
        return View(
            dict(zip(JobState, counts, strict=True)),
            created_at_ms(oldest[0]) if oldest else None,
            tuple(_scheduler(text, left_ms) for text, left_ms in found),
        )


def _scheduler(text: str, left_ms: int) -> Scheduler:
    known = {
        name: value for name, value in json.loads(text).items() if name in Heartbeat.__dataclass_fields__
    }
    beat = Heartbeat(**known)  # another version's may say more
    return Scheduler(beat, max(0.0, beat.ttl_s - left_ms / 1000))
