"""``mergemill recover``: an operator's command, which speaks to Redis and the object store itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergemill.arguments import AsJson, read_settings
from workers.errors import KeyNotFoundError

if TYPE_CHECKING:
    from service.keys import ApiKey
    from service.settings import Settings


def recover(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Where the lost job writes: s3://bucket/prefix or a path.")
    ],
    key: Annotated[
        str | None,
        typer.Option(metavar="ID", help="API key whose job it is to be. Needed unless MERGEMILL_AUTH=off."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have a job go on that the service's Redis (MERGEMILL_REDIS_URL) has lost; one that is there is left alone."""
    from mergemill.recipes import output_uri
    from service.jobs.recoverystore import RecoveryStore
    from service.running.recovery import recover as recover_job
    from workers.store import open_stores

    settings = read_settings()
    whose = _whose(key, settings)
    store = open_stores(settings.store)
    try:
        with RecoveryStore(settings.redis_url, settings.namespace) as jobs:
            found = recover_job(output_uri(output, Path.cwd()), settings, store, jobs, whose, time.time())
    finally:
        store.close()
    record = found.record
    if as_json:
        told = {
            "id": record.id,
            "state": str(record.state),
            "recovered": found.was_lost,
            "parts_done": found.parts,
            "parts_total": record.parts_total,
        }
        typer.echo(json.dumps(told, indent=2))
        return
    parts = f"{found.parts} of {record.parts_total} parts are finished"
    what = f"recovered: {record.state}" if found.was_lost else f"not lost: {record.state}"
    typer.echo(f"{record.id} is {what}, {parts}")


def _whose(key: str | None, settings: Settings) -> ApiKey | None:
    """The key that was named; anybody where there are no keys.

    :raises KeyNotFoundError: there is no such key, or it has ended.
    """
    from service.keys import ANYBODY
    from service.keystore import KeyStore

    if key is None:
        return ANYBODY if settings.auth == "off" else None
    with KeyStore(settings.redis_url, settings.namespace) as keys:
        found = keys.get(key)
    if found is None:
        raise KeyNotFoundError(f"there is no key {key}: mergemill keys list")
    if (ended := found.ended(time.time())) is not None:
        raise KeyNotFoundError(f"the key {key} {ended}: give it to another one")
    return found
