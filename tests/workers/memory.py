"""How much a worker grows by a task, measured in a process of its own that has a fleet's environment.

Run as a program it is that worker: it takes the payloads of ``sys.argv[1]`` one after another, each as a stream of
one task with an arena just for it, and prints how far above its start each one took it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.cluster.fleet_process import WORKER_ENV
from workers import entry
from workers.kernels.cpu import prepare

Task = dict[str, Any]
"""A payload of :func:`workers.entry.tasks`."""


def growth(tasks: Sequence[Task], scratch: Path) -> list[int]:
    """The most resident bytes during each task, less those of the worker that had imported and compiled all."""
    scratch.write_text("\n".join(json.dumps(payload) for payload in tasks))
    command = [sys.executable, "-m", __name__, str(scratch)]
    done = subprocess.run(
        command, env={**os.environ, **WORKER_ENV}, stdout=subprocess.PIPE, check=True, timeout=100
    )
    found: list[int] = json.loads(done.stdout)
    return found


def status(key: str) -> int:
    """A figure of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Do the tasks of a file; each line holds a function's name and the text of its payload."""
    prepare()
    start, found = status("VmRSS"), []
    with Path(sys.argv[1]).open(encoding="utf-8") as lines:
        for line in lines:
            payload = json.loads(line)
            del line
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
            ((_, value),) = entry.tasks([payload])
            if isinstance(value, Exception):
                raise value
            answer = json.dumps({"value": value})
            found.append(status("VmHWM") - start)
            del answer, payload, value
            ctypes.CDLL(None).malloc_trim(0)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
