"""What came out: on the terminal, as JSON, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import SIZES
from benchmarks.picture import picture
from benchmarks.results import (
    BUDGET,
    COLD,
    COPY,
    GB,
    MERGEKIT,
    SERVICE,
    WORKERS,
    Line,
    Results,
    Run,
    Scale,
    Spread,
    figure,
    lines,
    scales,
    select,
)

DOCS = Path(__file__).parents[1] / "docs"
PAGE = "benchmarks.md"
PICTURE = "benchmarks.svg"

BEGIN, END = "<!-- made by make bench: begin -->", "<!-- made by make bench: end -->"

NAMES = {COPY: "plain copy", SERVICE: "service, up", COLD: "`mergemill merge`, cold", MERGEKIT: "mergekit"}

COLUMNS = (
    "method",
    "what",
    "wall, s",
    "÷ copy",
    "mergekit ÷",
    "CPU-s/GB",
    "server's",
    "peak",
    "all",
    "÷ price",
)
"""``peak`` is the biggest process (of ours: the biggest worker), ``all`` is everything together, in MiB."""


def progress(run: Run) -> str:
    """One line about one run."""
    memory = _mib(run.worker_peak_bytes or run.process_peak_bytes)
    return (
        f"{run.size} {run.store} {run.method:15} {run.what:8} {run.round}  "
        f"{figure(run.wall_s):>6} s  {figure(run.cpu_s):>6} CPU-s  {memory} MiB"
    )


def cells(line: Line) -> list[str]:
    """A line's cells, in the order of :data:`COLUMNS`."""
    return [
        line.method,
        NAMES[line.what],
        str(line.wall),
        _or_dash(line.to_copy),
        _or_dash(line.mergekit_to),
        str(line.cpu),
        _or_dash(line.server_cpu),
        _mib(line.memory_bytes),
        _mib(line.together_bytes),
        "–" if line.memory_of_priced is None else f"{line.memory_of_priced:.2f}",
    ]


def scale_cells(scale: Scale) -> list[str]:
    """A line of a series: label, method, input, wall, CPU, the worker's peak and the promised one."""
    peaks = _mib(scale.worker_peak_bytes), _mib(scale.priced_peak_bytes)
    gigabytes = figure(scale.input_bytes / GB)
    return [scale.method, scale.label, gigabytes, str(scale.wall), str(scale.cpu), *peaks]


def show(results: Results, console: Console) -> None:
    """Print the results."""
    for store in dict.fromkeys(line.store for line in lines(results)):
        table = Table(title=f"{results.size} on {store}: median (least–most)", title_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        for line in lines(results):
            if line.store == store:
                table.add_row(*(cell.replace("`", "") for cell in cells(line)))
        console.print(table)
    for name, label, runs in _series(results):
        table = Table(
            "method", label, "GB in", "wall, s", "CPU-s/GB", "peak", "price", title=name, title_justify="left"
        )
        for scale in runs:
            table.add_row(*scale_cells(scale))
        console.print(table)
    for check in results.checks:
        console.print(f"right: {check}", highlight=False)


def save(results: Results, store: str, build: Path) -> None:
    """Keep the results of one store, in place of those of the last time."""
    directory = build / "results"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{results.size}-{store}.json").write_text(results.to_json())


def saved(build: Path) -> list[Results]:
    """All results that are kept, in the order of sizes and stores."""
    found = [Results.from_json(path.read_text()) for path in sorted((build / "results").glob("*.json"))]
    order = list(SIZES)
    return sorted(found, key=lambda results: order.index(results.size))


def write(build: Path, docs: bool) -> None:
    """Write the report of all results that are kept beside them, and into ``docs/`` if wanted."""
    found = saved(build)
    text, drawn = markdown(found), picture(found)
    (build / PAGE).write_text(text)
    (build / PICTURE).write_text(drawn)
    if docs:
        page = DOCS / PAGE
        page.write_text(inserted(page.read_text(), text))
        (DOCS / PICTURE).write_text(drawn)


def inserted(page: str, text: str) -> str:
    """A page with what is between the marks replaced; what people wrote around them stays.

    :raises ValueError: it has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost its marks: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def markdown(found: Sequence[Results]) -> str:
    """All results as a document's section."""
    return "\n".join(_paragraphs(found)) + "\n"


def _paragraphs(found: Sequence[Results]) -> Iterator[str]:
    yield f"![Wall time, cost against size and memory]({PICTURE})\n"
    for results in found:
        for store in dict.fromkeys(run.store for run in results.runs):
            yield f"## {results.size}, {store}\n"
            yield (
                f"{results.made}. "
                + "; ".join(f"{name}: {value}" for name, value in results.machine.items())
                + "."
            )
            yield "; ".join(f"{name} {value}" for name, value in results.versions.items()) + "."
            yield " ".join(results.notes) + "\n"
            chosen = [line for line in lines(results) if line.store == store]
            if chosen:
                yield from _table(COLUMNS, map(cells, chosen), 2)
        for name, label, series in _series(results):
            yield f"### {name}\n"
            columns = ("method", label, "GB in", "wall, s", "CPU-s/GB", "worker's peak, MiB", "promised, MiB")
            yield from _table(columns, map(scale_cells, series), 2)
        if results.checks:
            yield (
                "Checked: " + "; ".join(results.checks) + ". Every merge of ours by a method, in every round,"
            )
            yield "cold and by the service, with every worker count and budget, has the same SHA-256.\n"
    by_size = scales(
        [run for results in found for run in select(results.runs, what=BUDGET)], lambda run: run.size
    )
    if by_size:
        yield "## Cost against size\n"
        yield "By the service, on files, with a budget of 1 GiB a worker.\n"
        columns = ("method", "size", "GB in", "wall, s", "CPU-s/GB", "worker's peak, MiB", "promised, MiB")
        ordered = sorted(by_size, key=lambda scale: (scale.method, scale.input_bytes))
        yield from _table(columns, map(scale_cells, ordered), 2)


def _series(results: Results) -> Iterator[tuple[str, str, list[Scale]]]:
    if runs := select(results.runs, what=WORKERS):
        yield (
            f"{results.size} by the number of workers",
            "workers",
            scales(runs, lambda run: str(run.workers)),
        )
    if runs := select(results.runs, what=BUDGET):
        yield f"{results.size} in a budget of 1 GiB a worker", "size", scales(runs, lambda run: run.size)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' if number < left else '---:' for number in range(len(columns)))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _or_dash(value: Spread | None) -> str:
    return "–" if value is None else str(value)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f}"
