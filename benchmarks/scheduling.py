"""What it costs to schedule a job of ten thousand parts: ``python -m benchmarks.scheduling``.

Runs jobs of parts of the default size by the real Valkey, scheduler, Ray and API, on workers that make nothing
(:mod:`benchmarks.hollow`), and adds up the CPU time of everything around the workers, by who used it. Beside it, as
the measure, stands what the workers would have used: the CPU time a GB of the cheapest merge that reads all it is
given, a linear one of three models, which this machine makes first.

Most of the cost is a part's, but some is time's, and workers that make nothing take hardly any. So one more job runs
at a pace that is nearer to that of real parts, and what a second costs is told from what a part costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from benchmarks.cases import Recipe, case
from benchmarks.hollow import PACE_FILE, make_hollow_inputs
from benchmarks.inputs import SIZES, Inputs, Size, make_inputs
from benchmarks.stages import profile
from benchmarks.usage import ROLES, SAMPLE_S, SCHEDULING, Processes, Sample, Watch
from mergemill.client import Client
from mergemill.jobs import Job
from service.planning.plan import PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_recipe
from service.valkey import EmbeddedValkey
from workers.store.local import LocalStore

SHAPES = {
    size.name: size
    for size in (
        Size("large", 16384, 126, 128, 8, 53248, 128256, 5_000_000_000),
        Size("small", 2048, 16, 32, 8, 5632, 32000, 5_000_000_000),
    )
}
"""Whose layers are repeated. ``large`` is Llama 3.1 405B: a part is a run of one tensor. ``small`` has tensors of
2 to 23 MB, as models of many experts do: a part is six of them."""

METHOD = "linear"
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One job."""

    parts: int
    """Parts in its plan."""
    input_bytes: int
    """Bytes that its workers would have read."""
    pace_s: float
    """Seconds that a worker took for a part."""
    phases_s: dict[str, float]
    """Wall seconds by state."""
    cpu_s: dict[str, dict[str, float]]
    """CPU seconds by state and role."""
    peak_bytes: dict[str, int]
    """VmHWM of the scheduler and its driver."""

    @property
    def wall_s(self) -> float:
        """From accepted to succeeded."""
        return sum(self.phases_s.values())

    def used(self, *roles: str) -> float:
        """CPU seconds of some roles in all phases."""
        return sum(used.get(role, 0.0) for used in self.cpu_s.values() for role in roles)


def shape_of(size: Size, parts: int) -> Size:
    """The size with as many layers as make about ``parts`` parts of the default size, at least one."""
    without, one = (2 * replace(size, layers=layers).parameters for layers in (0, 1))
    layers = max(1, round((parts * PlanOptions().part_bytes - without) / (one - without)))
    return replace(size, name=f"{size.name}-{layers}-layers", layers=layers)


def seconds_by_phase(history: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Wall seconds by state; see :func:`used_by_phase`."""
    found: dict[str, float] = {}
    for (state, begun), (_, ended) in pairwise(history):
        found[state] = found.get(state, 0.0) + ended - begun
    return found


def used_by_phase(
    history: Sequence[tuple[str, float]], samples: Sequence[Sample]
) -> dict[str, dict[str, float]]:
    """CPU seconds by state and role; between two samples, in proportion to the time.

    :param history: each state and when it began, in order; the last is the end. A state may come again.
    """
    found: dict[str, dict[str, float]] = {}
    for (state, begun), (_, ended) in pairwise(history):
        own = found.setdefault(state, {})
        for role in samples[-1].cpu_s:
            own[role] = own.get(role, 0.0) + _until(samples, role, ended) - _until(samples, role, begun)
    return found


def _until(samples: Sequence[Sample], role: str, when: float) -> float:
    before = max((s for s in samples if s.at <= when), key=lambda s: s.at, default=samples[0])
    after = min((s for s in samples if s.at >= when), key=lambda s: s.at, default=samples[-1])
    low, high = before.cpu_s.get(role, 0.0), after.cpu_s.get(role, 0.0)
    return low if after.at <= before.at else low + (high - low) * (when - before.at) / (after.at - before.at)


def part_and_second(fast: Measured, slow: Measured, *roles: str) -> tuple[float, float]:
    """CPU seconds of a part and of a second, from two jobs whose parts took different times."""
    seconds = slow.wall_s / slow.parts - fast.wall_s / fast.parts
    second = (slow.used(*roles) / slow.parts - fast.used(*roles) / fast.parts) / seconds
    return (fast.used(*roles) - second * fast.wall_s) / fast.parts, second


@dataclass(frozen=True, slots=True)
class Stack:
    """A Mergemill whose workers make nothing."""

    client: Client
    """Its client."""
    processes: Processes
    """All of it."""
    pace: Path
    """The file with the seconds that a worker takes for a part."""

    def run(self, recipe: Recipe, output: Path, pace_s: float) -> Measured:
        """Run a job to its end.

        :raises JobFailedError: it did not succeed.
        """
        self.pace.write_text(str(pace_s))
        self.processes.sample()
        self.processes.forget_peaks()
        seen: dict[float, str] = {}  # the record keeps the latest events, and a job of many shards has more

        def look(job: Job) -> None:
            seen.update(
                {datetime.fromisoformat(e["at"]).timestamp(): e["state"] for e in job.body["history"]}
            )

        with Watch(self.processes) as watch:
            done = self.client.wait(self.client.submit(recipe, output.as_uri()).id, look)
        shutil.rmtree(output)
        history = history_of(seen)
        return Measured(
            done.progress.parts_total,
            done.progress.bytes_read,
            pace_s,
            seconds_by_phase(history),
            used_by_phase(history, watch.samples),
            self.processes.peaks(),
        )


def history_of(states: Mapping[float, str]) -> list[tuple[str, float]]:
    """Each state that a job was in and when it began, from the states after its events by their time."""
    found: list[tuple[str, float]] = []
    for at, state in sorted(states.items()):
        if not found or found[-1][0] != state:
            found.append((state, at))
    return found


@contextlib.contextmanager
def stack(scratch: Path) -> Iterator[Stack]:
    """Valkey, the API, and a scheduler of hollow merges with its Ray."""
    pace, ready = scratch / "pace", scratch / "ready"
    with EmbeddedValkey(scratch / "valkey") as valkey, socket.create_server(("127.0.0.1", 0)) as listener:
        env = os.environ | {
            "MERGEMILL_REDIS_URL": valkey.url,
            "MERGEMILL_STATE_DIR": str(scratch / "state"),
            "MERGEMILL_RAY_ADDRESS": "local",
            "MERGEMILL_AUTH": "off",
            PACE_FILE: str(pace),
        }
        serve = [sys.executable, "-m", "mergemill", "serve", "--fd", str(listener.fileno())]
        schedule = [sys.executable, "-m", "benchmarks.hollow", str(ready)]
        with (scratch / "log").open("ab") as log:
            started = [
                subprocess.Popen(command, env=env, stdout=log, stderr=log, pass_fds=[listener.fileno()])
                for command in (serve, schedule)
            ]
        try:
            with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                deadline = time.monotonic() + START_TIMEOUT_S
                while not ready.exists():
                    if time.monotonic() > deadline or started[1].poll() is not None:
                        raise SystemExit(
                            f"the scheduler did not come up:\n{(scratch / 'log').read_text()[-3000:]}"
                        )
                    time.sleep(SAMPLE_S)
                roots = {valkey.pid: "valkey", started[0].pid: "api", started[1].pid: None}
                yield Stack(client, Processes(roots), pace)
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait()


def merge_cpu_s(size: Size, build: Path) -> float:
    """CPU seconds a GB of input that a worker takes for a linear merge of a size."""
    inputs = make_inputs(size, build / "inputs")
    plan = plan_recipe(parse_recipe(_recipe(inputs)), PlanOptions(), LocalStore(), {}).plan
    return profile(plan, build / "scratch" / "scheduling")[1] / (plan.price.bytes_read / 1e9)


def _recipe(inputs: Inputs) -> Recipe:
    return case(METHOD, len(inputs.size.models) - 1).recipe(lambda model: str(inputs.directory(model)))


def report(jobs: Sequence[Measured], paced: Measured, merge_s: float) -> Iterator[str]:
    """Lines of Markdown: the jobs, what a part and a second cost, and their share of the biggest job."""
    yield (
        "| parts | pace, s | wall, s | planning, running, committing, s | "
        + " | ".join((*(f"{role}, ms a part" for role in ROLES), "scheduler's peak, MiB", "driver's, MiB"))
        + " |"
    )
    yield "|---:" * (6 + len(ROLES)) + "|"
    for job in (*jobs, paced):
        phases = ", ".join(f"{job.phases_s.get(p, 0.0):.1f}" for p in ("planning", "running", "committing"))
        used = (f"{1000 * job.used(role) / job.parts:.2f}" for role in ROLES)
        peaks = (f"{job.peak_bytes[role] >> 20}" for role in SCHEDULING)
        yield f"| {job.parts:,} | {job.pace_s:g} | {job.wall_s:.1f} | {phases} | {' | '.join((*used, *peaks))} |"
    biggest = max(jobs, key=lambda job: job.parts)
    nearest = min(jobs, key=lambda job: abs(job.parts - paced.parts))
    merging = merge_s * biggest.input_bytes / 1e9
    cores = len(os.sched_getaffinity(0))
    yield ""
    yield (
        f"The workers of the biggest job would use {merging:,.0f} CPU seconds: {biggest.input_bytes / 1e9:,.0f} GB at "
        f"{merge_s:.2f} a GB, {1000 * merging / biggest.parts:.0f} ms a part; {cores} cores, {merging / cores:,.0f} s."
    )
    for label, roles in (("scheduler and driver", SCHEDULING), ("all but the workers", ROLES)):
        _, second = part_and_second(nearest, paced, *roles)
        own = biggest.used(*roles) + second * max(0.0, merging / cores - biggest.wall_s)
        yield (
            f"- {label}: {biggest.used(*roles):.1f} CPU seconds, and {1000 * second:.1f} ms for each second "
            f"that it would take longer: {own:.1f} in all, {100 * own / (own + merging):.2f} % of the job."
        )


def main() -> int:
    """Print the table, and keep every figure in ``build/bench/scheduling.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", type=int, default=[1000, 3000, 10_000], help="about so many; %(default)s")
    add("--pace", nargs=2, type=float, default=[1000, 0.1], help="parts, and seconds for each; %(default)s")
    add("--shape", choices=SHAPES, default="large", help="of the model; %(default)s by default")
    add("--size", choices=SIZES, default="100m", help="of the merge that is measured beside it")
    add("--build", type=Path, default=Path("build/bench"), help="where inputs and results go")
    arguments = parser.parse_args()
    build = arguments.build.resolve()
    merge_s = merge_cpu_s(SIZES[arguments.size], build)
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as directory:
        scratch = Path(directory)
        with stack(scratch) as up:
            pairs = [(parts, 0.0) for parts in (100, *sorted(arguments.parts))]  # the first warms everything
            pairs.append((int(arguments.pace[0]), arguments.pace[1]))
            jobs = list(_run_all(up, SHAPES[arguments.shape], pairs, scratch))[1:]
    told = "\n".join(report(jobs[:-1], jobs[-1], merge_s)) + "\n"
    sys.stdout.write(told)
    found = {"shape": arguments.shape, "merge_cpu_s_per_gb": merge_s, "jobs": [asdict(job) for job in jobs]}
    (build / "scheduling.json").write_text(json.dumps(found, indent=2))
    return 0


def _run_all(up: Stack, size: Size, pairs: Iterable[tuple[int, float]], scratch: Path) -> Iterator[Measured]:
    for parts, pace_s in pairs:
        inputs = make_hollow_inputs(shape_of(size, parts), scratch / "inputs")
        job = up.run(_recipe(inputs), scratch / "output", pace_s)
        shutil.rmtree(inputs.root)
        sys.stderr.write(f"{job.parts:,} parts in {job.wall_s:.1f} s\n")
        yield job


if __name__ == "__main__":
    raise SystemExit(main())
