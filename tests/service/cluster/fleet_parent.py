"""A parent for the tests to kill: ``python -m tests.service.cluster.fleet_parent NOTES GATE``."""

from __future__ import annotations

import sys

from service.cluster.driver import Driver, TaskRequest
from service.cluster.fleet_process import FleetSettings


def main() -> None:
    notes, gate = sys.argv[1:]
    with Driver(FleetSettings(address="local", num_cpus=1)) as driver:
        payload = {"file": notes, "gate": gate}
        entry = "tests.service.cluster.fleet_tasks:note_and_wait"
        future = driver.submit(TaskRequest(entry=entry, payload=payload, memory_bytes=1, label="held"))
        driver.capacity()
        sys.stdout.write(f"{driver.pid}\n")
        sys.stdout.flush()
        future.result()


if __name__ == "__main__":
    main()
