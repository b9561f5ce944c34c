"""The dispatcher: order, bounds, counted tries, and tasks that no node can hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cluster.dispatch import Batch, Dispatcher, Need, Node, Policy

pytestmark = pytest.mark.fast

SMALL = Node(cpus=2, gpus=0, memory_bytes=100)
BIG = Node(cpus=1, gpus=1, memory_bytes=1000)


def need(memory_bytes: int = 1, cpus: float = 1, gpus: float = 0, label: str = "task") -> Need:
    return Need(memory_bytes, cpus, gpus, label)


def dispatcher(*nodes: Node, **policy: float) -> Dispatcher:
    made = Dispatcher(Policy(**policy))  # type: ignore[arg-type]
    made.set_nodes(nodes)
    return made


def start(fleet: Dispatcher, now: float = 0) -> list[int]:
    """The tasks that go out, each of them by itself."""
    batches = fleet.start(now)
    assert all(len(batch.tasks) == 1 for batch in batches)
    return [batch.tasks[0] for batch in batches]


def finish(fleet: Dispatcher, batch: int) -> None:
    """A batch of one task ends well."""
    assert fleet.finished(batch, 0) is not None
    assert fleet.ended(batch) == []


def test_tasks_go_out_in_order_and_bounded_by_the_cpus() -> None:
    fleet = dispatcher(SMALL)
    for task in (1, 2, 3, 4, 5, 6):
        assert fleet.add(task, need()) is None
    assert fleet.start(0) == [Batch(1, (1,)), Batch(2, (2,)), Batch(3, (3,)), Batch(4, (4,))]
    assert fleet.start(0) == []
    assert fleet.finished(2, 0) == 2
    assert fleet.start(0) == []  # its worker is not done with it
    assert fleet.ended(2) == []
    assert fleet.start(0) == [Batch(5, (5,))]
    assert fleet.running == {1, 3, 4, 5}


def test_the_bound_follows_the_cluster() -> None:
    fleet = dispatcher(SMALL, BIG)
    assert fleet.limit == 6
    fleet.set_nodes([BIG])
    assert fleet.limit == 2
    fleet.set_nodes([])
    assert fleet.limit == 1


def test_a_removed_task_is_not_started() -> None:
    fleet = dispatcher(SMALL)
    fleet.add(1, need())
    assert fleet.remove(1) is None
    assert fleet.remove(1) is None
    assert fleet.start(0) == []


def test_a_removed_task_that_runs_is_to_be_ended() -> None:
    fleet = dispatcher(SMALL)
    fleet.add(7, need())
    assert fleet.start(0) == [Batch(1, (7,))]
    assert fleet.remove(7) == 1
    assert fleet.running == set()
    # What it says after that concerns nobody.
    assert fleet.finished(1, 0) is None
    assert fleet.ended(1) == []
    assert fleet.crashed(1, "cancelled", 0) == []


def test_a_batch_that_ends_without_a_result_says_whose() -> None:
    fleet = dispatcher(SMALL)
    fleet.add(7, need())
    fleet.start(0)
    assert fleet.ended(1) == [7]
    assert fleet.running == set()
    assert fleet.remove(7) is None


def test_a_crashed_task_goes_to_the_front_until_its_tries_are_used_up() -> None:
    fleet = dispatcher(SMALL, max_tries=3, per_cpu=0.5)
    for task in (1, 2):
        fleet.add(task, need(label=f"part {task}"))
    for batch in (1, 2):
        assert fleet.start(0) == [Batch(batch, (1,))]
        assert fleet.crashed(batch, "killed", 0) == [(1, None)]
    assert start(fleet) == [1]
    assert fleet.crashed(3, "killed by 9", 0) == [
        (1, "part 1: given up after 3 tries; the last: killed by 9")
    ]
    assert start(fleet) == [2]


def test_retries_for_memory_wait_longer_each_time_and_block_nobody() -> None:
    fleet = dispatcher(SMALL, per_cpu=0.5, backoff_s=1)
    fleet.add(1, need())
    fleet.add(2, need())
    assert start(fleet, 10) == [1]
    fleet.crashed(1, "memory", 10, out_of_memory=True)
    assert start(fleet, 10.9) == [2]
    finish(fleet, 2)
    assert start(fleet, 10.9) == []
    assert start(fleet, 11) == [1]
    fleet.crashed(3, "memory", 11, out_of_memory=True)
    assert start(fleet, 12.9) == []
    assert start(fleet, 13) == [1]


def test_a_task_that_is_removed_while_it_waits_for_memory_does_not_come_back() -> None:
    fleet = dispatcher(SMALL)
    fleet.add(1, need())
    fleet.start(0)
    fleet.crashed(1, "memory", 0, out_of_memory=True)
    assert fleet.remove(1) is None
    assert fleet.start(100) == []


@pytest.mark.parametrize("too_big", [need(1001), need(cpus=3), need(gpus=2), need(101, cpus=2)])
def test_what_no_single_node_could_hold_is_refused(too_big: Need) -> None:
    why = dispatcher(SMALL, BIG).add(1, too_big)
    assert why is not None
    assert why.startswith("task: no node of the cluster can hold it")
    assert f"{too_big.memory_bytes:,} bytes" in why
    assert "the largest of 2 nodes has 1,000 bytes" in why


def test_a_lost_node_is_waited_for_but_not_for_ever() -> None:
    fleet = dispatcher(SMALL, BIG, patience_s=60)
    fleet.add(1, need(1000, label="running"))
    assert start(fleet) == [1]
    fleet.set_nodes([SMALL])
    assert fleet.add(2, need(1000, label="queued")) is None
    fleet.add(3, need())
    assert start(fleet) == [3]
    assert fleet.hopeless(0) == []
    assert fleet.hopeless(60) == []
    assert [task for task, _ in fleet.hopeless(60.1)] == [1, 2]
    fleet.set_nodes([SMALL, BIG])
    assert fleet.hopeless(61) == []
    assert start(fleet, 61) == [2]


def test_a_cluster_that_is_still_coming_up_refuses_nothing() -> None:
    head = Node(cpus=0, gpus=0, memory_bytes=50)
    fleet = dispatcher(head)
    assert fleet.add(1, need(100)) is None
    assert start(fleet) == []
    fleet.set_nodes([head, SMALL])
    assert start(fleet, 1) == [1]


class Model:
    """What a dispatcher should know, told apart from it: every task, its deaths, and where it runs."""

    def __init__(self, max_tries: int, max_stream: int) -> None:
        self.max_tries, self.max_stream = max_tries, max_stream
        self.fleet = dispatcher(SMALL, max_tries=max_tries, max_stream=max_stream, patience_s=1e9)
        self.deaths: dict[int, int] = {}
        """Of every task that is not done; those that it died by itself."""
        self.shaken: set[int] = set()
        """Tasks that were in a batch that died."""
        self.running: dict[int, dict[int, int]] = {}
        """By batch: the index of each task without a result."""
        self.sizes: dict[int, int] = {}
        self.submitted = 0
        self.now = 0.0

    def add(self, stream: str | None) -> None:
        self.submitted += 1
        assert self.fleet.add(self.submitted, replace(need(), stream=stream)) is None
        self.deaths[self.submitted] = 0

    def start(self) -> None:
        batches = self.fleet.start(self.now)
        for batch in batches:
            tasks = set(batch.tasks)
            assert 1 <= len(tasks) <= self.max_stream
            assert list(batch.tasks) == sorted(tasks)
            assert len(tasks) == 1 or not self.shaken & tasks
            assert tasks <= self.deaths.keys()
            assert not any(tasks & left.keys() for left in self.running.values())
            self.running[batch.number] = {task: index for index, task in enumerate(batch.tasks)}
            self.sizes[batch.number] = len(tasks)
        assert len(self.running) <= self.fleet.limit or not batches

    def finish(self, batch: int) -> None:
        task, index = self.running[batch].popitem()
        assert self.fleet.finished(batch, index) == task
        assert self.fleet.finished(batch, index) is None
        del self.deaths[task]

    def end(self, batch: int) -> None:
        while self.running[batch]:
            self.finish(batch)
        assert self.fleet.ended(batch) == []
        del self.running[batch]

    def cancel(self, task: int) -> None:
        del self.deaths[task]
        to_end = None
        for batch, left in self.running.items():
            if left.pop(task, None) is not None and not left:
                to_end = batch
        assert self.fleet.remove(task) == to_end
        if to_end is not None:
            del self.running[to_end]

    def crash(self, batch: int, *, out_of_memory: bool) -> None:
        left = self.running.pop(batch)
        alone = self.sizes[batch] == 1
        fates = self.fleet.crashed(batch, "x", self.now, out_of_memory=out_of_memory)
        assert [task for task, _ in fates] == sorted(left)
        for task, why in fates:
            self.deaths[task] += alone
            assert (why is not None) == (self.deaths[task] == self.max_tries)
            if why is not None:
                del self.deaths[task]
        self.shaken.update(left)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["add", "stream", "stream", "start", "finish", "end", "crash", "oom", "cancel", "lose", "regain"]
        ),
        max_size=80,
    ),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_whatever_happens_tasks_are_bounded_counted_and_never_lost(
    events: list[str], max_tries: int, max_stream: int
) -> None:
    model = Model(max_tries, max_stream)
    for event in events:
        model.now += 0.5
        last = max(model.running, default=0)
        match event:
            case "add" | "stream":
                model.add(None if event == "add" else event)
            case "start":
                model.start()
            case "finish" if last and model.running[last]:
                model.finish(last)
            case "end" if last:
                model.end(last)
            case "crash" | "oom" if last:
                model.crash(last, out_of_memory=event == "oom")
            case "cancel" if model.deaths:
                model.cancel(min(model.deaths))
            case "lose" | "regain":
                model.fleet.set_nodes([SMALL] if event == "regain" else [])
        assert model.fleet.running == {task for left in model.running.values() for task in left}
    model.fleet.set_nodes([SMALL])
    while model.deaths:
        model.now += 1000.0
        model.start()
        assert model.running
        for batch in sorted(model.running):
            model.end(batch)
    assert model.fleet.start(model.now) == []
