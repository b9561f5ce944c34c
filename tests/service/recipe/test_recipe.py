"""Recipes: mergekit's YAML as it is written in the wild, and every way to get one wrong."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.planning.places import resolve_model
from service.recipe import Recipe, Source, parse_recipe, parse_yaml
from tests.fuzzing import fuzzed
from tests.service.recipe.recipe_checks import problems, recipe
from workers.errors import PlanError, RecipeError

pytestmark = pytest.mark.fast

SLERP: dict[str, Any] = {"merge_method": "slerp", "base_model": ...}

TIES = """
# from the documentation of mergekit
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: 1
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: 3e-1
  - model: TheBloke/Llama-2-13B-fp16
    # no parameters necessary for base model
    parameters:
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
  lambda: 0.9
dtype: float16
tokenizer_source: base
"""


def merged(found: Recipe) -> tuple[Source, ...]:
    """What the recipe of whole models merges, in its order."""
    return found.regions[0].stretches[0].merged


def test_mergekits_yaml_is_read_unchanged() -> None:
    found = parse_yaml(TIES)
    assert found.merge_method == "ties"
    assert found.reference == "TheBloke/Llama-2-13B-fp16"
    assert found.models is not None
    assert found.models[0].model == "psmathur/orca_mini_v3_13b"
    assert found.out_dtype_name == "F16"
    assert [source.index for source in merged(found)] == [0, 1]  # the base has no task vector
    assert found.models[1].parameters == {"density": 0.5, "weight": "3e-1"}  # YAML 1.1's reading of 3e-1
    assert found.models[2].parameters == {}
    assert (found.seed, found.profile, found.missing_tensors) == (0, None, "error")


def test_json_and_yaml_mean_the_same() -> None:
    assert parse_yaml(yaml.safe_dump(recipe())) == parse_recipe(recipe())
    assert parse_yaml('{"merge_method": "linear", "models": [{"model": "/a"}]}').merge_method == "linear"


@pytest.mark.parametrize("null", ["base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"])
def test_a_key_without_a_value_is_as_if_it_were_not_there(null: str) -> None:
    value = recipe(merge_method="linear", base_model=..., parameters=...)
    value["models"][0]["parameters"] = None
    assert parse_recipe(value | {null: None}) == parse_recipe(value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_modle": "x"}, "base_modle: is not a key of a recipe; did you mean `base_model`?"),
        ({"paramters": {}}, "did you mean `parameters`?"),
        ({"qqq": 1}, "qqq: is not a key of a recipe ("),
        ({"merge_method": "tie"}, "merge_method: 'tie' is not a method"),
        ({"merge_method": "tie"}, "did you mean 'ties'?"),
        ({"merge_method": None}, "merge_method: "),
        ({"merge_method": ...}, "merge_method: Field required"),
        ({"models": ...}, "models: name what is merged, here or under `slices` or `modules`"),
        ({"models": []}, "models: "),
        ({"models": "a"}, "models: "),
        ({"models": ["s3://b/one"]}, "models[0]: "),
        ({"models": [{"parameters": {}}]}, "models[0].model: Field required"),
        ({"models": [{"model": ""}]}, "models[0].model: "),
        ({"models": [{"model": 3}]}, "models[0].model: "),
        ({"models": [{"model": "a", "paramters": {}}]}, "models[0].paramters: is not a key of a model; did you"),
        ({"models": [{"model": "a", "parameters": []}]}, "models[0].parameters: "),
        ({"models": [{"model": "org/a+org/b+org/c"}]}, "models[0].model: 'org/a+org/b+org/c': one adapter is written"),
        ({"models": [{"model": "org/a+"}]}, "models[0].model: 'org/a+': one adapter is written"),
        ({"models": [{"model": "a+b", "adapter": "c"}]}, "models[0]: adapter: 'a+b' has one already"),
        ({"models": [{"model": "a", "adapter": "b+c"}]}, "models[0].adapter: 'b+c' has an adapter of its own"),
        ({"models": [{"model": "a", "gram": "b+c"}]}, "models[0].gram: 'b+c' has an adapter of its own"),
        ({"models": [{"model": f"/m{i}"} for i in range(65)]}, "models: "),
        ({"base_model": ""}, "base_model: "),
        ({"base_model": "/a+/b+/c"}, "base_model: '/a+/b+/c': one adapter is written"),
        ({"base_model": ...}, "base_model: `ties` works on task vectors and needs the base model"),
        ({"models": [{"model": "s3://b/base"}]}, "takes 1 to any model(s) besides the base, the recipe has 0"),
        ({"merge_method": "slerp", "base_model": "/x", "parameters": {"t": 0.5}}, "base_model: `slerp` goes from"),
        (SLERP | {"models": [{"model": "/x"}], "parameters": {"t": 0.5}}, "takes 2 model"),
        ({"merge_method": "passthrough", "base_model": ..., "parameters": ...}, "`passthrough` takes 1 model(s)"),
        ({"dtype": "int8"}, "dtype: "),
        ({"out_dtype": "F32"}, "out_dtype: "),
        ({"profile": "official"}, "profile: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**63}, "seed: "),
        ({"seed": True}, "seed: "),
        ({"seed": "abc"}, "seed: "),
        ({"missing_tensors": "ignore"}, "missing_tensors: "),
        ({"buffers": "s3://b/three"}, "buffers: 's3://b/three' is not one of the recipe's models"),
        ({"tokenizer_source": "union", "tokenizer": {}}, "tokenizer_source: there is a `tokenizer` already"),
        ({"tokenizer_source": "/other"}, "tokenizer_source: '/other' is not one of"),
        ({"slices": []}, "slices: Tuple should have at least 1 item"),
        ({"slices": [{"sources": [{"model": "/a", "layer_range": [0, 1]}]}]}, "slices: there are `models` already"),
        ({"tokenizer": {"source": "/other"}}, "tokenizer.source: '/other' is not one of the recipe's models"),
        ({"tokenizer": {"surce": "union"}}, "tokenizer.surce: "),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: "),
        ({"tokenizer": {"pad_to_multiple_of": True}}, "tokenizer.pad_to_multiple_of: "),
        ({"tokenizer": {"embeddings": []}}, "tokenizer.embeddings: "),
        ({"tokenizer": {"tokens": {"<x>": {}}}}, "tokenizer.tokens.<x>.source: Field required"),
        ({"tokenizer": {"tokens": {"<x>": {"source": "/other"}}}}, "tokenizer.tokens.<x>.source: '/other' is not one"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "one"}}}}}, "tokenizer.tokens.<x>.source"),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "s3://b/base"}}}}},
            "a `model_token` has either `token` or `token_id`",
        ),
        ({"chat_template": ["auto"]}, "chat_template: "),
        ({"chat_template": "{" * 65_537}, "chat_template: "),
        ({"vocabularies": "base"}, "vocabularies: "),
        ({"parameters": {"lamda": 1}}, "parameters.lamda: is not a parameter of ties; did you mean 'lambda'?"),
        ({"parameters": {"density": 1.01}}, "parameters.density: "),
        ({"parameters": {"density": -0.1}}, "parameters.density: "),
        ({"parameters": {"density": True}}, "parameters.density: must be a number"),
        ({"parameters": {"weight": float("nan")}}, "parameters.weight: "),
        ({"parameters": {"weight": float("inf")}}, "parameters.weight: "),
        ({"parameters": {"weight": 1e39}}, "parameters.weight: "),
        ({"parameters": {"weight": "much"}}, "parameters.weight: "),
        ({"parameters": {"density": [0, 0.5, 1.5]}}, "parameters.density: input should be less than or equal to 1"),
        ({"parameters": {"weight": []}}, "parameters.weight: an empty list says nothing"),
        ({"parameters": {"weight": [0, "much"]}}, "parameters.weight: input should be a valid number"),
        ({"parameters": {"weight": [0, {"value": 1}]}}, "parameters.weight: a list holds either numbers"),
        ({"parameters": {"weight": [{"filtr": "mlp", "value": 1}]}}, "parameters.weight: a condition has `filter` and"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "parameters.weight: a condition needs a `value`"),
        ({"parameters": {"weight": [{"filter": 3, "value": 1}]}}, "parameters.weight: a `filter` is text"),
        ({"parameters": {"weight": {"value": [{"value": 1}]}}}, "parameters.weight: a gradient is a list of values"),
        ({"parameters": {"weight": {"value": {"value": 1}}}}, "parameters.weight: a condition's `value` is one"),
        ({"parameters": {"weight": {"filter": "mlp", "value": "much"}}}, "parameters.weight: input should be a valid"),
        ({"parameters": {"weight": [1] * 1025}}, "parameters.weight: 1025 values in a gradient, more than the 1024"),
        ({"parameters": {"weigth": [0, 1]}}, "parameters.weigth: is not a parameter of ties; did you mean 'weight'?"),
        ({"parameters": {"trim_scope": "layer"}}, "parameters.trim_scope: "),
        ({"models": [{"model": "/a", "parameters": {"weigth": 1}}]}, "models[0].parameters.weigth: "),
        ({"models": [{"model": "/a", "parameters": {"lambda": 1}}]}, "parameters.lambda: is set for the whole merge"),
        (SLERP | {"parameters": {"t": 1.5}}, "parameters.t: "),
        (SLERP | {"parameters": {}}, "parameters.t: is required"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: dict[str, Any], says: str) -> None:
    found = problems(recipe(**changes))
    assert any(says in problem for problem in found), found
    assert not any("merge_method: merge_method" in problem for problem in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"merge_method": "linear", "slices": []}, "slices: Tuple should have at least 1 item"),
        ({"merge_method": "linear", "modules": {}}, "modules: Dictionary should have at least 1 item"),
        (recipe(int8_mask=True), "int8_mask: is not a key of a recipe; write it under `parameters`"),
        (
            recipe(models=[{"model": "/a", "weight": 0.5}]),
            "models[0].weight: is not a key of a model; write it under `parameters`",
        ),
        (
            {
                "merge_method": "slerp",
                "models": [{"model": "/x"}, {"model": "/y"}],
                "parameters": {"t": [{"filter": "mlp", "value": 2}]},
            },
            "parameters.t: input should be less than or equal to 1 (got 2)",
        ),
    ],
)
def test_one_mistake_is_one_problem(value: dict[str, Any], said: str) -> None:
    (problem,) = problems(value)
    assert problem.startswith(said)


@pytest.mark.parametrize("value", [None, [], "text", 3, True])
def test_what_is_no_mapping_is_refused(value: Any) -> None:
    assert "must be a mapping" in problems(value if not isinstance(value, str) else "text")[0]


def test_all_problems_are_said_at_once() -> None:
    found = problems(
        recipe(
            slices=[],
            seeed=1,
            dtype="int4",
            seed=-3,
            tokenizer_source="/nobody",
            buffers="nobody",
            base_model=...,
            models=[
                {"model": "/a", "parameters": {"density": 2, "weigth": 1}},
                {"model": "/b", "paramters": {}, "parameters": {"density": [1, 2]}},
            ],
            parameters={"lambda": "high", "zero_sign": "minus"},
        )
    )
    for start in (
        "slices: ", "seeed: ", "dtype: ", "seed: ", "tokenizer_source: '/nobody'", "buffers: 'nobody'",
        "base_model: `ties`", "models[0].parameters.density", "models[0].parameters.weigth",
        "models[1].paramters", "models[1].parameters.density", "parameters.lambda", "parameters.zero_sign",
    ):  # fmt: skip
        assert sum(problem.startswith(start) for problem in found) == 1, (start, found)
    assert len(found) == 13


def test_an_unknown_method_does_not_hide_other_problems() -> None:
    found = problems(recipe(merge_method="tise", buffers="nobody", tokenizer_source="/nobody"))
    assert len(found) == 3


def test_a_models_place_in_the_recipe_is_named_not_its_place_among_the_merged() -> None:
    listed = [{"model": "s3://b/base"}, {"model": "/a"}, {"model": "/b", "parameters": {"density": 7}}]
    assert problems(recipe(models=listed))[0].startswith("models[2].parameters.density")
    turned = [{"model": "/a", "parameters": {"x": 1}}, {"model": "/b"}]
    found = problems(recipe(merge_method="slerp", base_model="/b", models=turned, parameters={"t": 0.5}))
    assert found[0].startswith("models[0].parameters.x")


def test_a_typo_in_the_bases_own_parameters_is_found_though_they_have_no_effect() -> None:
    listed = [{"model": "/a"}, {"model": "s3://b/base", "parameters": {"weigth": 1}}]
    assert problems(recipe(models=listed)) == [
        "models[1].parameters.weigth: is not a parameter of ties; did you mean 'weight'?"
    ]


def test_slerp_goes_from_the_base_model() -> None:
    models = [{"model": "/a"}, {"model": "/b"}]
    found = parse_recipe(recipe(merge_method="slerp", models=models, base_model="/b", parameters={"t": 0.2}))
    assert [(source.index, source.model) for source in merged(found)] == [(1, "/b"), (0, "/a")]
    assert found.reference == "/b"
    found = parse_recipe(recipe(merge_method="slerp", models=models, base_model=..., parameters={"t": 0.2}))
    assert [source.index for source in merged(found)] == [0, 1]
    assert found.reference == "/a"


def test_out_dtype_wins_over_dtype() -> None:
    assert parse_recipe(recipe(dtype="float32", out_dtype="bfloat16")).out_dtype_name == "BF16"
    assert parse_recipe(recipe(dtype="float32")).out_dtype_name == "F32"
    assert parse_recipe(recipe()).out_dtype_name is None


def test_a_recipe_is_frozen() -> None:
    found = parse_recipe(recipe())
    with pytest.raises(ValidationError, match="frozen"):
        found.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        found.models[0].model = "other"  # type: ignore[index,misc]


def test_canonical_json_depends_on_what_is_meant_and_on_nothing_else() -> None:
    value = recipe()
    turned = dict(reversed(value.items()))
    assert list(turned) != list(value)
    assert parse_recipe(turned).canonical() == parse_recipe(value).canonical()
    assert (
        parse_recipe(recipe(seed=0, missing_tensors="error", dtype=None)).canonical()
        == parse_recipe(value).canonical()
    )
    assert parse_recipe(recipe(seed=1)).canonical() != parse_recipe(value).canonical()
    assert parse_recipe(recipe(models=value["models"][::-1])).canonical() != parse_recipe(value).canonical()


@pytest.mark.parametrize(
    "text", [TIES, yaml.safe_dump(recipe(seed=2**63 - 1, out_dtype="float32", buffers="/dir/two"))]
)
def test_a_recipe_round_trips_through_json_and_yaml(text: str) -> None:
    found = parse_yaml(text)
    assert parse_recipe(found.to_json()) == found
    assert parse_yaml(found.to_yaml()) == found
    assert Recipe.model_validate_json(found.canonical()) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzzed(100)
@given(
    st.dictionaries(st.sampled_from([*Recipe.model_fields, "slices", "x"]), JSON),
    st.sampled_from(["ties", "slerp"]),
)
def test_any_json_is_a_recipe_or_a_recipe_error(value: dict[str, Any], method: str) -> None:
    for candidate in (value, recipe(merge_method=method, **value) if "merge_method" not in value else value):
        try:
            found = parse_recipe(candidate)
        except RecipeError as error:
            assert error.problems
        else:
            assert parse_recipe(found.to_json()) == found


ROOTS = {
    "org/exact": "s3://models/exact",
    "org/": "s3://org-models",
    "": "file:///hub",
    "pin/x@v1": "/pinned",
}


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("s3://b//p/", "s3://b/p"),
        ("file:///a/./b", "file:///a/b"),
        ("/a/b/", "file:///a/b"),
        ("org/exact", "s3://models/exact"),
        ("org/exact@main", "s3://models/exact@main"),
        ("org/other", "s3://org-models/other"),
        ("org/other@v1.0", "s3://org-models/other@v1.0"),
        ("else/model", "file:///hub/else/model"),
        ("gpt2", "file:///hub/gpt2"),
        ("pin/x@v1", "file:///pinned"),
    ],
)
def test_a_models_name_becomes_a_uri(name: str, uri: str) -> None:
    assert resolve_model(name, ROOTS) == uri


@pytest.mark.parametrize(
    "name",
    [
        "./model", "../model", "models/../../etc", "a/b/c", "~/model", "org/..", "org/name@../../x", "org/name\n", "",
        "http://host/x", "gs://b/x", "C:\\models", "org/na me", "org//x", "s3://", "s3:///key", "s3://b/../c", "file://host/x",
        "file:relative", "..", ".",
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(PlanError) as caught:
        resolve_model(name, ROOTS)
    assert name.strip() in str(caught.value).replace("\\\\", "\\")


def test_a_hub_name_that_nothing_maps_says_how_to_map_it() -> None:
    with pytest.raises(PlanError, match="MERGEMILL_MODEL_ROOTS") as caught:
        resolve_model("org/name@rev", {"other/": "s3://b"})
    assert '{"org/name": "s3://bucket/org/name"}' in str(caught.value)


def test_a_root_that_is_no_uri_is_a_plan_error_that_names_it() -> None:
    with pytest.raises(PlanError, match=r"MERGEMILL_MODEL_ROOTS.*relative/dir"):
        resolve_model("org/name", {"org/": "relative/dir"})
