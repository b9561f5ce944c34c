"""Packing pieces into parts: what a store can copy by itself stands apart from what must be merged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.planning.layout import pack
from workers.task import Arithmetic, CopyPiece, HeaderPiece, MergePiece, ModelInput, Part, Piece, TensorRef

pytestmark = pytest.mark.fast

MINIMUM = 5


def copy(uri: str, start: int, nbytes: int) -> CopyPiece:
    return CopyPiece("copy", f"{uri}@{start}", TensorRef(uri, "e", start, start + nbytes, "U8"), 0)


def merge(nbytes: int) -> MergePiece:
    ref = TensorRef("m", "e", 0, nbytes, "BF16")
    arithmetic = Arithmetic("t", "linear", {}, None, (ModelInput(0, ref),), 0, nbytes // 2, 0, nbytes // 2)
    return MergePiece("merge", arithmetic, "BF16", None)


def packed(pieces: Sequence[Piece], target: int = 100) -> list[Part]:
    groups = pack(pieces, target, 1 << 40, lambda piece: piece.nbytes, MINIMUM)
    return [Part("s", number, 0, tuple(group), 1) for number, group in enumerate(groups, start=1)]


def test_a_run_of_copies_is_a_part_of_its_own() -> None:
    parts = packed([merge(6), copy("a", 0, 7), copy("a", 7, 1), copy("a", 8, 9), merge(6), merge(6)])
    assert [len(part.pieces) for part in parts] == [1, 3, 2]
    assert [part.source for part in parts] == [None, TensorRef("a", "e", 0, 17, "U8"), None]


def test_copies_that_do_not_follow_each_other_are_parts_of_their_own_when_long_enough() -> None:
    parts = packed([copy("a", 0, 7), copy("a", 8, 7), copy("b", 15, 7)])
    assert [part.source and (part.source.uri, part.source.start) for part in parts] == [
        ("a", 0),
        ("a", 8),
        ("b", 15),
    ]


def test_short_copies_do_not_cut_what_is_merged() -> None:
    parts = packed([merge(6), copy("a", 0, 1), merge(6), copy("b", 0, 1), merge(6)])
    assert len(parts) == 1
    assert parts[0].source is None


def test_a_copy_that_is_too_short_takes_what_follows_with_it() -> None:
    parts = packed([copy("a", 0, 2), merge(4), merge(4)])
    assert [part.source for part in parts] == [None]


PIECES = st.lists(
    st.one_of(
        st.builds(copy, st.sampled_from("ab"), st.integers(0, 40), st.integers(1, 30)),
        st.integers(1, 15).map(lambda half: merge(2 * half)),
        st.just(HeaderPiece("header", "{}")),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(PIECES, st.integers(MINIMUM, 60))
def test_nothing_is_lost_or_moved_and_no_part_but_the_last_is_too_short(
    pieces: list[Piece], target: int
) -> None:
    parts = packed(pieces, target)
    assert [piece for part in parts for piece in part.pieces] == pieces
    assert all(part.nbytes >= MINIMUM for part in parts[:-1])
    for part in parts:  # what is a copy of one range has exactly that range's bytes
        if part.source is not None:
            assert part.source.nbytes == part.nbytes
            assert all(isinstance(piece, CopyPiece) for piece in part.pieces)
