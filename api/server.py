"""The HTTP server: uvicorn, but that event streams end when it does."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """uvicorn waits for every answer to be whole before it ends: streams that have no end are told to have one."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, and then everything."""
        app: Any = self.config.app
        streams = getattr(getattr(app, "state", None), "streams", None)
        if streams is not None:
            streams.end()
        await super().shutdown(sockets)
