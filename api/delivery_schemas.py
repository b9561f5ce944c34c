"""What goes over the wire about webhooks: answers of ``/v1/merges/{id}/deliveries``."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TryInfo(_Model):
    """One try of a delivery."""

    number: int
    """Which try, from 1; one that is missing was not recorded, because who made it ended."""
    at: datetime
    """When it began."""
    seconds: float
    """How long it took."""
    status: int | None
    """HTTP status of the answer; null when there was none."""
    error: str | None
    """Why it failed; null when it did not."""
    next_try_at: datetime | None
    """When it is tried again; null when it is not."""


class DeliveryInfo(_Model):
    """One event for a webhook."""

    id: str
    """Its `webhook-id`, the same with every try."""
    event: str
    """Name of the event."""
    state: str
    """`pending`, `delivered`, `failed` (given up), or `gone` (the receiver answered 410 and is told nothing more)."""
    tries: tuple[TryInfo, ...]
    """All tries so far."""
    next_try_at: datetime | None
    """When the next try is due; null when there is none."""


class DeliveryList(_Model):
    """What a merge's webhook was told, or is to be."""

    url: str | None
    """Where it is; null when the merge has no webhook."""
    events: tuple[str, ...]
    """What it is told."""
    deliveries: tuple[DeliveryInfo, ...]
    """One for each of its events so far, in order."""
