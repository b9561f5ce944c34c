"""The fleet on a real Ray: tasks, their errors, and what dies under them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pytest

from service.cluster.driver import Driver, TaskRequest
from service.cluster.fleet_process import FleetSettings
from service.cluster.warden import processes
from tests.servers.ray_cluster import ROOT, RayCluster
from tests.waiting import until
from workers.errors import AccessDeniedError, FleetError, NonFiniteError, PlanError
from workers.task import JSONValue

pytestmark = pytest.mark.ray
pytest_plugins = ["tests.servers.ray_fixtures"]

TASKS = "tests.service.cluster.fleet_tasks:"


def submit(
    driver: Driver, entry: str, payload: JSONValue, label: str = "", memory: int = 1 << 20
) -> Future[JSONValue]:
    request = TaskRequest(entry=TASKS + entry, payload=payload, memory_bytes=memory, label=label or entry)
    return driver.submit(request)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def session(leader: int) -> set[int]:
    """The processes of a session: always one of our own children's, so never anybody else's."""
    return {process.pid for process in processes() if process.session == leader}


def below(leader: int, name: str) -> int:
    """The one process of a session that has this in its command line, apart from the leader."""
    others = session(leader) - {leader}
    (pid,) = (pid for pid in others if name in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return pid


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that tasks wait for; opened at last, so that no task is left waiting."""
    path = tmp_path / "gate"
    yield path
    path.touch()


class Held:
    """A task that has begun, and goes on when the gate opens."""

    def __init__(self, driver: Driver, notes: Path, gate: Path) -> None:
        self.notes = notes
        self.future = submit(driver, "note_and_wait", {"file": str(notes), "gate": str(gate)}, "held")
        until(lambda: lines(notes))

    @property
    def worker(self) -> int:
        return int(lines(self.notes)[-1].split()[0])

    @property
    def raylet(self) -> int:
        return int(lines(self.notes)[-1].split()[1])


def test_capacity_is_the_machine(driver: Driver) -> None:
    capacity = driver.capacity()
    assert (capacity.cpus, capacity.nodes) == (2, 1)
    assert 0 < capacity.max_node_memory_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def listening(pids: set[int]) -> dict[str, str]:
    """Where these processes listen for TCP: local address and port in hex to the process's name."""
    sockets = {}
    for pid in pids:
        with suppress(OSError):  # it has just ended
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                sockets[str(descriptor.readlink())] = name
    found = {}
    for table in ("tcp", "tcp6"):
        for line in lines(Path(f"/proc/net/{table}"))[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found[local] = sockets[f"socket:[{rest[5]}]"]
    return found


def test_a_ray_of_our_own_listens_on_loopback_alone(driver: Driver) -> None:
    """It runs whatever it is sent."""
    assert submit(driver, "square", 2).result(60) == 4
    assert driver.pid is not None
    found = listening(session(driver.pid))
    assert {"gcs_server", "raylet"} <= set(found.values())
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
    assert [where for where in found if not where.startswith(loopback)] == []


def test_every_task_answers_for_itself(driver: Driver) -> None:
    futures = [submit(driver, "square", number) for number in range(50)]
    assert [future.result(60) for future in futures] == [number * number for number in range(50)]


def test_errors_keep_their_type(driver: Driver) -> None:
    with pytest.raises(PlanError) as plan:
        submit(driver, "fail", "plan").result(60)
    assert plan.value.problems == ("no tensor a", "no tensor b")
    with pytest.raises(AccessDeniedError, match=r"^s3://bucket/key: denied$"):
        submit(driver, "fail", "access").result(60)
    with pytest.raises(NonFiniteError, match="3 NaN in model 1"):
        submit(driver, "fail", "nonfinite").result(60)


@pytest.mark.parametrize(
    ("entry", "payload", "told"),
    [
        ("fail", "other", "KeyError: 'out of the blue'"),
        ("not_json", None, "not JSON compliant"),
        ("nowhere", None, "has no attribute 'nowhere'"),
    ],
)
def test_what_is_not_ours_is_a_fleet_error(driver: Driver, entry: str, payload: str, told: str) -> None:
    with pytest.raises(FleetError) as caught:
        submit(driver, entry, payload).result(60)
    assert told in str(caught.value)
    assert TASKS + entry in str(caught.value)


def test_a_task_that_no_node_can_hold_is_refused_at_once(driver: Driver) -> None:
    with pytest.raises(FleetError) as caught:
        submit(driver, "square", 2, label="a mountain", memory=1 << 50).result(5)
    largest = driver.capacity().max_node_memory_bytes
    assert "a mountain" in str(caught.value)
    assert f"{1 << 50:,}" in str(caught.value)
    assert f"{largest:,}" in str(caught.value)


def test_a_killed_worker_is_replaced(driver: Driver, tmp_path: Path, gate: Path) -> None:
    retries = driver.retries
    held = Held(driver, tmp_path / "notes", gate)
    first = held.worker
    os.kill(first, signal.SIGKILL)
    until(lambda: len(lines(held.notes)) == 2)
    gate.touch()
    assert held.future.result(60) == held.worker != first
    assert len(lines(held.notes)) == 2
    assert driver.retries == retries + 1


def test_poison_harms_nobody_else(driver: Driver, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    poison = submit(driver, "note_and_die", {"file": str(notes), "text": "x"}, "the poison")
    others = [submit(driver, "square", number) for number in range(20)]
    assert [other.result(60) for other in others] == [number * number for number in range(20)]
    with pytest.raises(FleetError, match="the poison: given up after 4 tries"):
        poison.result(60)
    assert len(lines(notes)) == driver.settings.policy.max_tries == 4


def test_cancelling_kills_what_runs_and_drops_what_waits(driver: Driver, tmp_path: Path, gate: Path) -> None:
    retries = driver.retries
    held = [Held(driver, tmp_path / f"notes-{number}", gate) for number in range(2)]
    never = tmp_path / "never"
    waiting = [submit(driver, "note", {"file": str(never), "text": "x"}) for _ in range(10)]
    for future in waiting:
        assert driver.cancel(future)
    workers = [task.worker for task in held]
    for task in held:
        assert driver.cancel(task.future)
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert submit(driver, "square", 3).result(60) == 9
    assert not never.exists()
    assert driver.retries == retries
    assert driver.in_flight == 0


def test_no_more_is_in_flight_than_two_tasks_a_cpu(driver: Driver, tmp_path: Path, gate: Path) -> None:
    notes = tmp_path / "notes"
    payload = {"file": str(notes), "gate": str(gate)}
    futures = [submit(driver, "note_and_wait", payload) for _ in range(12)]
    seen = set()

    def both_run() -> bool:
        seen.add(driver.in_flight)
        return len(lines(notes)) == 2

    until(both_run)
    until(lambda: driver.in_flight == 4)
    gate.touch()
    while not all(future.done() for future in futures):
        seen.add(driver.in_flight)
        time.sleep(0.001)
    assert max(seen) == 4
    assert len(lines(notes)) == 12


def test_memory_goes_back_to_the_system(driver: Driver) -> None:
    """Otherwise tasks would add up in a worker, and exceed what each of them was priced at."""

    def met_again() -> bool:
        big = submit(driver, "memory", None).result(60)
        assert big["with_whole"] - big["before"] > 250 << 20
        assert big["after_whole"] - big["before"] < 16 << 20
        assert big["with_pieces"] - big["before"] > 250 << 20
        later = [submit(driver, "resident", None).result(60) for _ in range(4)]
        resident = [now["now"] for now in later if now["pid"] == big["pid"]]
        assert all(now - big["before"] < 16 << 20 for now in resident)
        return bool(resident)

    until(met_again)  # any of the workers may get a task


def test_workers_get_one_thread_and_a_frugal_heap(driver: Driver) -> None:
    names = ["OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_"]
    found = submit(driver, "environment", names).result(60)
    assert found == {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "2097152"}


@pytest.mark.parametrize(
    "victim", ["service.cluster.fleet", "gcs/gcs_server", "raylet/raylet", "service.cluster.warden"]
)
def test_the_child_and_its_ray_can_die(driver: Driver, tmp_path: Path, gate: Path, victim: str) -> None:
    """What was finished is not done again; what was not, is; nothing is left of the Ray that was."""
    finished = tmp_path / "finished"
    assert submit(driver, "note", {"file": str(finished), "text": "once"}).result(60) == "once"
    held = Held(driver, tmp_path / "notes", gate)
    waiting = [submit(driver, "square", number) for number in range(8)]
    restarts, old = driver.restarts, driver.pid
    assert old is not None
    pid = old if victim == "service.cluster.warden" else below(old, victim)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(lines(held.notes)) == 2, seconds=60)
    gate.touch()
    assert held.future.result(60) == held.worker
    assert [future.result(60) for future in waiting] == [number * number for number in range(8)]
    assert lines(finished) == ["once"]
    assert driver.restarts == restarts + 1
    assert session(old) == set()


def test_nothing_outlives_a_killed_parent(tmp_path: Path, gate: Path) -> None:
    """Not even when Ray's driver, which could have seen to it, is killed with it."""
    notes = tmp_path / "notes"
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.service.cluster.fleet_parent", str(notes), str(gate)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with parent:
        assert parent.stdout is not None
        # Fleets that other tests have left without an owner are told of before it.
        leader = int(next(line for line in parent.stdout if line.strip().isdigit()))
        until(lambda: lines(notes))
        worker = int(lines(notes)[0].split()[0])
        assert worker in session(leader)
        os.kill(below(leader, "service.cluster.fleet"), signal.SIGKILL)
        parent.kill()
    until(lambda: not session(leader), seconds=10)
    assert not Path(f"/proc/{worker}").exists()


def test_a_task_moves_when_its_node_dies(
    ray_cluster: RayCluster, tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    with Driver(FleetSettings()) as driver:
        until(lambda: driver.capacity().nodes == 3)
        assert driver.capacity().cpus == 3
        assert driver.capacity().max_node_memory_bytes == 1 << 30
        held = [Held(driver, tmp_path / f"notes-{number}", gate) for number in range(3)]
        victim = next(task for task in held if task.raylet != ray_cluster.raylets[0])
        lost = victim.raylet
        ray_cluster.kill_node(lost)
        until(lambda: driver.retries == 1)
        gate.touch()
        assert [task.future.result(60) for task in held] == [task.worker for task in held]
        assert victim.raylet in ray_cluster.raylets
        assert sorted(len(lines(task.notes)) for task in held) == [1, 1, 2]
        until(lambda: driver.capacity().nodes == 2)
        assert driver.restarts == 0
