"""The API as a process: what ``mergemill serve`` runs."""

from __future__ import annotations

import socket

import uvicorn

from api.app import create_app
from service.settings import Settings


def run_api(settings: Settings, fd: int | None = None) -> bool:
    """Serve until a signal ends it; whether it came up.

    :param fd: a listening socket to accept on, in place of the settings' address.
    """
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # each request is logged with its id
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)
    server.run(None if fd is None else [socket.socket(fileno=fd)])
    return bool(server.started)
