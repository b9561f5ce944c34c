"""When a request to a store is sent again: full jitter, a budget that a process shares, and a count of what happened.

Waits are random between nothing and a bound that doubles, so that clients which failed together do not come
back together. The budget is that of the AWS SDKs' standard mode: each retry takes from it, what succeeds gives a
little back, and when it is empty nothing is sent again: a store that is down is not held down.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Final

from botocore.retries.quota import RetryQuota

from workers.store.settings import StoreSettings

CAUSES: Final = ("throttled", "server_error", "timeout", "connection", "checksum", "credentials")
"""Why a request was sent again: the store asked for fewer, answered 5xx, did not go on answering, or broke the
connection off, bytes had changed on their way, or credentials were renewed."""

RETRY_COST: Final = 10
"""What a retry takes from the budget, where a request that succeeds at once gives 1 back."""


class RetryBudget:
    """The retries that the requests of a process share.

    :param retries: how many there are at most, and in the beginning.
    """

    def __init__(self, retries: int) -> None:
        self._quota = RetryQuota(retries * RETRY_COST)

    def take(self) -> bool:
        """Take a retry, if there is one left."""
        return self._quota.acquire(RETRY_COST)

    def succeeded(self, retried: bool) -> None:
        """Give back what the last retry took, since it helped; without one, a tenth of a retry."""
        self._quota.release(RETRY_COST if retried else 1)


@dataclass
class Tries:
    """How one request goes."""

    settings: StoreSettings
    """How often it may be sent, and how long is waited."""
    budget: RetryBudget
    """What all requests share."""
    sent: int = 1
    """How often it was sent."""
    spent: bool = False
    """Whether the budget had nothing left for it."""

    def wait_s(self, cause: str, retry_after_s: float = 0.0) -> float | None:
        """Seconds to wait before it is sent again; None when it is not. The retry is counted.

        :param cause: one of :data:`CAUSES`.
        :param retry_after_s: the least that the store asked for; obeyed up to the longest wait.
        """
        settings = self.settings
        if self.sent >= settings.s3_max_attempts:
            return None
        if not self.budget.take():
            self.spent = True
            return None
        bound = min(settings.s3_retry_wait_max_s, settings.s3_retry_wait_s * 2.0 ** (self.sent - 1))
        self.sent += 1
        RETRIES.add(cause)
        jittered = random.uniform(0, bound)  # noqa: S311 - spreads requests, keeps no secret
        return max(jittered, min(retry_after_s, settings.s3_retry_wait_max_s))

    @property
    def told(self) -> str:
        """For an error's message: how often, and whether it would have been sent again."""
        times = "once" if self.sent == 1 else f"{self.sent} times"
        if self.spent:
            return f"sent {times}, and not again, since too many requests of this process failed lately"
        return f"sent {times}"


class Tally:
    """Counts of this process by cause. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, cause: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[cause] += 1

    def take(self) -> dict[str, int]:
        """What was counted since this was asked last."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts


RETRIES: Final = Tally()
"""Requests of this process that were sent again."""
