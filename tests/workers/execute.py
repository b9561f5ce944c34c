"""Run a plan to its end in this process, as the scheduler would on a cluster, on a directory."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.planning.plan import Plan, PlanOptions
from service.planning.planner import Planned, plan_recipe
from service.recipe import parse_recipe
from tests.checkpoints import Tensors, write_checkpoint
from workers.binding import bind
from workers.methods.survey import conclude_pass
from workers.run import run_part, run_survey
from workers.store.base import ObjectStore
from workers.store.local import LocalStore
from workers.store.uris import from_path, join
from workers.task import PART, PART_RESULT, SURVEY_TASK, Facts, PartResult, SurveyTask

MIB = 1 << 20


@dataclass(frozen=True)
class Done:
    """A merge that ran."""

    planned: Planned
    """Its plan."""
    results: list[PartResult]
    """What every part reported, in the order of the plan."""
    output: Path
    """Where the shards are."""

    def shards(self) -> list[bytes]:
        """The bytes of all shards."""
        return [(self.output / shard.name).read_bytes() for shard in self.planned.plan.shards]


def write_models(root: Path, models: Mapping[str, Tensors], **more: Any) -> None:
    """Write each model's checkpoint to ``root/<its name>``."""
    for name, tensors in models.items():
        write_checkpoint(root / name, tensors, **more)


def plan(
    root: Path,
    method: str,
    names: list[str],
    parameters: Mapping[str, Any],
    options: PlanOptions,
    **more: Any,
) -> Planned:
    """Plan a merge of the checkpoints ``root/<name>``, on the base ``root/base`` where the method has one."""
    value = {"merge_method": method, "models": [{"model": str(root / name)} for name in names]} | more
    if method not in ("linear", "slerp", "passthrough") and "base_model" not in more:
        value["base_model"] = str(root / "base")
    recipe = parse_recipe(value | {"parameters": dict(parameters)})
    return plan_recipe(recipe, options, LocalStore(), {}, baseline_bytes=0)


def run(planned: Planned, output: Path, store: ObjectStore | None = None, order: int = 0) -> Done:
    """Do every task in an order shuffled by ``order``, each after a trip through JSON, and complete the shards.

    Earlier merges that are staged are made before.
    """
    store = store or LocalStore()
    for stage in planned.plan.stages:
        _made(stage, output, store, order)
    return Done(planned, _made(planned.plan, output, store, order), output)


def _made(found: Plan, output: Path, store: ObjectStore, order: int) -> list[PartResult]:
    shuffle = random.Random(order).shuffle
    facts: dict[str, Facts] = {}
    for survey in found.surveys:
        known: Facts = {}
        passes = bind(survey.tasks[0][0]).passes
        assert len(passes) == survey.passes
        for index, survey_pass in enumerate(passes):
            if not survey_pass.needed(known):
                continue
            tasks = [
                SurveyTask(survey.id, index, runs, known, found.parts[0].allow_nonfinite)
                for runs in survey.tasks
            ]
            shuffle(tasks)
            summaries = [
                run_survey(SURVEY_TASK.validate_json(SURVEY_TASK.dump_json(t)), store) for t in tasks
            ]
            known = conclude_pass(survey_pass, summaries, survey.numel, known)
        facts[survey.id] = known
    target = from_path(str(output))
    uploads = {s.name: store.open_upload(join(target, s.name), s.size, {}) for s in found.shards}
    parts = list(found.parts)
    shuffle(parts)
    made = {}
    for part in parts:
        result = run_part(PART.validate_json(PART.dump_json(part)), uploads[part.shard], facts, store)
        made[part.shard, part.number] = PART_RESULT.validate_json(PART_RESULT.dump_json(result))
    for upload in uploads.values():
        store.complete(upload, store.list_parts(upload))
    return [made[part.shard, part.number] for part in found.parts]


def dyadic(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random multiples of 1/64 from -4 to 4: float32, bfloat16 and float64 sums of a few of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-256, 257, shape, generator=generator) / 64).to(dtype)
