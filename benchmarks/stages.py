"""Where one worker's time goes: ``python -m benchmarks.stages --size 1b --methods linear ties``.

Makes every part of a merge in this process as a worker's stream does, three times over, and prints the CPU seconds and
wall seconds of each stage: of the last round, when all memory has been touched before. The stages run beside each
other, in threads; their wall seconds add up to more than the whole. Uses the inputs of ``make bench``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cases import METHODS, case
from benchmarks.inputs import SIZES, make_inputs
from service.planning.plan import Plan, PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_recipe
from workers.arena import Arena
from workers.kernels import kernels_of
from workers.run import PartRun, Tools, peak_bytes, run_tasks
from workers.store.base import ObjectStore, Upload
from workers.store.local import LocalStore
from workers.store.uris import from_path, join

ROUNDS = 3

Seconds = dict[str, list[float]]
"""CPU and wall seconds by stage."""


class Timed:
    """Something whose methods are timed, each in the thread that calls it."""

    def __init__(self, target: Any, names: tuple[str, ...], seconds: Seconds) -> None:
        self._target = target
        self._names = names
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return partial(self._call, name, method) if name in self._names else method

    def _call(self, name: str, method: Any, *arguments: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        try:
            return method(*arguments)
        finally:
            spent = self._seconds.setdefault(name, [0.0, 0.0])
            spent[0] += time.thread_time() - cpu
            spent[1] += time.perf_counter() - wall


def profile(plan: Plan, output: Path) -> tuple[Seconds, float, float]:
    """Make all parts; seconds by stage, and the CPU and wall seconds of the last round."""
    seconds: Seconds = {}
    store: ObjectStore = LocalStore()
    kernels = kernels_of("cpu")
    passes = ("merge", "nonfinite", "histogram", "equal_counts", "elected", "norms", "products")
    tools = Tools(
        store=Timed(store, ("read_into", "put_part"), seconds),  # type: ignore[arg-type]
        arena=Arena(plan.price.arena_bytes),
        kernels=Timed(kernels, passes, seconds),  # type: ignore[arg-type]
    )
    cpu = wall = 0.0
    for _ in range(ROUNDS):
        seconds.clear()
        shutil.rmtree(output, ignore_errors=True)
        uploads: dict[str, Upload] = {
            shard.name: store.open_upload(join(from_path(str(output)), shard.name), shard.size, {})
            for shard in plan.shards
        }
        makers = [partial(PartRun, part, uploads[part.shard], {}, tools) for part in plan.parts]
        cpu, wall = time.process_time(), time.perf_counter()
        for _, done in run_tasks(makers):
            if isinstance(done, Exception):
                raise done
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        for upload in uploads.values():
            store.abort(upload)
    shutil.rmtree(output, ignore_errors=True)
    return seconds, cpu, wall


def main() -> int:
    """Print one table a method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["linear", "ties"])
    parser.add_argument("--build", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    inputs = make_inputs(SIZES[arguments.size], arguments.build / "inputs")
    for method in arguments.methods:
        recipe = case(method, len(inputs.size.models) - 1).recipe(lambda model: str(inputs.directory(model)))
        plan = plan_recipe(parse_recipe(recipe), PlanOptions(), LocalStore(), {}).plan
        if plan.surveys:
            raise SystemExit(f"{method}: surveys of their own are not profiled here; choose a smaller size")
        seconds, cpu, wall = profile(plan, arguments.build / "scratch" / "stages")
        gigabytes = plan.price.bytes_read / 1e9
        sys.stdout.write(
            f"{method}: {gigabytes:.2f} GB in, {cpu:.2f} CPU-s ({cpu / gigabytes:.2f} a GB), {wall:.2f} s, "
            f"peak {peak_bytes() >> 20} MiB\n"
        )
        rest = cpu - sum(spent for spent, _ in seconds.values())
        for name, (spent, waited) in sorted(seconds.items(), key=lambda item: -item[1][0]):
            sys.stdout.write(f"  {name:<20} {spent:6.2f} CPU-s {waited:6.2f} s\n")
        sys.stdout.write(f"  {'digests and the rest':<20} {rest:6.2f} CPU-s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
