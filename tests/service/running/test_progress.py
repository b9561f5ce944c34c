"""Progress beside the output: what is written is read again, and no more is written than is new."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from service.planning.plan import Plan, PlanOptions, make_plan
from service.running.commit import Output
from service.running.progress import PAGE_PARTS, PREFIX, Progress
from tests.service.headers import alike, recipe_of
from workers.store.local import LocalStore
from workers.store.uris import from_path, join
from workers.task import PartResult, TensorDigest

pytestmark = pytest.mark.fast

UPLOADS = {"model-00001-of-00001.safetensors": "upload-1"}
PARTS = 2 * PAGE_PARTS + 3


class Written(LocalStore):
    """A directory that remembers what was put."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def put(self, uri, data, metadata=None):  # type: ignore[no-untyped-def]
        self.names.append(uri.rpartition("/")[2])
        return super().put(uri, data, metadata)


@pytest.fixture(scope="module")
def plan() -> Plan:
    recipe = recipe_of("linear", 2)
    made = make_plan(recipe, alike(recipe, {"w": ("BF16", (4 * PAGE_PARTS, 1 << 25))}), PlanOptions())
    assert len(made.parts) >= PARTS
    return replace(made, digest="d" * 64)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(Written(), from_path(str(tmp_path / "out")), "job", lambda: inf)


def result(plan: Plan, index: int, etag: str = "e") -> PartResult:
    part = plan.parts[index]
    return PartResult(
        plan.part_ids[index], part.shard, part.number, part.nbytes, etag,
        (TensorDigest("w", index, ("ab" * 32,)),), 7, {"w: m0": 1}, 1 << 30, {"read": 0.5},
    )  # fmt: skip


def names(output: Output) -> list[str]:
    assert isinstance(output.store, Written)
    found, output.store.names = output.store.names, []
    return found


def page(number: int) -> str:
    return f"{PREFIX.rpartition('/')[2]}{number:05}.json"


def test_what_was_saved_is_loaded_whole(plan: Plan, output: Output) -> None:
    progress = Progress(output, plan, UPLOADS)
    made = {plan.part_ids[index]: result(plan, index) for index in range(PARTS)}
    for each in made.values():
        progress.add(each)
    assert not progress.is_saved
    progress.save()
    assert progress.is_saved
    again = Progress(output, plan, UPLOADS)
    assert again.load() == made
    assert again.is_saved


def test_only_pages_with_something_new_are_written(plan: Plan, output: Output) -> None:
    progress = Progress(output, plan, UPLOADS)
    for index in (0, PAGE_PARTS - 1, 2 * PAGE_PARTS):
        progress.add(result(plan, index))
    progress.save()
    assert names(output) == [page(0), page(2)]
    progress.add(result(plan, PAGE_PARTS))
    progress.save()
    assert names(output) == [page(1)]
    progress.save()
    assert names(output) == []


def test_a_page_that_is_written_again_after_a_restart_keeps_what_it_held(plan: Plan, output: Output) -> None:
    first = Progress(output, plan, UPLOADS)
    first.add(result(plan, 0))
    first.save()
    second = Progress(output, plan, UPLOADS)
    second.load()
    second.add(result(plan, 1))
    second.save()
    assert Progress(output, plan, UPLOADS).load().keys() == set(plan.part_ids[:2])


def test_a_failed_write_is_made_up_for(plan: Plan, tmp_path: Path) -> None:
    refusals = [PermissionError("not now")]

    def guard() -> float:
        if refusals:
            raise refusals.pop()
        return inf

    output = Output(Written(), from_path(str(tmp_path / "out")), "job", guard)
    progress = Progress(output, plan, UPLOADS)
    progress.add(result(plan, 0))
    with pytest.raises(PermissionError):
        progress.save()
    assert not progress.is_saved
    progress.save()
    assert Progress(output, plan, UPLOADS).load() == {plan.part_ids[0]: result(plan, 0)}


@pytest.mark.parametrize("other", ["job", "plan", "uploads"])
def test_what_belongs_to_something_else_is_not_loaded(plan: Plan, output: Output, other: str) -> None:
    progress = Progress(output, plan, UPLOADS)
    progress.add(result(plan, 0))
    progress.save()
    whose = Output(output.store, output.uri, "another" if other == "job" else "job", lambda: inf)
    changed = replace(plan, digest="f" * 64) if other == "plan" else plan
    uploads = dict.fromkeys(UPLOADS, "upload-2") if other == "uploads" else UPLOADS
    assert Progress(whose, changed, uploads).load() == {}


def test_nothing_but_pages_is_read(plan: Plan, output: Output) -> None:
    assert Progress(output, plan, UPLOADS).load() == {}
    output.store.put(join(output.uri, ".mergemill/progress.json"), b"an older version's")
    output.store.put(join(output.uri, ".mergemill/claim.json"), b"{}")
    assert Progress(output, plan, UPLOADS).load() == {}
