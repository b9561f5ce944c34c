"""Connections to Redis, alike for everything that keeps something there, and its errors as ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from workers.errors import JobStoreUnavailableError

TIMEOUT_S: Final = 5.0
"""Longest wait for a connection or an answer, in seconds."""

CONNECTION_TRIES: Final = 8
"""How often a broken connection is tried again, with backoff: about four seconds when refused at once."""

_S = TypeVar("_S")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def connect(url: str, tries: int = CONNECTION_TRIES) -> redis.Redis:
    """A pool of connections for threads; what breaks is tried again, though Redis may have acted already."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        protocol=2,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), tries),
    )


def guarded(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Turn what redis raises after its last retry into our own error."""

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except redis.RedisError as error:
            raise JobStoreUnavailableError(f"job store: {type(error).__name__}: {error}") from error

    return call
