"""The driver with a child that only pretends to have a Ray, and misbehaves on purpose."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from service.cluster.driver import Capacity, Driver, TaskRequest
from service.cluster.fleet_process import FleetSettings
from service.cluster.warden import processes
from tests.waiting import until
from workers.errors import FleetError
from workers.task import JSONValue

REQUEST = TaskRequest(entry="m:f", payload=[1], memory_bytes=1, label="part 1")


def settings(behaviour: str, **changes: object) -> FleetSettings:
    return replace(FleetSettings(address=behaviour, module="tests.service.cluster.fleet_fake"), **changes)  # type: ignore[arg-type]


wait_until = partial(until, seconds=20)


def reason(future: Future[JSONValue]) -> str:
    error = future.exception(30)
    assert isinstance(error, FleetError)
    return str(error)


def test_requests_before_the_child_is_up_are_answered_too() -> None:
    with Driver(settings("echo")) as driver:
        futures = [driver.submit(replace(REQUEST, payload={"n": n})) for n in range(100)]
        assert [future.result(30) for future in futures] == [f'{{"n": {n}}}' for n in range(100)]
        assert driver.capacity() == Capacity(cpus=6, gpus=1, nodes=2, max_node_memory_bytes=300)
        assert (driver.restarts, driver.retries, driver.in_flight) == (0, 0, 0)


def test_a_child_that_will_not_start_fails_everything_with_its_last_words() -> None:
    with Driver(settings("refuse", max_starts=2)) as driver:
        futures = [driver.submit(REQUEST) for _ in range(3)]
        assert all("no route to cluster" in reason(future) for future in futures)
        assert driver.restarts == 1
        with pytest.raises(FleetError, match="no route to cluster"):
            driver.capacity()
        assert "no route to cluster" in reason(driver.submit(REQUEST))  # it was tried again
        assert driver.restarts == 3


def test_one_failed_start_is_forgiven(tmp_path: Path) -> None:
    with Driver(settings(f"refuse-once:{tmp_path / 'tried'}")) as driver:
        assert driver.submit(REQUEST).result(30) == "[1]"
        assert driver.restarts == 1


@pytest.mark.parametrize(
    ("behaviour", "told", "limit"),
    [("mute", "did not start in time", "start_timeout_s"), ("silent", "fell silent", "silence_s")],
)
def test_a_child_that_hangs_is_replaced(behaviour: str, told: str, limit: str) -> None:
    with Driver(settings(behaviour, max_starts=1, **{limit: 0.3})) as driver:
        assert told in reason(driver.submit(REQUEST))


def test_a_task_that_kills_the_driver_is_given_up_and_the_others_are_not(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with Driver(settings(f"echo:{runs}", max_losses=3, max_starts=10)) as driver:
        killer = driver.submit(replace(REQUEST, label="killer"))
        other = driver.submit(REQUEST)
        assert "killer: given up after Ray's driver died 3 times" in reason(killer)
        assert other.result(30) == "[1]"
        assert runs.read_text().splitlines() == ["run"] * 3


def test_cancelling_tells_the_child_and_wakes_the_waiting(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with Driver(settings(f"hold:{told}")) as driver:
        first, second = driver.submit(REQUEST), driver.submit(REQUEST)
        wait_until(lambda: driver.in_flight == 2)
        assert driver.cancel(second)
        assert wait([second], timeout=5).done == {second}
        with pytest.raises(CancelledError):
            second.result()
        wait_until(lambda: told.exists() and told.read_text() == "1\n")
        assert driver.in_flight == 1
        assert not first.done()


def test_a_finished_task_cannot_be_cancelled() -> None:
    with Driver(settings("echo")) as driver:
        future = driver.submit(REQUEST)
        assert future.result(30) == "[1]"
        assert not driver.cancel(future)


def test_closing_fails_what_is_unfinished_and_leaves_no_process(tmp_path: Path) -> None:
    driver = Driver(settings("hold", state_dir=tmp_path))
    with pytest.raises(FleetError, match="not started"):
        driver.submit(REQUEST)
    with driver:
        future = driver.submit(REQUEST)
        driver.capacity()
        leader = driver.pid
        assert leader is not None
    assert reason(future) == "the fleet was closed"
    assert not [its for its in processes() if its.session == leader]
    for call in (driver.capacity, lambda: driver.submit(REQUEST)):
        with pytest.raises(FleetError, match="closed"):
            call()
    driver.close()  # twice is no harm


def test_closing_does_not_wait_for_a_child_that_is_starting() -> None:
    driver = Driver(settings("mute"))
    driver.start()
    future = driver.submit(REQUEST)
    wait_until(lambda: driver.pid)
    began = time.monotonic()
    driver.close()
    assert time.monotonic() - began < 5
    assert reason(future) == "the fleet was closed"


def test_a_stopped_child_is_killed_on_closing() -> None:
    with Driver(settings("hold", silence_s=0.5, max_starts=1)) as driver:
        future = driver.submit(REQUEST)
        wait_until(lambda: driver.in_flight)
        leader = driver.pid
        assert leader is not None
        (child,) = (its.pid for its in processes() if its.parent == leader)
        os.kill(child, signal.SIGSTOP)
        assert "fell silent" in reason(future)
        assert not [its for its in processes() if its.session == leader]


def test_a_payload_that_is_not_json_is_the_callers_error() -> None:
    with Driver(settings("echo")) as driver:
        with pytest.raises(ValueError, match="JSON compliant"):
            driver.submit(replace(REQUEST, payload=float("nan")))
        with pytest.raises(TypeError):
            driver.submit(replace(REQUEST, payload=object()))
        assert driver.submit(REQUEST).result(30) == "[1]"
