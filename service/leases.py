"""The right to work on a job."""

from __future__ import annotations

from dataclasses import dataclass


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
