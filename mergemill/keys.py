"""``mergemill keys``: the operator's commands, which speak to Redis itself."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.arguments import AsJson, read_settings, size

if TYPE_CHECKING:
    from service.keys import ApiKey
    from service.keystore import KeyStore

app = typer.Typer(
    name="keys",
    help="Make, list and revoke API keys, in the Redis of MERGEMILL_REDIS_URL and MERGEMILL_NAMESPACE.",
    no_args_is_help=True,
)

_UNITS = {"h": 3600, "d": 86400, "w": 604800}


def _span(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,5})([hdw])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time such as 12h, 90d or 52w")
    return int(found[1]) * _UNITS[found[2]]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, submit or admin; several by several --scope. [read, submit]"),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="Prefix of the places that its merges may read; `*`: all, `hub:`: hub names."
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output", help="Prefix of the places that they may write; `*`: all.")
    ] = None,
    expires: Annotated[
        int | None, typer.Option(parser=_span, metavar="TIME", help="How long it lasts, as 12h, 90d or 52w.")
    ] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(help="Requests a second; 0 is any number.")
    ] = None,
    queued_jobs: Annotated[int | None, typer.Option(help="Most jobs that wait; 0 is any number.")] = None,
    running_jobs: Annotated[
        int | None, typer.Option(help="Most jobs that run at once; 0 is any number.")
    ] = None,
    input_bytes: Annotated[
        int | None,
        typer.Option(parser=size, metavar="SIZE", help="Most bytes that one job may merge, as 200GB."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its token, which is shown this once. An admin's key may read and write everywhere
    unless it is given prefixes; any other one nowhere."""
    from pydantic import ValidationError

    from mergemill.recipes import output_uri
    from service.keys import EVERYWHERE, HUB, Scope, new_key
    from service.recipe import validation_problems

    if unknown := set(scope or ()) - {*Scope}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are read, submit and admin")
    scopes = [Scope(each) for each in scope or (Scope.READ, Scope.SUBMIT)]
    anywhere = [EVERYWHERE] if Scope.ADMIN in scopes else []

    def prefixes(given: list[str] | None) -> list[str]:
        return [
            each if each in (EVERYWHERE, HUB) else output_uri(each, Path.cwd()) for each in given or anywhere
        ]

    limits = {
        "requests_per_second": requests_per_second,
        "queued_jobs": queued_jobs,
        "running_jobs": running_jobs,
        "input_bytes": input_bytes,
    }
    try:
        key, token = new_key(
            name,
            scopes,
            time.time(),
            inputs=prefixes(inputs),
            outputs=prefixes(outputs),
            limits={each: value for each, value in limits.items() if value is not None},
            lasts_s=expires,
        )
    except ValidationError as error:
        raise typer.BadParameter("; ".join(validation_problems(error))) from error
    with _store() as store:
        store.create(key)
    if as_json:
        typer.echo(json.dumps({**_shown(key), "token": token}, indent=2))
        return
    typer.echo(token)
    if Scope.SUBMIT in scopes and not (key.inputs and key.outputs):
        typer.echo("note: without --input and --output its merges may read or write nowhere", err=True)
    typer.echo(f"note: key {key.id} of {name}; this token is not shown again", err=True)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, revoked and expired ones too."""
    with _store() as store:
        found = [_shown(key) for key in store.list()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for key in found:
        what = ", ".join(key["scopes"])
        where = (
            f"reads {' '.join(key['inputs']) or 'nothing'}; writes {' '.join(key['outputs']) or 'nothing'}"
        )
        state = f"{key['state']}, last used {key['used_at'] or 'never'}"
        typer.echo(f"{key['id']}  {key['name']}  [{what}]  {where}  ({state})")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="Its id, the middle of its token.")],
) -> None:
    """End a key, at once and for good. Its jobs go on: cancel those that should not."""
    with _store() as store:
        store.revoke(key, time.time())
    typer.echo(f"{key} is revoked")


@contextmanager
def _store() -> Iterator[KeyStore]:
    from service.keystore import KeyStore

    settings = read_settings()
    with KeyStore(settings.redis_url, settings.namespace) as store:
        yield store


def _shown(key: ApiKey) -> dict[str, Any]:
    """All that may be told of a key."""
    ended = key.ended(time.time())
    return {
        "id": key.id,
        "name": key.name,
        "state": "active" if ended is None else ended.removeprefix("was ").removeprefix("has "),
        "scopes": [str(scope) for scope in key.scopes],
        "inputs": list(key.inputs),
        "outputs": list(key.outputs),
        "limits": dict(key.limits),
        "created_at": _time(key.created_at),
        "expires_at": _time(key.expires_at),
        "revoked_at": _time(key.revoked_at),
        "used_at": _time(key.used_at),
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
