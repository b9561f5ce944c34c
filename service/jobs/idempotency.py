"""Idempotency keys: the same request twice makes one job. Pure.

As draft-ietf-httpapi-idempotency-key-header has it, with keys quoted (the draft) or bare (Stripe). A key is
recorded in the step that creates the job: there is no time at which one exists without the other, and so no
request "in progress" that a second one could meet. Of two at the same instant one creates, and the other is told.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.errors import IdempotencyKeyError
from workers.task import JSONValue

MAX_KEY_CHARS = 255
"""Longest idempotency key."""

_BARE = re.compile(r"[!-~]+")  # visible ASCII
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')  # a string of RFC 8941, 3.3.3


@dataclass(frozen=True, slots=True)
class Once:
    """What makes a request the same as an earlier one."""

    key: str
    """SHA-256 of the caller and the key that it chose."""
    fingerprint: str
    """SHA-256 of all that was asked for."""
    ttl_s: float
    """How long it is remembered, in seconds."""


def read_key(headers: Sequence[str]) -> str | None:
    """The key that the request's ``Idempotency-Key`` headers give, if there is one.

    :raises IdempotencyKeyError: there are several, or it is empty, too long, or not of visible ASCII.
    """
    if not headers:
        return None
    if len(headers) > 1:
        raise IdempotencyKeyError("there are several Idempotency-Key headers: send one")
    text = headers[0].strip(" \t")
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not _BARE.fullmatch(key):
        raise IdempotencyKeyError(
            "the Idempotency-Key is not made of visible ASCII characters: a UUID will do"
        )
    if len(key) > MAX_KEY_CHARS:
        raise IdempotencyKeyError(f"the Idempotency-Key is longer than {MAX_KEY_CHARS} characters")
    return key


def once(
    key: str,
    method: str,
    path: str,
    query: Iterable[tuple[str, str]],
    body: JSONValue,
    ttl_s: float,
    owner: str = "",
) -> Once:
    """What to remember of a request; neither the order of keys in a body nor that of a query is part of it.

    :param owner: id of the caller's API key: the keys that two callers choose have nothing to do with each other.
    """
    asked = [method, path, sorted(map(list, query)), body, owner]
    return Once(_digest([owner, key]), _digest(asked), ttl_s)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
