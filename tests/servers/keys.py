"""API keys for tests, and how a request carries one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from service.keys import EVERYWHERE, Limits, Scope, new_key
from service.keystore import KeyStore

UNLIMITED: dict[str, float] = dict.fromkeys(Limits.model_fields, 0)
"""The limits of a key that may do as much as it likes."""


def make_key(
    redis_url: str,
    namespace: str,
    scopes: Iterable[str] = ("admin",),
    inputs: Iterable[str] = (EVERYWHERE,),
    outputs: Iterable[str] = (EVERYWHERE,),
    **more: Any,
) -> str:
    """The token of a new key; an admin's without limits, unless told otherwise."""
    chosen = {"limits": UNLIMITED, **more}
    key, token = new_key("a test", map(Scope, scopes), time.time(), inputs=inputs, outputs=outputs, **chosen)
    with KeyStore(redis_url, namespace) as keys:
        keys.create(key)
    return token


def bearer(token: str | None) -> dict[str, str]:
    """The headers of a request that comes with a key."""
    return {"Authorization": f"Bearer {token}"}
