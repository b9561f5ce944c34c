"""What may go wrong between a client and an object store, and who decides when it does.

A policy is asked once for every request. It keeps no state and draws from no clock: what it answers follows from the
request and how often the same one came before, so that a run with the same seed meets the same faults in
whatever order its requests arrive.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Kind(StrEnum):
    """What goes wrong."""

    DELAY = "delay"
    """The request reaches the server ``seconds`` late."""
    INTERNAL_ERROR = "internal_error"
    """500 InternalError; the server sees nothing."""
    SLOW_DOWN = "slow_down"
    """503 SlowDown; the server sees nothing."""
    EXPIRED_TOKEN = "expired_token"
    """403 ExpiredToken; the server sees nothing."""
    RESET = "reset"
    """The connection is cut, the server sees nothing."""
    CUT_REQUEST = "cut_request"
    """The connections are cut when a part of the request's body has come through."""
    FLIP_REQUEST = "flip_request"
    """One bit of the request's body changes on its way."""
    LOSE_ANSWER = "lose_answer"
    """The server acts, and the connection is cut in place of its answer."""
    ACT_LATE = "act_late"
    """The connection is cut; the server gets the request ``seconds`` later, and acts."""
    TRUNCATE = "truncate"
    """The answer's body ends early."""
    STALL = "stall"
    """The answer's body stops for ``seconds`` half-way."""
    FLIP = "flip"
    """One bit of the answer's body changes on its way."""
    HOLD = "hold"
    """The request is held back until it is released; then its connection is cut, and the server sees nothing."""


OF_UPLOADS = frozenset({Kind.CUT_REQUEST, Kind.FLIP_REQUEST})
"""What needs a request with a body."""
OF_READS = frozenset({Kind.TRUNCATE, Kind.STALL, Kind.FLIP})
"""What needs an answer with a body."""


LATE_IS_HARMLESS = frozenset({"UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"})
"""What may come late and do no harm. What is put or deleted late may replace somebody's newer object, and an upload
that is opened late is known to nobody: no client of S3 can do anything about these."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong with one request."""

    kind: Kind
    """What."""
    seconds: float = 0.0
    """How long, for what lasts."""
    at: float = 0.5
    """Where in the body, as a fraction of its length in [0, 1)."""
    bit: int = 0
    """Which bit of that byte flips, in 0..7."""
    retry_after_s: int | None = None
    """The ``Retry-After`` of an error answer; none when None."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request on its way to the server."""

    number: int
    """How many came before it, from 0."""
    nth: int
    """How many of the same :attr:`identity` came before it."""
    method: str
    """HTTP's."""
    operation: str
    """S3's name for it, as :func:`operation_of`."""
    path: str
    """Bucket and key, as sent."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Query parameters; of those that come twice the last."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers by lower-case names."""
    client: int = 0
    """The client's port."""

    @property
    def key(self) -> str:
        """The object's name within its bucket, as sent."""
        return self.path.lstrip("/").partition("/")[2]

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What a request keeps when it is sent again, in this run or another with buckets of other names."""
        return (self.operation, self.key, self.headers.get("range", ""), self.query.get("partNumber", ""))


class Policy(Protocol):
    """Decides what goes wrong. Pure, or else only ever asked by one thread: the proxy's."""

    def decide(self, request: Request) -> Fault | None:
        """The fault for this request, or None to let it pass."""
        ...


@dataclass(frozen=True)
class Calm:
    """Nothing goes wrong."""

    def decide(self, request: Request) -> Fault | None:
        """See :meth:`Policy.decide`."""
        return None


@dataclass
class Script:
    """Programmed faults: of the requests that ``matches`` takes, the first meet these, one each."""

    faults: list[Fault | None]
    """What is still to come; None lets a request pass."""
    matches: Callable[[Request], bool] = lambda _: True
    """Which requests are counted."""

    def decide(self, request: Request) -> Fault | None:
        """See :meth:`Policy.decide`."""
        return self.faults.pop(0) if self.faults and self.matches(request) else None


@dataclass(frozen=True)
class Storm:
    """Faults at random, from a seed."""

    seed: int | str
    """What all follows from."""
    rates: Mapping[Kind, float]
    """Probability of each kind, of those requests that it makes sense for."""
    seconds: tuple[float, float] = (0.05, 0.5)
    """Bounds of how long delays, stalls and late actions last."""
    spared: Collection[str] = ()
    """Operations that nothing happens to."""
    in_a_row: int = 3
    """The most that the same request meets one after the other: below a client's attempts, all succeed in the end."""

    def decide(self, request: Request) -> Fault | None:
        """See :meth:`Policy.decide`."""
        if request.operation in self.spared or request.nth % (self.in_a_row + 1) == self.in_a_row:
            return None
        rng = random.Random(f"{self.seed} {request.identity} {request.nth}")
        drawn = rng.random()
        for kind, rate in sorted(self.rates.items()):
            if not _makes_sense(kind, request):
                continue
            if drawn < rate:
                retry_after_s = 1 if kind == Kind.SLOW_DOWN and rng.random() < 0.5 else None
                return Fault(kind, rng.uniform(*self.seconds), rng.random(), rng.randrange(8), retry_after_s)
            drawn -= rate
        return None


def _makes_sense(kind: Kind, request: Request) -> bool:
    if kind in OF_READS:
        return request.method == "GET"
    if kind in OF_UPLOADS:
        return request.headers.get("content-length", "0") != "0"
    return kind != Kind.ACT_LATE or request.operation in LATE_IS_HARMLESS


def operation_of(method: str, query: Mapping[str, str]) -> str:
    """S3's name for a request, as far as tests care; else the method."""
    if "uploadId" in query:
        names = {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}
        return names.get(method, "UploadPart")
    if "uploads" in query:
        return "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    return "ListObjects" if "list-type" in query else method
