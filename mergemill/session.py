"""What commands that talk to a service share: reaching it, handing a recipe in, and ending in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mergemill import recipes
from mergemill.client import Client
from mergemill.jobs import Job
from mergemill.stack import EmbeddedStack
from workers.errors import JobError, JobFailedError, RecipeError


def open_client(url: str | None, api_key: str | None = None) -> Client:
    """A client of the service at ``url``, or else where ``mergemill up`` listens."""
    return Client(url, api_key=api_key)


@contextmanager
def open_service(url: str | None, console: Console) -> Iterator[Client]:
    """A client of the service at ``url``, or of a stack that is started for it and stopped afterwards."""
    if url is not None:
        with open_client(url) as client:
            yield client
        return
    with console.status("Starting an embedded stack"):
        stack = EmbeddedStack()
    with stack, open_client(stack.url, stack.api_key) as client:
        yield client


def submit_recipe(
    client: Client, recipe: dict[str, Any], output: str, options: dict[str, Any], key: str | None = None
) -> Job:
    """Have a merge queued; ``output`` may be a local path."""
    with hub_names_explained(recipe):
        return client.submit(recipe, recipes.output_uri(output, Path.cwd()), idempotency_key=key, **options)


@contextmanager
def hub_names_explained(recipe: dict[str, Any]) -> Iterator[None]:
    """Where a name turns out to be unknown to the service, say too that it is no directory here."""
    try:
        yield
    except RecipeError as error:
        hint = recipes.hub_name_hint(recipe, error.problems, Path.cwd())
        if hint is None:
            raise
        raise type(error)(*error.problems, hint) from error


def cancel_and_wait(client: Client, job: str, console: Console) -> None:
    """End a job and say how it ended."""
    try:
        client.cancel(job)
    except JobError as error:  # it has ended, or is committing, which is over soon
        console.print(f"Too late: {error}", highlight=False, soft_wrap=True)
    try:
        client.wait(job)
    except JobFailedError as error:
        console.print(str(error), highlight=False, soft_wrap=True)
    else:
        console.print(f"{job} succeeded", highlight=False)


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP do what Ctrl-C does: everything that was begun is ended in order."""
    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
