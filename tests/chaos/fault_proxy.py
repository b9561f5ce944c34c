"""A proxy before an S3 server over http that does to requests what a policy says, and counts it.

It understands as much of HTTP/1.1 as S3's clients and servers use: one request after the other on a connection, bodies
with a length, answers that may be chunked. The Host header is passed on as it was signed, so signatures hold. The
server gets a connection for each request: none of them is ever found closed by accident.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from tests.chaos.faults import OF_READS, OF_UPLOADS, Calm, Fault, Kind, Policy, Request, operation_of
from tests.chaos.listener import HEAD_BYTES, Listener, cut, finish, forward

_HOP_BY_HOP = {"connection", "keep-alive", "expect", "transfer-encoding", "content-length"}
_ERRORS = {
    Kind.INTERNAL_ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
    Kind.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Kind.EXPIRED_TOKEN: (403, "ExpiredToken", "The provided token has expired."),
}
_BODILESS = {204, 304}


@dataclass(frozen=True)
class _Head:
    """First line and headers of a request or an answer."""

    line: str
    headers: list[tuple[str, str]]

    def get(self, name: str, default: str = "") -> str:
        """The last header of this lower-case name."""
        return {key.lower(): value for key, value in self.headers}.get(name, default)

    def to_bytes(self, *more: tuple[str, object]) -> bytes:
        """As it is passed on: nothing that concerns one connection alone, and ``more`` in its place."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in _HOP_BY_HOP]
        lines = [self.line, *(f"{name}: {value}" for name, value in [*kept, *more])]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class FaultProxy(Listener):
    """A running proxy.

    :param upstream: URL of the server.
    :param policy: decides what goes wrong; :attr:`policy` may be set to another one at any time.
    :param journal: a file that gets a JSON line for each fault: ``time``, ``kind``, ``operation``, ``key``,
        ``number``.
    :param port: where it listens; 0 for any free port.
    """

    def __init__(
        self, upstream: str, policy: Policy | None = None, journal: Path | None = None, port: int = 0
    ) -> None:
        address = urlsplit(upstream)
        self._server_address = (str(address.hostname), address.port or 80)
        self.policy: Policy = policy or Calm()
        """Decides what goes wrong."""
        self.requests: Counter[str] = Counter()
        """Requests that came, by operation."""
        self.injected: Counter[Kind] = Counter()
        """Faults that happened, by kind: a body that is empty cannot end early, and then nothing is counted."""
        self.held: list[Request] = []
        """Requests that are held back, or were."""
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._released = asyncio.Event()
        self._journal = journal
        super().__init__(port)
        self.url = f"http://127.0.0.1:{self.port}"
        """Where it listens."""

    def release(self) -> None:
        """Drop what is held back: the server never sees it. What comes to be held later waits for another release."""

        def drop() -> None:
            self._released.set()
            self._released = asyncio.Event()

        self.soon(drop)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """See :meth:`Listener.serve`."""
        while head := await _read_head(reader):
            request = self._request(head, writer.get_extra_info("peername")[1])
            fault = self.policy.decide(request)
            length = int(head.get("content-length", "0"))
            if fault is not None and fault.kind in _ERRORS:
                await _take_in(head, reader, writer, length)
                self._note(request, fault)
                writer.write(_error_answer(fault, request))
                await writer.drain()
            elif not await self._pass_on(head, request, fault, reader, writer):
                return

    def _request(self, head: _Head, client: int) -> Request:
        method, target, _ = head.line.split(" ", 2)
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in head.headers}
        operation = operation_of(method, query)
        found = Request(0, 0, method, operation, parts.path, query, headers, client)
        number, nth = self.requests.total(), self._seen[found.identity]
        self.requests[operation] += 1
        self._seen[found.identity] += 1
        return Request(number, nth, method, operation, parts.path, query, headers, client)

    async def _pass_on(
        self,
        head: _Head,
        request: Request,
        fault: Fault | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Let the server answer; whether the client's connection may go on."""
        kind, length = fault.kind if fault else None, int(head.get("content-length", "0"))
        if fault is not None and kind not in OF_READS | OF_UPLOADS:
            self._note(request, fault)
        if kind == Kind.RESET:
            return False
        if kind == Kind.HOLD:
            self.held.append(request)
            await self._released.wait()
            return False
        if fault is not None and kind == Kind.DELAY:
            await asyncio.sleep(fault.seconds)
        if fault is not None and kind == Kind.ACT_LATE:
            body = await _take_in(head, reader, writer, length)
            cut(writer)
            await asyncio.sleep(fault.seconds)
            reader = asyncio.StreamReader()
            reader.feed_data(body)
        elif head.get("expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        back, forth = await asyncio.open_connection(*self._server_address, limit=HEAD_BYTES)
        try:
            sent: list[tuple[str, object]] = (
                [("Content-Length", length)] if head.get("content-length") else []
            )
            forth.write(head.to_bytes(*sent, ("Connection", "close")))
            of_upload = fault if kind in OF_UPLOADS else None
            if not await self._body(request, of_upload, reader, forth, length):
                return False
            answer = await _read_head(back)
            if answer is None or kind in {Kind.LOSE_ANSWER, Kind.ACT_LATE}:
                return False
            of_read = fault if kind in OF_READS else None
            return await self._answer(request, of_read, answer, back, writer)
        finally:
            cut(forth)

    async def _answer(
        self,
        request: Request,
        fault: Fault | None,
        answer: _Head,
        back: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        length = int(answer.get("content-length", "0"))
        if request.method == "HEAD" or int(answer.line.split(" ")[1]) in _BODILESS:
            sent = [("Content-Length", length)] if answer.get("content-length") else []
            writer.write(answer.to_bytes(*sent))
            length = 0
        elif "content-length" in {name.lower() for name, _ in answer.headers}:
            writer.write(answer.to_bytes(("Content-Length", length)))
        else:  # a listing or an error: small, and sent on whole
            body = await (
                _read_chunks(back) if answer.get("transfer-encoding").lower() == "chunked" else back.read()
            )
            length = len(body)
            writer.write(answer.to_bytes(("Content-Length", length)))
            back = asyncio.StreamReader()
            back.feed_data(body)
        if not await self._body(request, fault, back, writer, length):
            await finish(writer)
            return False
        await writer.drain()
        return True

    async def _body(
        self,
        request: Request,
        fault: Fault | None,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        length: int,
    ) -> bool:
        """Pass a body on, with what goes wrong half-way; whether it came through to its end."""
        done = 0
        if fault is not None and length:
            self._note(request, fault)
            done = min(int(length * fault.at), length - 1)
            await forward(source, sink, done)
            match fault.kind:
                case Kind.TRUNCATE | Kind.CUT_REQUEST:
                    return False
                case Kind.STALL:
                    await asyncio.sleep(fault.seconds)
                case _:
                    byte = await source.readexactly(1)
                    sink.write(bytes([byte[0] ^ 1 << fault.bit]))
                    done += 1
        await forward(source, sink, length - done)
        return True

    def _note(self, request: Request, fault: Fault) -> None:
        self.injected[fault.kind] += 1
        if self._journal is not None:
            noted = {"time": time.time(), "kind": fault.kind, "operation": request.operation}
            line = json.dumps(noted | {"key": request.key, "number": request.number})
            with self._journal.open("a") as journal:
                journal.write(line + "\n")


async def _read_head(reader: asyncio.StreamReader) -> _Head | None:
    """The next head; None when the connection has ended."""
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    line, *lines = text.rstrip("\r\n").split("\r\n")
    pairs = (each.partition(":") for each in lines)
    return _Head(line, [(name, value.strip()) for name, _, value in pairs])


async def _take_in(
    head: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int
) -> bytes:
    """The whole body of a request."""
    if head.get("expect").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return await reader.readexactly(length)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    while (await reader.readline()).strip():
        pass  # trailers
    return bytes(body)


def _error_answer(fault: Fault, request: Request) -> bytes:
    status, code, message = _ERRORS[fault.kind]
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    lines = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
    if fault.retry_after_s is not None:
        lines.append(f"Retry-After: {fault.retry_after_s}")
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if request.method == "HEAD" else body)
