"""``make bench``: Mergemill, a plain copy and mergekit, on the same files, in one run, interleaved."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.cases import METHODS, Case, case
from benchmarks.check import check
from benchmarks.groups import group
from benchmarks.inputs import SIZES, Inputs, make_inputs
from benchmarks.machine import load, machine, versions
from benchmarks.places import FILES, STORES, Place, digest, place
from benchmarks.results import BUDGET, COLD, COPY, MERGEKIT, SERVICE, WHAT, WORKERS, Results, Run
from benchmarks.runs import (
    BenchmarkError,
    Service,
    Setup,
    output_name,
    run_cold,
    run_copy,
    run_mergekit,
    run_service,
    service,
)
from mergemill.session import interruptible
from tests.servers.rgw import missing_binaries

BUDGET_BYTES = 1 << 30
"""What a worker may use in the runs that are compared over sizes."""

SCALED = ("linear", "ties")
"""Methods that are run for budgets and worker counts: the cheapest and the dearest."""

WARM_UP = "tiny"
"""Size of the inputs of the merge of each method that a service has done before its first timed one."""

WARMING = "warm-up"

TABLE_WIDTH = 140
"""Cells are not cut off where nobody looks: in a log, or on a narrow terminal, which wraps them."""

DEFAULT_WHAT = {"7b": (COPY, SERVICE, BUDGET)}
"""Where it is not everything: mergekit needs more disk and hours."""


@dataclass
class Bench:
    """One benchmark of one size."""

    inputs: Inputs
    """What is merged."""
    warm_up: Inputs
    """What a service merges first."""
    methods: Sequence[str]
    """Merge methods."""
    what: Sequence[str]
    """Contenders."""
    rounds: int
    """How often each is run."""
    scratch: Path
    """Where outputs go."""
    oracle: Path | None
    """mergekit's environment; ``None`` when it does not run."""
    console: Console
    """Where progress is shown."""
    runs: list[Run] = field(default_factory=list)
    """What was measured."""
    checks: dict[str, None] = field(default_factory=dict)
    """What was found right, each once."""
    digests: dict[str, str] = field(default_factory=dict)
    """The one digest that every merge of ours by a method has to have."""

    def at(self, where: Place) -> None:
        """Run everything that was asked for in one store."""
        setup = Setup(where, self.scratch, self.oracle)
        cases = [case(method, self.inputs.size.tunes) for method in self.methods]
        if {COPY, SERVICE, COLD, MERGEKIT, BUDGET} & set(self.what):
            with self._service(setup, 0, {SERVICE, BUDGET}) as up:
                for number in range(1, self.rounds + 1):
                    for each in cases:
                        self._round(setup, up, each, number)
        if WORKERS in self.what and where.name == FILES:
            cores = len(os.sched_getaffinity(0))
            for workers in sorted({1, 2, cores // 2, cores} - {0}):
                if workers <= cores:
                    with self._service(setup, workers, {WORKERS}) as up:
                        for number in range(1, self.rounds + 1):
                            for each in cases:
                                if up is not None and each.method in SCALED:
                                    self._done(setup, each, run_service(setup, up, each, number, WORKERS))

    def _round(self, setup: Setup, up: Service | None, each: Case, number: int) -> None:
        if COPY in self.what:
            self._done(setup, each, run_copy(setup, each, number))
        if up is not None and SERVICE in self.what:
            self._done(setup, each, run_service(setup, up, each, number))
        if up is not None and BUDGET in self.what and setup.place.name == FILES and each.method in SCALED:
            self._done(setup, each, run_service(setup, up, each, number, BUDGET, BUDGET_BYTES))
        if COLD in self.what:
            self._done(setup, each, run_cold(setup, each, number))
        if MERGEKIT in self.what:
            self._done(setup, each, run_mergekit(setup, each, number))

    @contextlib.contextmanager
    def _service(self, setup: Setup, workers: int, needed_by: set[str]) -> Iterator[Service | None]:
        """A service that has merged before, where anything needs one."""
        if not needed_by & set(self.what):
            yield None
            return
        with service(setup, workers) as up:
            self.console.print(f"A service is up ({setup.place.name}, workers: {workers or 'all'}).")
            local = replace(setup.place, inputs=self.warm_up)
            for method in self.methods:
                each = case(method, self.inputs.size.tunes)
                run_service(replace(setup, place=local), up, each, 0, WARMING)
                local.clear(local.output(output_name(WARMING, each)))
            yield up

    def _done(self, setup: Setup, each: Case, run: Run) -> None:
        """Check a result, remove it, and keep the figures."""
        where = setup.place
        output = where.output(output_name(run.what, each))
        if run.what != COPY:
            if run.round == 1:
                self.checks[check(where, each, run.what, output)] = None
            if run.what != MERGEKIT:
                run = replace(run, digest=digest(where.store, output))
                first = self.digests.setdefault(each.method, run.digest)
                if run.digest != first:
                    raise BenchmarkError(
                        f"{run.what} {each.method} on {where.name} made other bytes than before"
                    )
        where.clear(output)
        self.runs.append(run)
        self.console.print(report.progress(run), highlight=False)


def main() -> int:
    """Run what was asked for and write the report."""
    arguments = _arguments()
    if not arguments.report_only:
        run(arguments)
    report.write(arguments.build, arguments.docs)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Run what was asked for and keep the results."""
    size = SIZES[arguments.size]
    what = arguments.what or DEFAULT_WHAT.get(size.name, WHAT)
    build: Path = arguments.build.resolve()
    oracle = arguments.oracle.absolute() if MERGEKIT in what else None
    if oracle is not None and not (oracle / "bin" / "mergekit-yaml").exists():
        raise SystemExit(
            f"there is no mergekit in {oracle}: `make oracle` makes one, or leave it out of WHAT"
        )
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    scratch = build / "scratch"
    with interruptible(), alone(build):
        console.print(f"Making the inputs of size {size.name}, unless they are there.")
        inputs = make_inputs(size, build / "inputs")
        warm_up = make_inputs(SIZES[WARM_UP], build / "inputs")
        try:
            for name in arguments.stores:
                shutil.rmtree(scratch, ignore_errors=True)
                with place(name, (inputs, warm_up), scratch) as where:
                    bench = Bench(
                        inputs, warm_up, arguments.methods, what, arguments.rounds, scratch, oracle, console
                    )
                    scratch.mkdir(parents=True, exist_ok=True)
                    before = load()
                    try:
                        bench.at(where)
                    except KeyboardInterrupt:  # what was measured until then is as good as ever
                        report.save(_results(bench, oracle, before), name, build)
                        raise
                results = _results(bench, oracle, before)
                report.save(results, name, build)
                report.show(results, console)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def alone(build: Path) -> Iterator[None]:
    """Refuse to share the directory, and so the machine, with another benchmark.

    :raises SystemExit: one is running.
    """
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another benchmark is running in {build}") from None
        yield


def _results(bench: Bench, oracle: Path | None, before: float) -> Results:
    size = bench.inputs.size
    with group("probe") as probe:
        exact = probe.exact
    notes = [
        f"Load average before the first run: {before:.1f}.",
        "CPU time is the kernel's sum of a control group."
        if exact
        else "CPU time is added up from the process table: a lower bound for processes that end.",
    ]
    if size.cold:
        notes.append("Inputs were read from the disk: the page cache was emptied of them before every run.")
    made = datetime.now(UTC).isoformat(timespec="minutes")
    found = machine(bench.inputs.root), versions(oracle)
    return Results(size.name, made, *found, notes, list(bench.checks), bench.runs)


def _arguments() -> argparse.Namespace:
    stores = [FILES] if missing_binaries() else list(STORES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="1b", help="of the models; %(default)s by default")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="merge methods; all by default")
    add("--stores", nargs="+", choices=STORES, default=stores, help="files alone where Ceph is not installed")
    add("--what", nargs="+", choices=WHAT, help="contenders; all by default, for 7b: copy service budget")
    add("--rounds", type=int, default=3, help="how often each is run; %(default)s by default")
    add("--oracle", type=Path, default=Path(".venv-oracle"), help="mergekit's environment")
    add("--build", type=Path, default=Path("build/bench"), help="where inputs, outputs and results go")
    add("--docs", action="store_true", help="write the report into docs/ too")
    add(
        "--report-only",
        action="store_true",
        help="run nothing; write the report of the results that are there",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
