"""A server on a free loopback port whose connections are served in a thread of their own: what both proxies are."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

Answer = TypeVar("Answer")

HEAD_BYTES = 1 << 18
"""Longest line or head that is read."""
PIECE_BYTES = 1 << 18
"""How much is read at a time."""
_PATIENCE_S = 30.0


class Listener(ABC):
    """Accepts until it is closed. Subclasses say what becomes of a connection; whatever they leave open is cut."""

    def __init__(self, port: int = 0) -> None:
        self.connections: set[asyncio.StreamWriter] = set()
        """Clients that are connected; for the thread that serves them."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="listener", daemon=True)
        self._thread.start()
        self._server = self._wait_for(asyncio.start_server(self._accept, "127.0.0.1", port, limit=HEAD_BYTES))
        self.port: int = self._server.sockets[0].getsockname()[1]
        """Where it listens on loopback."""

    @abstractmethod
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""

    def reset(self) -> int:
        """Cut every open connection hard; how many there were."""

        def cut_all() -> int:
            found = len(self.connections)
            for writer in self.connections:
                cut(writer)
            return found

        return self.soon(cut_all)

    def soon(self, call: Callable[[], Answer]) -> Answer:
        """What ``call`` returns in the thread that serves."""

        async def run() -> Answer:
            return call()

        return self._wait_for(run())

    def close(self) -> None:
        """Listen no more, and cut what is open."""
        if self._loop.is_closed():
            return
        self._wait_for(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(_PATIENCE_S)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            # Either side may go at any time: that is what proxies that cut connections are for
            with contextlib.suppress(OSError, EOFError):
                await self.serve(reader, writer)
        finally:
            self.connections.discard(writer)
            cut(writer)

    async def _shut(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what was cut is told so in the loop's next turn


def cut(writer: asyncio.StreamWriter) -> None:
    """Close a connection hard: the other side gets a reset. Nothing happens to one that is closed."""
    if not writer.is_closing():
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


async def finish(writer: asyncio.StreamWriter) -> None:
    """Send what is to be sent, and close a connection properly."""
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter, count: int) -> None:
    """Pass on ``count`` bytes.

    :raises EOFError: there are not as many.
    """
    while count:
        piece = await source.read(min(count, PIECE_BYTES))
        if not piece:
            raise EOFError
        sink.write(piece)
        await sink.drain()
        count -= len(piece)
