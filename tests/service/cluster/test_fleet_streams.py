"""Streams in the dispatcher: the sizes of batches, what a simulated cluster makes of them, and who is blamed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cluster.dispatch import Batch, Dispatcher, Need, Node, Policy

pytestmark = pytest.mark.fast

NEED = Need(memory_bytes=100, cpus=1, gpus=0, label="part", stream="job")


def fleet(*nodes: Node, **policy: float) -> Dispatcher:
    made = Dispatcher(Policy(**policy))  # type: ignore[arg-type]
    made.set_nodes(nodes)
    return made


def machine(cpus: float = 2, gpus: float = 0, memory_bytes: int = 10_000) -> Node:
    return Node(cpus, gpus, memory_bytes)


def add(to: Dispatcher, tasks: Iterable[int], need: Need = NEED) -> None:
    for task in tasks:
        assert to.add(task, replace(need, label=f"part {task}")) is None


def sizes(of: Dispatcher, now: float = 0) -> list[int]:
    return [len(batch.tasks) for batch in of.start(now)]


@pytest.mark.parametrize(
    ("node", "need", "slots"),
    [
        (machine(cpus=16), NEED, 16),
        (machine(cpus=16, memory_bytes=799), NEED, 7),
        (machine(cpus=16, gpus=2), replace(NEED, gpus=1), 2),
        (machine(cpus=16, gpus=2), replace(NEED, gpus=0.5), 4),
        (machine(cpus=16), replace(NEED, cpus=3), 5),
        (machine(cpus=0.3), replace(NEED, cpus=0.1), 3),
        (machine(), replace(NEED, cpus=0, memory_bytes=0), 1),
    ],
)
def test_slots_are_what_a_node_can_hold_at_once(node: Node, need: Need, slots: int) -> None:
    assert need.times(node) == slots


def test_a_stream_gets_one_batch_a_slot_and_one_a_node_that_waits() -> None:
    streams = fleet(machine(cpus=4), machine(cpus=8, memory_bytes=300), machine(memory_bytes=99))
    add(streams, range(1000))
    assert len(streams.start(0)) == (4 + 1) + (3 + 1) + 0
    assert streams.start(0) == []
    add(streams, [1000], replace(NEED, memory_bytes=1))
    assert len(streams.start(0)) == 1  # it may fit beside them
    add(streams, [1001], replace(NEED, stream=None))
    assert len(streams.start(0)) == 1


def test_batches_get_smaller_towards_the_end() -> None:
    streams = fleet(machine())
    add(streams, range(40))
    seen: list[tuple[int, ...]] = []
    waiting = deque(streams.start(0))
    while waiting:
        batch = waiting.popleft()
        seen.append(batch.tasks)
        for index in range(len(batch.tasks)):
            assert streams.finished(batch.number, index) is not None
        assert streams.ended(batch.number) == []
        waiting.extend(streams.start(0))
    assert [task for tasks in seen for task in tasks] == list(range(40))
    assert [len(tasks) for tasks in seen] == [10, 8, 6, 4, 3, 3, 2, 1, 1, 1, 1]


def test_a_batch_has_bounds() -> None:
    streams = fleet(machine(cpus=1), max_stream=16)
    add(streams, range(1000))
    assert sizes(streams) == [16, 16]
    streams = fleet(machine(cpus=1), max_stream_bytes=1000)
    add(streams, range(7), replace(NEED, payload_bytes=400))
    add(streams, range(7, 10), replace(NEED, payload_bytes=2000))
    assert sizes(streams) == [2, 2]
    streams = fleet(machine(cpus=1), max_stream_bytes=1000)
    add(streams, range(10), replace(NEED, payload_bytes=2000))
    assert sizes(streams) == [1, 1]


def test_only_the_same_stream_and_needs_share_a_worker() -> None:
    streams = fleet(machine(cpus=100), max_stream=4)
    kinds = [
        NEED,
        replace(NEED, stream="another"),
        replace(NEED, memory_bytes=101),
        replace(NEED, cpus=2),
        replace(NEED, stream=None),
    ]
    for task in range(2000):
        assert streams.add(task, kinds[task % 5]) is None
    batches = streams.start(0)
    assert len(batches) == 200
    for batch in batches:
        assert len({task % 5 for task in batch.tasks}) == 1
        assert len(batch.tasks) == 1 or batch.tasks[0] % 5 != 4
    # Nobody overtakes: the oldest comes first.
    assert [batch.tasks[0] for batch in batches[:5]] == [0, 1, 2, 3, 4]


def test_poison_among_sixteen_is_given_up_and_nobody_else() -> None:
    streams = fleet(machine(cpus=1), max_tries=4)
    add(streams, range(32))
    poison, done, starts = 5, set[int](), [0] * 32
    given_up: list[tuple[int, str]] = []
    while batches := streams.start(0):
        for batch in batches:
            for index, task in enumerate(batch.tasks):
                starts[task] += 1
                if task == poison:
                    fates = streams.crashed(batch.number, "killed", 0)
                    given_up += [(task, why) for task, why in fates if why is not None]
                    break
                assert streams.finished(batch.number, index) == task
                done.add(task)
            else:
                assert streams.ended(batch.number) == []
    assert given_up == [(5, "part 5: given up after 4 tries; the last: killed")]
    assert done == set(range(32)) - {poison}
    assert starts == [
        5 if task == poison else 1 for task in range(32)
    ]  # its first, with others, did not count


def test_members_of_many_dying_batches_are_not_blamed() -> None:
    """A member's first death in company counts for nothing, nor do those of others that it once went with."""
    streams = fleet(machine(cpus=1), max_tries=1, max_stream=4)
    add(streams, range(8))
    for batch in streams.start(0):
        assert all(why is None for _, why in streams.crashed(batch.number, "node died", 0))
    alone = streams.start(0)
    assert {len(batch.tasks) for batch in alone} == {1}
    (fate,) = streams.crashed(alone[0].number, "again", 0)
    assert fate == (alone[0].tasks[0], f"part {alone[0].tasks[0]}: given up after 1 tries; the last: again")


def test_a_stream_killed_for_memory_waits_and_then_goes_one_by_one() -> None:
    streams = fleet(machine(cpus=1), backoff_s=1)
    add(streams, range(8))
    first, second = streams.start(10)
    assert (first.tasks, second.tasks) == ((0, 1, 2, 3), (4, 5))
    assert [why for _, why in streams.crashed(first.number, "memory", 10, out_of_memory=True)] == [None] * 4
    assert sizes(streams, 10.9) == [1]
    streams.ended(second.number)
    assert [batch.tasks for batch in streams.start(11)] == [(0,)]


def test_cancelling_leaves_the_others_to_go_on() -> None:
    streams = fleet(machine(cpus=1))
    add(streams, range(8))
    first, second = streams.start(0)
    assert streams.remove(1) is None
    assert streams.finished(first.number, 1) is None
    assert streams.finished(first.number, 0) == 0
    assert streams.remove(3) is None
    assert streams.remove(2) == first.number  # nothing is left for it to do
    assert streams.finished(first.number, 3) is None
    assert streams.remove(6) is None  # queued
    assert [task for batch in streams.start(0) for task in batch.tasks] == [7]
    assert streams.running == {4, 5, 7}
    assert streams.ended(second.number) == [4, 5]


def test_a_stream_that_lost_its_node_is_waited_for_but_not_for_ever() -> None:
    streams = fleet(machine(), patience_s=60)
    add(streams, range(8))
    begun = {task for batch in streams.start(0) for task in batch.tasks}
    streams.set_nodes([machine(memory_bytes=1)])
    assert streams.start(0) == []
    assert streams.hopeless(0) == []
    assert begun < set(range(8))
    assert [task for task, _ in streams.hopeless(60.1)] == list(range(8))
    streams.set_nodes([machine()])
    assert streams.hopeless(61) == []


@dataclass
class Cluster:
    """Workers that take batches in order and do their tasks one after the other."""

    dispatcher: Dispatcher
    workers: int
    seconds: Callable[[int], float]
    """How long a task takes."""
    window: int = 1 << 30
    """Tasks that are submitted and not finished."""
    batch_s: float = 0.0
    """What a batch costs besides."""
    batches: int = 0
    """How many there were."""

    def makespan(self, tasks: int) -> float:
        """When the last of the tasks is done."""
        submitted, done, now, free = 0, 0, 0.0, self.workers
        queue: deque[Batch] = deque()
        events: list[tuple[float, int, int, bool]] = []  # when, which batch, which member, whether the last
        while done < tasks:
            wanted = min(tasks, done + self.window)
            add(self.dispatcher, range(submitted, wanted))
            submitted = wanted
            queue.extend(self.dispatcher.start(now))
            while free and queue:
                free, self.batches = free - 1, self.batches + 1
                batch, end = queue.popleft(), now + self.batch_s
                for index, task in enumerate(batch.tasks):
                    end += self.seconds(task)
                    heappush(events, (end, batch.number, index, task == batch.tasks[-1]))
            now, number, index, last = heappop(events)
            assert self.dispatcher.finished(number, index) is not None
            done += 1
            if last:
                assert self.dispatcher.ended(number) == []
                free += 1
        return now


def cluster(slots: int, nodes: int, seconds: Callable[[int], float], **changes: float) -> Cluster:
    share = machine(cpus=slots / nodes)
    return Cluster(fleet(*[share] * nodes), slots, seconds, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slots", "nodes"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (16, 1), (16, 4), (16, 16)]
)
@pytest.mark.parametrize("window", [1 << 30, 64])
def test_the_end_of_a_job_is_spread_over_all_workers(slots: int, nodes: int, window: int) -> None:
    simulated = cluster(slots, nodes, lambda _: 1.0, window=window)
    assert simulated.makespan(100) <= 1.15 * -(-100 // slots)


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([1, 2, 4, 16]), st.integers(1, 300))
def test_whatever_tasks_take_the_end_is_near_the_ideal(seed: int, slots: int, tasks: int) -> None:
    rng = random.Random(seed)
    seconds = [rng.uniform(0.5, 2.0) for _ in range(tasks)]
    simulated = cluster(slots, 1, lambda task: seconds[task])
    assert simulated.makespan(tasks) <= sum(seconds) / slots + 1.5 * max(seconds)


def test_streams_cost_a_fraction_of_single_tasks() -> None:
    streamed = cluster(2, 1, lambda _: 1.0, batch_s=1.0, window=256)
    assert streamed.makespan(1000) < 1.1 * 500
    assert streamed.batches < 90
