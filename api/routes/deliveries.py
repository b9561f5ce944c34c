"""``/v1/merges/{id}/deliveries``: what became of a merge's webhook."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter

from api.auth import JobsDep
from api.delivery_schemas import DeliveryInfo, DeliveryList, TryInfo
from api.deps import WebhooksDep
from api.openapi import problems
from api.routing import readable
from service.webhooks.webhooks import Delivery, Try

router = APIRouter(prefix="/v1/merges", tags=["merges"])


@readable(router, "/{job}/deliveries", response_model=DeliveryList, responses=problems(404, 503))
def deliveries(job: str, jobs: JobsDep, webhooks: WebhooksDep) -> DeliveryList:
    """What the merge's webhook was told, every try of it, and what is still to be told."""
    jobs.get(job)  # others' jobs are not there
    found = webhooks.deliveries(job)
    return DeliveryList(
        url=found.url, events=found.events, deliveries=tuple(map(_delivery, found.deliveries))
    )


def _delivery(delivery: Delivery) -> DeliveryInfo:
    return DeliveryInfo(
        id=delivery.id,
        event=delivery.event,
        state=delivery.state,
        tries=tuple(map(_try, delivery.tries)),
        next_try_at=_time(delivery.next_at),
    )


def _try(done: Try) -> TryInfo:
    return TryInfo(
        number=done.number,
        at=datetime.fromtimestamp(done.at, UTC),
        seconds=done.seconds,
        status=done.status,
        error=done.error,
        next_try_at=_time(done.next_at),
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
