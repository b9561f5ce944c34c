"""The right to work on a job."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Protocol

SURE_OF_LEASE: Final = 2 / 3
"""Share of a lease after which the store is to refuse what is changed under it: the rest is for clocks that differ."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job, until it expires or is released."""

    job: str
    """Id of the job."""
    token: str
    """``<random epoch>:<counter>``; never given out twice."""
    owner: str
    """Who holds it, for people."""
    ttl_s: float
    """How long it lasts after it was taken or renewed, in seconds."""


class _Renews(Protocol):
    def renew(self, lease: Lease) -> None: ...


def permit(jobs: _Renews, lease: Lease) -> float:
    """Renew a lease; until when its job is surely its holder's, in Unix seconds. See :mod:`workers.store.fence`.

    :raises LeaseLostError: it is not in force any more.
    """
    asked = time.time()
    jobs.renew(lease)
    return asked + SURE_OF_LEASE * lease.ttl_s
