"""A proxy before any TCP server, such as Redis: it cuts connections, lets no byte pass, or loses answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from tests.chaos.listener import PIECE_BYTES, Listener, cut

Loses = Callable[[bytes, bytes], bool]
"""Whether this answer to that request is lost; asked with the first bytes that come after a request."""


class TcpProxy(Listener):
    """A TCP proxy; :meth:`reset` cuts what is open, and a lost answer cuts the connection in its place.

    :param port: where it listens; 0 for any free port.
    """

    def __init__(
        self, host: str, server_port: int, loses: Loses = lambda _, __: False, port: int = 0
    ) -> None:
        self._server_address = (host, server_port)
        self._loses = loses
        self._flows = asyncio.Event()
        self._flows.set()
        self.injected: Counter[str] = Counter()
        """What was done: ``reset`` (by connection), ``stall``, ``lose_answer``."""
        super().__init__(port)

    def reset(self) -> int:
        """See :meth:`Listener.reset`."""
        found = super().reset()
        self.injected["reset"] += found
        return found

    def partition(self) -> None:
        """Let nothing pass from now on, either way; connections are still taken, and nobody answers."""
        self.injected["stall"] += 1
        self.soon(self._flows.clear)

    def heal(self) -> None:
        """Let pass what waited, and all that comes."""
        self.soon(self._flows.set)

    def stall(self, seconds: float) -> None:
        """A partition that heals by itself; returns at once."""
        self.partition()
        self.soon(lambda: self._loop.call_later(seconds, self._flows.set))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """See :meth:`Listener.serve`."""
        await self._flows.wait()
        back, forth = await asyncio.open_connection(*self._server_address)
        asked = bytearray()

        async def upwards() -> None:
            while piece := await reader.read(PIECE_BYTES):
                await self._flows.wait()
                asked[:] = piece
                forth.write(piece)
                await forth.drain()

        async def downwards() -> None:
            while piece := await back.read(PIECE_BYTES):
                await self._flows.wait()
                request = bytes(asked)
                asked.clear()
                if request and self._loses(request, piece):
                    self.injected["lose_answer"] += 1
                    return
                writer.write(piece)
                await writer.drain()

        pumps = [asyncio.ensure_future(upwards()), asyncio.ensure_future(downwards())]
        try:
            await asyncio.wait(pumps, return_when="FIRST_COMPLETED")
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            cut(forth)
