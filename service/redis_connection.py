"""Connections to Redis, for everything that keeps something there: its keys, its scripts, and its errors as ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from workers.errors import JobStoreUnavailableError

TIMEOUT_S: Final = 5.0
"""Longest wait for a connection or an answer, in seconds."""

CONNECTION_TRIES: Final = 8
"""How often a broken connection is tried again, with backoff: about four seconds when refused at once."""

OLDEST_REDIS: Final = (7, 0)
"""The oldest version of Redis that is supported."""

_S = TypeVar("_S")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class RedisKeys:
    """A connection, and the namespace that its keys are in. A context manager that closes the connection."""

    def __init__(self, connection: redis.Redis, namespace: str) -> None:
        self._redis = connection
        self._namespace = namespace

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _key(self, *names: str) -> str:
        return ":".join((self._namespace, *names))

    def _run(self, script: str, keys: tuple[str, ...], *arguments: str | float) -> Any:
        return self._redis.register_script(script)(keys=list(keys), args=list(arguments))


def connect(url: str, tries: int = CONNECTION_TRIES, timeout_s: float = TIMEOUT_S) -> redis.Redis:
    """A pool of connections for threads; what breaks is tried again, though Redis may have acted already.

    :param tries: how often a broken connection is tried again, with backoff.
    :param timeout_s: longest wait for a connection or an answer.
    """
    return redis.Redis.from_url(url, retry=Retry(_backoff(), tries), **_options(timeout_s))


def connect_async(
    url: str, tries: int = CONNECTION_TRIES, max_connections: int | None = None
) -> redis.asyncio.Redis:
    """The same for an event loop; whoever comes when ``max_connections`` are in use waits for one."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        retry=AsyncRetry(_backoff(), tries),
        max_connections=max_connections or 2**31,
        timeout=None,
        **_options(),
    )
    return redis.asyncio.Redis.from_pool(pool)


def guarded(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Turn what redis raises after its last retry into our own error."""

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except redis.RedisError as error:
            raise unavailable(error) from error

    return call


def unavailable(error: redis.RedisError) -> JobStoreUnavailableError:
    """Our own error for one of redis's."""
    return JobStoreUnavailableError(f"job store: {type(error).__name__}: {error}")


def durability_warnings(client: redis.Redis) -> tuple[str, ...]:
    """A sentence for each setting of this Redis that could lose what it has acknowledged."""
    version = str(client.info("server").get("redis_version", "0.0"))
    warnings = []
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_REDIS:
        warnings.append(f"Redis {version} is older than {'.'.join(map(str, OLDEST_REDIS))}")
    wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    try:
        found: Any = client.config_get(*wanted)
    except redis.ResponseError as error:  # managed services forbid or rename CONFIG
        settings = ", ".join(f"{name} {value}" for name, value in wanted.items())
        return (*warnings, f"Redis does not tell how durable it is ({error}); check {settings}")
    wrong = {name: found[name] for name in wanted if name in found and found[name] != wanted[name]}
    warnings.extend(f"Redis has {name} {value}, not {wanted[name]}" for name, value in wrong.items())
    return tuple(warnings)


def _options(timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    return {
        "decode_responses": True,
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 15,
    }


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(cap=1.0, base=0.05)
