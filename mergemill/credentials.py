"""The API key that a client asks with, and where it may go."""

from __future__ import annotations

from collections.abc import Generator

import httpx

from workers.errors import MergemillError


class BearerAuth(httpx.Auth):
    """Sends an API key to one service, and to nobody that it refers to: a presigned URL is the store's.

    :param url: the service's address.
    :param api_key: the key; nothing is sent without one.
    :raises MergemillError: it cannot be a key.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._origin = _origin(httpx.URL(url))
        key = (api_key or "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise MergemillError("the API key (MERGEMILL_API_KEY) is none: it looks like mm_<id>_<secret>")
        self._header = f"Bearer {key}" if key else None

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """See :meth:`httpx.Auth.auth_flow`; httpx itself drops the header when it is redirected elsewhere."""
        if self._header is not None and _origin(request.url) == self._origin:
            request.headers["Authorization"] = self._header
        yield request


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
