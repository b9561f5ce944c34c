"""What a worker's memory costs: ``python -m benchmarks.memory``.

First, seconds and page faults of reading a cached file into memory that was never touched before, and into memory that
was: in turn, several times over; each round is printed, since a virtual machine's own memory may be new to it as well,
and is then dearest the first time. Then, how big a Ray worker is after each thing that it imports, with kernels that
are compiled already and with those that nobody compiled yet.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.baseline import Stage
from service.cluster.driver import Driver, TaskRequest
from service.cluster.fleet_process import FleetSettings
from workers.arena import Arena
from workers.store import files

MIB = 1 << 20


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=1024, help="how much is read each time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    touch(options.directory, options.mib * MIB, options.rounds)
    with tempfile.TemporaryDirectory() as empty:
        tell("kernels compiled before", baseline())
        os.environ["NUMBA_CACHE_DIR"] = empty  # the workers of a Ray of our own inherit it
        tell("kernels compiled now", baseline())


def touch(directory: Path, nbytes: int, rounds: int) -> None:
    """Read a file into memory of every kind, and print what each took."""
    arena = Arena(nbytes)

    def fresh() -> memoryview:
        return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def fresh_arena() -> memoryview:
        return Arena(nbytes).take([nbytes])[0].view

    def in_use() -> memoryview:
        (extent,) = arena.take([nbytes])
        arena.give_back(extent)
        return extent.view

    def rested() -> memoryview:
        arena.rest()
        return in_use()

    kinds: dict[str, Callable[[], memoryview]] = {
        "fresh": fresh,
        "a fresh arena (MADV_HUGEPAGE)": fresh_arena,
        "an arena in use": in_use,
        "an arena that rested (MADV_FREE)": rested,
    }
    with tempfile.TemporaryFile(dir=directory) as file:
        noise = os.urandom(MIB)
        for _ in range(nbytes // MIB):
            file.write(noise)
        file.flush()
        files.read_at(file.fileno(), 0, in_use())
        say(f"{'reading into':<34}{'round':>6}{'s/GiB':>8}{'page faults':>13}")
        for number in range(1, rounds + 1):
            for name, memory in kinds.items():
                view = memory()
                faults, wall = _faults(), time.perf_counter()
                files.read_at(file.fileno(), 0, view)
                faults, wall = _faults() - faults, time.perf_counter() - wall
                say(f"{name:<34}{number:>6}{wall / nbytes * 2**30:>8.2f}{faults:>13,}")


def baseline() -> list[Stage]:
    """How a Ray worker grows as it becomes one of ours."""
    request = TaskRequest(
        entry="benchmarks.baseline:stages", payload=None, memory_bytes=1 << 30, label="baseline"
    )
    with Driver(FleetSettings(address="local", num_cpus=1)) as driver:
        found: list[Stage] = driver.submit(request).result()
    return found


def tell(title: str, stages: list[Stage]) -> None:
    """Print one worker's growth."""
    say(f"\n{title:<34}{'VmHWM, MiB':>12}{'more':>6}{'CPU-s':>8}{'wall, s':>9}")
    before = 0
    for name, peak, cpu, wall in stages:
        say(f"{name:<34}{peak / MIB:>12.0f}{(peak - before) / MIB:>6.0f}{cpu:>8.2f}{wall:>9.2f}")
        before = peak


def say(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    main()
