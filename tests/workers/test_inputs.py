"""Reading a task's ranges: how many at once."""

from __future__ import annotations

import threading

import pytest

from workers.inputs import READ_THREADS, SHORT_BYTES, SHORT_READ_THREADS, Inputs
from workers.task import TensorRef

pytestmark = pytest.mark.fast


class Meeting:
    """A store whose readers wait for each other: so many that there are always as many, or the test fails."""

    def __init__(self, readers: int) -> None:
        self._barrier = threading.Barrier(readers, timeout=30)
        self.threads: set[str] = set()

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str) -> None:
        """As :meth:`workers.store.base.ObjectStore.read_into`: fills the buffer with ones."""
        self.threads.add(threading.current_thread().name)
        self._barrier.wait()
        buffer[:] = b"\1" * len(buffer)


@pytest.mark.parametrize(
    ("long", "short", "readers"),
    [
        (0, 32, SHORT_READ_THREADS),
        (8, 8, READ_THREADS),
        (7, 9, SHORT_READ_THREADS),
        (0, 3, 3),
        (1, 0, 1),
    ],
)
def test_more_ranges_are_read_at_once_where_most_are_short(long: int, short: int, readers: int) -> None:
    lengths = [SHORT_BYTES] * long + [SHORT_BYTES - 1] * short
    refs = [TensorRef(f"file:///m{k}", "e", 0, length, "U8") for k, length in enumerate(lengths)]
    inputs, store = Inputs(refs), Meeting(readers)
    inputs.fetch(store, memoryview(bytearray(inputs.nbytes)))  # type: ignore[arg-type]
    assert len(store.threads) == readers
    for ref in refs:
        assert bytes(inputs.view(ref)) == b"\1" * ref.nbytes
