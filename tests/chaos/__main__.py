"""``python -m tests.chaos --seed N --runs M --store files|s3``: runs of the real stack, each struck from its own seed.

The first seed is ``--seed``, and each run takes the next. A run that is not green says what was wrong, its seed, what
was planned and where its logs are; ``--seed`` with that seed alone is that run again.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import structlog

from service.cluster.warden import PR_SET_CHILD_SUBREAPER
from service.valkey import EmbeddedValkey
from tests.chaos.inputs import RECIPES, Undisturbed
from tests.chaos.places import place
from tests.chaos.plan import make_plan
from tests.chaos.report import add, summary
from tests.chaos.run import Result, Run


def main() -> int:
    """Do what the command line says; 1 when a run was not green."""
    parser = argparse.ArgumentParser(prog="tests.chaos")
    parser.add_argument("--seed", type=int, default=1, help="the first run's seed")
    parser.add_argument("--runs", type=int, default=1, help="how many runs")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--store", choices=("files", "s3"), default="files")
    parser.add_argument("--json", type=Path, help="a file that results are added to")
    parser.add_argument("--plan", action="store_true", help="only say what would be done")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.runs)
    if arguments.plan:
        for seed in seeds:
            say(str(make_plan(seed, arguments.store, tuple(RECIPES))))
        return 0
    # What outlives its parent becomes a child of ours, and is seen.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    kept = Path(tempfile.mkdtemp(prefix="chaos-"))
    _log_to(kept / "harness.log")
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    results: list[Result] = []
    with place(arguments.store) as where, EmbeddedValkey(kept / "valkey") as valkey:
        undisturbed = Undisturbed(valkey.url, where.settings, where.root)
        for seed in seeds:
            if end is not None and time.monotonic() > end:
                break
            plan = make_plan(seed, arguments.store, tuple(RECIPES))
            directory = kept / str(seed)
            directory.mkdir()
            result = Run(plan, directory, kept, where, undisturbed).run()
            results.append(result)
            _tell(result, directory)
            if arguments.json is not None:
                add(arguments.json, result)
            if not result.wrong:
                shutil.rmtree(directory, ignore_errors=True)
    say(summary(results))
    red = [result for result in results if result.wrong]
    if not red:
        shutil.rmtree(kept, ignore_errors=True)
    return 1 if red or not results else 0


def _tell(result: Result, directory: Path) -> None:
    plan = result.plan
    ends = ", ".join(f"{count} {state}" for state, count in sorted(result.states.items()))
    say(
        f"seed {plan.seed} on {plan.store}: {'RED' if result.wrong else 'green'} in {result.seconds} s; {ends}; "
        f"{result.parts} parts, {result.repeats} again"
    )
    if result.wrong:
        lines = [
            *(f"  wrong: {each}" for each in result.wrong),
            f"  {plan}",
            f"  done: {result.injected}",
            f"  logs: {directory}",
            f"  again: make chaos SEED={plan.seed} RUNS=1 STORE={plan.store}",
        ]
        say("\n".join(lines))


def say(text: str) -> None:
    """Print."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _log_to(path: Path) -> None:
    """What the code says that runs in this process is for when something goes wrong."""
    logging.basicConfig(filename=path, level=logging.INFO)
    structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())


if __name__ == "__main__":
    sys.exit(main())
