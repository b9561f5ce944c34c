"""Joining byte ranges: nothing is lost, nothing is read that nobody asked for, nothing twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.ranges import Run, coalesce
from workers.task import TensorRef

pytestmark = pytest.mark.fast

REFS = st.lists(
    st.builds(
        lambda uri, etag, start, length: TensorRef(uri, etag, start, start + length, "U8"),
        st.sampled_from(["file:///a", "file:///b"]),
        st.sampled_from(["1", "2"]),
        st.integers(0, 60),
        st.integers(0, 9),
    ),
    max_size=20,
)


def wanted(refs: list[TensorRef]) -> set[tuple[str, str, int]]:
    return {(ref.uri, ref.etag, byte) for ref in refs for byte in range(ref.start, ref.end)}


@settings(deadline=None)
@given(REFS, st.randoms())
def test_runs_are_exactly_the_bytes_that_were_asked_for(refs: list[TensorRef], random: object) -> None:
    runs = coalesce(refs)
    read = [(run.uri, run.etag, byte) for run in runs for byte in range(run.start, run.end)]
    assert len(read) == len(set(read))
    assert set(read) == wanted(refs)
    for one, two in itertools.pairwise(runs):
        assert (one.uri, one.etag, one.end) < (
            two.uri,
            two.etag,
            two.start,
        )  # never touching: joined as far as can be
    shuffled = list(refs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert coalesce(shuffled) == runs


def test_neighbours_are_joined_but_not_across_objects_or_versions() -> None:
    refs = [
        TensorRef("s3://b/x", "1", 8, 16, "F32"),
        TensorRef("s3://b/x", "1", 0, 8, "BF16"),
        TensorRef("s3://b/x", "2", 16, 24, "F32"),
        TensorRef("s3://b/y", "1", 16, 24, "F32"),
        TensorRef("s3://b/x", "1", 17, 17, "F32"),
    ]
    assert coalesce(refs) == [
        Run("s3://b/x", "1", 0, 16),
        Run("s3://b/x", "2", 16, 24),
        Run("s3://b/y", "1", 16, 24),
    ]
    assert coalesce([]) == []
