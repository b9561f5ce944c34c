"""docs/threats.md and docs/reliability.md promise nothing that no test shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/threats.md").read_text()
RELIABILITY = (ROOT / "docs/reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT + RELIABILITY)))


def test_tests_are_named() -> None:
    assert len(NAMED) > 30
    assert TEXT.count("`tests/") == len(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_test_that_is_named_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions
    assert any(function.startswith("test_") for function in functions)
