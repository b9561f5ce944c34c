"""API keys in Redis.

Every key, after the namespace:

===================  ==========  ===============================================================
``keys``             set         the ids of all keys, revoked ones too
``key:<id>``         hash        ``record`` (JSON of the ApiKey), ``revoked_at`` and ``used_at`` (Unix seconds),
                                 and ``running_jobs``, its own limit, for the script that claims jobs
``key:<id>:rate``    hash        ``tokens`` left in its bucket ``at`` a time; expires when the bucket is full
===================  ==========  ===============================================================

Records never change, and are kept when a key is revoked: its jobs still name it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from service.keys import BURST_S, ApiKey, Limits
from service.redis_connection import CONNECTION_TRIES, RedisKeys, connect, guarded
from workers.errors import KeyNotFoundError

USED_EVERY_S: Final = 60
"""How exactly it is known when a key was used last, in seconds: not every request is worth a write."""

# What is left, what has come since and what is taken are one fact, or two requests would take the same token.
# Time is Redis's own, since the clocks of several APIs differ.
_ADMIT: Final = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local used = tonumber(redis.call('HGET', KEYS[1], 'used_at') or 0)
if now - used >= tonumber(ARGV[3]) and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[1], 'used_at', clock[1])
end
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
if rate == 0 then return {1, 0, '0', '0'} end
local tokens, at = unpack(redis.call('HMGET', KEYS[2], 'tokens', 'at'))
tokens = math.min(burst, (tonumber(tokens) or burst) + math.max(0, now - (tonumber(at) or now)) * rate)
local admitted = tokens >= 1
if admitted then tokens = tokens - 1 end
redis.call('HSET', KEYS[2], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[2], math.ceil((burst - tokens) / rate * 1000) + 1000)
return {admitted and 1 or 0, math.floor(tokens), string.format('%.6f', (burst - tokens) / rate),
        string.format('%.6f', math.max(0, 1 - tokens) / rate)}
"""

# To revoke again changes nothing: the first time is when it ended.
_REVOKE: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSETNX', KEYS[1], 'revoked_at', ARGV[1])
return 1
"""


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request is taken, and what is left of its key's requests."""

    admitted: bool
    """Whether it is."""
    limit: int
    """Requests that may come at once; 0 is any number."""
    remaining: int
    """How many more may come now."""
    reset_s: float
    """Seconds until all of them may again."""
    retry_s: float
    """Seconds until the next one may."""


class KeyStore(RedisKeys):
    """API keys in the Redis that the jobs are in.

    Every method raises :class:`JobStoreUnavailableError` when Redis cannot be reached or refuses to work.
    """

    def __init__(self, url: str, namespace: str = "mergemill") -> None:
        super().__init__(connect(url, CONNECTION_TRIES), namespace)

    @guarded
    def create(self, key: ApiKey) -> None:
        """Keep a new key."""
        fields: dict[str, str | float] = {"record": key.model_dump_json(exclude={"revoked_at", "used_at"})}
        if "running_jobs" in key.limits:
            fields["running_jobs"] = int(key.limits["running_jobs"])
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._key("key", key.id), mapping=fields)  # type: ignore[arg-type]
            pipe.sadd(self._key("keys"), key.id)
            pipe.execute()

    @guarded
    def get(self, key: str) -> ApiKey | None:
        """The key of this id, also when it has ended; ``None`` when there is none."""
        record, *times = self._redis.hmget(self._key("key", key), "record", "revoked_at", "used_at")
        if record is None:
            return None
        revoked_at, used_at = (None if time is None else float(time) for time in times)
        found = ApiKey.model_validate_json(record)
        return found.model_copy(update={"revoked_at": revoked_at, "used_at": used_at})

    def list(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        found = (self.get(key) for key in self._ids())
        return sorted((key for key in found if key is not None), key=lambda key: (key.created_at, key.id))

    def any_usable(self, now: float) -> bool:
        """Whether anybody has a key that is good for something."""
        return any(key.ended(now) is None for key in self.list())

    @guarded
    def revoke(self, key: str, now: float) -> None:
        """End a key, for good.

        :raises KeyNotFoundError: there is none of this id.
        """
        if not self._run(_REVOKE, (self._key("key", key),), now):
            raise KeyNotFoundError(f"there is no key {key}")

    @guarded
    def admit(self, key: str, limits: Limits) -> Admission:
        """Count a request of a key whose secret was right, and take note that it was used."""
        rate = limits.requests_per_second
        burst = max(1, math.ceil(rate * BURST_S)) if rate else 0
        keys = (self._key("key", key), self._key("key", key, "rate"))
        admitted, remaining, reset, retry = self._run(_ADMIT, keys, rate, burst, USED_EVERY_S)
        return Admission(bool(admitted), burst, remaining, float(reset), float(retry))

    @guarded
    def _ids(self) -> set[str]:
        found: set[str] = self._redis.smembers(self._key("keys"))  # type: ignore[assignment]
        return found
