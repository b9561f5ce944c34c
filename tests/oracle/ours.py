"""Our side: the whole service by its client, or only the mathematics of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from service.planning.plan import PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_documents
from service.running.sidecars import adapter_config_json, config_json
from tests.oracle.cases import Recipe
from tests.workers.execute import run
from workers.store.local import LocalStore
from workers.store.uris import from_path, to_path

Jobs = Mapping[Path, Recipe | list[Recipe]]
"""Recipes, their models named by absolute path, by the directory that they go to."""


def merge_in_process(jobs: Jobs) -> None:
    """Plan each recipe and do all of its tasks, here; no service."""
    for output, recipe in jobs.items():
        options = PlanOptions(worker_memory_bytes=1 << 40, shard_bytes=100_000)
        place = from_path(str(output))
        planned = plan_recipe(parse_documents(recipe), options, LocalStore(), {}, output=place)
        run(planned, output)
        if planned.recipe.output_kind == "adapter":
            (output / "adapter_config.json").write_text(adapter_config_json(planned))
            continue
        (output / "config.json").write_text(config_json(planned) or "")
        for name, text in planned.texts.items():
            (output / name).write_bytes(text)
        for name, info in planned.copied.items():
            shutil.copyfile(to_path(info.uri), output / name)
        (output / "model.safetensors.index.json").write_text(planned.plan.index)


def merge_by_service(jobs: Jobs, state: Path) -> None:
    """Have an embedded stack merge them all: the first from the command line, the rest by the client, at once."""
    from mergemill import Client
    from mergemill.stack import EmbeddedStack

    first, *others = jobs
    with EmbeddedStack(state_dir=state) as stack, ThreadPoolExecutor(4) as pool:
        client = Client(stack.url, api_key=stack.api_key)

        def merge(output: Path) -> None:
            client.wait(client.submit(jobs[output], output=output.as_uri(), overwrite=True).id)

        where = {"MERGEMILL_URL": stack.url, "MERGEMILL_API_KEY": stack.api_key or ""}
        _merge_by_command(jobs[first], first, where, state.with_name("recipe.yml"))
        for future in [pool.submit(merge, output) for output in others]:
            future.result()


def _merge_by_command(recipe: Recipe | list[Recipe], output: Path, where: dict[str, str], file: Path) -> None:
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "mergemill", "merge", str(file), str(output)]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mergemill merge exited with {done.returncode}:\n{done.stdout}{done.stderr}")
