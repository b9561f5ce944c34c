"""The command line: ``mergemill --help``.

What only some commands need is imported by them: torch alone takes longer than ``--help`` may.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mergemill import keys, recovering
from mergemill.arguments import (
    AllowNonfinite,
    AsJson,
    IdempotencyKey,
    JobId,
    Overwrite,
    PartSize,
    Priority,
    RecipeFile,
    ShardSize,
    Url,
    WorkerMemory,
    merge_options,
    read_settings,
)
from mergemill.sizes import size_text
from workers.errors import MergemillError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from mergemill.jobs import Job

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class _Group(TyperGroup):
    """Commands whose own errors are a message and exit status 1, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MergemillError as error:
            from mergemill.show import show_error

            show_error(_console(), error)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    name="mergemill",
    help="Merge model checkpoints in object storage, bigger than any machine's memory.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys.app)
app.command()(recovering.recover)


@app.command()
def up(
    port: Annotated[
        int, typer.Option(envvar="MERGEMILL_PORT", min=0, max=65535, help="Port; 0 is a free one.")
    ] = 8080,
    host: Annotated[str, typer.Option(envvar="MERGEMILL_HOST", help="Address to listen on.")] = "127.0.0.1",
    state_dir: Annotated[
        Path,
        typer.Option(envvar="MERGEMILL_STATE_DIR", file_okay=False, help="Where jobs and logs are kept."),
    ] = Path("~/.mergemill"),
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="MERGEMILL_REDIS_URL", show_envvar=True, help="In place of the embedded Valkey."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="In place of a local Ray.")
    ] = None,
) -> None:
    """Run everything on this machine: Valkey, a local Ray, the scheduler and the API. Ctrl-C stops all of it."""
    from mergemill import session
    from mergemill.stack import EmbeddedStack

    console = _console()
    with session.interruptible():
        try:
            with console.status("Starting Valkey, Ray, the scheduler and the API"):
                stack = EmbeddedStack(
                    state_dir, port, host=host, ray_address=ray_address, redis_url=redis_url
                )
            with stack:
                key = [f"  export MERGEMILL_API_KEY=$(cat {shlex.quote(str(stack.key_file))})"]
                for line in (
                    f"Mergemill is up at {stack.url} (its documentation: {stack.url}/docs).",
                    f"State and logs are in {stack.state_dir}. Ctrl-C stops everything.",
                    "",
                    "In another terminal:",
                    f"  export MERGEMILL_URL={stack.url}",
                    *(key if stack.api_key else ()),
                    "  mergemill merge recipe.yml ./merged",
                ):
                    typer.echo(line)
                stack.wait()
        except KeyboardInterrupt:
            typer.echo("Stopped.")


@app.command()
def serve(
    fd: Annotated[int | None, typer.Option(hidden=True, help="A listening socket to accept on.")] = None,
) -> None:
    """Run the REST API; see the settings MERGEMILL_HOST, MERGEMILL_PORT and MERGEMILL_REDIS_URL."""
    from mergemill.serving import run_api
    from service.watching.logs import configure

    settings = read_settings().served()
    configure(settings.log_format)
    if not run_api(settings, fd):
        raise typer.Exit(1)


@app.command()
def schedule(
    ready_file: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Made once jobs are claimed, removed at the end.")
    ] = None,
) -> None:
    """Run a scheduler; see the settings MERGEMILL_REDIS_URL and RAY_ADDRESS. Any number of them may run."""
    from service.running import scheduler
    from service.watching.logs import configure

    settings = read_settings().served()
    configure(settings.log_format)
    scheduler.main(settings, ready_file)


@app.command()
def merge(
    recipe: RecipeFile,
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="s3://bucket/prefix, file:///dir or a path.")
    ],
    url: Url = None,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    shard_size: ShardSize = None,
    part_size: PartSize = None,
    worker_memory: WorkerMemory = None,
    priority: Priority = 0,
    idempotency_key: IdempotencyKey = None,
    as_json: AsJson = False,
) -> None:
    """Merge, and wait for it: on the service, or on an embedded stack of its own. Ctrl-C cancels."""
    from mergemill import session
    from mergemill.show import job_progress

    document = _read_recipe(recipe)
    options = merge_options(overwrite, allow_nonfinite, shard_size, part_size, worker_memory, priority)
    console = _console()
    with session.interruptible(), session.open_service(url, console) as client:
        job = session.submit_recipe(client, document, output, options, idempotency_key)
        with job_progress(console) as show:
            try:
                done = client.wait(job.id, show)
            except KeyboardInterrupt:
                console.print("Cancelling; Ctrl-C again leaves the job alone.")
                session.cancel_and_wait(client, job.id, console)
                raise typer.Exit(INTERRUPTED) from None
    _show_done(done, as_json)


@app.command()
def plan(
    recipe: RecipeFile,
    output: Annotated[str | None, typer.Argument(metavar="[OUTPUT]", help="Where it would go.")] = None,
    url: Url = None,
    overwrite: Overwrite = False,
    shard_size: ShardSize = None,
    part_size: PartSize = None,
    worker_memory: WorkerMemory = None,
    as_json: AsJson = False,
) -> None:
    """Check and price a merge without running it: on the service, or right here without any server."""
    from mergemill import recipes, session
    from mergemill.show import price_table

    document = _read_recipe(recipe)
    options = merge_options(overwrite, False, shard_size, part_size, worker_memory)
    place = None if output is None else recipes.output_uri(output, Path.cwd())
    with session.hub_names_explained(document):
        if url is not None:
            with session.open_client(url) as client:
                found = client.plan(document, place, **options)
        else:
            from mergemill.local import plan_here

            found = plan_here(document, place, options, read_settings())
    _print(found, price_table(found), as_json)


@app.command()
def submit(
    recipe: RecipeFile,
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="s3://bucket/prefix, file:///dir or a path.")
    ],
    url: Url = None,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    shard_size: ShardSize = None,
    part_size: PartSize = None,
    worker_memory: WorkerMemory = None,
    priority: Priority = 0,
    idempotency_key: IdempotencyKey = None,
    as_json: AsJson = False,
) -> None:
    """Have a merge queued and print the job's id."""
    from mergemill import session

    document = _read_recipe(recipe)
    options = merge_options(overwrite, allow_nonfinite, shard_size, part_size, worker_memory, priority)
    with session.open_client(url) as client:
        job = session.submit_recipe(client, document, output, options, idempotency_key)
    typer.echo(_json(job.body) if as_json else job.id)


@app.command()
def status(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Show a job."""
    from mergemill import session
    from mergemill.show import job_lines

    with session.open_client(url) as client:
        found = client.get(job)
    typer.echo(_json(found.body) if as_json else "\n".join(job_lines(found)))


@app.command()
def watch(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Wait for a job and show its progress. Ctrl-C stops the watching, not the job."""
    from mergemill import session
    from mergemill.show import job_progress

    with session.open_client(url) as client, job_progress(_console()) as show:
        done = client.wait(job, show)
    _show_done(done, as_json)


@app.command()
def cancel(job: JobId, url: Url = None) -> None:
    """Ask for a job's end."""
    from mergemill import session

    with session.open_client(url) as client:
        found = client.cancel(job)
    typer.echo(f"{found.id} {found.state if found.is_terminal else 'is being cancelled'}")


@app.command()
def delete(job: JobId, url: Url = None) -> None:
    """Forget a job that has ended. The checkpoint that it wrote stays."""
    from mergemill import session

    with session.open_client(url) as client:
        client.delete(job)
    typer.echo(f"{job} is deleted; what it wrote is not")


@app.command("list")
def list_jobs(
    url: Url = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    from itertools import islice

    from mergemill import session
    from mergemill.show import job_table

    with session.open_client(url) as client:
        found = list(islice(client.jobs(state), limit))
    _print([job.body for job in found], job_table(found) if found else "no jobs", as_json)


@app.command()
def download(
    job: JobId,
    directory: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="Where the files go.")],
    url: Url = None,
) -> None:
    """Download a merged checkpoint and check its digests. Run it again to go on where it broke off."""
    from mergemill import session
    from mergemill.show import byte_progress

    console = _console()

    def repaired(name: str) -> None:
        console.print(
            f"{directory / name} is not what the merge wrote: replacing it", soft_wrap=True, highlight=False
        )

    with session.interruptible(), session.open_client(url) as client, byte_progress(console, job) as show:
        client.download(job, directory, show, repaired)
    typer.echo(f"{directory} holds the checkpoint of {job}, every digest checked")


@app.command()
def methods(url: Url = None, as_json: AsJson = False) -> None:
    """List the merge methods and their parameters."""
    from mergemill import session
    from mergemill.show import method_table

    if url is not None:
        with session.open_client(url) as client:
            found = client.methods()
    else:
        from mergemill.local import methods_here

        found = methods_here()
    _print(found, method_table(found), as_json)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mergemill {version('mergemill')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that go before a command."""


def _console() -> Console:
    """Where people look: standard error, so that standard output is the answer alone."""
    from rich.console import Console

    return Console(stderr=True)


def _print(value: Any, shown: RenderableType, as_json: bool) -> None:
    """Print an answer, as JSON or for people."""
    from rich.console import Console

    if as_json:
        typer.echo(_json(value))
        return
    console = Console()
    if console.is_terminal:
        console.print(shown)
        return
    console.width = 10_000  # lines are not broken for a width that nobody has
    with console.capture() as lines:
        console.print(shown)
    typer.echo("\n".join(line.rstrip() for line in lines.get().splitlines()))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _read_recipe(path: Path) -> dict[str, Any]:
    """The recipe with local paths as URIs."""
    from mergemill import recipes

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    return recipes.localise(recipes.read(text), Path.cwd())


def _show_done(job: Job, as_json: bool) -> None:
    if as_json:
        typer.echo(_json(job.body))
        return
    for notice in job.notices:
        typer.echo(f"note: {notice}", err=True)
    typer.echo(f"{job.id} succeeded: {size_text(job.progress.bytes_total)} at {job.output}")
