"""Direct writes: the bytes are there, the neighbours' are left alone, and what cannot be direct is written too."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.store import direct, files
from workers.task import PAGE_BYTES

SIZE = 8 * PAGE_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "data"
    path.write_bytes(b"." * SIZE)
    with files.opened(path, os.O_RDWR) as fd:
        yield path, fd


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was written by files.write_at, by offset and length: all that is not written directly."""
    written: list[tuple[int, int]] = []
    write = files.write_at

    def watched(fd: int, offset: int, data: memoryview) -> None:
        if len(data):
            written.append((offset, len(data)))
        write(fd, offset, data)

    monkeypatch.setattr(files, "write_at", watched)
    return written


def placed(offset: int, data: bytes, shift: int = 0) -> memoryview:
    """``data`` in memory where it is in a file at ``offset``, or ``shift`` bytes further."""
    room = memoryview(mmap.mmap(-1, (len(data) // PAGE_BYTES + 3) * PAGE_BYTES))
    start = (offset + shift) % PAGE_BYTES
    room[start : start + len(data)] = data
    return room[start : start + len(data)]


OFFSETS = st.one_of(
    st.integers(0, SIZE), st.sampled_from([0, 1, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES + 5])
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OFFSETS, OFFSETS, st.sampled_from([0, 0, 1, 64]))
def test_every_byte_is_written_and_no_other(file: tuple[Path, int], one: int, two: int, shift: int) -> None:
    path, fd = file
    start, end = min(one, two), max(one, two)
    data = bytes(1 + n % 251 for n in range(end - start))
    path.write_bytes(b"." * SIZE)
    direct.write_at(path, fd, start, placed(start, data, shift))
    assert path.read_bytes() == b"." * start + data + b"." * (SIZE - end)


def test_whole_pages_go_directly_and_the_shared_ones_do_not(
    file: tuple[Path, int], pages: list[tuple[int, int]]
) -> None:
    path, fd = file
    data = os.urandom(5 * PAGE_BYTES)
    direct.write_at(path, fd, 100, placed(100, data))
    assert pages == [(100, PAGE_BYTES - 100), (5 * PAGE_BYTES, 100)]
    assert path.read_bytes()[100 : 100 + len(data)] == data


def test_a_buffer_that_lies_elsewhere_is_copied(file: tuple[Path, int], pages: list[tuple[int, int]]) -> None:
    path, fd = file
    direct.write_at(path, fd, PAGE_BYTES, placed(PAGE_BYTES, b"x" * 2 * PAGE_BYTES, shift=8))
    assert pages == [(PAGE_BYTES, 2 * PAGE_BYTES)]


@pytest.mark.parametrize("fails", ["open", "write"])
def test_a_file_system_that_cannot_is_written_as_ever(
    file: tuple[Path, int], pages: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path, fd = file

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "no direct writes here")

    if fails == "open":
        monkeypatch.setattr(files, "opened", refuse)
    else:
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda to, *rest: refuse() if to != fd else write(to, *rest))
    direct.write_at(path, fd, 0, placed(0, b"x" * 2 * PAGE_BYTES))
    assert pages == [(0, 2 * PAGE_BYTES)]
    assert path.read_bytes()[: 2 * PAGE_BYTES] == b"x" * 2 * PAGE_BYTES


def test_a_full_disk_is_not_taken_for_a_file_system_that_cannot(
    file: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = file

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="no space left"):
        direct.write_at(path, fd, 0, placed(0, b"x" * PAGE_BYTES))


def test_a_short_direct_write_is_gone_on_with(
    file: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = file
    write = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda to, data, offset: write(to, data[: PAGE_BYTES if to != fd else None], offset)
    )
    data = os.urandom(3 * PAGE_BYTES)
    direct.write_at(path, fd, PAGE_BYTES, placed(PAGE_BYTES, data))
    assert path.read_bytes()[PAGE_BYTES : 4 * PAGE_BYTES] == data
