"""How everything that keeps state in Redis connects to it, and what its failures become."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from workers.errors import JobStoreUnavailableError

TIMEOUT_S: Final = 5.0
"""Longest wait for a connection or an answer, in seconds."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def connect(url: str, tries: int, timeout_s: float = TIMEOUT_S) -> redis.Redis:
    """A client of the Redis at ``url``; safe to share between threads.

    :param tries: how often a broken connection is tried again, with backoff.
    :param timeout_s: longest wait for a connection or an answer.
    """
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        protocol=2,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), tries),
    )


def guarded(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn what redis raises after its last retry into :class:`JobStoreUnavailableError`."""

    @wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except redis.RedisError as error:
            raise JobStoreUnavailableError(f"job store: {type(error).__name__}: {error}") from error

    return call
