"""Recipes that stand for far more than their text: refused before it is looked into, and soon."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from service.planning.salvage import salvage
from service.recipe import (
    MAX_DOCUMENTS,
    MAX_PLACES,
    MAX_RECIPE_CHARACTERS,
    Recipe,
    checks,
    entries,
    parse_documents,
    parse_documents_yaml,
    parse_recipe,
    sizes,
    tokenizers,
    values,
    yaml_text,
)
from service.vocabulary import filling, reading
from tests.service.recipe.recipe_checks import recipe
from workers.errors import RecipeError
from workers.methods.resolve import MAX_PARAMETERS

pytestmark = pytest.mark.fast

ENTRY = "m: &m {model: /a, layer_range: [0, 1]}\ns: &s {sources: [" + "*m, " * 63 + "*m]}\n"
SLICES = ENTRY + "l: &l [" + "*s, " * 1023 + "*s]\nmerge_method: linear\n"
MODULES = SLICES + "modules: {" + ", ".join(f"m{n}: {{slices: *l}}" for n in range(16)) + "}\n"
SETTING = "g: &g [" + "1, " * 1023 + "1]\nc: &c {value: *g}\np: &p {weight: [" + "*c, " * 255 + "*c]}\n"
TOKEN = "{" + ", ".join(f"t{n}: {{source: {{kind: zero}}}}" for n in range(4096)) + "}"


def documents(document: str, anchor: str = "&d ") -> str:
    """A YAML text of 64 documents that are one."""
    inner = document.replace("\n", "\n  ")
    return f"documents:\n- {anchor}\n  {inner}\n" + "- *d\n" * 63


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SLICES + "slices: *l", "more than the 16384"),
        (MODULES, "more than the 16384"),
        (documents(MODULES), "more than the 16384"),
        (documents(f"merge_method: linear\nmodels: [{{model: /a}}]\ntokenizer: {{tokens: {TOKEN}}}"), "than the 16384"),
        (SETTING + "merge_method: linear\nmodels: [" + "{model: /a, parameters: *p}, " * 64 + "]", "than the 262144"),
        (SETTING + "merge_method: linear\nparameters: *p\nmodels: [{model: /a, parameters: *p}]", "than the 262144"),
        (documents(SETTING + "merge_method: linear\nparameters: *p\nmodels: [{model: /a}]"), "than the 262144"),
        ("s: &s {sources: []}\nmerge_method: linear\nl: &l [" + "*s, " * 40_000 + "*s]\nmodules: {"
         + ", ".join(f"m{n}: {{slices: *l}}" for n in range(4000)) + "}", "more than the 16384"),
        ("c: &c {filter: a}\nmerge_method: linear\nmodels: [{model: /a}]\nparameters: {"
         + ", ".join(f"p{n}: *l" for n in range(4000)) + ", l: &l [" + "*c, " * 40_000 + "*c]}", ""),
    ],
)  # fmt: skip
def test_what_a_short_text_stands_for_is_counted_first(text: str, says: str) -> None:
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse_documents_yaml(text)
    assert time.process_time() - started < 5
    assert any(says in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("name", ["sources", "settings"])
def test_nothing_is_left_of_what_is_too_much(name: str) -> None:
    value = {"sources": recipe(models=..., modules={"x": {"slices": [{"sources": [{"model": "/a"}] * 64}] * 1024}}),
             "settings": recipe(parameters={"weight": [{"value": [1] * 1024}] * 257})}[name]  # fmt: skip
    started = time.process_time()
    assert salvage(value) is None
    assert salvage({"documents": [value]}) is None
    assert time.process_time() - started < 1


def sliced(count: int) -> dict[str, Any]:
    """A recipe of slices that have two sources each."""
    sources = [{"model": name, "layer_range": [0, 1]} for name in ("/a", "/b")]
    return {"merge_method": "linear", "slices": [{"sources": sources}] * count}


def test_limits_are_of_all_lists_and_documents_together(monkeypatch: pytest.MonkeyPatch) -> None:
    one = sliced(3) | {"tokenizer": {"tokens": {"a": {"source": {"kind": "zero"}}}}}
    set_values = recipe(parameters={"density": [0, {"value": [0.5, 0.7]}][1:], "lambda": 0.7})
    monkeypatch.setattr(sizes, "MAX_ENTRIES", 11)
    monkeypatch.setattr(sizes, "MAX_SETTINGS", 4 + 1)
    assert parse_recipe(one)
    assert parse_recipe(set_values)
    assert "the 11 models, slices and tokens" in told([one | {"name": "x"}, recipe(models=[{"model": "x"}])])
    monkeypatch.setattr(sizes, "MAX_ENTRIES", 10)
    monkeypatch.setattr(sizes, "MAX_SETTINGS", 4)
    assert "the 10 models, slices and tokens" in told(one)
    assert "the 4 values in all" in told(set_values)
    for place in ("modules", "slices"):
        held = {"slices": sliced(3)["slices"], "parameters": {"weight": [1] * 5}}
        inside = held if place == "slices" else {"modules": {"default": held}}
        assert "the 4 values in all" in told({"merge_method": "linear"} | inside)


def told(value: Any) -> str:
    """What is wrong with a recipe."""
    with pytest.raises(RecipeError) as caught:
        parse_documents(value)
    (problem,) = caught.value.problems
    return problem


def test_a_recipe_of_as_many_models_as_are_read_is_read_soon() -> None:
    sources = [{"model": f"/{n}", "layer_range": [0, 1], "parameters": {"weight": 0.5}} for n in range(15)]
    value = {"merge_method": "linear", "slices": [{"sources": sources}] * 1023}
    started = time.process_time()
    found = parse_recipe(value)
    assert (found.most_inputs, len(found.names), len(found.places)) == (15, 15, 15)
    assert time.process_time() - started < 20


def test_regions_are_made_once_and_are_no_part_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    found, other = (parse_recipe(sliced(3)) for _ in range(2))
    assert found.regions is found.regions
    assert found == other
    assert hash(found.canonical()) == hash(other.canonical())
    assert found.to_json() == sliced(3)
    assert Recipe.model_validate_json(found.canonical()) == found


def test_the_documented_limits_are_those_of_the_code() -> None:
    text = Path("docs/recipes.md").read_text().split("\n## Limits\n")[1].split("\n## ")[0]
    limits = (
        MAX_RECIPE_CHARACTERS, MAX_DOCUMENTS, MAX_PLACES, sizes.MAX_ENTRIES, sizes.MAX_SETTINGS, entries.MAX_MODELS,
        entries.MAX_MODULES, entries.MAX_SLICES, checks.MAX_FILTERS, values.MAX_CONDITIONS, values.MAX_GRADIENT,
        MAX_PARAMETERS, tokenizers.MAX_TOKEN_ENTRIES, tokenizers.MAX_PADDING, tokenizers.MAX_TEMPLATE,
        reading.MAX_TOKEN_ID, filling.MAX_ROWS, filling.MAX_MODEL_ROWS, filling.MAX_ROW_RANGES,
        yaml_text.MAX_DEPTH, yaml_text.MAX_MERGED_KEYS,
    )  # fmt: skip
    written = set(re.findall(r"\d[\d,]*\d", text))
    assert {f"{limit:,}" for limit in limits} <= written


def test_a_tokenizer_option_without_a_source_means_a_union() -> None:
    vocabulary = parse_recipe(recipe(tokenizer={})).vocabulary
    assert vocabulary is not None
    assert vocabulary.source == "union"
