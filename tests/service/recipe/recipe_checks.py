"""A recipe to change, and what is wrong with a changed one."""

from __future__ import annotations

from typing import Any

import pytest

from service.recipe import parse_recipe, parse_yaml
from workers.errors import RecipeError


def recipe(**changes: Any) -> dict[str, Any]:
    """A TIES merge of two models, with these keys changed; ``...`` leaves one out."""
    value: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": "s3://b/base",
        "models": [
            {"model": "s3://b/one", "parameters": {"density": 0.5}},
            {"model": "/dir/two", "parameters": {"weight": 0.3}},
        ],
        "parameters": {"lambda": 0.7},
    }
    return {key: inner for key, inner in (value | changes).items() if inner is not ...}


def problems(value: Any) -> list[str]:
    """What is wrong with a recipe, as a value or as YAML: each said in a line of bearable length."""
    with pytest.raises(RecipeError) as caught:
        parse_yaml(value) if isinstance(value, str) else parse_recipe(value)
    assert all(len(problem) < 700 for problem in caught.value.problems)
    return list(caught.value.problems)
