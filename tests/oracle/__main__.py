"""Run every case with both tools, compare, and write ``docs/parity.md``: ``make oracle``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.oracle.adapters import compare_adapters
from tests.oracle.architectures import Opened, outputs, read_reply, write_request
from tests.oracle.bench import Bench
from tests.oracle.cases import DARE, PARITY, ROUNDED, write_inputs
from tests.oracle.compare import SLACK
from tests.oracle.exact import Nearness
from tests.oracle.language import Spoken, spoken, write_language_inputs
from tests.oracle.methods import DELLA_MASKS, METHOD_CASES, STORED
from tests.oracle.ours import merge_by_service, merge_in_process
from tests.oracle.report import Results, markdown, total
from tests.oracle.several import Several, compare_several, several, several_problems
from tests.oracle.spoken import compare_spoken, spoken_problems
from tests.oracle.vocabularies import (
    TALKS,
    TEXTS,
    Worded,
    compare_words,
    worded,
    words_problems,
    write_vocabulary_inputs,
)

SEED = 1234
"""mergekit's; ours is the recipe's default."""

FACTORS = {"mergekit": "l1", None: "inverse"}
"""How DARE makes up for what it drops, by profile."""


def main() -> int:
    """The exit status: 0 when every tensor is within its bound and every checkpoint opens."""
    arguments = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    arguments.add_argument("--output", type=Path, default=Path("docs/parity.md"), help="the report")
    arguments.add_argument("--in-process", action="store_true", help="the mathematics alone, no service")
    arguments.add_argument("--recipes", type=int, default=100, help="random recipes in all of the language")
    arguments.add_argument("--several", type=int, default=28, help="random recipes of several documents")
    arguments.add_argument("--words", type=int, default=96, help="random recipes over different vocabularies")
    options = arguments.parse_args()
    chains = [several(number) for number in range(options.several)]
    recipes: list[Spoken | Worded] = [spoken(number) for number in range(options.recipes)]
    recipes += [worded(number) for number in range(options.words)]
    console = Console()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mergemill-oracle-") as directory:
        bench = Bench(Path(directory).resolve())
        with console.status("Building models of every architecture with transformers"):
            foreign(bench, "foreign_models.py", "make", bench.root / "models")
        with console.status("Merging with Mergemill"):
            merge(bench, in_process=options.in_process)
            write_language_inputs(bench.root / "inputs")
            write_vocabulary_inputs(bench.root / "inputs")
            merge_in_process(
                {
                    _ours(bench, each): each.placed(bench.root / "inputs", profile="mergekit")
                    for each in recipes
                }
                | {
                    _ours(bench, each): each.placed(bench.root / "inputs", profile="mergekit")
                    for each in chains
                }
            )
        with console.status("Merging with mergekit, opening with transformers"):
            reply = ask(bench, [*recipes, *chains])
        with console.status("Merging adapters with PEFT, mergekit and Mergemill"):
            adapters, misfits = compare_adapters(bench.root / "adapters")
        results = Results(
            versions=reply["versions"],
            opened=open_merges(bench),
            adapters=adapters,
            parity={case: total(bench.compare(case)) for case in (*PARITY, *METHOD_CASES)},
            rounded={case: total(bench.compare(case)) for case in ROUNDED},
            stored={case: bench.stored(case) for case in STORED},
            dare={
                (case, tool, factor): bench.mask(case, made, factor)
                for case in DARE
                for tool, factor, made in (
                    ("mergekit", "l1", bench.theirs(case)),
                    *(("Mergemill", factor, bench.ours(case, name)) for name, factor in FACTORS.items()),
                )
            },
            spoken=[
                compare_spoken(bench.root / "inputs", each, _ours(bench, each), _theirs(bench, each))
                for each in recipes
                if isinstance(each, Spoken)
            ],
            words=[
                compare_words(
                    each,
                    bench.root / "inputs",
                    _ours(bench, each),
                    _theirs(bench, each),
                    reply["encoded"][str(_ours(bench, each))],
                    reply["rendered"],
                )
                for each in recipes
                if isinstance(each, Worded)
            ],
            several=[
                compare_several(bench.root / "inputs", each, _ours(bench, each), _theirs(bench, each))
                for each in chains
            ],
        )
        results.exact.update(
            {
                method: sum(
                    (bench.nearness(case) for case in METHOD_CASES if case.method == method), start=Nearness()
                )
                for method in SLACK
            },
            task_arithmetic=sum((each.nearness for each in results.spoken), start=Nearness()),
        )
        results.dare.update(
            ((case, tool, "l1"), bench.mask(case, made, "l1"))
            for case in DELLA_MASKS
            for tool, made in (("mergekit", bench.theirs(case)), ("Mergemill", bench.ours(case)))
        )
        loaded = reply["loaded"]
        problems = [
            *(each.problem for each in results.opened if each.problem),
            *results.problems(),
            *results.too_few(),
            *misfits,
            *spoken_problems(results.spoken),
            *several_problems(results.several),
            *words_problems(results.words),
            *(problem for case in (*PARITY, *ROUNDED) for problem in bench.checkpoint_problems(case)),
            *(problem for case in (*METHOD_CASES, *STORED) for problem in bench.checkpoint_problems(case)),
            *(f"{Path(made).name}: {found['problem']}" for made, found in loaded.items() if found["problem"]),
        ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(markdown(results, len(loaded), problems))
    for problem in problems:
        console.print(f"[red]✗[/red] {problem}")
    count = len(results.parity) + len(STORED) + len(recipes) + len(chains) + len(adapters)
    console.print(f"{count} recipes compared, {len(problems)} problems: {options.output}")
    return 1 if problems else 0


def merge(bench: Bench, *, in_process: bool) -> None:
    """Make all of our results: DARE as mergekit does it and as the paper does, the rest as mergekit."""
    write_inputs(bench.root / "inputs")
    jobs = {
        bench.ours(case, profile): bench.recipe(case, **({"profile": profile} if profile else {}))
        for case in (*PARITY, *ROUNDED, *DARE, *METHOD_CASES, *DELLA_MASKS, *STORED)
        for profile in (FACTORS if case in DARE else ("mergekit",))
    } | outputs(bench.root / "models", bench.root / "ours")
    if in_process:
        merge_in_process(jobs)
        return
    # A checkpoint that would be loaded in place of the merged shards, if it stayed.
    write_checkpoint(bench.ours(PARITY[1]), llama_tensors(99), {"model_type": "stale"})
    merge_by_service(jobs, bench.root / "state")


def _ours(bench: Bench, recipe: Spoken | Several | Worded) -> Path:
    return bench.root / "ours" / recipe.name


def _theirs(bench: Bench, recipe: Spoken | Several | Worded) -> Path:
    return bench.root / "theirs" / recipe.name


def ask(bench: Bench, recipes: Sequence[Spoken | Several | Worded]) -> dict[str, Any]:
    """Run the other tools, in their environment."""
    merges = [
        {"recipe": bench.recipe(case), "output": str(bench.theirs(case)), "seed": SEED}
        for case in (*PARITY, *ROUNDED, *DARE, *METHOD_CASES, *DELLA_MASKS, *STORED)
    ]
    merges += [
        {"recipe": each.placed(bench.root / "inputs"), "output": str(_theirs(bench, each)), "seed": SEED}
        for each in recipes
    ]
    request, reply = bench.root / "request.json", bench.root / "reply.json"
    opened = [str(bench.ours(case)) for case in (*PARITY, *ROUNDED)]
    words = [str(_ours(bench, each)) for each in recipes if isinstance(each, Worded)]
    spoken_with = [each for each in recipes if isinstance(each, Worded) and "chat_template" in each.recipe]
    places = [str(place(bench, each)) for each in spoken_with for place in (_ours, _theirs)]
    wanted = {
        "merge": merges,
        "load": [*opened, *words],
        "encode": dict.fromkeys(words, TEXTS),
        "render": dict.fromkeys(places, TALKS),
    }
    request.write_text(json.dumps(wanted))
    foreign(bench, "foreign.py", request, reply)
    found: dict[str, Any] = json.loads(reply.read_text())
    return found


def open_merges(bench: Bench) -> list[Opened]:
    """Have transformers open the merges of every architecture."""
    models, request, reply = (bench.root / name for name in ("models", "open.json", "opened.json"))
    write_request(models, bench.root / "ours", request)
    foreign(bench, "foreign_models.py", "open", request, reply)
    return read_reply(models, reply)


def foreign(bench: Bench, program: str, *arguments: str | Path) -> None:
    """Run one of the programs of the other tools' side, in their environment.

    :raises RuntimeError: it failed; with the end of what it said.
    """
    python = os.environ.get("MERGEMILL_ORACLE_PYTHON", ".venv-oracle/bin/python")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(bench.root / "hub")}
    command = [python, str(Path(__file__).with_name(program)), *map(str, arguments)]
    ran = subprocess.run(command, check=False, env=os.environ | offline, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{ran.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
