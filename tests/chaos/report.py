"""What runs have shown, added up: a file of JSON, a line for people, and the table of ``docs/reliability.md``.

``python -m tests.chaos.report RESULTS.json docs/reliability.md`` writes the table between its marks.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.plan import Fate, Kind
from tests.chaos.run import Result

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
"""Marks of the table."""


def add(path: Path, result: Result) -> None:
    """Add a run to the results in a file."""
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    run = {
        "seed": result.plan.seed,
        "store": result.plan.store,
        "wrong": list(result.wrong),
        "injected": result.injected,
        "states": result.states,
        "parts": result.parts,
        "repeats": result.repeats,
        "told": result.told,
        "seconds": result.seconds,
    }
    path.write_text(json.dumps([*known, run], indent=1) + "\n")


def summary(results: Sequence[Result]) -> str:
    """How many runs were green, and what was done in all of them."""
    green = sum(not result.wrong for result in results)
    done = sum((Counter(result.injected) for result in results), Counter[str]())
    counts = "; ".join(f"{count} x {what}" for what, count in sorted(done.items()))
    return f"{green} of {len(results)} runs green: {counts}"


def table(runs: Iterable[dict[str, Any]]) -> str:
    """The table of what was injected how often, by store."""
    stores: dict[str, Counter[str]] = {"files": Counter(), "s3": Counter()}
    for run in runs:
        own = stores[run["store"]]
        own.update(run["injected"])
        own.update({f"jobs {state}": count for state, count in run["states"].items()})
        own.update({f"told {what}": count for what, count in run.get("told", {}).items()})
        own.update(runs=1, green=not run["wrong"], parts=run["parts"], repeats=run["repeats"])
    rows = [("runs", "runs"), ("green", "of them green")]
    rows += [(str(kind), str(kind)) for kind in (*Kind, *(fate for fate in Fate if fate != Fate.PLAIN))]
    requests = sorted({what for own in stores.values() for what in own if what.startswith("requests: ")})
    rows += [(what, f"requests that met `{what.removeprefix('requests: ')}`") for what in requests]
    ends = sorted({what for own in stores.values() for what in own if what.startswith("jobs ")})
    rows += [(what, what) for what in ends]
    heard = sorted({what for own in stores.values() for what in own if what.startswith("told ")})
    rows += [(what, what.removeprefix("told ")) for what in heard]
    rows += [("parts", "parts made"), ("repeats", "parts made again, all in flight at a kill")]
    lines = ["| what | on `file://` | on Ceph RGW |", "|---|---:|---:|"]
    lines += [f"| {text} | {stores['files'][key]} | {stores['s3'][key]} |" for key, text in rows]
    return "\n".join(lines)


def write(results: Path, page: Path) -> None:
    """Put the table of these results into a page, between its marks."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(f"{head}{BEGIN}\n{table(json.loads(results.read_text()))}\n{END}{tail}")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
