"""The recipes of several documents that mergekit-multi is asked for, and their comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.recipe import parse_documents
from tests.checkpoints import fine_tune, llama_config, llama_tensors, read_checkpoint, write_checkpoint
from tests.oracle.language import LLAMA
from tests.oracle.several import FIRST, GROUPS, compare_several, several, several_problems, several_table


def test_every_recipe_is_one_that_is_read_and_made_by_its_number_alone() -> None:
    recipes = [several(number) for number in range(28)]
    assert [each.documents for each in recipes] == [several(number).documents for number in range(28)]
    graphs = [parse_documents(each.placed(Path("/models"))) for each in recipes]
    assert {len(graph.recipes) for graph in graphs} == {2, 3}
    assert any(graph.order != tuple(sorted(graph.order)) for graph in graphs)
    assert {each.group for each in recipes} == set(GROUPS)
    assert sum(each.is_rounded for each in recipes) >= 3
    assert len(FIRST) * 3 <= len(recipes) + 1


@pytest.mark.parametrize(
    ("change", "says"), [(0.0, None), (1e-5, "elements beyond the bound"), (None, "only one has")]
)
def test_what_is_apart_is_told(tmp_path: Path, change: float | None, says: str | None) -> None:
    recipe = several(0)
    assert not recipe.is_rounded
    base, config = llama_tensors(0, **LLAMA), llama_config(**LLAMA)
    for name in ("base", "a", "b", "c"):
        write_checkpoint(tmp_path / recipe.group / name, fine_tune(base, 1), config)
    for name in ("ours", "theirs"):
        write_checkpoint(tmp_path / name, base, config)
    changed = read_checkpoint(tmp_path / "ours")
    if change is None:
        del changed["model.norm.weight"]
    else:
        changed["model.norm.weight"][3] += change
    write_checkpoint(tmp_path / "ours", changed, config)
    found = compare_several(tmp_path, recipe, tmp_path / "ours", tmp_path / "theirs")
    problems = list(several_problems([found]))
    assert bool(problems) is (says is not None)
    assert says is None or says in problems[0]
    assert f"| float32 | 1 | {found.distance.elements:,} |" in several_table([found])
