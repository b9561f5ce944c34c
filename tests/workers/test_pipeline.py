"""The pipeline: stages overlap, keep their order, and one item's failure is its own."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
import weakref

import pytest

from workers.pipeline import Pipeline

pytestmark = pytest.mark.fast


class Item:
    """Notes what was done to it."""

    def __init__(self, name: int, fails_in: str = "") -> None:
        self.name, self.fails_in = name, fails_in
        self.seen: list[str] = []

    def step(self, stage: str) -> None:
        if self.fails_in == stage:
            raise ValueError(f"{self.name} fails in {stage}")
        self.seen.append(stage)


def pipeline(finished: list[int]) -> Pipeline[Item]:
    stages = ("read", "merge", "write")
    return Pipeline(
        {stage: lambda item, stage=stage: item.step(stage) for stage in stages},  # type: ignore[misc]
        lambda item: finished.append(item.name),
    )


def test_every_item_goes_through_every_stage_in_order() -> None:
    items, finished = [Item(number) for number in range(20)], list[int]()
    assert list(pipeline(finished).run(items)) == [(number, None) for number in range(20)]
    assert all(item.seen == ["read", "merge", "write"] for item in items)
    assert finished == list(range(20))


@pytest.mark.parametrize(("stage", "seen"), [("read", []), ("merge", ["read"]), ("write", ["read", "merge"])])
def test_a_failure_ends_its_own_item_only(stage: str, seen: list[str]) -> None:
    items, finished = [Item(0), Item(1, stage), Item(2)], list[int]()
    outcomes = dict(pipeline(finished).run(items))
    assert str(outcomes[1]) == f"1 fails in {stage}"
    assert outcomes[0] is None
    assert outcomes[2] is None
    assert items[1].seen == seen
    assert items[2].seen == ["read", "merge", "write"]
    assert finished == [0, 1, 2]


def test_no_items_is_no_outcome() -> None:
    assert list(pipeline([]).run([])) == []


def test_three_items_are_in_three_stages_at_once() -> None:
    # Each stage waits for the others: it only ends if all three run at the same time, each with another item.
    together = threading.Barrier(3, timeout=20)
    meetings: list[int] = []

    def meet(item: int, at: int) -> None:
        if item == at:
            together.wait()
            meetings.append(item)

    stages = {
        "read": lambda item: meet(item, 2),
        "merge": lambda item: meet(item, 1),
        "write": lambda item: meet(item, 0),
    }
    assert list(Pipeline(stages, lambda item: None).run([0, 1, 2])) == [(0, None), (1, None), (2, None)]
    assert sorted(meetings) == [0, 1, 2]


def test_an_outcome_is_told_before_the_next_item_is_through() -> None:
    gate = threading.Event()
    stages = {"only": lambda item: None if item == 0 else _wait(gate)}
    run = Pipeline(stages, lambda item: None).run([0, 1])
    assert next(run) == (0, None)
    gate.set()
    assert next(run) == (1, None)


def test_closing_ends_the_rest_and_releases_all() -> None:
    began, gate = threading.Event(), threading.Event()
    read: list[int] = []
    finished: list[int] = []

    def slow(item: int) -> None:
        read.append(item)
        if item == 1:
            began.set()
            _wait(gate)

    ends: list[Exception | None] = []

    def write(item: int) -> None:
        if item == 1:  # it was read before the pipeline was closed, and is not written any more
            ends.append(None)

    run = Pipeline({"read": slow, "write": write}, finished.append).run(list(range(50)))
    assert next(run) == (0, None)
    assert began.wait(20)
    closer = threading.Thread(target=run.close)
    closer.start()
    deadline = time.monotonic() + 20
    while "join" not in calls_of(closer):  # what waits for the stages has told them to stop before
        assert time.monotonic() < deadline
    gate.set()
    closer.join(20)
    assert not closer.is_alive()
    assert read == [0, 1]
    assert ends == []
    assert finished == list(range(50))


def test_what_releasing_raises_is_the_outcome_and_stops_nobody() -> None:
    def finish(item: int) -> None:
        if item == 0:
            raise ValueError("given back twice")

    outcomes = dict(Pipeline({"only": lambda item: None}, finish).run([0, 1]))
    assert str(outcomes[0]) == "given back twice"
    assert outcomes[1] is None


def test_a_failed_item_is_not_kept_alive() -> None:
    class Big:
        pass

    def fail(item: Big) -> None:
        raise ValueError("no")

    item = Big()
    alive = weakref.ref(item)
    gc.disable()
    try:
        for _, error in Pipeline({"only": fail}, lambda item: None).run([item]):
            assert isinstance(error, ValueError)
        del item, error
        assert alive() is None
    finally:
        gc.enable()


def calls_of(thread: threading.Thread) -> list[str]:
    """The functions that a thread is in."""
    frame = sys._current_frames().get(thread.ident or 0)
    return [each.f_code.co_name for each, _ in traceback.walk_stack(frame)] if frame else []


def _wait(gate: threading.Event) -> None:
    assert gate.wait(20)
