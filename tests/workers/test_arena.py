"""The arena: extents never overlap, are aligned, are waited for, and come back."""

from __future__ import annotations

import errno
import itertools
import mmap
import resource
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.arena import ALIGNMENT, Arena, Extent, padded
from workers.errors import FleetError

pytestmark = pytest.mark.fast

PAGE = ALIGNMENT


def spans(extents: Sequence[Extent]) -> list[tuple[int, int]]:
    return sorted((extent.start, extent.start + padded(len(extent.view))) for extent in extents)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 11 * PAGE), min_size=1, max_size=3), st.integers(0, 5)), max_size=30
    )
)
def test_extents_in_use_never_overlap_and_are_aligned(orders: list[tuple[list[int], int]]) -> None:
    arena = Arena(64 * PAGE)
    out: list[Extent] = []
    for sizes, returned in orders:
        for _ in range(min(returned, len(out))):
            arena.give_back(out.pop(0))
        while arena._fit(sizes) is None:
            arena.give_back(out.pop(0))
        taken = arena.take(sizes)
        assert [len(extent.view) for extent in taken] == sizes
        out += [extent for extent in taken if len(extent.view)]
        ordered = spans(out)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(ordered))
        assert all(start % ALIGNMENT == 0 and end <= arena.nbytes for start, end in ordered)


def test_what_is_written_into_one_extent_is_not_seen_in_another() -> None:
    arena = Arena(2 * PAGE)
    first, second = arena.take([100, 300])
    first.view[:] = b"a" * 100
    second.view[:] = b"b" * 300
    assert bytes(first.view) == b"a" * 100


def test_the_same_bytes_are_handed_out_again() -> None:
    arena = Arena(128)
    (first,) = arena.take([128])
    first.view[:] = b"x" * 128
    arena.give_back(first)
    (second,) = arena.take([128])
    assert second.start == 0
    assert bytes(second.view) == b"x" * 128


def test_sizes_are_taken_together_or_not_at_all() -> None:
    arena = Arena(4 * PAGE)
    (held,) = arena.take([2 * PAGE])
    got: list[Extent] = []
    waiter = threading.Thread(target=lambda: got.extend(arena.take([PAGE, 2 * PAGE])))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    (small,) = arena.take([PAGE])  # what the waiter cannot use yet is not kept for it
    arena.give_back(small)
    arena.give_back(held)
    waiter.join(10)
    assert not waiter.is_alive()
    assert [len(extent.view) for extent in got] == [PAGE, 2 * PAGE]


def test_more_than_there_is_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="were asked of an arena"):
        Arena(2 * PAGE).take([PAGE, PAGE + 1])


def test_empty_extents_take_no_room() -> None:
    arena = Arena(64)
    full, empty = arena.take([64, 0])
    arena.give_back(empty)
    arena.give_back(empty)
    assert len(full.view) == 64


def test_giving_back_twice_is_an_error() -> None:
    arena = Arena(64)
    (extent,) = arena.take([64])
    arena.give_back(extent)
    with pytest.raises(ValueError, match="not in list"):
        arena.give_back(extent)


def test_resting_lets_the_system_take_the_memory_unless_it_is_in_use() -> None:
    size = 16 << 20
    before = free_to_take()
    arena = Arena(size)
    (extent,) = arena.take([size])
    extent.view[:] = b"x" * size
    arena.rest()
    assert free_to_take() == before
    arena.give_back(extent)
    arena.rest()
    assert free_to_take() - before > size * 3 // 4
    (extent,) = arena.take([size])
    extent.view[:] = b"y" * size
    assert free_to_take() - before < size // 4
    assert bytes(extent.view[-64:]) == b"y" * 64


@pytest.mark.parametrize("wanted", [8 << 20, 24 << 20])
def test_of_another_size_it_keeps_the_memory_that_it_has(wanted: int) -> None:
    size = 16 << 20
    arena = Arena(size)
    (extent,) = arena.take([size])
    extent.view[:] = b"x" * size
    arena.give_back(extent)
    del extent
    assert arena.resize(wanted - 1)
    assert arena.nbytes == wanted
    (extent,) = arena.take([wanted])
    kept = min(size, wanted)
    assert extent.view[:kept] == b"x" * kept
    written = memoryview(b"y" * wanted)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    extent.view[:kept] = written[:kept]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < kept // PAGE // 2
    extent.view[:] = written
    with pytest.raises(ValueError, match="were asked of an arena"):
        arena.take([wanted + 1])


def test_its_size_stays_while_somebody_uses_it_and_when_it_is_pinned() -> None:
    arena = Arena(4 * PAGE)
    (extent,) = arena.take([PAGE])
    assert not arena.resize(PAGE)
    arena.give_back(extent)
    assert not arena.resize(8 * PAGE)  # who gave it back still holds the view
    (whole,) = arena.take([4 * PAGE])
    whole.view[:] = b"x" * 4 * PAGE
    arena.give_back(whole)
    del extent, whole
    assert arena.resize(8 * PAGE)
    assert not Arena(PAGE, lambda memory: lambda: None).resize(2 * PAGE)


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, option: int, *rest: int) -> None:
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(errno.EINVAL, "no huge pages here")
            super().madvise(option, *rest)

    monkeypatch.setattr(mmap, "mmap", Plain)
    (extent,) = Arena(PAGE).take([PAGE])
    assert len(extent.view) == PAGE


def test_pinned_memory_is_let_go_before_it_is_unmapped() -> None:
    events: list[str] = []

    def pin(memory: memoryview) -> Callable[[], None]:
        assert len(memory) == 4 * PAGE
        events.append("pinned")

        def unpin() -> None:
            assert bytes(memory[:2]) == b"xx"  # still there
            events.append("unpinned")

        return unpin

    arena = Arena(3 * PAGE + 1, pin)
    (extent,) = arena.take([PAGE])
    extent.view[:] = b"x" * PAGE
    arena.give_back(extent)
    assert events == ["pinned"]
    del arena, extent
    assert events == ["pinned", "unpinned"]


def test_pinned_memory_is_never_given_up() -> None:
    size = 16 << 20
    before = free_to_take()
    arena = Arena(size, lambda memory: lambda: None)
    (extent,) = arena.take([size])
    extent.view[:] = b"x" * size
    arena.give_back(extent)
    arena.rest()
    assert free_to_take() == before
    (extent,) = arena.take([size])
    assert bytes(extent.view[-64:]) == b"x" * 64


def test_memory_that_cannot_be_pinned_is_no_arena() -> None:
    def refuse(memory: memoryview) -> Callable[[], None]:
        raise FleetError("CUDA would not pin it")

    with pytest.raises(FleetError, match="would not"):
        Arena(PAGE, refuse)


def free_to_take() -> int:
    """Bytes of this process that the system may take without asking."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("LazyFree:"))
