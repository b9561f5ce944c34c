"""Tensors that are merged as a whole, and methods with a base or without, from a recipe to the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.plan import PlanOptions
from service.planning.planner import Planned
from tests.checkpoints import read_checkpoint
from tests.workers.execute import MIB, plan, run, write_models
from tests.workers.methods.test_survey_memory import check, part_tasks
from workers.errors import PlanError
from workers.kernels.cpu import FusedKernels
from workers.methods import METHODS
from workers.methods.evaluate import merge_tensor
from workers.methods.resolve import resolve_parameters
from workers.random import mask_key
from workers.task import MergePiece

SHAPE = (1201, 1103)
"""A tensor of more than 5 MiB, which would be split if it could be."""

SMALL = PlanOptions(part_bytes=5 * MIB, whole_tensor_bytes=5 * MIB)

WHOLE: list[tuple[str, int, dict[str, Any]]] = [
    ("model_stock", 3, {"filter_wise": True}),
    ("nuslerp", 2, {"nuslerp_flatten": False, "weight": 1.0}),
    ("nuslerp", 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": 1.0}),
    ("della", 2, {"density": 0.4, "rescale": "l1"}),
    ("arcee_fusion", 1, {}),
]
IDS = [f"{name}-{number}" for number, (name, *_) in enumerate(WHOLE)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(SHAPE, generator=generator)
    tensors = {"base": base.to(torch.bfloat16)}
    for name in "abc":
        tensors[name] = (base + 0.2 * torch.randn(SHAPE, generator=generator)).to(torch.bfloat16)
    write_models(root, {name: {"w": tensor, "n": tensor[0].clone()} for name, tensor in tensors.items()})
    return root


def planned_of(models: Path, method: str, count: int, parameters: dict[str, Any]) -> Planned:
    return plan(models, method, list("abc"[:count]), parameters, SMALL, out_dtype="float32")


def test_whole_tensors_take_no_more_than_their_price(models: Path, tmp_path: Path) -> None:
    tasks = []
    for number, (method, count, parameters) in enumerate(WHOLE):
        found = planned_of(models, method, count, parameters).plan
        pieces = [piece for part in found.parts for piece in part.pieces if isinstance(piece, MergePiece)]
        assert sorted(piece.name for piece in pieces) == ["n", "w"]
        assert found.surveys == ()
        tasks += part_tasks(tmp_path, f"{method}-{number}", found)
    check(tasks, tmp_path)


def test_the_shape_makes_no_tensor_take_more_than_its_price(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    for name in ("base", "a", "b", "c"):
        shapes = {"tall": (1_400_003, 1), "wide": (1, 1_400_003)}
        tensors = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
        write_models(tmp_path, {name: tensors})
    tasks = []
    for number, (method, count, parameters) in enumerate(WHOLE):
        found = planned_of(tmp_path, method, count, parameters).plan
        tasks += part_tasks(tmp_path, f"{method}-{number}", found)
    check(tasks, tmp_path)


@pytest.mark.parametrize("method", ["knots", "tsv"])
def test_matrices_as_tall_as_all_are_wide_take_no_more_than_their_price(tmp_path: Path, method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    names = [f"m{number}" for number in range(8)]
    for name in ("base", *names):
        write_models(tmp_path, {name: {"w": torch.randn(1600, 200, generator=generator).bfloat16()}})
    check(part_tasks(tmp_path, method, plan(tmp_path, method, names, {}, SMALL).plan), tmp_path)


@pytest.mark.parametrize(("method", "count", "parameters"), WHOLE, ids=IDS)
def test_whole_tensors_merge_as_in_memory(
    models: Path, tmp_path: Path, method: str, count: int, parameters: dict[str, Any]
) -> None:
    done = run(planned_of(models, method, count, parameters), tmp_path / "merged")
    of = METHODS[method]
    own, theirs = resolve_parameters(of, None, parameters, [{}] * count)
    for name in ("w", "n"):
        inputs = [read_checkpoint(models / each)[name] for each in "abc"[:count]]
        keys = [mask_key(0, index, name) for index in range(count)]
        wanted = merge_tensor(of, own, theirs, read_checkpoint(models / "base")[name], inputs, mask_keys=keys)
        assert shard_bytes(done.shards(), wanted), name


def shard_bytes(shards: list[bytes], wanted: torch.Tensor) -> bool:
    """Whether these elements are in one of the shards."""
    return any(wanted.contiguous().view(torch.uint8).numpy().tobytes() in shard for shard in shards)


def test_what_does_not_fit_a_worker_is_told_with_its_name(models: Path) -> None:
    tight = SMALL.model_copy(update={"worker_memory_bytes": 100 * MIB})
    with pytest.raises(PlanError, match=r"the biggest task \(n and 1 more\).*raise it to at least"):
        plan(models, "model_stock", list("abc"), {"filter_wise": True}, tight)


@pytest.mark.parametrize("based", [False, True])
def test_a_base_makes_task_vectors_where_it_is_optional(models: Path, tmp_path: Path, based: bool) -> None:
    more: dict[str, Any] = {} if based else {"base_model": None}
    parameters = {"weight": 1.0}
    planned = plan(models, "nuslerp", ["a", "b"], parameters, SMALL, out_dtype="float32", **more)
    own, theirs = resolve_parameters(METHODS["nuslerp"], None, parameters, [{}, {}])
    a, b, base = (read_checkpoint(models / name)["w"] for name in ("a", "b", "base"))
    wanted = merge_tensor(
        METHODS["nuslerp"], own, theirs, base if based else None, [a, b], kernels=FusedKernels()
    )
    assert shard_bytes(run(planned, tmp_path / "merged").shards(), wanted)


def test_a_scaled_passthrough_is_not_a_copy(models: Path, tmp_path: Path) -> None:
    def merges(parameters: dict[str, Any]) -> int:
        parts = plan(models, "passthrough", ["a"], parameters, SMALL).plan.parts
        return sum(isinstance(piece, MergePiece) for part in parts for piece in part.pieces)

    assert (merges({}), merges({"scale": 1.0}), merges({"scale": 0.5})) == (0, 0, 2)
    scaled = plan(models, "passthrough", ["a"], {"scale": 0.5}, SMALL)
    wanted = (read_checkpoint(models / "a")["n"].float() * 0.5).to(torch.bfloat16).view(torch.int16)
    assert shard_bytes(run(scaled, tmp_path / "merged").shards(), wanted)


def test_the_plan_says_where_profiles_differ(models: Path) -> None:
    def notices(method: str, parameters: dict[str, Any], **more: Any) -> str:
        return "\n".join(plan(models, method, ["a", "b"], parameters, SMALL, **more).plan.notices)

    said = notices("ties", {"density": 0.5})
    assert "`ties` is not the same everywhere" in said
    assert "paper sets `" in said
    assert "`trim_scope: model`" in said
    assert "mergekit sets" in said and "`equal_magnitudes: exact_k`" in said
    assert "Set `profile:`" in said
    assert "everywhere" not in notices("ties", {"density": 0.5}, profile="mergekit")
    assert "everywhere" not in notices("linear", {})
    assert "rescale" not in notices("dare_linear", {"density": 1.0})
    assert "mergekit sets `rescale: l1`" in notices("dare_linear", {"density": 0.5})
    assert "paper sets `count_scope: model`" in notices("ramplus_tl", {})
