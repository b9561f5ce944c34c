"""Those who are told of jobs, as followers of their events and by webhooks, and what they must have heard."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from mergemill.events import Event, stream
from tests.servers.receiver import Received, Receiver

SECRET: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DELIVERED_WITHIN_S: Final = 90.0
"""How long the last delivery may take: one that its courier died with is made again after half a minute."""

_BREAKS_OFF_AFTER: Final = 8
"""Events after which a follower leaves of its own accord, and comes again."""


@dataclass
class Follower:
    """Follows the events of one job, whatever breaks off; from the last one on that came."""

    job: str
    """The job's id."""
    heard: list[Event] = field(default_factory=list)
    """What came, in order."""
    is_void: bool = False
    """Whether the job was lost on the way."""
    again: int = 0
    """How often it came again with a ``Last-Event-ID``."""

    def follow(self, http: httpx.Client, over: threading.Event) -> None:
        """Follow until the job has ended, or all is over."""
        while not (self.is_void or over.is_set() or (self.heard and self.heard[-1].is_terminal)):
            after = self.heard[-1].id if self.heard else None
            self.again += after is not None
            try:
                self._listen(http, after)
            except httpx.HTTPError:  # it was killed, refuses for the moment, or cannot know the job yet
                over.wait(0.1)

    def _listen(self, http: httpx.Client, after: str | None) -> None:
        came = 0
        for event in stream(http, f"/v1/merges/{self.job}/events", after):
            if event is not None:
                self.heard.append(event)
                came += 1
            if came == _BREAKS_OFF_AFTER:
                return


def events(name: str, heard: Sequence[tuple[str, str]], written: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Whoever followed a job heard each event once, in order, and no other.

    :param heard: id and name of what came.
    :param written: the same of what there is.
    """
    twice = [each for each, count in Counter(heard).items() if count > 1]
    if twice:
        yield f"{name}: heard twice of {twice}"
    if lost := [each for each in written if each not in heard]:
        yield f"{name}: never heard of {lost}"
    if more := [each for each in heard if each not in written]:
        yield f"{name}: heard of {more}, which never were"
    if not (twice or lost or more) and list(heard) != list(written):
        yield f"{name}: heard out of order"


def deliveries(states: Mapping[str, str], received: Sequence[Received], refused: int) -> Iterator[str]:
    """Every final state was told at least once, nothing else, and all of it signed.

    :param states: the final state of each job that had asked to be told, by id.
    :param refused: how many of the first requests were refused: they have to come again.
    """
    told: dict[str, set[str]] = {job: set() for job in states}
    for each in received:
        try:
            body = Verifier(SECRET).verify(each.body, each.headers)
        except WebhookVerificationError as error:
            yield f"a webhook came whose signature is wrong: {error}"
            continue
        job = body["data"]["job"]
        if job in told:
            told[job].add(body["type"])
    for job, types in told.items():
        if types != {f"merge.{states[job]}"}:
            yield f"{job} is {states[job]}, and its webhook was told {sorted(types) or 'nothing'}"
    ids = [each.headers["webhook-id"] for each in received]
    yield from (
        f"{own} was refused and did not come again" for own in ids[:refused] if own not in ids[refused:]
    )


def wait_for_deliveries(states: Mapping[str, str], receiver: Receiver, refused: int) -> list[str]:
    """What is wrong with the deliveries, when they have had the time to come."""
    deadline = time.monotonic() + DELIVERED_WITHIN_S
    while wrong := list(deliveries(states, list(receiver.received), refused)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return wrong
