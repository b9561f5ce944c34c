"""What is left of a refused recipe: what it surely meant, and nothing that would bring up problems of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.planning.salvage import salvage
from service.recipe import Recipe, parse_documents, parse_recipe
from workers.errors import RecipeError
from workers.methods import METHODS

pytestmark = pytest.mark.fast

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "/base",
    "models": [{"model": "/a", "parameters": {"weight": 0.5}}, {"model": "/b"}],
    "parameters": {"density": 0.25},
    "out_dtype": "bfloat16",
}


def left(**changes: Any) -> Recipe:
    """What is left of a TIES recipe that is refused for these changes."""
    with pytest.raises(RecipeError):
        parse_recipe(TIES | changes)
    found = salvage(TIES | changes)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"slices": []},
        {"profil": "paper"},
        {"parameters": {"density": 0.25, "wieght": 1}},
        {"parameters": {"density": 0.25, "lambda": "much"}},
        {"seed": -1},
        {"profile": "none"},
    ],
)
def test_a_wrong_field_leaves_the_rest(changes: dict[str, Any]) -> None:
    assert left(**changes).to_json() == TIES


@pytest.mark.parametrize("changes", [{"tokenizer_source": 3}, {"tokenizer": {"source": "/nobody"}}])
def test_what_a_wrong_tokenizer_would_have_made_fit_is_let_be(changes: dict[str, Any]) -> None:
    found = left(**changes)
    assert found.to_json() == TIES | {"vocabularies": "ignore", "mismatched_tensors": "base"}


def test_wrong_parameters_leave_the_others_of_their_section() -> None:
    models = [{"model": "/a", "parameters": {"weight": 2, "density": 7}}, {"model": "/b", "parameters": [1]}]
    found = left(models=models, parameters=None)
    assert [dict(entry.parameters) for entry in found.models] == [{"weight": 2}, {}]
    assert found.merge_method == "ties"


@pytest.mark.parametrize("method", ["tiesd", None, 3, [], "slerp"])
def test_where_the_method_makes_no_sense_the_models_are_averaged(method: Any) -> None:
    found = left(merge_method=method, models=[{"model": f"/{name}"} for name in "abc"])
    assert found.merge_method == "linear"
    assert found.names == ["/base", "/a", "/b", "/c"]
    assert found.out_dtype == "bfloat16"
    assert (found.missing_tensors, found.extra_tensors) == ("error", "error")


@pytest.mark.parametrize("base", [None, 3, "org/name+one+two"])
def test_without_a_base_nobody_lacks_anything(base: Any) -> None:
    found = left(base_model=base)
    assert found.names == ["/a", "/b"]
    assert (found.missing_tensors, found.extra_tensors) == ("base", "drop")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("missing_tensors", "base"),
        ("extra_tensors", "drop"),
        ("mismatched_tensors", "base"),
        ("buffers", "/base"),
    ],
)
def test_what_a_malformed_option_may_have_allowed_is_allowed(name: str, allowed: str) -> None:
    assert getattr(left(**{name: "yes"}), name) == allowed
    assert getattr(left(x=1), name) == Recipe.model_fields[name].default


def test_models_that_are_none_are_left_out() -> None:
    models = [
        {"model": "/a"},
        "b",
        {"model": "c+d+e"},
        {"modell": "/e"},
        {"model": ["f"]},
        {"model": "/g", "x": 1},
    ]
    assert left(models=models).names == ["/base", "/a", "/g"]


@pytest.mark.parametrize(
    "value", [None, [], "x", {}, *({"models": each} for each in (None, [], ["/a"], [{"model": "/a"}] * 65))]
)  # fmt: skip
def test_where_nothing_can_be_opened_nothing_is_left(value: Any) -> None:
    assert salvage(value) is None


@pytest.mark.parametrize("wrapped", [lambda value: [value], lambda value: {"documents": [value]}])
def test_one_document_in_a_list_is_a_recipe_as_ever(wrapped: Callable[[Any], Any]) -> None:
    value = TIES | {"profil": "paper"}
    with pytest.raises(RecipeError):
        parse_documents(wrapped(value))
    found = salvage(wrapped(value))
    assert found is not None
    assert found.to_json() == TIES
    assert salvage(wrapped([value])) is None  # which is no recipe, mended or not
    assert salvage({"documents": [value], "dtype": "float32"}) is None
    assert salvage([value, TIES | {"name": "other"}]) is None


def test_more_places_than_are_read_leave_the_models_alone() -> None:
    sources = [
        [{"model": "/a", "layer_range": [0, 1], "fisher": f"/{n}/{m}"} for m in range(64)] for n in range(5)
    ]
    value = {"merge_method": "fisher", "slices": [{"sources": each} for each in sources]}
    with pytest.raises(RecipeError, match="models: 321 places in all"):
        parse_documents(value)
    found = salvage(value)
    assert found is not None
    assert parse_documents(found.to_json()).places == ["/a"]


def test_thousands_of_parameters_are_not_looked_into() -> None:
    many = {f"density{number}": 1 for number in range(100_000)}
    assert left(parameters=many, models=[{"model": "/a", "parameters": many}]).parameters == {}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["/a", "base"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from([*Recipe.model_fields, "x"])
parts = st.dictionaries(
    st.sampled_from(["weight", "density", "lambda", "t", "normalize"]) | st.integers(), values
)
entries = st.lists(
    st.fixed_dictionaries({"model": st.just("/a") | values}, optional={"parameters": parts}) | values
)


@given(
    st.dictionaries(fields, values), st.sampled_from([*METHODS]) | values, entries | values, parts | values
)
def test_whatever_comes_in_what_is_left_is_a_recipe_that_is_not_refused(
    rest: dict[str, Any], method: Any, models: Any, parameters: Any
) -> None:
    found = salvage({"merge_method": method, "models": models, "parameters": parameters} | rest)
    assert found is None or parse_recipe(found.to_json()) == found
