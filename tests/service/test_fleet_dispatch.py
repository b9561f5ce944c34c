"""The dispatcher: order, bounds, counted tries, and tasks that no node can hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dispatch import Dispatcher, Need, Node, Policy

pytestmark = pytest.mark.fast

SMALL = Node(cpus=2, gpus=0, memory_bytes=100)
BIG = Node(cpus=1, gpus=1, memory_bytes=1000)


def need(memory_bytes: int = 1, cpus: float = 1, gpus: float = 0, label: str = "task") -> Need:
    return Need(memory_bytes, cpus, gpus, label)


def dispatcher(*nodes: Node, **policy: float) -> Dispatcher:
    made = Dispatcher(Policy(**policy))  # type: ignore[arg-type]
    made.set_nodes(nodes)
    return made


def test_tasks_go_out_in_order_and_bounded_by_the_cpus() -> None:
    fleet = dispatcher(SMALL)
    for task in (1, 2, 3, 4, 5, 6):
        assert fleet.add(task, need()) is None
    assert fleet.start(0) == [1, 2, 3, 4]
    assert fleet.start(0) == []
    assert fleet.remove(2)
    assert fleet.start(0) == [5]


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
    assert not fleet.remove(1)
    assert not fleet.remove(1)
    assert fleet.start(0) == []


def test_a_crashed_task_goes_to_the_front_until_its_tries_are_used_up() -> None:
    fleet = dispatcher(SMALL, max_tries=3, per_cpu=0.5)
    for task in (1, 2):
        fleet.add(task, need(label=f"part {task}"))
    for tried in (1, 2):
        assert fleet.start(0) == [1]
        assert fleet.tries(1) == tried
        assert fleet.crashed(1, "killed", 0) is None
    assert fleet.start(0) == [1]
    assert fleet.crashed(1, "killed by 9", 0) == "part 1: given up after 3 tries; the last: killed by 9"
    assert fleet.start(0) == [2]


def test_retries_for_memory_wait_longer_each_time_and_block_nobody() -> None:
    fleet = dispatcher(SMALL, per_cpu=0.5, backoff_s=1)
    fleet.add(1, need())
    fleet.add(2, need())
    assert fleet.start(10) == [1]
    fleet.crashed(1, "memory", 10, out_of_memory=True)
    assert fleet.start(10.9) == [2]
    fleet.remove(2)
    assert fleet.start(10.9) == []
    assert fleet.start(11) == [1]
    fleet.crashed(1, "memory", 11, out_of_memory=True)
    assert fleet.start(12.9) == []
    assert fleet.start(13) == [1]


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
    assert fleet.start(0) == [1]
    fleet.set_nodes([SMALL])
    assert fleet.add(2, need(1000, label="queued")) is None
    fleet.add(3, need())
    assert fleet.start(0) == [3]
    assert fleet.hopeless(0) == []
    assert fleet.hopeless(60) == []
    assert [task for task, _ in fleet.hopeless(60.1)] == [1, 2]
    fleet.set_nodes([SMALL, BIG])
    assert fleet.hopeless(61) == []
    assert fleet.start(61) == [2]


def test_a_cluster_that_is_still_coming_up_refuses_nothing() -> None:
    head = Node(cpus=0, gpus=0, memory_bytes=50)
    fleet = dispatcher(head)
    assert fleet.add(1, need(100)) is None
    assert fleet.start(0) == []
    fleet.set_nodes([head, SMALL])
    assert fleet.start(1) == [1]


@given(
    st.lists(
        st.sampled_from(["add", "start", "finish", "crash", "oom", "cancel", "lose", "regain"]), max_size=60
    ),
    st.integers(1, 5),
)
def test_whatever_happens_tasks_are_bounded_counted_and_never_lost(events: list[str], max_tries: int) -> None:
    fleet = dispatcher(SMALL, max_tries=max_tries, patience_s=1e9)
    alive: dict[int, int] = {}
    number, now = 0, 0.0
    for event in events:
        now += 0.5
        running = sorted(fleet.running)
        match event:
            case "add":
                number += 1
                assert fleet.add(number, need()) is None
                alive[number] = 0
            case "finish" if running:
                assert fleet.remove(running[0])
                del alive[running[0]]
            case "cancel" if alive:
                fleet.remove(min(alive))
                del alive[min(alive)]
            case "crash" | "oom" if running:
                if fleet.crashed(running[-1], "x", now, out_of_memory=event == "oom"):
                    assert alive.pop(running[-1]) == max_tries
            case "lose":
                fleet.set_nodes([])
            case "regain":
                fleet.set_nodes([SMALL])
            case "start":
                for task in fleet.start(now):
                    alive[task] += 1
                    assert alive[task] <= max_tries
                assert len(fleet.running) <= 4
        assert fleet.running <= alive.keys()
    fleet.set_nodes([SMALL])
    while alive:
        now += 1000.0
        started = fleet.start(now)
        assert started or fleet.running
        for task in sorted(fleet.running):
            fleet.remove(task)
            del alive[task]
    assert fleet.start(now) == []
