"""How long what is over is kept, and whose an upload is. Pure: no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from service.planning.checkpoint import is_shard, is_staged

PAUSES_S = (10.0, 3600.0)
"""Shortest and longest time until an output that could not be cleared away is tried again, in seconds."""

SOONEST_S = 60.0
"""How long a job that has ended is kept, whatever the settings say, in seconds; and by how much clocks may differ."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept for how long. Times are Unix seconds."""

    records_s: float
    """How long the record of a job that has ended is kept, with all that belongs to it; 0 is for ever."""
    uploads_s: float
    """After how long an upload that nobody works at counts as abandoned."""

    def forget_before(self, now: float) -> float | None:
        """When jobs ended whose records are forgotten now; ``None`` when none are."""
        return now - max(self.records_s, SOONEST_S) if self.records_s else None

    def sweep_before(self, now: float) -> float:
        """When jobs ended whose outputs are looked at now: what they left there is old enough."""
        return now - max(self.uploads_s, SOONEST_S)

    def is_abandoned(self, name: str, opened_at: float, now: float, left_since: float | None = None) -> bool:
        """Whether an upload, at the output of a job that has ended and of no other, is one that nobody will end.

        :param name: of the object that it would become; whatever is no shard of a checkpoint is somebody else's.
        :param left_since: when the job began, if it is known to have left something: what is younger is its own.
        """
        is_own = left_since is not None and opened_at > left_since - SOONEST_S  # clocks differ
        return (is_shard(name) or is_staged(name)) and (is_own or opened_at < self.sweep_before(now))

    @staticmethod
    def pause_s(ended_at: float, now: float) -> float:
        """How long to wait before a store that failed is asked again: a tenth of the time it has been so."""
        return min(max(PAUSES_S[0], (now - ended_at) / 10), PAUSES_S[1])
