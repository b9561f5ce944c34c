"""A thousand queued jobs under the eyes of a hundred clients: ``python -m benchmarks.load``.

A real Valkey that syncs every write, the API as its own process, and a real scheduler in a third, whose fleet is one
thread (:mod:`benchmarks.load_scheduler`). Jobs of four API keys and three priorities are submitted while 50 clients ask
for the status of one or another twice a second, and 50 follow one job after the other by its events, so that in the end
every job was followed from its beginning to its end. With all of them queued the scheduler is started, and drains the
queue while the clients go on and a job of the lowest priority is submitted every second.

Ends with 1 where something was lost, failed, or came out of turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from benchmarks.inputs import Inputs, Size, make_inputs
from benchmarks.load_client import JSON, Connection
from benchmarks.load_report import Queued, order_of, table, whole, write_between_marks
from benchmarks.machine import load, machine, versions
from benchmarks.usage import Processes
from service.keys import EVERYWHERE, Limits, Scope, new_key
from service.keystore import KeyStore
from service.valkey import EmbeddedValkey

DOCS = Path("docs/load.md")

SIZE = Size("load", 64, 1, 2, 2, 128, 128, 5_000_000_000, tunes=1)
"""Of a base and a fine-tune: a hundred thousand elements, one part."""

SHARES = {"ann": 0.4, "bob": 0.3, "cy": 0.2, "dee": 0.1}
"""How much of the queue is whose."""

ADMIN = "root"
"""Whose the jobs are that go before all others."""

PRIORITIES = (0, 0, 0, -10, -10, 10)
"""Taken in turn by the jobs of each key."""

PROBE_PRIORITY = -100
"""Of the jobs that are submitted while the queue drains."""

POLL_S = 0.5
PROBE_S = 1.0
START_TIMEOUT_S = 120.0
FILLING, DRAINING = "filling", "draining"


@dataclass
class Seen:
    """What the clients saw."""

    phase: str = FILLING
    """What goes on."""
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Seconds that answers took, by phase and kind."""
    jobs: list[Queued] = field(default_factory=list)
    """What was accepted, in that order."""
    ends: list[str] = field(default_factory=list)
    """The last state of each job that was followed to its end."""
    gaps: int = 0
    """Jobs whose events were not told in full."""
    events: int = 0
    """Events that came."""

    def took(self, phase: str, kind: str, seconds: float) -> None:
        """Take note of an answer."""
        self.times.setdefault(phase, {}).setdefault(kind, []).append(seconds)


@dataclass(frozen=True)
class Service:
    """A service under load."""

    port: int
    """Port of its API."""
    tokens: dict[str, str]
    """Tokens of the API keys, by whose they are."""
    inputs: Inputs
    """What its jobs merge."""
    outputs: Path
    """Where they write."""
    claims: Path
    """The file with the ids of the jobs that were begun."""
    go: Path
    """The file that the scheduler waits for before it begins any."""

    def connection(self, whose: str = ADMIN) -> Connection:
        """A client's connection."""
        return Connection(self.port, self.tokens[whose])

    async def submit(self, seen: Seen, client: Connection, key: str, number: int, priority: int) -> None:
        """Submit a job."""
        models = [{"model": str(self.inputs.directory(model))} for model in SIZE.models]
        body = {
            "recipe": {"merge_method": "linear", "models": models},
            "output": (self.outputs / str(number)).as_uri(),
            "priority": priority,
        }
        began, phase = time.perf_counter(), seen.phase
        job = await client.ask("POST", "/v1/merges", body)
        seen.took(phase, "submit", time.perf_counter() - began)
        seen.jobs.append(Queued(job["id"], key, priority))


async def poll(service: Service, seen: Seen, number: int) -> None:
    """Ask for the status of one job or another, at a steady pace, whatever the answers take."""
    chosen = random.Random(number)  # noqa: S311 - which job is looked at
    async with service.connection() as client:
        due = time.perf_counter() + chosen.random() * POLL_S
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if seen.jobs:
                phase = seen.phase
                await client.ask("GET", f"/v1/merges/{chosen.choice(seen.jobs).id}")
                seen.took(
                    phase, "status", time.perf_counter() - due
                )  # what it waited for its turn is part of it
            due += POLL_S


async def follow(service: Service, seen: Seen, indices: Iterable[int]) -> None:
    """Follow jobs from their beginning to their end, one after the other."""
    async with service.connection() as client:
        for index in indices:
            while len(seen.jobs) <= index:
                await asyncio.sleep(0.05)
            job, began = seen.jobs[index].id, time.time()
            told: list[JSON] = []
            async for event in client.events(f"/v1/merges/{job}/events"):
                told.append(event)
                at = datetime.fromisoformat(event["at"]).timestamp()
                if at > began:
                    seen.took(seen.phase, "event, until it came", time.time() - at)
            seen.events += len(told)
            seen.ends.append(told[-1]["state"] if told else "nothing")
            seen.gaps += not whole([event["version"] for event in told])


async def fill(service: Service, seen: Seen, total: int) -> None:
    """Have the queue filled, by all keys at once, each as fast as it is answered."""

    async def by(key: str, numbers: Sequence[int]) -> None:
        async with service.connection() as admin, service.connection(key) as own:
            for turn, number in enumerate(numbers):
                priority = PRIORITIES[turn % len(PRIORITIES)]
                # Above 0 takes an admin's key, so those jobs are the admin's.
                client, whose = (admin, ADMIN) if priority > 0 else (own, key)
                await service.submit(seen, client, whose, number, priority)

    shares: dict[str, list[int]] = {key: [] for key in SHARES}
    for number in range(total):
        key = min(SHARES, key=lambda key: len(shares[key]) / SHARES[key])
        shares[key].append(number)
    await asyncio.gather(*(by(key, numbers) for key, numbers in shares.items()))


async def probe(service: Service, seen: Seen, first: int) -> None:
    """Submit one more job every second."""
    async with service.connection("ann") as client:
        number = first
        while True:
            await service.submit(seen, client, "ann", number, PROBE_PRIORITY)
            number += 1
            await asyncio.sleep(PROBE_S)


async def measure(service: Service, total: int, pollers: int, followers: int) -> tuple[Seen, float, float]:
    """Fill the queue and have it drained, under the eyes of the clients; what they saw, and how long each took."""
    seen = Seen()
    async with asyncio.TaskGroup() as group:
        polling = [group.create_task(poll(service, seen, number)) for number in range(pollers)]
        following = [
            group.create_task(follow(service, seen, range(number, total, followers)))
            for number in range(followers)
        ]
        began = time.perf_counter()
        await fill(service, seen, total)
        filled, seen.phase = time.perf_counter(), DRAINING
        service.go.touch()
        probing = group.create_task(probe(service, seen, total))
        await asyncio.wait(following)
        probing.cancel()
        await asyncio.wait([probing])
        await follow(service, seen, range(total, len(seen.jobs)))
        drained = time.perf_counter()
        for task in polling:
            task.cancel()
    return seen, filled - began, drained - filled


@contextmanager
def service(scratch: Path, build: Path, apis: int) -> Iterator[tuple[Service, Processes]]:
    """Valkey, the API and a scheduler that waits for :attr:`Service.go`, and its processes."""
    claims, go = scratch / "claims", scratch / "go"
    with (
        EmbeddedValkey(scratch / "valkey") as valkey,
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
        (scratch / "log").open("ab") as log,
    ):
        env = os.environ | {
            "MERGEMILL_REDIS_URL": valkey.url,
            "MERGEMILL_STATE_DIR": str(scratch / "state"),
            "MERGEMILL_STORE__FILE_ROOTS": json.dumps([str(build)]),
            "MERGEMILL_LOG_FORMAT": "json",
        }
        serve = [sys.executable, "-m", "mergemill", "serve", "--fd", str(listener.fileno())]
        schedule = [sys.executable, "-m", "benchmarks.load_scheduler", str(claims), str(go)]
        tokens = {}
        with KeyStore(valkey.url) as keys:
            for whose in (ADMIN, *SHARES):
                limits = dict.fromkeys(Limits.model_fields, 0)
                scopes = [Scope.ADMIN if whose == ADMIN else Scope.SUBMIT]
                key, tokens[whose] = new_key(
                    whose, scopes, time.time(), inputs=[EVERYWHERE], outputs=[EVERYWHERE], limits=limits
                )
                keys.create(key)
        started = [
            subprocess.Popen(command, env=env, stdout=log, stderr=log, pass_fds=[listener.fileno()])
            for command in (*[serve] * apis, schedule)
        ]
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not claims.exists():
                if time.monotonic() > deadline or any(process.poll() is not None for process in started):
                    raise SystemExit(f"it did not come up:\n{(scratch / 'log').read_text()[-3000:]}")
                time.sleep(0.1)
            roots = {
                valkey.pid: "valkey",
                **{each.pid: "api" for each in started[:-1]},
                started[-1].pid: "scheduler",
            }
            inputs = make_inputs(SIZE, build / "inputs")
            port = listener.getsockname()[1]
            yield Service(port, tokens, inputs, scratch / "outputs", claims, go), Processes(roots)
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait()


def result_of(seen: Seen, claims: Sequence[str], total: int) -> JSON:
    """The figures of a run, and what was not as it should be."""
    first = {job.id for job in seen.jobs[:total]}
    order = order_of(seen.jobs[:total], [name for name in claims if name in first])
    wrong = {
        "jobs were lost or failed": len(seen.jobs) - seen.ends.count("succeeded"),
        "jobs were never begun": len({job.id for job in seen.jobs} - set(claims)),
        "jobs were begun again": len(claims) - len(set(claims)),
        "jobs were begun before one of a higher priority": order.out_of_priority,
        "jobs were begun before an older one of their key": order.out_of_age,
        "streams of events had gaps": seen.gaps,
    }
    return {
        "jobs": len(seen.jobs),
        "succeeded": seen.ends.count("succeeded"),
        "events": seen.events,
        "spread": order.spread,
        "problems": [f"{count} {what}" for what, count in wrong.items() if count],
    }


def report(found: JSON, clients: str) -> Iterator[str]:
    """Lines of Markdown."""
    on, tools = found["machine"], (f"{name} {version}" for name, version in found["versions"].items())
    yield f"{on['processor']}; {on['memory']}; {on['disk']}; load average before the run {found['load']:.1f};"
    yield f"{', '.join(tools)}."
    yield ""
    yield f"{clients}; {found['apis']} API process(es). The queue was filled in {found['fill_s']:.1f} s and"
    yield f"drained in {found['drain_s']:.1f} s: {found['jobs']:,} jobs, of which {found['succeeded']:,} succeeded,"
    yield f"and {found['events']:,} events."
    yield "; ".join(found["problems"]) or "Nothing was lost, and every job was begun in its turn."
    yield "Of several keys with jobs of the same priority waiting, none was ever more than"
    yield f"{found['spread']} jobs ahead of another."
    yield ""
    yield from table(found["seconds"])
    yield ""
    yield "| process | CPU, s | of a core |"
    yield "|---|---:|---:|"
    for role, used in found["cpu_s"].items():
        yield f"| {role} | {used:.1f} | {100 * used / (found['fill_s'] + found['drain_s']):.0f} % |"


def main() -> int:
    """Print the report, and keep every figure in ``build/bench/load.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--jobs", type=int, default=1000, help="how many are queued; %(default)s")
    add("--pollers", type=int, default=50, help="clients that ask for a status twice a second; %(default)s")
    add("--followers", type=int, default=50, help="clients that follow events; %(default)s")
    add("--apis", type=int, default=1, help="processes of the API; %(default)s")
    add("--build", type=Path, default=Path("build/bench"), help="where inputs and results go")
    add("--docs", action="store_true", help="write the report into docs/load.md, too")
    arguments = parser.parse_args()
    build = arguments.build.resolve()
    build.mkdir(parents=True, exist_ok=True)
    before = load()
    with (
        tempfile.TemporaryDirectory(dir=build) as directory,
        service(Path(directory), build, arguments.apis) as (up, processes),
    ):
        began, own = processes.sample().cpu_s, _own_cpu_s()
        seen, fill_s, drain_s = asyncio.run(
            measure(up, arguments.jobs, arguments.pollers, arguments.followers)
        )
        cpu_s = {role: used - began[role] for role, used in processes.sample().cpu_s.items() if used}
        cpu_s["clients"] = _own_cpu_s() - own
        found = result_of(seen, up.claims.read_text().split(), arguments.jobs) | {
            "apis": arguments.apis, "fill_s": fill_s, "drain_s": drain_s, "cpu_s": cpu_s, "seconds": seen.times,
            "load": before, "machine": machine(build), "versions": versions(None),
        }  # fmt: skip
    (build / "load.json").write_text(json.dumps(found, indent=2))
    clients = f"{arguments.pollers} clients polling, {arguments.followers} following events"
    text = "\n".join(report(found, clients)) + "\n"
    sys.stdout.write(text)
    if arguments.docs:
        write_between_marks(DOCS, text)
    return 1 if found["problems"] else 0


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
