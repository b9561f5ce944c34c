"""The load benchmark: what counts as out of turn, as late and as lost; and a client that reads what a server sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import Seen, report, result_of
from benchmarks.load_client import Connection
from benchmarks.load_report import (
    BEGIN,
    END,
    Order,
    Queued,
    order_of,
    quantile,
    table,
    whole,
    write_between_marks,
)

pytestmark = pytest.mark.fast

QUEUE = [
    Queued("1", "ann", 0),
    Queued("2", "bob", 0),
    Queued("3", "ann", 0),
    Queued("4", "ann", 10),
    Queued("5", "bob", 0),
    Queued("6", "ann", -10),
    Queued("7", "ann", 0),
]


@pytest.mark.parametrize(
    ("claims", "order"),
    [
        ("4123576", Order(0, 0, 1)),
        ("4132576", Order(0, 0, 2)),
        ("1432576", Order(1, 0, 1)),
        ("641235", Order(1, 0, 1)),
        ("432176", Order(1, 1, 1)),
        ("4137256", Order(0, 0, 2)),
        ("4126", Order(1, 0, 1)),
        ("41233576", Order(0, 0, 1)),
        ("", Order(0, 0, 0)),
    ],
)
def test_the_order_of_a_queue(claims: str, order: Order) -> None:
    assert order_of(QUEUE, list(claims)) == order


def test_quantiles() -> None:
    times = [number / 100 for number in range(1, 101)]
    assert [quantile(times, share) for share in (0.5, 0.99, 1.0)] == [0.5, 0.99, 1.0]
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert (quantile([7.0], 0.99), quantile([], 0.5)) == (7.0, 0.0)


@pytest.mark.parametrize(
    ("versions", "expected"),
    [([1, 2, 3], True), ([1, 2, 2, 3, 3], True), ([1, 3], False), ([2, 3], False), ([1, 2, 1], True)],
)
def test_streams_without_gaps(versions: Sequence[int], expected: bool) -> None:
    assert whole(versions) == expected


def test_what_is_lost_is_a_problem() -> None:
    seen = Seen(jobs=QUEUE[:3], ends=["succeeded"] * 3, events=9)
    fine = result_of(seen, ["1", "2", "3"], 3)
    assert (fine["problems"], fine["jobs"], fine["succeeded"]) == ([], 3, 3)
    seen.ends[1] = "failed"
    seen.gaps = 2
    assert result_of(seen, ["3", "1", "3"], 3)["problems"] == [
        "1 jobs were lost or failed",
        "1 jobs were never begun",
        "1 jobs were begun again",
        "1 jobs were begun before an older one of their key",
        "2 streams of events had gaps",
    ]


def test_the_report(tmp_path: Path) -> None:
    seen = Seen(jobs=QUEUE[:1], ends=["succeeded"], events=3)
    for seconds in (0.001, 0.002, 0.003):
        seen.took("filling", "submit", seconds)
    found: dict[str, Any] = result_of(seen, ["1"], 1) | {
        "apis": 1, "fill_s": 1.0, "drain_s": 3.0, "cpu_s": {"api": 2.0}, "seconds": seen.times, "load": 0.1,
        "machine": {"processor": "2 cores", "memory": "8 GiB", "disk": "ext4"}, "versions": {"ray": "2"},
    }  # fmt: skip
    lines = list(report(found, "3 clients"))
    assert "| filling | submit | 3 | 2.0 | 3.0 | 3.0 |" in lines
    assert "| api | 2.0 | 50 % |" in lines
    assert "Nothing was lost, and every job was begun in its turn." in lines
    assert list(table({"filling": {"submit": []}}))[2:] == []
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{BEGIN}\nold\n{END}\nrest\n")
    write_between_marks(page, "new\n")
    assert page.read_text() == f"# Page\n{BEGIN}\nnew\n{END}\nrest\n"


def test_the_page_has_marks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "load.md").read_text()
    assert page.index(BEGIN) < page.index(END)


def test_the_client_reads_json_and_streams_in_any_pieces() -> None:
    events = [{"version": number, "text": "x" * 40} for number in range(3)]
    text = b"retry: 1000\n\n" + b"".join(b"id: 1-0\ndata: %s\n\n" % json.dumps(e).encode() for e in events)
    asked: list[str] = []
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            asked.append(head.decode().strip())
            while (line := await reader.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length: "):
                    length = int(line.split()[1])
            if b"POST" in head:
                body = await reader.readexactly(length)
                writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                continue
            if b"missing" in head:
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}")
                continue
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(text), 17):
                writer.write(b"%x\r\n%s\r\n" % (len(text[at : at + 17]), text[at : at + 17]))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        left.set()

    async def use() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            async with Connection(server.sockets[0].getsockname()[1], "token") as client:
                assert await client.ask("POST", "/a", {"b": 1}) == {"b": 1}
                assert [event async for event in client.events("/events")] == events
                assert await client.ask("POST", "/c", {"d": 2}) == {"d": 2}
                with pytest.raises(RuntimeError, match="404"):
                    await client.ask("GET", "/missing")
            await left.wait()

    asyncio.run(use())
    assert asked[0] == "POST /a HTTP/1.1"
