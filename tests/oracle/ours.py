"""Our side: the whole service by its client, or only the mathematics of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from service.recipe import parse_recipe
from tests.checkpoints import Tensors, read_checkpoint, write_checkpoint
from tests.oracle.cases import Recipe
from workers.kernels.reference import round_to
from workers.methods import get_method
from workers.methods.evaluate import merge_tensor
from workers.methods.resolve import resolve_parameters
from workers.random import mask_key

Jobs = Mapping[Path, Recipe]
"""Recipes, their models named by absolute path, by the directory that they go to."""


def merge_in_process(jobs: Jobs) -> None:
    """Apply each recipe's method tensor by tensor, here; no plan, no parts, no service."""
    for output, recipe in jobs.items():
        models, reference = _merge(recipe)
        config = json.loads((reference / "config.json").read_text())
        write_checkpoint(output, models, config | {"torch_dtype": recipe["dtype"]}, shard_bytes=100_000)


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


def _merge_by_command(recipe: Recipe, output: Path, where: dict[str, str], file: Path) -> None:
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "mergemill", "merge", str(file), str(output)]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mergemill merge exited with {done.returncode}:\n{done.stdout}{done.stderr}")


def _merge(data: Recipe) -> tuple[Tensors, Path]:
    recipe = parse_recipe(data)
    method = get_method(recipe.merge_method)
    parameters, own = resolve_parameters(
        method, recipe.profile, recipe.parameters, [entry.parameters for _, entry in recipe.task_models]
    )
    models = [read_checkpoint(Path(entry.model)) for _, entry in recipe.task_models]
    base = read_checkpoint(Path(recipe.reference)) if recipe.has_task_vectors else None
    dtype: torch.dtype = getattr(torch, data["dtype"])
    merged = {}
    for name in base or models[0]:
        keys = [mask_key(recipe.seed, index, name) for index, _ in recipe.task_models]
        inputs = [model[name] for model in models]
        tensor = merge_tensor(method, parameters, own, base[name] if base else None, inputs, mask_keys=keys)
        merged[name] = round_to(tensor, dtype)
    return merged, Path(recipe.reference)
