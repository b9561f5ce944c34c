"""A job's events as they come (server-sent events), and where to go on when they break off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self

import httpx

from mergemill.jobs import TERMINAL_STATES, Job
from service.jobs.progress import Progress
from workers.errors import MergemillError

SILENCE_S = 45.0
"""Longest silence of a stream that is alive, in seconds: the service says something every 15."""

EVENT_STREAM = "text/event-stream"
PROGRESS = "progress"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a job."""

    id: str
    """Where in the job's stream it is."""
    job: str
    """Id of the job."""
    event: str
    """`progress`, `warning`, `succeeded`, `failed`, `cancelled`, or what else the job's history says."""
    state: str
    """The job's state after it."""
    version: int
    """Version of the job's record after it."""
    at: datetime
    """When."""
    detail: str
    """A few words."""
    progress: Progress
    """How far the job was then."""
    body: Mapping[str, Any] = field(repr=False)
    """All that the service said."""

    @classmethod
    def from_json(cls, id: str, body: Mapping[str, Any]) -> Self:  # noqa: A002 - what the wire calls it
        """Read what the service says."""
        return cls(
            id=id,
            job=body["job"],
            event=body["event"],
            state=body["state"],
            version=int(body["version"]),
            at=datetime.fromisoformat(body["at"]),
            detail=body["detail"],
            progress=Progress.from_json(body["progress"]),
            body=body,
        )

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended by it."""
        return self.state in TERMINAL_STATES

    def shown_by(self, job: Job) -> Job:
        """The job as this progress event says."""
        return replace(job, progress=self.progress, body={**job.body, "progress": self.body["progress"]})


class NoStreamError(MergemillError):
    """The service, or something before it, does not tell events."""


def messages(lines: Iterable[str]) -> Iterator[tuple[str, str] | None]:
    """Id and data of each event in the lines of a stream; ``None`` for a line that only shows that it is alive."""
    last = ""
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            last = value
        elif name == "data":
            data.append(value)
        elif not line and data:
            yield last, "\n".join(data)
            data.clear()
        elif line.startswith(":"):
            yield None


def stream(
    http: httpx.Client, path: str, after: str | None, silence_s: float = SILENCE_S
) -> Generator[Event | None]:
    """The events of one connection; ``None`` for each sign of life between them.

    :param after: id of the last event that came.
    :param silence_s: longest wait for the next sign of life, in seconds.
    :raises NoStreamError: what is there is no stream.
    :raises httpx.HTTPError: there is no connection, or it broke.
    :raises httpx.HTTPStatusError: the service refuses.
    """
    headers = {"Accept": EVENT_STREAM} | ({} if after is None else {"Last-Event-ID": after})
    usual = http.timeout
    timeout = httpx.Timeout(connect=usual.connect, read=silence_s, write=usual.write, pool=usual.pool)
    with http.stream("GET", path, headers=headers, timeout=timeout) as response:
        if response.status_code == httpx.codes.NO_CONTENT:
            return
        if response.status_code != httpx.codes.OK:
            response.read()
            response.raise_for_status()
        if response.headers.get("Content-Type", "").partition(";")[0].strip() != EVENT_STREAM:
            raise NoStreamError(f"{response.request.url} is no stream of events")
        for message in messages(response.iter_lines()):
            yield None if message is None else Event.from_json(message[0], json.loads(message[1]))


class Follower:
    """Waits for news of one job by its stream, where there is one. Not thread safe."""

    def __init__(self, http: httpx.Client, path: str) -> None:
        self._http = http
        self._path = path
        self._after: str | None = None
        self._stream: Generator[Event | None] | None = None
        self._silence_s = 0.0
        self._useful = True

    def close(self) -> None:
        """Leave the stream, and go on after its last event when listening again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def listen(self, job: Job, on_progress: Callable[[Job], None] | None, timeout_s: float | None) -> bool:
        """Wait until there is reason to look at the job again; whether that was worth it.

        ``False``: there is no stream, or it broke off, so a pause is in order before the next look.

        :param job: the latest look at it.
        :param on_progress: called with the job as its progress events say.
        :param timeout_s: longest wait, in seconds.
        """
        if not self._useful:
            return False
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            return self._listen(job, on_progress, deadline)
        except (NoStreamError, httpx.HTTPStatusError) as error:
            broken = isinstance(error, httpx.HTTPStatusError) and is_passing(error.response)
            self._useful = (
                broken  # a service of before there were events, or a proxy that does not let them through
            )
        except (httpx.HTTPError, ValueError, KeyError):
            pass  # whatever it was: polling goes on, and the next try begins after the last event that came
        self.close()
        return False

    def _listen(self, job: Job, on_progress: Callable[[Job], None] | None, deadline: float | None) -> bool:
        left = SILENCE_S if deadline is None else deadline - time.monotonic()
        if self._stream is None or left < self._silence_s:
            self.close()
            self._silence_s = min(SILENCE_S, max(left, 0.001))
            self._stream = stream(self._http, self._path, self._after, self._silence_s)
        for event in self._stream:
            if event is not None:
                self._after = event.id or self._after
                if event.event != PROGRESS and event.version > job.version:
                    return True
                if event.event == PROGRESS and _is_further(event, job):
                    job = event.shown_by(job)
                    if on_progress is not None:
                        on_progress(job)
            if deadline is not None and deadline - time.monotonic() < self._silence_s:
                return True
        self.close()
        return False


def is_passing(response: httpx.Response) -> bool:
    """Whether a refusal may be over soon: the service fails, or is asked too often."""
    return response.is_server_error or response.status_code == httpx.codes.TOO_MANY_REQUESTS


def _is_further(event: Event, job: Job) -> bool:
    """Whether a progress event is news: of this plan, and not of before the look."""
    now, then = event.progress, job.progress
    done = now.parts_done + now.surveys_done > then.parts_done + then.surveys_done
    return event.version >= job.version and done
