"""Server-sent events: any number of streams of a process, woken by one read of the deployment's feed.

Format: the WHATWG HTML standard, 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import structlog

from service.jobs.eventlog import EventLog, Look
from service.jobs.events import JobEvent
from workers.errors import JobNotFoundError, JobStoreUnavailableError

HEARTBEAT_S = 15.0
"""Longest silence of a stream, in seconds: proxies close connections that are silent for longer."""

RETRY_MS = 1000
"""How long a browser is told to wait before it connects again, in milliseconds."""

RECHECK_S = 5.0
"""How often it is looked whether the key that a stream was asked for with is still good, in seconds."""

PAUSE_S = 1.0
"""Pause before the feed is read again after Redis could not be reached, in seconds."""

log = structlog.get_logger(__name__)


class Streams:
    """The event streams that this process serves. Belongs to one event loop."""

    def __init__(self, events: EventLog, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.ending = False
        """Whether the server shuts down: streams end then, and clients go on elsewhere."""
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._woken: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._wanted = asyncio.Event()

    async def run(self) -> None:
        """Wake streams whose jobs have news, for as long as there are any streams."""
        while True:
            await self._wanted.wait()
            try:
                last = await self._events.newest()
                self._wake(*self._woken)  # what came before that position is theirs to find
                while self._woken:
                    last, jobs = await self._events.news(last)
                    self._wake(*jobs)
            except JobStoreUnavailableError as error:
                log.warning("events are out of reach", error=str(error))
                await asyncio.sleep(PAUSE_S)
                continue
            self._wanted.clear()

    def end(self) -> None:
        """Have every stream end now."""
        self.ending = True
        self._wake(*self._woken)

    async def look(self, job: str, after: str | None) -> Look:
        """A first look at the events after the one with the id ``after``.

        :raises JobNotFoundError: there is no such job.
        :raises JobStoreUnavailableError: Redis cannot be reached.
        """
        return await self._events.look(job, after)

    async def follow(
        self,
        job: str,
        look: Look,
        after: str | None,
        ended: JobEvent | None,
        may: Callable[[], Awaitable[bool]] | None = None,
    ) -> AsyncIterator[bytes]:
        """The stream of a job, until it has ended, or the server does.

        :param look: the first look at the events after the one with the id ``after``.
        :param ended: what to send of a job that has ended, when its stream does not tell how.
        :param may: whether its reader may still know of the job; asked now and then.
        """
        yield f"retry: {RETRY_MS}\n\n".encode()
        clock = asyncio.get_running_loop().time
        checked = heard = clock()
        with self._listening(job) as woken:
            while not self.ending:
                if may is not None and clock() - checked >= RECHECK_S:
                    if not await may():
                        log.info("an event stream ends: its key is good no more", job=job)
                        return
                    checked = clock()
                for event in look.events:
                    yield encode(event)
                    heard = clock()
                    if event.state.is_terminal:
                        return
                    after = event.id
                if not look.events:
                    if look.state.is_terminal:
                        if ended is not None:
                            yield encode(ended)
                        return
                    try:
                        silent = self._heartbeat_s - (clock() - heard)
                        await asyncio.wait_for(woken.wait(), min(silent, RECHECK_S))
                    except TimeoutError:
                        if clock() - heard < self._heartbeat_s:
                            continue
                        yield b":\n\n"
                        heard = clock()
                woken.clear()
                try:
                    look = await self._events.look(job, after)
                except (JobNotFoundError, JobStoreUnavailableError) as error:
                    log.info("an event stream breaks off", job=job, reason=str(error))
                    return

    @contextmanager
    def _listening(self, job: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        woken.set()  # there may have been news since the first look
        self._woken[job].add(woken)
        self._wanted.set()
        try:
            yield woken
        finally:
            self._woken[job].discard(woken)
            if not self._woken[job]:
                del self._woken[job]

    def _wake(self, *jobs: str) -> None:
        for job in jobs:
            for woken in self._woken.get(job, ()):
                woken.set()


@asynccontextmanager
async def streaming(redis_url: str, namespace: str) -> AsyncIterator[Streams]:
    """The streams of a deployment, for as long as the block lasts."""
    events = EventLog(redis_url, namespace)
    streams = Streams(events)
    runner = asyncio.create_task(streams.run(), name="event streams")
    try:
        yield streams
    finally:
        streams.end()
        runner.cancel()
        await asyncio.wait([runner])
        await events.close()


def encode(event: JobEvent) -> bytes:
    """An event on the wire."""
    id_line = f"id: {event.id}\n" if event.id else ""
    return f"{id_line}event: {event.event}\ndata: {json.dumps(event.to_json())}\n\n".encode()
