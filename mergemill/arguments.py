"""What commands take: the arguments and options that several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.sizes import binary_text, parse_size

if TYPE_CHECKING:
    from service.settings import Settings

Url = Annotated[str | None, typer.Option(envvar="MERGEMILL_URL", help="Address of the service.")]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", exists=True, dir_okay=False, help="Recipe, as mergekit's YAML.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


KIB, MIB, GIB, TIB = (1 << power for power in (10, 20, 30, 40))
BOUNDS = {"part_bytes": (5 * MIB, 4 * GIB), "shard_bytes": (1, 5 * TIB), "worker_memory_bytes": (1, None)}
"""Least and most of every size, as the service has them: asking it takes longer than ``--help`` may."""


def size(text: str) -> int:
    """A size such as 5GB, in bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _size(option: str) -> dict[str, Any]:
    """How a size is read. Typer names the option in front of what is wrong with it."""
    least, most = BOUNDS[option]

    def parse(text: str) -> int:
        found = size(text)
        if found < least:
            raise typer.BadParameter(f"{text} is less than the minimum, {binary_text(least)}")
        if most is not None and found > most:
            raise typer.BadParameter(f"{text} is more than the maximum, {binary_text(most)}")
        return found

    return {"parser": parse, "metavar": "SIZE"}


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at the output.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the inputs through.")
]
ShardSize = Annotated[
    int | None,
    typer.Option(help="Most bytes of one output file, as 5GB; up to 5TiB.", **_size("shard_bytes")),
]
PartSize = Annotated[
    int | None,
    typer.Option(help="Output bytes of one unit of work, as 64MiB; 5MiB to 4GiB.", **_size("part_bytes")),
]
WorkerMemory = Annotated[
    int | None,
    typer.Option(
        help="Most memory of one worker, as 2GiB: 512MiB of it are taken before the first byte.",
        **_size("worker_memory_bytes"),
    ),
]


IdempotencyKey = Annotated[
    str | None,
    typer.Option(
        help="The same key and merge again, within a day, are the same job. A fresh one by default."
    ),
]


Priority = Annotated[
    int, typer.Option(min=-100, max=100, help="Higher ones are begun first; above 0 it takes an admin's key.")
]


def merge_options(
    overwrite: bool,
    allow_nonfinite: bool,
    shard: int | None,
    part: int | None,
    memory: int | None,
    priority: int = 0,
) -> dict[str, Any]:
    """The options of a merge as the service names them, without those that were not given."""
    given = {
        "overwrite": overwrite or None,
        "allow_nonfinite": allow_nonfinite or None,
        "shard_bytes": shard,
        "part_bytes": part,
        "worker_memory_bytes": memory,
        "priority": priority or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def read_settings() -> Settings:
    """The deployment's settings, from the environment; what is wrong with them ends the command."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from service.recipe import validation_problems
    from service.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        for problem in validation_problems(error):
            typer.echo(f"error: setting {problem}", err=True)
        raise typer.Exit(2) from error
    except SettingsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
