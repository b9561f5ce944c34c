"""What the command line shows: progress, tables and errors. Plain, stable lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from mergemill.jobs import Job
from mergemill.sizes import size_text
from workers.errors import JobFailedError, RecipeError

STEP_PERCENT = 10
"""Without a terminal, progress is a line for each so many percent."""

PLAIN_SECONDS = 15.0
"""And a line after so many seconds, if anything has changed."""

_REST = "the rest is Python and its libraries before the first byte (512 MiB by default), and workspace"
_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}


def error_lines(error: BaseException) -> Iterator[str]:
    """An error for people: every problem on a line of its own."""
    cause = error.__cause__ if isinstance(error, JobFailedError) else error
    problems = cause.problems if isinstance(cause, RecipeError) else ()
    if len(problems) > 1:
        yield f"error: {len(problems)} problems:"
        yield from (f"  - {problem}" for problem in problems)
    elif problems:
        yield f"error: {problems[0]}"
    else:
        yield f"error: {error}"


def show_error(console: Console, error: BaseException) -> None:
    """Print an error."""
    for line in error_lines(error):
        style = "bold red" if line.startswith("error:") else None
        console.print(Text(line, style=style or ""), soft_wrap=True, highlight=False)


@contextmanager
def job_progress(console: Console) -> Iterator[Callable[[Job], None]]:
    """Show one job's progress while it is waited for: call what this yields with every look at the job."""
    if not console.is_terminal:
        yield _plain_job(console)
        return
    with _bar(console) as bar:
        row = bar.add_task("queued", total=None)

        def show(job: Job) -> None:
            done, total = job.moved
            bar.update(row, description=state_text(job), completed=done, total=total or None)

        yield show


@contextmanager
def byte_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show bytes as they come: call what this yields with those that are here, and all."""
    if not console.is_terminal:
        yield _plain_bytes(console, what)
        return
    with _bar(console) as bar:
        row = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def state_text(job: Job) -> str:
    """A job's state, and what it is busy with."""
    progress = job.progress
    if job.state == "running" and progress.surveys_done < progress.surveys_total:
        return f"running, survey {progress.surveys_done} of {progress.surveys_total}"
    if job.cancel_requested and not job.is_terminal:
        return f"{job.state}, to be cancelled"
    return job.state


def job_table(jobs: Iterable[Job]) -> Table:
    """Jobs as a table."""
    table = Table("job", "state", "method", "progress", "created", "output", "why", box=None, pad_edge=False)
    for job in jobs:
        total = job.progress.bytes_total
        first, *others = _reasons(job) or [""]
        table.add_row(
            job.id,
            Text(job.state, style=_COLOURS.get(job.state, "")),
            job.method,
            f"{job.percent} % of {size_text(total)}" if total else "",
            f"{job.created_at:%Y-%m-%d %H:%M:%S}",
            Text(job.output),
            Text(f"{first} (and {len(others)} more)" if others else first),
        )
    return table


def _reasons(job: Job) -> list[str]:
    """Why a job failed."""
    return [] if job.error is None else list(job.error.get("problems") or [job.error["detail"]])


def job_lines(job: Job) -> Iterator[str]:
    """One job, for people."""
    progress = job.progress
    yield f"{job.id}  {state_text(job)}"
    yield f"  method    {job.method}"
    yield f"  output    {job.output}"
    yield f"  created   {job.created_at:%Y-%m-%d %H:%M:%S} UTC"
    if job.ended_at is not None:
        took = timedelta(seconds=round((job.ended_at - job.created_at).total_seconds()))
        yield f"  ended     {job.ended_at:%Y-%m-%d %H:%M:%S} UTC, after {took}"
    price = job.price or {}
    if progress.bytes_total:
        if not job.is_terminal:
            yield f"  done      {job.percent} % of what is read and written"
        if progress.surveys_total:
            yield f"  surveys   {progress.surveys_done} of {progress.surveys_total} passes"
        at_most = f" of at most {size_text(price['bytes_read'])}" if "bytes_read" in price else ""
        yield f"  read      {size_text(progress.bytes_read)}{at_most}"
        share = f"{size_text(progress.bytes_done)} of {size_text(progress.bytes_total)}"
        yield f"  written   {share}, {progress.parts_done} of {progress.parts_total} parts"
    if price:
        memory = f"{size_text(price['peak_bytes'])} of memory a worker at most"
        yield f"  price     {price['requests']:,} requests to the stores, {memory}"
    for notice in job.notices:
        yield f"  note      {notice}"
    for reason in _reasons(job):
        yield f"  error     {reason}"


def price_table(plan: Mapping[str, Any]) -> Table:
    """What a plan costs."""
    price = plan["price"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    rows = [
        ("tensors", f"{plan['tensors']:,}"),
        ("files", f"{len(plan['shards'])}"),
        ("written", size_text(price["bytes_written"])),
        (
            "read",
            f"at most {size_text(price['bytes_read'])} (the inputs hold {size_text(price['input_bytes'])})",
        ),
        ("requests", f"{price['requests']:,}"),
        ("parts", f"{price['parts']:,}"),
    ]
    if price["survey_tasks"]:
        tensors = f"{price['surveyed_tensors']:,} tensors read up to {price['most_reads']} times"
        surveyed = f"{price['survey_tasks']:,}, for {tensors}"
        rows.append(("survey tasks", surveyed))
    held = f"{size_text(price['arena_bytes'])} of it for tensors, the most for {price['worst']}"
    rows.append(("memory", f"{size_text(price['peak_bytes'])} a worker at most: {held}; {_REST}"))
    if price["gpu_bytes"]:
        rows.append(("GPU memory", f"{size_text(price['gpu_bytes'])} a worker at most"))
    rows.append(("plan", plan["digest"]))
    rows.extend(("note", notice) for notice in plan["notices"])
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def method_table(methods: Iterable[Mapping[str, Any]]) -> Table:
    """Merge methods with their parameters."""
    table = Table("method", "models", "parameters", "what it does", box=None, pad_edge=False)
    for method in methods:
        least, most = method["min_models"], method["max_models"]
        count = f"{least}" if most == least else f"{least}+" if most is None else f"{least}–{most}"
        names = [
            *method["model_parameters"].get("properties", {}),
            *method["parameters"].get("properties", {}),
        ]
        base = {"required": " + base", "optional": " (+ base)"}.get(method["base"], "")
        table.add_row(method["name"], count + base, ", ".join(dict.fromkeys(names)), method["summary"])
    return table


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _plain_job(console: Console) -> Callable[[Job], None]:
    state, shown = "", -1
    told = monotonic()

    def show(job: Job) -> None:
        nonlocal state, shown, told
        step = (job.percent or 0) // STEP_PERCENT
        if job.state != state:
            line = f"{job.id} {job.state}"
        elif step > shown or (monotonic() - told > PLAIN_SECONDS and job.percent is not None):
            line = f"{job.id} {state_text(job)} {job.percent} % {_amounts(job)}"
        else:
            return
        state, shown, told = job.state, step, monotonic()
        console.print(line, soft_wrap=True, highlight=False)

    return show


def _amounts(job: Job) -> str:
    """What was read and written, of what will be."""
    progress = job.progress
    written = f"{size_text(progress.bytes_done)} of {size_text(progress.bytes_total)} written"
    if job.price is None:
        return written
    return f"{size_text(progress.bytes_read)} of {size_text(job.price['bytes_read'])} read, {written}"


def _plain_bytes(console: Console, what: str) -> Callable[[int, int], None]:
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        step = 100 * done // total // STEP_PERCENT if total else 100 // STEP_PERCENT
        if step > shown:
            shown = step
            amount = f"{size_text(done)} of {size_text(total)}"
            console.print(f"{what} {step * STEP_PERCENT} % {amount}", soft_wrap=True, highlight=False)

    return show
