"""Train on digits, merge over REST, print how good each merge is: ``make demo``.

It runs on an embedded stack of its own, or on the service at ``MERGEMILL_URL`` when that reads this
machine's disk. Everything that it writes is under ``demo-output``.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from demo import digits
from demo.checkpoints import read_checkpoint, write_checkpoint
from demo.report import Row, table, verdict
from mergemill import Client
from mergemill.stack import EmbeddedStack
from workers.errors import MergemillError

OUTPUT = Path("demo-output").absolute()
"""Checkpoints, the stack's state, downloads; begun anew by every run."""

LAMBDAS = (0.5, 1.0, 1.5)
DENSITIES = (0.2, 0.5, 0.8)
TRIMMED = tuple({"density": density, "lambda": scale} for density, scale in product(DENSITIES, LAMBDAS))
GRID: dict[str, tuple[dict[str, float], ...]] = {
    "linear": ({},),
    "task_arithmetic": tuple({"lambda": scale} for scale in (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)),
    "ties": TRIMMED,
    "dare_ties": TRIMMED,
}
"""What is tried of each method; the validation images choose. Fixed, as ``demo/digits.py`` says."""
FIXED: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0, "normalize": True},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0},
    "dare_ties": {"weight": 1.0, "normalize": True},  # the mean of those that agree, as in TIES
}
"""What is not tried."""
WAITING = 8
"""Merges that are waited for at once."""


def main() -> int:
    """Tell the whole story; the exit status."""
    console = Console()
    torch.set_num_threads(1)  # the models are too small for more
    begun = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with console.status("Training a base and its fine-tunes on scikit-learn's digits"):
        tasks = digits.load_tasks()
        base = digits.train_base(tasks)
        models = {"base": base}
        models |= {name: digits.train_fine_tune(base, tasks[name]) for name in digits.TASKS}
        for name, tensors in models.items():
            write_checkpoint(OUTPUT / "models" / name, tensors, digits.CONFIG)
    console.print(f"Trained {len(models)} models in {time.monotonic() - begun:.1f} s.")
    try:
        with service(console) as client:
            merges = merge_all(client, console)
    except MergemillError as error:
        console.print(f"[red]{type(error).__name__}:[/red] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    singles = [row(name if name == "base" else f"tuned: {name}", "", models[name], tasks) for name in models]
    merged = [chosen(method, found, tasks) for method, found in merges.items()]
    console.print(table(tuple(digits.TASKS), singles, merged))
    console.print(verdict(singles, merged), highlight=False)
    console.print(
        f"{time.monotonic() - begun:.0f} s in all. The checkpoints are in {OUTPUT.name}/.", style="dim"
    )
    return 0


@contextmanager
def service(console: Console) -> Iterator[Client]:
    """A client of a running service, which is stopped afterwards if it was started here."""
    if url := os.environ.get("MERGEMILL_URL"):
        yield Client(url)
        return
    with console.status("Starting the embedded stack: Valkey, Ray, scheduler, API"):
        begun = time.monotonic()
        stack = EmbeddedStack(state_dir=OUTPUT / "state")
    with stack:
        console.print(f"Started the embedded stack at {stack.url} in {time.monotonic() - begun:.1f} s.")
        yield Client(stack.url, api_key=stack.api_key)


def merge_all(client: Client, console: Console) -> dict[str, list[tuple[str, digits.Tensors]]]:
    """Have every merge of the grid made; the settings and weights of each, by method."""
    found: dict[str, list[tuple[str, digits.Tensors]]] = {method: [] for method in GRID}
    bars = TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*bars, console=console) as progress, ThreadPoolExecutor(WAITING) as pool:
        shown = {method: progress.add_task(method, total=len(settings)) for method, settings in GRID.items()}
        try:
            waiting = {
                pool.submit(merge, client, method, settings): (method, settings)
                for method, tried in GRID.items()
                for settings in tried
            }
            for future in as_completed(waiting):
                method, settings = waiting[future]
                found[method].append((label(settings), future.result()))
                progress.advance(shown[method])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def merge(client: Client, method: str, settings: Mapping[str, float]) -> digits.Tensors:
    """Post one merge, wait for it, download it and read it."""
    name = "-".join([method, *(f"{key}-{value}" for key, value in settings.items())])
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": (OUTPUT / "models" / task).as_uri()} for task in digits.TASKS],
        "parameters": {**FIXED[method], **settings},
        "dtype": "float32",
    }
    if method != "linear":
        recipe["base_model"] = (OUTPUT / "models" / "base").as_uri()
    job = client.submit(recipe, output=(OUTPUT / "merged" / name).as_uri())
    client.wait(job.id)
    client.download(job.id, OUTPUT / "downloaded" / name)
    return read_checkpoint(OUTPUT / "downloaded" / name)


def label(settings: Mapping[str, float]) -> str:
    """Settings as the table names them."""
    names = {"lambda": "λ"}
    return ", ".join(f"{names.get(key, key)} {value}" for key, value in settings.items()) or "equal weights"


def row(name: str, settings: str, tensors: digits.Tensors, tasks: Mapping[str, digits.Task]) -> Row:
    """Test accuracies of one model."""
    return Row(name, settings, tuple(digits.accuracy(tensors, tasks[task].test) for task in digits.TASKS))


def chosen(method: str, found: list[tuple[str, digits.Tensors]], tasks: Mapping[str, digits.Task]) -> Row:
    """The row of the settings that are best on the validation images, the first by name when several are."""

    def score(candidate: tuple[str, digits.Tensors]) -> float:
        return sum(digits.accuracy(candidate[1], tasks[task].validation) for task in digits.TASKS)

    settings, tensors = max(sorted(found, key=lambda candidate: candidate[0]), key=score)
    return row(method, settings, tensors, tasks)


if __name__ == "__main__":
    sys.exit(main())
