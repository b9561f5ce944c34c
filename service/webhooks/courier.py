"""Sends webhooks from the durable queue. Any number of couriers may run: each delivery is claimed by one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, Self

import structlog

from service.webhooks.addresses import Destinations
from service.webhooks.posting import DEADLINE_S, Answer, post
from service.webhooks.store import Claim, WebhookStore
from service.webhooks.webhooks import BACKOFF, Backoff, Try, message, message_id, outcome, signature
from workers.errors import JobStoreUnavailableError

if TYPE_CHECKING:
    from service.settings import Settings

THREADS: Final = 4
"""Deliveries that one courier makes at once: a receiver that hangs holds up one of them."""

CLAIM_S: Final = 2 * DEADLINE_S
"""How long a delivery belongs to who took it, in seconds; then another courier makes it again."""

CLOSE_S: Final = 3.0
"""How long a courier that is closed waits for what it is sending, in seconds."""

POLL_S: Final = 0.5
"""How often a courier that has nothing to send looks for something, in seconds."""

Post = Callable[[str, Mapping[str, str], bytes, Destinations], Answer]
"""Sends a body somewhere: URL, headers, body, and where it may go."""

log = structlog.get_logger(__name__)


class Courier:
    """Makes deliveries until it is closed; a context manager.

    What it was sending when it died is sent again, with the same ``webhook-id``, so at least once.
    """

    def __init__(
        self,
        store: WebhookStore,
        settings: Settings,
        *,
        backoff: Backoff = BACKOFF,
        threads: int = THREADS,
        claim_s: float = CLAIM_S,
        post: Post = post,
    ) -> None:
        self._store = store
        self._secret = settings.webhook_secret
        self._destinations = settings.webhook_destinations
        self._backoff = backoff
        self._claim_s = claim_s
        self._post = post
        self._stopping = threading.Event()
        self._watch = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"courier-{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Begin no further delivery, and wait a little for those on their way; the rest is sent again by others."""
        self._stopping.set()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._watch:  # one thread looks for all; when it has found something, the next one does
                    claim = self._next()
                if claim is not None:
                    self._deliver(claim)
                continue
            except JobStoreUnavailableError as error:
                log.warning("webhooks are out of reach", error=str(error))
            except Exception:  # a defect of ours: the delivery is tried again when its claim has run out
                log.exception("a webhook could not be handled")
            self._stopping.wait(POLL_S)

    def _next(self) -> Claim | None:
        """A delivery to make, as soon as there is one; ``None`` when the courier is closed."""
        while not self._stopping.is_set():
            claim = self._store.claim(self._claim_s)
            if claim is not None:
                return claim
            self._stopping.wait(POLL_S)
        return None

    def _deliver(self, claim: Claim) -> None:
        began, clock = time.time(), time.monotonic()
        answer = self._send(claim, int(began))
        result = outcome(answer.status, claim.number)
        pause = self._backoff.pause(claim.number) if result == "again" else None
        done = Try(
            delivery=claim.event.id,
            number=claim.number,
            at=began,
            seconds=round(time.monotonic() - clock, 3),
            status=answer.status,
            error=answer.error,
            next_at=None if pause is None else time.time() + pause,
        )
        self._store.finish(claim, done, result, pause or 0.0)
        told = {"job": claim.event.job, "about": claim.event.event, "number": claim.number, "outcome": result}
        if result == "delivered":
            log.info("webhook delivered", **told)
        else:
            log.warning("webhook not delivered", **told, status=answer.status, error=answer.error)

    def _send(self, claim: Claim, timestamp: int) -> Answer:
        body, name = message(claim.event), message_id(claim.event.job, claim.event.id)
        secret = claim.secret or (self._secret.get_secret_value() if self._secret else "")
        if not secret:
            return Answer(None, "this service has no secret to sign with any more")
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"mergemill/{version('mergemill')}",
            "webhook-id": name,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(secret, name, timestamp, body),
        }
        return self._post(claim.url, headers, body, self._destinations)
