"""``Idempotency-Key``: read from a request, and told in its answer."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic_core import from_json

from api.bodies import Body, Wanted
from service.jobs.idempotency import MAX_KEY_CHARS, Once, once, read_key

REPLAYED = "Idempotent-Replayed"
"""Header of an answer that tells of an earlier request's job."""


async def key_of(
    request: Request,
    _: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description=f"Makes a retry safe: the same key and request again give the same job. Up to "
            f"{MAX_KEY_CHARS} visible ASCII characters, such as a UUID",
        ),
    ] = None,
) -> str | None:
    """The request's idempotency key, if it has one.

    :raises IdempotencyKeyError: it cannot be one.
    """
    return read_key(request.headers.getlist("Idempotency-Key"))


KeyDep = Annotated[str | None, Depends(key_of)]


def once_of(
    key: str | None, request: Request, body: Body, wanted: Wanted, ttl_s: float, owner: str = ""
) -> Once | None:
    """What is to be remembered of a request that can be accepted; nothing, when it has no key.

    :param owner: id of the caller's API key.
    """
    if key is None:
        return None
    # Data, not text; of YAML only the recipe as it was understood, since aliases may stand for more than can be written
    asked = wanted.recipe.to_json() if body.is_yaml and wanted.recipe is not None else from_json(body.data)
    query = request.query_params.multi_items()
    return once(key, request.method, request.url.path, query, asked, ttl_s, owner)
