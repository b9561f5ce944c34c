"""The plain copy reads everything, and what it writes is what was last read."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import copying
from benchmarks.copying import Part, Request, copy_file_part, copy_files, parts_of

fast = pytest.mark.fast


@fast
@pytest.mark.parametrize(
    ("size", "spans"), [(1, [(0, 1)]), (10, [(0, 5), (5, 10)]), (11, [(0, 5), (5, 10), (10, 11)])]
)
def test_parts_cover_a_file_once(size: int, spans: list[tuple[int, int]]) -> None:
    parts = parts_of(("a",), "b", size, 5)
    assert [(part.start, part.end) for part in parts] == spans
    assert [part.number for part in parts] == list(range(1, len(spans) + 1))


def _request(tmp_path: Path, sizes: tuple[int, ...]) -> tuple[Request, list[bytes]]:
    sources, contents = [], []
    for number, size in enumerate(sizes):
        paths = []
        for model in ("x", "y"):
            path = tmp_path / f"{model}{number}"
            path.write_bytes(random.Random(f"{model}{number}").randbytes(size))
            paths.append(str(path))
        sources.append(tuple(paths))
        contents.append(Path(paths[-1]).read_bytes())
    targets = tuple(str(tmp_path / f"out{number}") for number in range(len(sizes)))
    return Request(tuple(sources), sizes, targets, processes=2), contents


@fast
def test_files_are_copied_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PART_BYTES", 3000)
    request, contents = _request(tmp_path, (copying.BUFFER_BYTES + 12345, 777))
    seen: list[Part] = []

    def run(function: object, parts: list[Part]) -> list[tuple[float, None]]:
        assert function is copy_file_part
        seen.extend(parts)
        return [copy_file_part(part) for part in reversed(parts)]

    assert copy_files(request, run) >= 0
    assert [Path(target).read_bytes() for target in request.targets] == contents
    assert sum(part.end - part.start for part in seen) == sum(request.sizes)


@fast
def test_a_source_that_is_shorter_than_it_was_is_an_error(tmp_path: Path) -> None:
    request, _ = _request(tmp_path, (1000,))
    Path(request.sources[0][0]).write_bytes(b"short")
    with pytest.raises(OSError, match="changed"):
        copy_files(request, lambda function, parts: [function(part) for part in parts])


def test_the_program_copies_in_processes_and_says_what_it_took(tmp_path: Path) -> None:
    request, contents = _request(tmp_path, (5_000_000, 10))
    asked, told = tmp_path / "request.json", tmp_path / "reply.json"
    asked.write_text(json.dumps(asdict(request)))
    program = [sys.executable, "-W", "error", "-m", "benchmarks.copying", str(asked), str(told)]
    subprocess.run(program, check=True, timeout=60)
    reply = json.loads(told.read_text())
    assert [Path(target).read_bytes() for target in request.targets] == contents
    assert reply["wall_s"] > 0
    assert reply["cpu_s"] > 0
