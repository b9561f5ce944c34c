"""Files of a directory on the wire, from open descriptors: what was allowed is what is sent."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from service.access import check_place
from service.keys import Access
from workers.store.local import LocalStore
from workers.store.uris import name


class OpenFileResponse(FileResponse):
    """A file that is open already, with Range support; closed once it is sent."""

    def __init__(self, fd: int, closing: ExitStack, filename: str) -> None:
        super().__init__(f"/proc/self/fd/{fd}", filename=filename, media_type="application/octet-stream")
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._closing:
            await super().__call__(scope, receive, send)


def served(store: LocalStore, uri: str, access: Access | None = None) -> OpenFileResponse:
    """The object as a response.

    :param access: where the job that wrote it may write; ``None`` is everywhere.
    :raises StoreError: it is not there, or not where the service may look.
    :raises ForbiddenError: a link leads out of where the job may write.
    """
    with ExitStack() as opened:
        fd = opened.enter_context(store.opened(uri))
        check_place(fd, uri, access)
        return OpenFileResponse(fd, opened.pop_all(), name(uri))
