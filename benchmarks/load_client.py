"""As little of an HTTP client as it takes: what many of them use is not to count as what the service uses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Self

JSON = dict[str, Any]


class Connection:
    """One connection to a service on loopback, used again and again."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()
            with suppress(ConnectionError):
                await self._writer.wait_closed()

    async def ask(self, method: str, path: str, body: JSON | None = None) -> JSON:
        """The JSON of an answer.

        :raises RuntimeError: its status is not 2xx.
        """
        status, headers = await self._send(method, path, body)
        assert self._reader is not None  # noqa: S101 - it was just used
        text = await self._reader.readexactly(int(headers["content-length"]))
        if not 200 <= status < 300:
            raise RuntimeError(f"{method} {path}: {status} {text.decode()}")
        found: JSON = json.loads(text)
        return found

    async def events(self, path: str) -> AsyncIterator[JSON]:
        """The data of the server-sent events of a stream, until the server ends it."""
        status, headers = await self._send("GET", path, None)
        if status != 200 or headers.get("transfer-encoding") != "chunked":
            raise RuntimeError(f"GET {path}: {status}")
        assert self._reader is not None  # noqa: S101 - it was just used
        held = b""
        while length := int(await self._reader.readline(), 16):
            held += await self._reader.readexactly(length)
            await self._reader.readline()
            *whole, held = held.split(b"\n\n")
            for block in whole:
                for line in block.split(b"\n"):
                    if line.startswith(b"data: "):
                        yield json.loads(line.removeprefix(b"data: "))
        await self._reader.readline()

    async def _send(self, method: str, path: str, body: JSON | None) -> tuple[int, Mapping[str, str]]:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "Host: load", f"Authorization: Bearer {self._token}"]
        head += [f"Content-Length: {len(content)}", "Content-Type: application/json"] if content else []
        self._writer.write("\r\n".join((*head, "", "")).encode() + content)
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value for name, _, value in pairs}
