"""The webhook of a request: what is wrong with it, and what is kept of it."""

from __future__ import annotations

from api.schemas import WebhookBody
from service.settings import Settings
from service.webhooks.webhooks import DEFAULT_EVENTS, EVENTS, Webhook, read_secret, url_problem


def webhook_of(body: WebhookBody | None, settings: Settings) -> tuple[Webhook | None, tuple[str, ...]]:
    """Who is to be told, and everything that is wrong with that; never with the secret in it."""
    if body is None:
        return None, ()
    problems = []
    if (problem := url_problem(body.url, settings.webhook_destinations)) is not None:
        problems.append(f"webhook.url: {problem}")
    if unknown := sorted(set(body.events or ()) - EVENTS):
        known = ", ".join(sorted(EVENTS))
        problems.append(f"webhook.events: there is no event {unknown[0][:100]!r}; there are {known}")
    secret = "" if body.secret is None else body.secret.get_secret_value()
    if body.secret is not None:
        try:
            read_secret(secret)
        except ValueError as error:
            problems.append(f"webhook.secret: {error}")
    elif settings.webhook_secret is None:
        problems.append("webhook.secret: give one, since this service has none of its own to sign with")
    events = tuple(dict.fromkeys(body.events or DEFAULT_EVENTS))
    return Webhook(body.url, events, secret), tuple(problems)
