"""Streams on a real Ray: several requests in one worker, each with its own future, fate and result."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.cluster.driver import Driver, TaskRequest
from tests.service.cluster.test_fleet import below, lines
from tests.waiting import until
from workers.errors import AccessDeniedError, FleetError, PlanError
from workers.task import JSONValue

pytestmark = pytest.mark.ray
pytest_plugins = ["tests.servers.ray_fixtures"]

TASKS = "tests.service.cluster.fleet_tasks:"
SIZE = 16
"""Requests in the first batch: a quarter of 64 that are ready, for two slots."""


@dataclass
class Streams:
    """64 requests that are handed out when all of them are there, so that the first sixteen share a worker."""

    driver: Driver
    directory: Path
    """Where the notes and the gates are."""
    futures: list[Future[JSONValue]] = field(default_factory=list)

    @property
    def gate(self) -> Path:
        """What a request that waits waits for."""
        return self.directory / "gate"

    def begin(self, **special: str) -> None:
        """Submit them; ``_3="die"`` is what the fourth does."""
        held, go = [], self.directory / "go"
        for _ in range(4):  # as many as the cluster takes
            payload: JSONValue = {"file": str(self.directory / "held"), "gate": str(go)}
            held.append(self._submit("note_and_wait", payload, "held"))
        for number in range(64):
            payload = {
                "file": str(self.directory / "notes"),
                "gate": str(self.gate),
                "name": f"part-{number}",
                "do": special.get(f"_{number}", ""),
            }
            self.futures.append(self._submit("stream", payload, f"part {number}", stream="job"))
        with pytest.raises(FleetError, match="no node of the cluster can hold it"):
            self._submit("square", 1, "a mountain", memory_bytes=1 << 50).result(
                60
            )  # all before it are there
        go.touch()
        assert all(future.result(60) for future in held)

    def _submit(
        self,
        entry: str,
        payload: JSONValue,
        label: str,
        stream: str | None = None,
        memory_bytes: int = 1 << 20,
    ) -> Future[JSONValue]:
        request = TaskRequest(
            entry=TASKS + entry, payload=payload, label=label, stream=stream, memory_bytes=memory_bytes
        )
        return self.driver.submit(request)

    def results(self, numbers: range) -> list[JSONValue]:
        return [self.futures[number].result(60) for number in numbers]

    @property
    def notes(self) -> list[tuple[str, int, int]]:
        """What was begun: its name, the worker, the size of the batch."""
        return [
            (name, int(pid), int(size))
            for name, pid, size in (line.split() for line in lines(self.directory / "notes"))
        ]

    def worker(self, number: int) -> int:
        """The worker that began a request, when it has."""
        until(lambda: any(name == f"part-{number}" for name, _, _ in self.notes))
        return next(pid for name, pid, _ in self.notes if name == f"part-{number}")

    def begun(self) -> Counter[int]:
        """How often each request was begun."""
        return Counter(int(name.removeprefix("part-")) for name, _, _ in self.notes)


@pytest.fixture
def streams(driver: Driver, tmp_path: Path) -> Iterator[Streams]:
    made = Streams(driver, tmp_path)
    yield made
    made.gate.touch()
    (tmp_path / "go").touch()
    until(lambda: all(future.done() for future in made.futures))


def names(numbers: range) -> list[JSONValue]:
    return [f"part-{number}" for number in numbers]


def test_requests_share_workers_and_keep_their_results(streams: Streams) -> None:
    streams.begin()
    assert streams.results(range(64)) == names(range(64))
    assert streams.begun() == Counter(range(64))
    sizes = [size for _, _, size in streams.notes]
    assert sizes.count(SIZE) == SIZE
    assert sizes.count(1) >= 2
    first = [name for name, _, size in streams.notes if size == SIZE]
    assert first == names(range(SIZE))
    assert len({pid for name, pid, _ in streams.notes if name in first}) == 1


def test_answers_may_come_in_any_order(driver: Driver) -> None:
    numbers = range(200)
    futures = [
        driver.submit(
            TaskRequest(
                entry=TASKS + "backwards", payload=number, memory_bytes=1 << 20, label="square", stream="s"
            )
        )
        for number in numbers
    ]
    assert [future.result(60) for future in futures] == [number**2 for number in numbers]


def test_a_result_does_not_wait_for_the_stream(streams: Streams) -> None:
    streams.begin(_3="wait")
    assert streams.results(range(3)) == names(range(3))
    streams.worker(3)
    assert streams.results(range(SIZE, 64)) == names(range(SIZE, 64))  # nor for another one
    assert not any(future.done() for future in streams.futures[3:SIZE])
    assert not streams.begun().keys() & set(range(4, SIZE))
    streams.gate.touch()
    assert streams.results(range(64)) == names(range(64))


def test_what_a_killed_worker_finished_is_not_repeated(streams: Streams) -> None:
    retries = streams.driver.retries
    streams.begin(_3="wait")
    assert streams.results(range(3)) == names(range(3))
    os.kill(streams.worker(3), signal.SIGKILL)
    until(lambda: streams.begun()[3] == 2)
    streams.gate.touch()
    assert streams.results(range(64)) == names(range(64))
    assert streams.begun() == Counter(range(64)) + Counter([3])
    assert streams.driver.retries == retries + SIZE - 3
    again = {name: size for name, _, size in streams.notes}
    assert [again[f"part-{number}"] for number in range(SIZE)] == [SIZE] * 3 + [1] * (SIZE - 3)


def test_poison_fails_alone(streams: Streams) -> None:
    streams.begin(_5="die")
    with pytest.raises(FleetError, match=r"^part 5: given up after 4 tries"):
        streams.futures[5].result(60)
    others = [number for number in range(64) if number != 5]
    assert [streams.futures[number].result(60) for number in others] == [f"part-{n}" for n in others]
    begun = streams.begun()
    assert begun.pop(5) == 1 + 4
    # A result on its way when the worker died is lost; whatever is later than the poison had not begun.
    assert max(begun[number] for number in range(5)) <= 2
    assert all(begun[number] == 1 for number in range(6, 64))


def test_cancelling_some_lets_the_others_go_on(streams: Streams) -> None:
    retries = streams.driver.retries
    streams.begin(_3="wait")
    worker = streams.worker(3)
    for number in (3, 4, 40):
        is_cancelled = streams.driver.cancel(streams.futures[number])
        assert is_cancelled or number == 40  # which another stream may have finished with by now
        if is_cancelled:
            with pytest.raises(CancelledError):
                streams.futures[number].result()
    streams.gate.touch()
    others = [number for number in range(64) if number not in (3, 4, 40)]
    assert [streams.futures[number].result(60) for number in others] == [f"part-{n}" for n in others]
    assert {pid for _, pid, size in streams.notes if size == SIZE} == {worker}
    assert streams.begun().keys() >= set(others)
    assert max(streams.begun().values()) == 1
    assert streams.driver.retries == retries


def test_cancelling_all_that_is_left_ends_the_worker(streams: Streams) -> None:
    retries = streams.driver.retries
    streams.begin(_3="wait")
    worker = streams.worker(3)
    assert streams.results(range(3)) == names(range(3))
    for future in streams.futures[3:SIZE]:
        assert streams.driver.cancel(future)
    until(lambda: not Path(f"/proc/{worker}").exists())
    assert streams.results(range(SIZE, 64)) == names(range(SIZE, 64))
    assert streams.begun().keys() == set(range(64)) - set(range(4, SIZE))
    assert streams.driver.retries == retries
    assert streams.driver.in_flight == 0


def test_an_error_of_one_is_its_own(streams: Streams) -> None:
    streams.begin(_3="error", _4="not json")
    with pytest.raises(AccessDeniedError, match=r"^s3://bucket/part-3: denied$"):
        streams.futures[3].result(60)
    with pytest.raises(FleetError, match=r"(?s)fleet_tasks:stream failed: .*not JSON compliant"):
        streams.futures[4].result(60)
    assert streams.results(range(5, 64)) == names(range(5, 64))
    assert max(streams.begun().values()) == 1


@pytest.mark.parametrize(
    ("does", "kind", "told"),
    [
        ("raise", PlanError, "^no tensor a; no tensor b$"),
        ("raise other", FleetError, "fleet_tasks:stream failed: .*KeyError: 'out of the blue'"),
        ("stop", FleetError, "fleet_tasks:stream ended without a result"),
        ("twice", FleetError, "fleet_tasks:stream gave a result for 3, which has one"),
    ],
)
def test_an_error_of_the_stream_is_that_of_all_that_is_left(
    streams: Streams, does: str, kind: type[Exception], told: str
) -> None:
    streams.begin(_3=does)
    assert streams.results(range(3)) == names(range(3))
    finished = 4 if does == "twice" else 3
    for future in streams.futures[finished:SIZE]:
        with pytest.raises(kind, match=f"(?s){told}"):
            future.result(60)
    assert streams.results(range(SIZE, 64)) == names(range(SIZE, 64))


def test_a_last_result_twice_is_an_error_too(driver: Driver, tmp_path: Path) -> None:
    """The last result is held until the function has ended, so nothing that it does goes unnoticed."""
    payload = {"file": str(tmp_path / "notes"), "name": "x", "do": "twice"}
    request = TaskRequest(
        entry=TASKS + "stream", payload=payload, memory_bytes=1 << 20, label="x", stream="s"
    )
    with pytest.raises(FleetError, match="gave a result for 0, which has one"):
        driver.submit(request).result(60)


def test_a_stream_survives_rays_driver(streams: Streams) -> None:
    streams.begin(_3="wait")
    assert streams.results(range(3)) == names(range(3))
    streams.worker(3)
    assert streams.results(range(SIZE, 64)) == names(range(SIZE, 64))
    leader = streams.driver.pid
    assert leader is not None
    os.kill(below(leader, "service.cluster.fleet"), signal.SIGKILL)
    until(lambda: streams.begun()[3] == 2, seconds=60)
    streams.gate.touch()
    assert streams.results(range(64)) == names(range(64))
    assert streams.begun() == Counter(range(64)) + Counter([3])
