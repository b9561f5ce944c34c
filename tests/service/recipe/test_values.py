"""Gradients, filters and precedence: what a recipe says about one tensor, and what has no form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.planning.layers import position
from service.recipe import parse_recipe
from service.recipe.resolve import Resolver, unused_filters
from service.recipe.values import interpolate, leaves, setting_problems, value_of
from workers.errors import RecipeError

pytestmark = pytest.mark.fast

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)
NAMES = st.sampled_from(
    ["model.layers.0.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight", "lm_head.weight"]
)
FILTERS = st.sampled_from(["mlp", "self_attn", "layers.3", "lm_head", "*", "nowhere"])
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5))
CONDITIONS = st.lists(
    st.fixed_dictionaries({"value": VALUES}, optional={"filter": FILTERS}), min_size=1, max_size=4
)
SETTINGS = st.one_of(VALUES, CONDITIONS)


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.floats(0, 1))
def test_a_gradient_is_linear_between_its_values(values: list[float], at: float) -> None:
    expected = np.interp(at, np.linspace(0, 1, len(values)), values)
    largest = max(map(abs, values))
    assert interpolate(values, at) == pytest.approx(expected, abs=1e-9 * largest + 1e-300, rel=1e-9)


@given(st.lists(NUMBERS, min_size=2, max_size=12), st.integers(1, 200))
def test_a_gradient_begins_and_ends_with_its_values_and_stays_between_them(
    values: list[float], depth: int
) -> None:
    found = [interpolate(values, position(layer, depth)) for layer in range(depth)]
    assert found[-1] == values[-1]
    assert depth == 1 or found[0] == values[0]
    slack = 1e-9 * max(map(abs, values))
    assert all(min(values) - slack <= each <= max(values) + slack for each in found)


def test_a_layer_alone_is_at_the_end() -> None:
    assert [position(layer, 4) for layer in range(4)] == [0, 1 / 3, 2 / 3, 1]
    assert position(0, 1) == 1


def test_switches_and_words_hold_until_the_next() -> None:
    said = [value_of([True, False, False, True], "x", at / 10, is_number=False) for at in range(11)]
    assert said == [True] * 4 + [False] * 6 + [True]
    assert value_of(["keep", "exact_k"], "x", 0.99, is_number=False) == "keep"


@given(CONDITIONS, NAMES, st.floats(0, 1))
def test_the_first_condition_that_fits_wins(conditions: list[dict[str, Any]], name: str, at: float) -> None:
    first = next((c for c in conditions if c.get("filter", "*") == "*" or c["filter"] in name), None)
    expected = None if first is None else value_of(first["value"], name, at)
    assert value_of(conditions, name, at) == expected
    if len(conditions) == 1:
        assert value_of(conditions[0], name, at) == expected


@given(st.lists(st.one_of(st.none(), SETTINGS), min_size=4, max_size=4), NAMES, st.floats(0, 1))
def test_the_nearest_place_that_says_something_wins(levels: list[Any], name: str, at: float) -> None:
    source, slice_, module, top = ({} if each is None else {"weight": each} for each in levels)
    value = {
        "merge_method": "linear",
        "parameters": top,
        "modules": {
            "default": {
                "parameters": module,
                "slices": [
                    {
                        "parameters": slice_,
                        "sources": [{"model": "/a", "layer_range": [0, 1], "parameters": source}],
                    }
                ],
            }
        },
    }
    recipe = parse_recipe(value)
    (region,) = recipe.regions
    found = Resolver(recipe).resolve(region.stretches[0], "any", [name], at).models[0]["weight"]
    said = (value_of(each, name, at) for each in levels if each is not None)
    assert found == next((each for each in said if each is not None), 1.0)


def test_a_models_own_name_is_what_filters_of_its_parameters_are_looked_for_in() -> None:
    recipe = parse_recipe(
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {"model": "/a", "layer_range": [0, 2]},
                        {"model": "/b", "layer_range": [4, 6]},
                    ]
                }
            ],
            "parameters": {
                "weight": [{"filter": "layers.0", "value": 2}, {"filter": "layers.4", "value": 3}],
                "normalize": [{"filter": "layers.7", "value": False}],
            },
        }
    )
    stretch = recipe.regions[0].stretches[0]
    found = Resolver(recipe).resolve(stretch, "layers.7.w", ["layers.0.w", "layers.4.w"], 0)
    assert [model["weight"] for model in found.models] == [2, 3]
    assert found.shared["normalize"] is False  # of the whole merge: what the output calls it


def test_what_no_filter_gives_a_tensor_is_named() -> None:
    value = {
        "merge_method": "slerp",
        "models": [{"model": "/a"}, {"model": "/b"}],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}]},
    }
    recipe = parse_recipe(value)
    resolver, stretch = Resolver(recipe), recipe.regions[0].stretches[0]
    assert resolver.resolve(stretch, "mlp", ["mlp", "mlp"], 0.25).shared == {"t": 0.25}
    for _ in range(2):  # remembered, too
        with pytest.raises(RecipeError, match=r"parameters\.t: is required"):
            resolver.resolve(stretch, "norm", ["norm", "norm"], 0)


def test_equal_parameters_are_one_object_however_many_tensors_share_them() -> None:
    recipe = parse_recipe(
        {"merge_method": "linear", "models": [{"model": "/a", "parameters": {"weight": [0, 1]}}]}
    )
    resolver, stretch = Resolver(recipe), recipe.regions[0].stretches[0]
    one, two, other = (resolver.resolve(stretch, "x", ["x"], at) for at in (0.5, 0.5, 0.75))
    assert one is two
    assert one.models[0] != other.models[0]


def test_filters_that_are_in_no_name_are_told() -> None:
    recipe = parse_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": "/a", "parameters": {"weight": [{"filter": "mpl", "value": 1}]}}],
            "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"filter": "*", "value": 2}]},
        }
    )
    assert unused_filters(recipe, ["layers.0.mlp.w"]) == [
        "models[0].parameters: the filter 'mpl' is in no tensor's name"
    ]


@given(st.one_of(SETTINGS, st.recursive(st.none() | NUMBERS | st.text(max_size=3), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["filter", "value", "x"]), inner, max_size=3)
), max_leaves=6)))  # fmt: skip
def test_what_has_the_right_form_can_be_read_for_any_tensor(setting: Any) -> None:
    if setting_problems(setting):
        return
    found = list(leaves(setting))
    assert found
    assert not any(isinstance(each, dict | list) or each is None for each in found)
    said = value_of(setting, "mlp", 0.5, is_number=False)
    assert said is None or said in found
