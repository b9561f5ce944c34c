"""What was measured, and what follows from it: medians, ratios within rounds, cost per gigabyte. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

COPY = "copy"
SERVICE = "service"
COLD = "cold"
MERGEKIT = "mergekit"
BUDGET = "budget"
WORKERS = "workers"
CONTENDERS = (COPY, SERVICE, COLD, MERGEKIT)
WHAT = (*CONTENDERS, BUDGET, WORKERS)

GB = 1e9


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run of one contender."""

    what: str
    """One of :data:`WHAT`."""
    size: str
    """Size of the inputs."""
    store: str
    """``files`` or ``s3``."""
    method: str
    """Merge method."""
    round: int
    """Which round, from 1; ratios are taken within one."""
    wall_s: float
    """Wall seconds."""
    cpu_s: float
    """CPU seconds of all its processes."""
    input_bytes: int
    """Bytes of the inputs, each counted once."""
    output_bytes: int
    """Bytes of the output."""
    server_cpu_s: float | None = None
    """CPU seconds of the S3 server meanwhile."""
    process_peak_bytes: int = 0
    """VmHWM of the biggest process."""
    own_peak_bytes: int = 0
    """Most anonymous and shared memory of all processes together."""
    worker_peak_bytes: int = 0
    """VmHWM of the biggest worker of ours while it did this job."""
    priced_peak_bytes: int = 0
    """What the price of the job says that a worker may need."""
    workers: int = 0
    """CPUs that Ray offers; 0 is all of the machine's."""
    digest: str = ""
    """SHA-256 of the shards."""


@dataclass(frozen=True, slots=True)
class Results:
    """All runs of one size, and where they were made."""

    size: str
    """Size of the inputs."""
    made: str
    """Date and time, UTC."""
    machine: Mapping[str, str]
    """The machine, in words."""
    versions: Mapping[str, str]
    """Versions of what ran."""
    notes: Sequence[str] = ()
    """How it was measured, where that depends on the machine."""
    checks: Sequence[str] = ()
    """What was found right."""
    runs: Sequence[Run] = field(default_factory=tuple)
    """Every run."""

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What :meth:`to_json` wrote."""
        body: dict[str, Any] = json.loads(text)
        return cls(**{**body, "runs": tuple(Run(**run) for run in body["runs"])})


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and how far the values lie apart."""

    median: float
    """The middle one."""
    least: float
    """The smallest."""
    most: float
    """The biggest."""
    count: int
    """How many there are."""

    def __str__(self) -> str:
        if self.count == 1:
            return f"{figure(self.median)}"
        return f"{figure(self.median)} ({figure(self.least)}–{figure(self.most)})"


def spread(values: Iterable[float]) -> Spread | None:
    """The median and range of some values; ``None`` where there are none."""
    known = list(values)
    return Spread(median(known), min(known), max(known), len(known)) if known else None


def figure(value: float) -> str:
    """Three significant digits, and no more than two after the point."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def select(runs: Iterable[Run], **wanted: object) -> list[Run]:
    """The runs whose fields have these values."""
    return [run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())]


def ratios(above: Iterable[Run], below: Iterable[Run]) -> list[float]:
    """Wall time over wall time, for every round that has both."""
    others = {run.round: run.wall_s for run in below}
    return [run.wall_s / others[run.round] for run in above if run.round in others]


def cpu_per_gb(run: Run) -> float:
    """CPU seconds for each 10⁹ bytes of input."""
    return run.cpu_s / (run.input_bytes / GB)


def server_cpu_per_gb(run: Run) -> float:
    """The S3 server's."""
    return (run.server_cpu_s or 0.0) / (run.input_bytes / GB)


@dataclass(frozen=True, slots=True)
class Line:
    """All about one contender at one method on one store."""

    store: str
    """``files`` or ``s3``."""
    method: str
    """Merge method."""
    what: str
    """Contender."""
    wall: Spread
    """Wall seconds."""
    to_copy: Spread | None
    """Its wall time over the copy's."""
    mergekit_to: Spread | None
    """mergekit's wall time over its own."""
    cpu: Spread
    """CPU seconds for each 10⁹ bytes of input."""
    server_cpu: Spread | None
    """The S3 server's, likewise."""
    memory_bytes: int
    """Peak of the biggest process; of our workers where there are any."""
    together_bytes: int
    """Peak of anonymous and shared memory of all processes together."""
    memory_of_priced: float | None
    """A worker's peak over the priced one."""


def lines(results: Results) -> list[Line]:
    """The table of contenders, in the order in which they were first run."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in results.runs:
        if run.what in CONTENDERS:
            groups.setdefault((run.store, run.method, run.what), []).append(run)
    order = {store: number for number, store in enumerate(dict.fromkeys(key[0] for key in groups))}
    methods = {method: number for number, method in enumerate(dict.fromkeys(key[1] for key in groups))}
    keys = sorted(groups, key=lambda key: (order[key[0]], methods[key[1]], CONTENDERS.index(key[2])))
    return [_line(*key, groups[key], groups) for key in keys]


def _line(
    store: str, method: str, what: str, runs: list[Run], groups: Mapping[tuple[str, str, str], list[Run]]
) -> Line:
    copies = [] if what == COPY else groups.get((store, method, COPY), [])
    theirs = groups.get((store, method, MERGEKIT), []) if what in (SERVICE, COLD) else []
    return Line(
        store,
        method,
        what,
        _known(run.wall_s for run in runs),
        spread(ratios(runs, copies)),
        spread(ratios(theirs, runs)),
        _known(map(cpu_per_gb, runs)),
        spread(server_cpu_per_gb(run) for run in runs if run.server_cpu_s is not None),
        max(run.worker_peak_bytes or run.process_peak_bytes for run in runs),
        max(run.own_peak_bytes for run in runs),
        max((used_of_priced(run) for run in runs if run.priced_peak_bytes), default=None),
    )


def used_of_priced(run: Run) -> float:
    """A worker's measured peak over what the price promises."""
    return run.worker_peak_bytes / run.priced_peak_bytes


def _known(values: Iterable[float]) -> Spread:
    found = spread(values)
    if found is None:
        raise ValueError("a line without a run")
    return found


@dataclass(frozen=True, slots=True)
class Scale:
    """A series of runs that differ in one thing: the worker count, or the size of the model."""

    label: str
    """What is different."""
    method: str
    """Merge method."""
    input_bytes: int
    """Bytes of the inputs."""
    wall: Spread
    """Wall seconds."""
    cpu: Spread
    """CPU seconds for each 10⁹ bytes of input."""
    worker_peak_bytes: int
    """VmHWM of the biggest worker."""
    priced_peak_bytes: int
    """What was promised."""


def scales(runs: Sequence[Run], label: Callable[[Run], str]) -> list[Scale]:
    """The runs by method and label, in order."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, label(run)), []).append(run)
    return [
        Scale(
            key,
            method,
            group[0].input_bytes,
            _known(run.wall_s for run in group),
            _known(map(cpu_per_gb, group)),
            max(run.worker_peak_bytes for run in group),
            max(run.priced_peak_bytes for run in group),
        )
        for (method, key), group in groups.items()
    ]
