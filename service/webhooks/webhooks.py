"""Webhooks: who is told of what, what is sent, and when it is sent again. Pure.

Reference: the Standard Webhooks specification, version 1.0.0.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import random
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Final

import httpx

from service.jobs.events import CHANGES, WARNING, JobEvent
from service.webhooks.addresses import Destinations

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what secrets begin with
SECRET_BYTES: Final = range(24, 65)
"""How long a secret may be, in bytes."""

DEFAULT_EVENTS: Final = ("succeeded", "failed", "cancelled")
"""What is told when nothing is chosen."""

EVENTS: Final = CHANGES | {WARNING}
"""What may be told: everything but progress."""

MAX_URL_CHARS: Final = 2048
"""Longest URL."""

MAX_TRIES: Final = 11
"""How often a delivery is tried: over a day, with :data:`BACKOFF`."""

GONE: Final = 410
"""The status by which a receiver says that it wants nothing any more."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """Somebody who wants to be told about a job."""

    url: str
    """Where to send it."""
    events: tuple[str, ...] = DEFAULT_EVENTS
    """Names of the events to tell."""
    secret: str = ""
    """What to sign with; empty for the deployment's own."""

    def __repr__(self) -> str:
        return f"Webhook({self.url!r}, {self.events!r})"  # never the secret


@dataclass(frozen=True, slots=True)
class Try:
    """One try of a delivery, as it is recorded."""

    delivery: str
    """Id of the event in the job's stream."""
    number: int
    """Which try, from 1."""
    at: float
    """When it began, in Unix seconds."""
    seconds: float
    """How long it took."""
    status: int | None
    """HTTP status of the answer, if one came."""
    error: str | None
    """Why it failed, if it did."""
    next_at: float | None
    """When it is tried again, in Unix seconds, if it is."""

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one receiver, and how far it got."""

    id: str
    """The `webhook-id`: the same with every try."""
    event: str
    """Name of the event."""
    state: str
    """`pending`, `delivered`, `failed` (given up) or `gone` (the receiver answered 410)."""
    tries: tuple[Try, ...]
    """All tries so far, the first one first."""
    next_at: float | None
    """When the next one is due, in Unix seconds; while one is on its way, when it counts as lost."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Growing pauses between tries."""

    first_s: float = 5.0
    """About the first pause, in seconds."""
    factor: float = 4.0
    """How much longer each is than the one before."""
    longest_s: float = 6 * 3600.0
    """About the longest pause, in seconds."""
    jitter: float = 0.2
    """Largest share by which a pause is longer or shorter."""

    def pause(self, tries: int) -> float:
        """How long to wait after so many tries, in seconds."""
        exact = min(self.longest_s, self.first_s * self.factor ** (tries - 1))
        return exact * random.uniform(1 - self.jitter, 1 + self.jitter)  # noqa: S311 - not for secrecy


BACKOFF: Final = Backoff()
"""5 s, 20 s, 80 s, …, 6 h: eleven tries in about 26 hours."""


def outcome(status: int | None, tries: int) -> str:
    """What becomes of a delivery after a try: ``delivered``, ``again``, ``failed`` or ``gone``.

    :param status: the answer's HTTP status, if one came.
    :param tries: how often it has been tried.
    """
    if status is not None and 200 <= status < 300:
        return "delivered"
    if status == GONE:
        return "gone"
    return "again" if tries < MAX_TRIES else "failed"


def message_id(job: str, event_id: str) -> str:
    """The ``webhook-id`` of an event: the same however often it is sent."""
    return f"{job}-{event_id}"


def message(event: JobEvent) -> bytes:
    """The body that tells of an event, the same with every try."""
    data = event.to_json()
    body = {"type": f"merge.{event.event}", "timestamp": data["at"], "data": data}
    return json.dumps(body, separators=(",", ":")).encode()


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The ``webhook-signature``.

    :raises ValueError: the secret is none.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(read_secret(secret), signed, hashlib.sha256)).decode()


def read_secret(secret: str) -> bytes:
    """The bytes to sign with.

    :raises ValueError: it is not ``whsec_`` and 24 to 64 bytes in base64; the message does not tell the secret.
    """
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in SECRET_BYTES:
        raise ValueError(
            f"it has to be {SECRET_PREFIX} and {SECRET_BYTES[0]} to {SECRET_BYTES[-1]} random bytes in base64"
        )
    return key


def url_problem(url: str, destinations: Destinations) -> str | None:
    """Why there can be no webhook at this URL, as far as that can be told without looking it up."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        return "it is not a URL"
    if len(url) > MAX_URL_CHARS or not url.isprintable() or " " in url:
        return f"it is longer than {MAX_URL_CHARS} characters, or has some that no URL has"
    if (
        parsed.scheme not in {"https", "http"}
        or not parsed.host
        or (parsed.port or 443) not in range(1, 65536)
    ):
        return "it has to begin with https:// and name a host, and perhaps a port"
    if parsed.userinfo or parsed.fragment:
        return "it holds a user, a password or a fragment"
    return _place_problem(parsed, destinations)


def _place_problem(url: httpx.URL, destinations: Destinations) -> str | None:
    """Why nothing may be sent there; a name is looked up when something is sent, and only then."""
    try:
        address = str(ip_address(url.host))
    except ValueError:
        refused = url.scheme != "https" and not destinations.allow_something()
        return "only https is allowed" if refused else None
    return destinations.refusal(url.scheme, url.host, address)
