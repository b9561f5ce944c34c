"""The contenders: each merges (or copies) once and says what that took."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import yaml

from benchmarks.cases import SEED, Case
from benchmarks.copying import Reply, Request
from benchmarks.groups import Group, Watch, group
from benchmarks.places import FILES, Place
from benchmarks.results import COLD, COPY, MERGEKIT, SERVICE, Run
from mergemill.client import Client
from mergemill.stack_key import KEY_FILE
from service.jobs.jobstore import JobStore
from service.valkey import EmbeddedValkey

STOP_TIMEOUT_S = 60.0
"""Longest wait for a service to end, in seconds."""

MERGEKIT_FLAGS = ("--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
"""What somebody who is short of memory gives it; CPU. The rest is what our merges have no counterpart for here."""


class BenchmarkError(RuntimeError):
    """A contender failed; the message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every contender needs to know."""

    place: Place
    """Store and inputs."""
    scratch: Path
    """A directory for recipes, logs and what a contender downloads."""
    oracle: Path | None
    """The environment that mergekit is installed in; ``None`` when it does not run."""

    def blank(self, what: str, case: Case, number: int) -> Run:
        """A run that has measured nothing yet."""
        inputs = self.place.inputs
        return Run(
            what, inputs.size.name, self.place.name, case.method, number, 0.0, 0.0,
            input_bytes=inputs.nbytes(case.models), output_bytes=inputs.nbytes(case.models[:1]),
        )  # fmt: skip


def output_name(what: str, case: Case) -> str:
    """Where a contender's result of a case goes, below the place's root."""
    return f"{case.method}-{what}"


@contextlib.contextmanager
def watched(setup: Setup, processes: Group) -> Iterator[tuple[Watch, list[float | None]]]:
    """Watch a contender, and the S3 server's CPU seconds meanwhile."""
    server = setup.place.server
    before = None if server is None else server.cpu_seconds()
    meanwhile: list[float | None] = [None]
    with Watch(processes) as watch:
        yield watch, meanwhile
    if server is not None and before is not None:
        meanwhile[0] = server.cpu_seconds() - before


def run_copy(setup: Setup, case: Case, number: int) -> Run:
    """The plain copy. Its time and CPU are its own reading, from when its processes are there and connected."""
    place = setup.place
    output = place.output(output_name(COPY, case))
    place.prepare(output, case.models)
    names = [path.name for path in place.inputs.files(case.models[0])]
    if place.name == FILES:
        directory = Path(output.removeprefix("file://"))
        directory.mkdir(parents=True)
        sources = [[str(place.inputs.directory(model) / name) for model in case.models] for name in names]
        targets = [str(directory / name) for name in names]
    else:
        sources = [[f"{place.model(model)}/{name}" for model in case.models] for name in names]
        targets = [f"{output}/{name}" for name in names]
    request = Request(
        tuple(map(tuple, sources)),
        tuple(path.stat().st_size for path in place.inputs.files(case.models[0])),
        tuple(targets),
        processes=_cores() * (1 if place.name == FILES else 2),
        store=None if place.settings is None else dict(place.settings),
    )
    asked, told = setup.scratch / "copy.json", setup.scratch / "copied.json"
    asked.write_text(json.dumps(asdict(request)))
    with group(COPY) as processes, watched(setup, processes) as (watch, server):
        _run(processes, [sys.executable, "-m", "benchmarks.copying", str(asked), str(told)], setup)
    reply = Reply(**json.loads(told.read_text()))
    place.clear(output)
    found = replace(setup.blank(COPY, case, number), wall_s=reply.wall_s, cpu_s=reply.cpu_s)
    return replace(
        found,
        server_cpu_s=server[0],
        process_peak_bytes=watch.process_peak_bytes,
        own_peak_bytes=watch.own_peak_bytes,
    )


@dataclass(frozen=True, slots=True)
class Service:
    """A Mergemill that is up."""

    client: Client
    """Its client."""
    jobs: JobStore
    """Its own records."""
    processes: Group
    """All of it: API, scheduler, Ray and its workers, Valkey."""
    workers: int
    """CPUs that its Ray offers; 0 is all."""


@contextlib.contextmanager
def service(setup: Setup, workers: int = 0) -> Iterator[Service]:
    """``mergemill up``, in a group of its own, on a Valkey as it would have started, whose records we can read.

    :raises BenchmarkError: it did not come up.
    """
    state = setup.scratch / f"state-{setup.place.name}-{workers}"
    shutil.rmtree(state, ignore_errors=True)
    argv = [*_mergemill(), "up", "--port", "0", "--state-dir", str(state)]
    with group(f"service-{workers}") as processes, EmbeddedValkey(state / "valkey") as valkey:
        processes.adopt(valkey.pid)
        more = {"MERGEMILL_REDIS_URL": valkey.url}
        if workers:
            more["MERGEMILL_RAY_CPUS"] = str(workers)
        up = subprocess.Popen(
            processes.command(argv), env=_environment(setup, more), stdout=subprocess.PIPE, text=True
        )
        processes.adopt(up.pid)
        try:
            said = up.stdout.readline() if up.stdout else ""
            if " is up at " not in said:
                raise BenchmarkError(f"`mergemill up` did not come up: {said}")
            url = said.partition(" is up at ")[2].split()[0]
            key = (state / KEY_FILE).read_text(encoding="ascii")
            with Client(url, api_key=key) as client, JobStore(valkey.url) as jobs:
                yield Service(client, jobs, processes, workers)
        finally:
            up.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                up.wait(STOP_TIMEOUT_S)
    shutil.rmtree(state, ignore_errors=True)


def run_service(
    setup: Setup, up: Service, case: Case, number: int, what: str = SERVICE, memory_bytes: int | None = None
) -> Run:
    """A merge by a service that is up: from accepted to succeeded, by the service's own clock.

    The workers' peak is theirs while they did this job: what each noted with its parts. From outside it would be
    that of the jobs before as well, whose arenas they keep until they make one for this job.
    """
    place = setup.place
    output = place.output(output_name(what, case))
    place.prepare(output, case.models)
    with watched(setup, up.processes) as (watch, server):
        job = up.client.submit(case.recipe(place.model), output, worker_memory_bytes=memory_bytes)
        done = up.client.wait(job.id)
    ended = datetime.fromisoformat(done.body["history"][-1]["at"])
    found = replace(
        setup.blank(what, case, number),
        wall_s=(ended - done.created_at).total_seconds(),
        workers=up.workers,
        priced_peak_bytes=done.body["price"]["peak_bytes"],
    )
    peak_bytes = max(part.peak_bytes for part in up.jobs.parts(job.id).values())
    return replace(_with_usage(found, watch, server[0]), worker_peak_bytes=peak_bytes)


def run_cold(setup: Setup, case: Case, number: int) -> Run:
    """``mergemill merge``, from a shell's view: start-up and the end of everything included."""
    place = setup.place
    output = place.output(output_name(COLD, case))
    place.prepare(output, case.models)
    recipe = setup.scratch / f"{case.method}.yml"
    recipe.write_text(yaml.safe_dump(case.recipe(place.model)))
    argv = [*_mergemill(), "merge", str(recipe), output, "--json"]
    with group(COLD) as processes, watched(setup, processes) as (watch, server):
        wall_s, said = _run(processes, argv, setup)
    price = json.loads(said)["price"]
    found = replace(setup.blank(COLD, case, number), wall_s=wall_s, priced_peak_bytes=price["peak_bytes"])
    return _with_usage(found, watch, server[0])


def run_mergekit(setup: Setup, case: Case, number: int) -> Run:
    """mergekit's command line in its own environment; on S3 with the download before and the upload after it."""
    place = setup.place
    result = setup.scratch / "mergekit-output"
    fetched = setup.scratch / "mergekit-inputs"
    shutil.rmtree(result, ignore_errors=True)
    shutil.rmtree(fetched, ignore_errors=True)
    output = place.output(output_name(MERGEKIT, case))
    place.prepare(output, case.models)
    above = place.inputs.root if place.name == FILES else fetched
    recipe = setup.scratch / f"mergekit-{case.method}.yml"
    recipe.write_text(yaml.safe_dump(case.recipe(lambda name: str(above / name))))
    if setup.oracle is None:
        raise BenchmarkError("no environment with mergekit was named")
    tool = str(setup.oracle / "bin" / "mergekit-yaml")
    merge = [tool, str(recipe), str(result), *MERGEKIT_FLAGS, "--random-seed", str(SEED)]
    with group(MERGEKIT) as processes, watched(setup, processes) as (watch, server):
        wall_s = 0.0
        if place.name == FILES:
            wall_s += _run(processes, merge, setup)[0]
        else:
            for model in case.models:
                wall_s += _run(
                    processes, _transfer(place, "download", place.model(model), fetched / model), setup
                )[0]
            wall_s += _run(processes, merge, setup)[0]
            wall_s += _run(processes, _transfer(place, "upload", output, result), setup)[0]
    shutil.rmtree(fetched, ignore_errors=True)
    if place.name == FILES:
        result.rename(output.removeprefix("file://"))
    shutil.rmtree(result, ignore_errors=True)
    return _with_usage(replace(setup.blank(MERGEKIT, case, number), wall_s=wall_s), watch, server[0])


def _transfer(place: Place, way: str, uri: str, directory: Path) -> list[str]:
    settings = json.dumps(dict(place.settings or {}))
    return [sys.executable, "-m", "benchmarks.transfer", way, settings, uri, str(directory)]


def _with_usage(run: Run, watch: Watch, server_cpu_s: float | None) -> Run:
    return replace(
        run,
        cpu_s=watch.cpu_s,
        server_cpu_s=server_cpu_s,
        process_peak_bytes=watch.process_peak_bytes,
        own_peak_bytes=watch.own_peak_bytes,
        worker_peak_bytes=watch.worker_peak_bytes,
    )


def _run(processes: Group, argv: Sequence[str], setup: Setup) -> tuple[float, str]:
    """Run a program to its end in a group; its wall seconds and what it wrote to standard output.

    :raises BenchmarkError: it failed.
    """
    log = setup.scratch / "program.log"
    with log.open("wb") as errors:
        begun = time.perf_counter()
        running = subprocess.Popen(
            processes.command(argv),
            env=_environment(setup, {}),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        processes.adopt(running.pid)
        said, _ = running.communicate()
        wall_s = time.perf_counter() - begun
    if running.returncode:
        raise BenchmarkError(
            f"{argv[:4]} ended with {running.returncode}: {log.read_text(errors='replace')[-3000:]}"
        )
    return wall_s, said


def _environment(setup: Setup, more: Mapping[str, str]) -> dict[str, str]:
    """Ours without a cluster or service that somebody else runs, and with what reaches the store."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MERGEMILL_URL")
    }
    return inherited | setup.place.environment | dict(more)


def _mergemill() -> list[str]:
    return [sys.executable, "-m", "mergemill"]


def _cores() -> int:
    return len(os.sched_getaffinity(0))
