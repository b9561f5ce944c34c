"""What is left of a refused recipe of slices or modules: their places, and as much of each as is surely meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.planning.plan import PlanOptions
from service.planning.planner import examine
from service.planning.salvage import salvage
from service.recipe import Recipe, parse_recipe
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from workers.errors import RecipeError
from workers.methods import METHODS
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast

JSON = dict[str, Any]

SLICED: JSON = {
    "merge_method": "slerp",
    "base_model": "/a",
    "slices": [
        {"sources": [{"model": "/a", "layer_range": [0, 2]}, {"model": "/b", "layer_range": [1, 3]}]},
        {
            "sources": [{"model": "/c", "layer_range": [0, 4]}, {"model": "/a", "layer_range": [0, 4]}],
            "parameters": {"t": [0, {"filter": "mlp", "value": 1}][:1]},
        },
    ],
    "parameters": {"t": 0.5},
}
PARTS: JSON = {
    "merge_method": "linear",
    "modules": {
        "vision": {"models": [{"model": "/v", "parameters": {"weight": 0.25}}]},
        "default": {"slices": [{"sources": [{"model": "/a", "layer_range": [0, 2]}]}]},
    },
}


def left(of: JSON, change: Callable[[JSON], Any]) -> JSON:
    """What is left of a recipe, as JSON, when ``change`` has made it one that is refused."""
    value = copy.deepcopy(of)
    change(value)
    with pytest.raises(RecipeError):
        parse_recipe(value)
    found = salvage(value)
    assert found is not None
    return found.to_json()


def ranges(found: JSON) -> list[list[tuple[str, int, int]]]:
    """Whose layers, and which, by slice."""
    return [[(each["model"], *each["layer_range"]) for each in entry["sources"]] for entry in found["slices"]]


@pytest.mark.parametrize("change", [{"profil": "paper"}, {"seed": -1}, {"rank": "none"}])
def test_a_wrong_field_leaves_slices_and_modules(change: JSON) -> None:
    assert left(SLICED, lambda value: value.update(change)) == parse_recipe(SLICED).to_json()
    assert left(PARTS, lambda value: value.update(change)) == parse_recipe(PARTS).to_json()


def test_a_wrong_tokenizer_leaves_slices_and_whatever_it_would_have_made_fit() -> None:
    allowed = {"vocabularies": "ignore", "mismatched_tensors": "base"}
    found = left(SLICED, lambda value: value.update({"tokenizer_source": 3}))
    assert found == parse_recipe(SLICED).to_json() | allowed


def test_wrong_parameters_leave_the_layers() -> None:
    def change(value: JSON) -> None:
        value["slices"][0]["parameters"] = {"t": [0, 7], "T": 1}
        value["slices"][1]["sources"][0]["parameters"] = {"density": 3}

    found = left(SLICED, change)
    assert ranges(found) == ranges(SLICED)
    assert found["merge_method"] == "slerp"
    assert found["slices"][1]["parameters"] == {"t": [0]}
    assert "parameters" not in found["slices"][0]


def test_an_unknown_method_leaves_the_layers_to_be_averaged() -> None:
    found = left(SLICED, lambda value: value.update(merge_method="slurp"))
    assert (found["merge_method"], ranges(found)) == ("linear", ranges(SLICED))


@pytest.mark.parametrize("layers", [None, [3], [2, 1], [-1, 2], [0, 5], "all"])
def test_of_a_slice_whose_layers_are_not_known_none_are_merged(layers: Any) -> None:
    """Which of two lengths is meant, nobody knows either."""
    found = left(SLICED, lambda value: value["slices"][0]["sources"][1].update(layer_range=layers))
    assert ranges(found) == [[("/a", 0, 0), ("/b", 0, 0)], ranges(SLICED)[1]]


def test_what_names_no_model_keeps_its_place() -> None:
    def change(value: JSON) -> None:
        del value["slices"][0]["sources"][0]["model"]
        value["slices"].insert(0, {"sorces": []})
        value["slices"].append(7)

    found = left(SLICED, change)
    assert ranges(found) == [[("/a", 0, 0)], [("/b", 0, 2), ("/b", 1, 3)], ranges(SLICED)[1], [("/a", 0, 0)]]


def test_a_slice_whose_base_is_not_known_allows_what_it_may_have_decided() -> None:
    found = left(SLICED, lambda value: value["slices"][1].update(base_model=3))
    assert (found["missing_tensors"], found["extra_tensors"]) == ("base", "drop")


def test_a_module_of_which_nothing_is_left_is_one_models() -> None:
    found = left(PARTS, lambda value: value["modules"].update(vision={"model": "/v"}))
    assert found["modules"]["vision"] == {"models": [{"model": "/a"}]}
    assert found["modules"]["default"] == PARTS["modules"]["default"]


@pytest.mark.parametrize("change", [{"default": {}}, {"x" * 200: {"models": [{"model": "/w"}]}}])
def test_where_modules_cannot_be_told_apart_the_models_are_only_opened(change: JSON) -> None:
    found = left(PARTS, lambda value: value["modules"].update(change))
    assert "modules" not in found
    assert {each["model"] for each in found["models"]} >= {"/v"}
    allowed = ("missing_tensors", "extra_tensors", "mismatched_tensors")
    assert [found[name] for name in allowed] == ["base", "drop", "base"]


@pytest.mark.parametrize("name", ["slices", "modules"])
def test_too_many_are_not_looked_into(name: str) -> None:
    entry = {"sources": [{"model": "/a", "layer_range": [0, 1]}]}
    many: Any = [entry] * 1025 if name == "slices" else {str(n): {"slices": [entry]} for n in range(17)}
    assert salvage({"merge_method": "linear", name: many}) is None


def test_problems_of_layers_are_said_with_those_of_the_recipe(tmp_path: Path) -> None:
    """Places are those of the recipe as it was written."""
    for name, layers in (("a", 4), ("b", 2)):
        shape = {"layers": layers, "hidden": 16, "heads": 2, "vocab": 32}
        write_checkpoint(tmp_path / name, llama_tensors(0, **shape), llama_config(**shape))
    value = {
        "merge_method": "linear",
        "slices": [
            {"sources": [{"model": "b/", "layer_range": [0, 2]}, {"modell": 1}]},
            {"sources": [{"model": str(tmp_path / "a"), "layer_range": [0, 4]}]},
            {"sources": [{"model": str(tmp_path / "b"), "layer_range": [1, 3]}]},
            {"sources": [{"model": str(tmp_path / "absent"), "layer_range": [0, 1]}]},
        ],
        "parameters": {"wait": 1},
    }
    found = salvage(value)
    assert found is not None
    problems = examine(found, PlanOptions(), LocalStore(), {}).problems
    assert (
        sum("slices[2].sources[0].layer_range: [1, 3] goes beyond the 2 layers" in each for each in problems)
        == 1
    )
    assert sum("absent: no model here" in each for each in problems) == 1
    assert sum("'b/'" in each for each in problems) == 1
    assert len(problems) == 3


names = st.sampled_from(["/a", "/b", 3, None, "x+y"])
layers = st.sampled_from([[0, 1], [1, 2], [0, 2], [2, 0], None, "0-2"])
settings = st.sampled_from(
    [{}, {"weight": 1}, {"t": [0, 1]}, {"weight": [{"filter": "a"}]}, {"x": 1}, None, 3]
)
sources = st.fixed_dictionaries({}, optional={"model": names, "layer_range": layers, "parameters": settings})
slices = st.lists(
    st.fixed_dictionaries(
        {"sources": st.lists(sources | st.integers(), max_size=3)},
        optional={"base_model": names, "parameters": settings},
    )
    | st.none(),
    max_size=3,
)
whole = st.lists(st.fixed_dictionaries({"model": names}, optional={"parameters": settings}), max_size=2)
modules = st.dictionaries(
    st.sampled_from(["default", "text_decoder", "vision", 4, ""]),
    st.fixed_dictionaries({}, optional={"models": whole, "slices": slices, "parameters": settings})
    | st.none(),
    max_size=3,
)


@given(
    st.sampled_from([*METHODS]) | st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "slices": slices,
            "modules": modules,
            "base_model": names,
            "parameters": settings,
            "x": names,
        },
    ),
)
def test_whatever_comes_in_what_is_left_is_a_recipe_that_is_not_refused(method: Any, rest: JSON) -> None:
    value = {"merge_method": method} | rest
    found = salvage(value)
    assert found is None or parse_recipe(found.to_json()) == found
    if found is None:
        assert not any(model in str(rest) for model in ("'model': '/a'", "'model': '/b'"))
    else:
        assert isinstance(found, Recipe)
        assert all(name in str(value) for name in found.names)
