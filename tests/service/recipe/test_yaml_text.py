"""Recipes as YAML text: what is hostile ends in an error and soon, and what YAML can do for a recipe works."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.recipe import MAX_RECIPE_CHARACTERS, parse_yaml
from service.recipe.yaml_text import load_documents
from tests.fuzzing import fuzzed
from tests.service.recipe.recipe_checks import problems
from workers.errors import RecipeError

pytestmark = pytest.mark.fast

BOMB = "\n".join(
    ["a: &a0 [x, x]", *(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
)
MERGES = "\n".join(
    [
        "a: &a0 {x: 1, y: 2}",
        *(f"b{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)),
    ]
)
WIDE = (
    "a: &a {" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}\nb: {<<: [" + ", ".join(["*a"] * 5000) + "]}"
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "is not a key of a recipe"),
        (BOMB + "\nmerge_method: ties\nmodels: [{model: /y}]\nbase_model: /x\nparameters: {weight: *a11}", "weight"),
        (BOMB + "\nmerge_method: *a11\nmodels: [*a11, {model: *a11, parameters: *a11}]\nparameters: *a11", "models[0]"),
        (MERGES, "may not use `<<` itself"),
        (WIDE, "more than 10000 keys"),
        ("&a [*a]", "must be a mapping"),
        ("models: &a [*a]\nmerge_method: linear", "models[0]"),
        ("merge_method: linear\nmodels: [{model: /a}]\nparameters: &p {weight: *p}", "parameters.weight"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("merge_method: !!python/name:os.system", "not valid YAML"),
        ("merge_method: !!python/tuple [a]", "not valid YAML"),
        ("merge_method: !custom x", "not valid YAML"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("{a: " * 50_000, "nested more than 50 levels"),
        ("- " * 100_000, "nested more than 50 levels"),
        ("? " * 100_000, "nested more than 50 levels"),
        ("x: !!timestamp never", "does not suit its `!!` tag"),
        ("x: !!int ''", "does not suit its `!!` tag"),
        ("x: !!float ''", "does not suit its `!!` tag"),
        ("x: !!bool maybe", "does not suit its `!!` tag"),
        ("x: !!int 0x", "not valid YAML"),
        ("x: 2020-99-99", "not valid YAML"),
        ('merge_method: "\\uD800"\nmodels: [{model: /a}]', "not valid YAML"),
        ("merge_method: linear\nmodels: [{model: /a, parameters: {weight: 1.0e+999}}]", "weight"),
        ("merge_method: [", "not valid YAML"),
        ("\tmerge_method: x", "not valid YAML"),
        ("a: *nobody", "not valid YAML"),
        ("merge_method: \x00", "not valid YAML"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("merge_method: linear\nmerge_method: ties", "line 2: the key `merge_method` is given twice"),
        ("models: [{model: /a, model: /b}]", "the key `model` is given twice"),
        ("", "empty"),
        ("# nothing", "empty"),
        ("---\nmerge_method: linear\n---\nmerge_method: ties", "documents: there are several"),
        ("null", "must be a mapping"),
        ("x" * (MAX_RECIPE_CHARACTERS + 1), "longer than"),
        ("\n".join(f"k{i}: 1" for i in range(20_000)), "more problem(s)"),
        ("? " + "m" * 200_000 + "\n: 1", "mmmm"),
        ("models: [{model: /a}]\nmerge_method: " + "m" * 200_000, "merge_method"),
        ("models: [" + ", ".join(["{}"] * 60_000) + "]", "models"),
        ("1: 2\nnull: 3\n2020-01-01: 4\n1.5: 5\ntrue: 6", "merge_method"),
        ("merge_method: linear\nmodels: [{model: /a, parameters: {weight: 2020-01-01}}]", "weight"),
        ("merge_method: linear\nmodels: [{model: /a, parameters: {weight: !!set {a, b}}}]", "weight"),
        ("merge_method: linear\nmodels: [{model: /a, parameters: {weight: !!binary aGk=}}]", "weight"),
        ("merge_method: linear\nmodels: [{model: /a, parameters: {weight: .nan}}]", "weight"),
        ("merge_method: linear\nmodels: [{model: /a, parameters: {weight: 1" + "0" * 9999 + "}}]", ""),
        ("merge_method: linear\nmodels: [{model: /a}]\nseed: 1:30:30:30:30:30:30:30:30:30:30:30:30:30", "seed"),
    ],
    ids=lambda value: value[:24] if len(value) < 400 else f"{value[:16]}…{len(value)}",
)  # fmt: skip
def test_hostile_yaml_ends_in_a_recipe_error_and_soon(text: str, says: str) -> None:
    started = time.monotonic()
    found = problems(text)
    assert time.monotonic() - started < 10
    assert any(says in problem for problem in found), found
    assert len(found) <= 51


def test_anchors_and_merge_keys_work_as_in_yaml() -> None:
    found = parse_yaml(
        "merge_method: ties\nbase_model: /base\nmodels:\n"
        "- {model: /a, parameters: &p {weight: 0.5, density: 0.3}}\n"
        "- {model: /b, parameters: *p}\n"
        "- {model: /c, parameters: {<<: *p, weight: 1}}\n"
    )
    assert [entry.parameters for entry in found.models] == [
        {"weight": 0.5, "density": 0.3}, {"weight": 0.5, "density": 0.3}, {"weight": 1, "density": 0.3},
    ]  # fmt: skip


TOKENS = st.sampled_from(
    ["a", "weight", "model", "0", "-1", "0x", "1e9", "1.5", ".nan", "1:30", "2020-01-01", "~", "", "=", "''",
     '"\\uD800"', "!!int ", "!!float ", "!!bool ", "!!null ", "!!str ", "!!timestamp ", "!!binary ", "!!set ",
     "!!omap ", "!!pairs ",
     "!!seq ", "!!map ", "!!merge ", "!!value ", "!!python/name:os.system ", "!x ", "! ", "!<tag:yaml.org,2002:int> ",
     "&a ", "*a", "&b ", "*b", "<<", ": ", ":", ", ", "- ", "? ", "[", "]", "{", "}", "|", ">", "%YAML 9.9", "---",
     "...",
     "\n", "\n  ", "\n    ", "\t", "\x00", "\ufeff", "\u2028", "#", "'", '"', "\\", "@", "`", "😀"]
)  # fmt: skip


@fuzzed(200)
@given(st.lists(TOKENS, max_size=30).map("".join))
def test_any_text_is_yaml_or_a_recipe_error(text: str) -> None:
    try:
        documents = load_documents(text)
    except RecipeError as error:
        assert len(str(error)) < 5_000
    else:
        assert isinstance(documents, list)
