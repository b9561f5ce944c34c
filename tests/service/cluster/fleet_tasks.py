"""What the tests have the fleet call; importable by Ray's workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.errors import AccessDeniedError, NonFiniteError, PlanError

PATIENCE_S = 60.0
_KEPT: list[bytearray] = []


def square(number: int) -> int:
    return number * number


def fail(kind: str) -> None:
    match kind:
        case "plan":
            raise PlanError("no tensor a", "no tensor b")
        case "access":
            raise AccessDeniedError("s3://bucket/key: denied")
        case "nonfinite":
            raise NonFiniteError("model.embed: 3 NaN in model 1")
        case _:
            raise KeyError("out of the blue")


def not_json(_: Any) -> object:
    return {"value": float("nan")}


def note(payload: dict[str, str]) -> str:
    """Leave a line in a file, so that runs can be counted."""
    _note(payload)
    return payload["text"]


def note_and_wait(payload: dict[str, str]) -> int:
    """Leave a line with our pid and our raylet's, and wait until the gate, a file, is there; returns our pid."""
    _note({**payload, "text": f"{os.getpid()} {os.getppid()}"})
    _wait_for(payload["gate"])
    return os.getpid()


def note_and_die(payload: dict[str, str]) -> None:
    _note(payload)
    os._exit(1)


def stream(payloads: list[dict[str, Any]]) -> Iterator[tuple[int, object]]:
    """For each, leave ``NAME PID SIZE-OF-THE-BATCH`` in a file, do as it says, and yield its name."""
    for index, payload in enumerate(payloads):
        name = payload["name"]
        _note({**payload, "text": f"{name} {os.getpid()} {len(payloads)}"})
        answer: object = name
        match payload["do"]:
            case "wait":
                _wait_for(payload["gate"])
            case "die":
                os._exit(1)
            case "error":
                answer = AccessDeniedError(f"s3://bucket/{name}: denied")
            case "not json":
                answer = float("nan")
            case "raise":
                raise PlanError("no tensor a", "no tensor b")
            case "raise other":
                raise KeyError("out of the blue")
            case "stop":
                return
            case "twice":
                yield index, answer
        yield index, answer


def backwards(numbers: list[int]) -> list[tuple[int, int]]:
    """Squares, the last first; raises where a number is negative."""
    if min(numbers) < 0:
        raise PlanError("a negative number")
    return [(index, numbers[index] ** 2) for index in reversed(range(len(numbers)))]


def memory(_: Any) -> dict[str, int]:
    """Resident bytes of this worker: before, with and after 256 MiB in one piece, then in 256 pieces."""
    before = _resident()
    whole = bytearray(os.urandom(1 << 12) * (1 << 16))
    with_whole = _resident()
    del whole
    after_whole = _resident()
    pieces = [bytearray(os.urandom(1 << 12) * (1 << 8)) for _ in range(256)]
    with_pieces = _resident()
    _KEPT.append(pieces.pop())  # on top of the heap: glibc alone would keep all that is below it
    del pieces
    return {
        "before": before,
        "with_whole": with_whole,
        "after_whole": after_whole,
        "with_pieces": with_pieces,
        "pid": os.getpid(),
    }


def resident(_: Any) -> dict[str, int]:
    return {"now": _resident(), "pid": os.getpid()}


def environment(names: list[str]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def _wait_for(gate: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not Path(gate).exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.02)


def _note(payload: dict[str, str]) -> None:
    with Path(payload["file"]).open("a") as file:
        file.write(payload["text"] + "\n")


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
