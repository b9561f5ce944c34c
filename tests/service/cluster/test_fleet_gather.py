"""Answers of a worker, gathered: none is lost, repeated or late, whatever the entry does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.cluster import fleet
from tests.service.cluster.test_fleet import TASKS

GATHER_S = 0.2


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "GATHER_S", GATHER_S)


def stream(tmp_path: Path, *does: str) -> Iterator[list[tuple[int, str]]]:
    payloads: list[dict[str, Any]] = [
        {"file": str(tmp_path / "notes"), "gate": str(tmp_path / "gate"), "name": f"part-{n}", "do": do}
        for n, do in enumerate(does)
    ]
    return fleet.run_gathered(TASKS + "stream", True, *map(json.dumps, payloads))


def value(number: int) -> tuple[int, str]:
    return number, json.dumps({"value": f"part-{number}"})


def test_what_comes_at_once_is_one_message(tmp_path: Path) -> None:
    assert list(stream(tmp_path, "go", "go", "go")) == [[value(0), value(1), value(2)]]


def test_an_answer_does_not_wait_for_the_next_one(tmp_path: Path) -> None:
    answers = stream(tmp_path, "go", "go", "wait", "go")
    assert next(answers) == [value(0), value(1)]
    (tmp_path / "gate").touch()
    assert list(answers) == [[value(2), value(3)]]


def test_the_end_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "GATHER_S", 3600.0)
    begun = time.monotonic()
    assert list(fleet.run_gathered(TASKS + "square", False, "7")) == [[(0, '{"value": 49}')]]
    assert time.monotonic() - begun < 60


def test_an_error_comes_with_what_came_before_it(tmp_path: Path) -> None:
    (answers,) = stream(tmp_path, "go", "raise", "go")
    assert answers[0] == value(0)
    assert [(index, json.loads(body)["error"]["type"]) for index, body in answers[1:]] == [
        (1, "PlanError"),
        (2, "PlanError"),
    ]


def test_an_entry_that_cannot_be_loaded_is_the_error_of_all() -> None:
    (answers,) = fleet.run_gathered("no.such:thing", True, "1", "2")
    assert [index for index, _ in answers] == [0, 1]
    assert all("ModuleNotFoundError" in body for _, body in answers)
