"""Waking streams: no event falls between a stream's first look and the feed's first read."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from api.streams import Streams
from service.jobs.eventlog import EventLog, Look
from service.jobs.events import JobEvent
from service.jobs.progress import Progress
from service.jobs.record import JobState
from workers.errors import JobStoreUnavailableError

pytestmark = pytest.mark.fast


class Log:
    """A log in which something happens just when the feed's end is asked for."""

    def __init__(self, failures: int = 0) -> None:
        self.events: list[JobEvent] = []
        self.failures = failures

    async def look(self, job: str, after: str | None) -> Look:
        events = tuple(event for event in self.events if after is None or event.id > after)
        return Look(events, events[-1].state if events else JobState.RUNNING)

    async def newest(self) -> str:
        await asyncio.sleep(0.01)
        if self.failures:
            self.failures -= 1
            raise JobStoreUnavailableError("gone")
        self.events.append(JobEvent("1-0", "job", "succeeded", JobState.SUCCEEDED, 2, 0.0, "", Progress()))
        return "1-0"

    async def news(self, after: str) -> tuple[str, frozenset[str]]:
        await asyncio.sleep(0.01)
        return after, frozenset()


@pytest.mark.parametrize("failures", [0, 2])
def test_what_happens_while_the_feed_is_opened_is_found(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.streams.PAUSE_S", 0.01)

    async def follow() -> list[bytes]:
        log = Log(failures)
        streams = Streams(cast(EventLog, log))
        runner = asyncio.create_task(streams.run())
        try:
            look = await streams.look("job", None)
            async with asyncio.timeout(5):
                return [chunk async for chunk in streams.follow("job", look, None, None)]
        finally:
            runner.cancel()

    chunks = asyncio.run(follow())
    assert b"event: succeeded" in chunks[-1]
    assert len(chunks) == 2
