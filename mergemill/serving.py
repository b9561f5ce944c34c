"""The API as a process: what ``mergemill serve`` runs."""

from __future__ import annotations

import socket

import uvicorn

from api import app
from api.server import Server
from mergemill.exposure import check_exposure
from service.settings import Settings


def run_api(settings: Settings, fd: int | None = None) -> bool:
    """Serve until a signal ends it; whether it came up.

    :param fd: a listening socket to accept on, in place of the settings' address.
    :raises ExposedError: others than this machine reach it, and it asks for no key, or nobody has one.
    """
    listener = None if fd is None else socket.socket(fileno=fd)
    check_exposure(settings.host if listener is None else listener.getsockname()[0], settings)
    config = uvicorn.Config(
        app.create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # each request is logged with its id
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = Server(config)
    server.run(None if listener is None else [listener])
    return bool(server.started)
