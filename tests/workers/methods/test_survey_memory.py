"""A worker grows by less than a task is priced at, for hostile task vectors and for crowds of tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.plan import Plan, PlanOptions
from service.planning.price import part_peak_bytes, price, survey_peak_bytes, workspace_bytes
from service.recipe.language import MAX_RANK
from tests.adapters import factors, write_adapter
from tests.checkpoints import Tensors, write_checkpoint
from tests.workers.execute import plan
from tests.workers.memory import Task, growth
from workers.binding import bind
from workers.methods.survey import conclude_pass
from workers.run import run_survey
from workers.store import StoreSettings
from workers.store.local import LocalStore
from workers.store.uris import from_path, join
from workers.task import PART, SURVEY_ELEMENTS, SURVEY_TASK, Facts, SurveyTask

MIB = 1 << 20
ELEMENTS = 6 * SURVEY_ELEMENTS + 7
ALL = {"equal_magnitudes": "exact_k", "zero_sign": "majority", "normalize": True}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("ties", "low", {"density": 0.5, **ALL}),
    ("dare_ties", "high", {"density": 0.9, "rescale": "l1", "retrim": True, **ALL}),
    ("dare_ties", "narrow", {"density": 0.9, "rescale": "l1", "retrim": True, **ALL}),
]
"""Method, model and parameters, with every pass that a survey can have."""
SHARED = {"store": StoreSettings().model_dump(mode="json"), "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of zeros; models whose magnitudes fill a histogram of the low and of the high 16 bits; one in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)

    def drawn(below: int) -> torch.Tensor:
        return torch.randint(0, below, (ELEMENTS,), generator=generator, dtype=torch.int32)

    tensors = {
        "base": torch.zeros(ELEMENTS),
        "low": (drawn(1 << 16) + 0x3F80_0000).view(torch.float32),
        "high": drawn(0x7000_0000).view(torch.float32),
        "narrow": drawn(0x7000_0000).view(torch.float32).bfloat16(),
    }
    for name, tensor in tensors.items():
        write_checkpoint(root / name, {"w": tensor})
    return root


def part_tasks(root: Path, name: str, found: Plan) -> list[tuple[Task, int]]:
    """The tasks that make the parts of a plan without surveys, each with its price."""
    assert not found.surveys
    tasks: list[tuple[Task, int]] = []
    store = LocalStore()
    for shard in found.shards:
        upload = store.open_upload(join(from_path(str(root / "out")), name, shard.name), shard.size, {})
        for part in found.parts:
            if part.shard == shard.name:
                text = PART.dump_json(part, ensure_ascii=True).decode()
                payload = {"part": text, "upload": {"uri": upload.uri, "id": upload.id}, "facts": {}}
                shared = SHARED | {"arena_bytes": price([part], [], 1).arena_bytes}
                tasks.append((payload | shared, part_peak_bytes(part, 0)))
    return tasks


def survey_tasks(found: Plan) -> list[tuple[Task, int]]:
    """The first task of every pass of a plan's only survey, each with its price."""
    (survey,) = found.surveys
    assert len(survey.tasks) > 1
    tasks: list[tuple[Task, int]] = []
    facts: Facts = {}
    alone = replace(survey, tasks=survey.tasks[:1])
    shared = SHARED | {"arena_bytes": price([], [alone], 0).arena_bytes}
    for index, survey_pass in enumerate(bind(survey.tasks[0][0]).passes):
        runs = [SurveyTask(survey.id, index, runs, facts) for runs in survey.tasks]
        text = SURVEY_TASK.dump_json(runs[0], ensure_ascii=True).decode()
        tasks.append(({"survey": text} | shared, survey_peak_bytes(survey.tasks[0], 0)))
        summaries = [run_survey(task, LocalStore()) for task in runs]
        facts = conclude_pass(survey_pass, summaries, survey.numel, facts)
    return tasks


@pytest.mark.parametrize("count", [1, 16])
def test_surveys(models: Path, tmp_path: Path, count: int) -> None:
    tasks: list[tuple[Task, int]] = []
    for method, model, parameters in CASES:
        options = PlanOptions(worker_memory_bytes=1 << 40)
        found = plan(models, method, [model] * count, parameters, options)
        tasks += part_tasks(tmp_path, f"{method}-{model}", found.plan)
    split = PlanOptions(worker_memory_bytes=1 << 40, whole_tensor_bytes=5 * MIB, part_bytes=5 * MIB)
    tasks += survey_tasks(plan(models, "ties", ["low"] * count, CASES[0][2], split).plan)
    check(tasks, tmp_path)


@pytest.mark.parametrize("count", [8])
def test_a_survey_task_of_a_crowd_of_tensors(tmp_path: Path, count: int) -> None:
    """Of a whole model: each tensor's histograms are as full as they can be."""
    generator = torch.Generator().manual_seed(0)

    def drawn(bits: int, below: int) -> Tensors:
        found = torch.randint(0, below, (60, 1 << 15), generator=generator, dtype=torch.int32) + bits
        return {f"t{number}": row.clone() for number, row in enumerate(found.view(torch.float32))}

    write_checkpoint(tmp_path / "base", {f"t{number}": torch.zeros(1 << 15) for number in range(60)})
    tasks: list[tuple[Task, int]] = []
    options = PlanOptions(worker_memory_bytes=1 << 40, part_bytes=5 * MIB)
    for name, bits, below in (("low", 0x3F80_0000, 1 << 16), ("high", 0, 0x7000_0000)):
        write_checkpoint(tmp_path / name, drawn(bits, below))
        found = plan(tmp_path, "ties", [name] * count, {"density": 0.5}, options, profile="paper")
        tasks += survey_tasks(found.plan)
    check(tasks, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("model.layers.{:05}.norm.weight", id="plain"),
        pytest.param("{:05}" + "\N{GRINNING FACE}" * 50, id="wide"),
    ],
)
def test_crowds_of_tensors(tmp_path: Path, name: str) -> None:
    """What a worker holds besides bytes and workspace: tensors that do not touch, so that none are read together."""
    keys = [name.format(number) for number in range(2500)]
    base: Tensors = {key: torch.ones(8) for key in keys}
    apart = base | {f"{key}.not-in-base": torch.ones(1) for key in keys}
    write_checkpoint(tmp_path / "one", {"w": torch.ones(8)})
    write_checkpoint(tmp_path / "base", base)
    models = [write_checkpoint(tmp_path / f"m{number}", apart).name for number in range(4)]
    options = PlanOptions(worker_memory_bytes=1 << 40)
    alone = plan(tmp_path, "linear", ["one"], {}, options).plan
    crowd = plan(tmp_path, "task_arithmetic", models, {}, options, extra_tensors="drop").plan
    tasks = part_tasks(tmp_path, "alone", alone) + part_tasks(tmp_path, "crowd", crowd)
    before, grown = growth([task for task, _ in tasks], tmp_path / "tasks")
    assert 0 < grown - before <= tasks[1][1] - workspace_bytes(5)


def test_adapters_of_the_highest_rank(tmp_path: Path) -> None:
    """The compiled kernel widens some columns of one adapter's right matrix, whatever its rank."""
    base = {"w.weight": torch.zeros(64, 64)}
    write_checkpoint(tmp_path / "base", base)
    write_adapter(tmp_path / "lora", factors(3, base, {"w": MAX_RANK}, dtype=torch.bfloat16), r=MAX_RANK)
    options = PlanOptions(worker_memory_bytes=1 << 40)
    found = plan(tmp_path, "linear", [f"base+{tmp_path / 'lora'}"], {}, options).plan
    check(part_tasks(tmp_path, "lora", found), tmp_path)


def check(tasks: list[tuple[Task, int]], scratch: Path) -> None:
    """One worker does them all, and what it keeps of one counts in the next."""
    grown = growth([task for task, _ in tasks], scratch / "tasks")
    found = list(zip(grown, [priced for _, priced in tasks], strict=True))
    assert all(0 < most <= priced for most, priced in found), found
