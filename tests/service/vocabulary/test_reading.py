"""What is read of a tokenizer, in which bounds, and the documented example."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.recipe import parse_recipe, parse_yaml
from service.vocabulary import reading
from service.vocabulary.reading import Tokenizers, tokens_of
from tests.service.vocabulary.models import ONE, planned, write_model
from workers.errors import PlanError
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"model": {"vocab": {"a": 1, "b": 0}}}, {"a": 1, "b": 0}),
        ({"model": {"vocab": [["a", -1.0], ["b", 0]]}}, {"a": 0, "b": 1}),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 7, "content": "<x>"}]}, {"a": 0, "<x>": 7}),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": None}, {"a": 0}),
        ({"model": {"vocab": {}}}, {}),
    ],
)
def test_tokens_are_those_of_the_model_and_those_that_were_added(
    document: Any, tokens: dict[str, int]
) -> None:
    assert tokens_of(document)[0] == tokens


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, "no vocabulary"),
        ({"model": []}, "no vocabulary"),
        ({"model": {"vocab": {"a": True}}}, "has the number True"),
        ({"model": {"vocab": {"a": 1 << 30}}}, "has the number"),
        ({"model": {"vocab": {"a": -1}}}, "has the number -1"),
        ({"model": {"vocab": ["a"]}}, "not a piece with its score"),
        ({"model": {"vocab": {}}, "added_tokens": {"a": 1}}, "is no list"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}, "has no `content`"),
        ({"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}, "has the number None"),
        ({"model": {"vocab": {"\ud800": 1}}}, "surrogates not allowed"),
    ],
)
def test_what_is_no_tokenizer_is_told(document: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tokens_of(document)


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [
        ("MAX_TOKENIZER_BYTES", 99, "more than the 99 that are read"),
        ("MAX_TOKENIZER_VALUES", 9, "more than the 9 that are read"),
        ("MAX_SETTINGS_BYTES", 9, "more than the 9 that are read"),
    ],
)
def test_big_files_are_not_read(
    limit: str, value: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, limit, value)
    places = [write_model(tmp_path / name, 1, ONE) for name in "ab"]
    with pytest.raises(PlanError, match=says):
        planned(places, tokenizer_source="union")
    assert planned(places).plan.parts  # copying has its own limit


def test_the_same_text_is_parsed_once(tmp_path: Path) -> None:
    places = [write_model(tmp_path / name, 1, ONE) for name in "ab"]
    found = planned(places)
    tokenizers = Tokenizers(LocalStore())
    one, two = (tokenizers.of(found.inputs.models[str(place)]) for place in places)
    assert one is not None and two is not None
    assert one.tokens is two.tokens
    assert one.uri != two.uri


def test_the_documented_recipe_can_be_read_and_round_trips() -> None:
    text = Path("docs/recipes.md").read_text().split("## Vocabularies")[1]
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    recipe = parse_yaml(block[1])
    assert recipe.vocabulary is not None
    assert recipe.vocabulary.pad_to_multiple_of == 64
    assert [entry.force for entry in (recipe.vocabulary.tokens or {}).values()] == [True, False, False]
    assert parse_recipe(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert parse_yaml(recipe.to_yaml()) == recipe
    shown = recipe.to_yaml({"org/chat": "chat"})
    assert "org/chat" not in shown
