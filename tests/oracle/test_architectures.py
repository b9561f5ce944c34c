"""The recipes for other architectures, and what is said of what transformers made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.recipe import parse_recipe
from tests.oracle.architectures import (
    ARCHITECTURES,
    architecture_table,
    outputs,
    read_reply,
    write_request,
)

pytestmark = pytest.mark.fast

FOUND = {"class": "LlamaModel", "parameters": 12345, "problem": None}


def test_every_architecture_is_merged_in_both_ways(tmp_path: Path) -> None:
    jobs = outputs(Path("/models"), Path("/ours"))
    assert {path.name for path in jobs} == {
        f"{name}-{kind}" for name in ARCHITECTURES for kind in ("mean", "slices")
    }
    for path, recipe in jobs.items():
        parsed = parse_recipe(recipe)
        layers = [
            stretch.layers for region in parsed.regions for stretch in region.stretches if region.is_sliced
        ]
        assert set(layers) == ({2} if path.name.endswith("slices") else set())
        assert {Path(name).name for name in parsed.names} == {"one", "two"}
    write_request(Path("/models"), Path("/ours"), tmp_path / "request")
    asked = json.loads((tmp_path / "request").read_text())
    assert [each["output"] for each in asked] == [str(path) for path in jobs]
    assert [each["origins"] for each in asked[:2]] == [None, [["one", 0], ["one", 1], ["two", 1], ["two", 2]]]


def test_what_is_not_as_it_has_to_be_is_told(tmp_path: Path) -> None:
    found = [
        FOUND | {"problem": "its logits" if number == 3 else None} for number in range(2 * len(ARCHITECTURES))
    ]
    (tmp_path / "reply").write_text(json.dumps(found))
    opened = read_reply(Path("/models"), tmp_path / "reply")
    assert [each.problem for each in opened if each.problem] == ["qwen2, slices: its logits"]
    rows = architecture_table(opened).splitlines()
    assert len(rows) == len(ARCHITECTURES)
    assert [row.endswith("| 12,345 | same | **differ** |") for row in rows].index(True) == 1
    assert sum(row.endswith("| same | same |") for row in rows) == len(rows) - 1
    assert architecture_table([]) == ""
    with pytest.raises(ValueError, match="zip"):
        (tmp_path / "reply").write_text(json.dumps(found[1:]))
        read_reply(Path("/models"), tmp_path / "reply")
