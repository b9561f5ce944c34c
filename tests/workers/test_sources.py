"""Sources: JSON round trips, ids that plain operands keep, runs of runs, and what is read and held for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.workers.made import ref
from tests.workers.test_task import PART_OF_THREE
from workers.ranges import Arrangement
from workers.scratch import inner, scratch_bytes
from workers.sources import (
    JOINED_BYTES,
    SOURCE,
    Arithmetic,
    Change,
    Derived,
    Gathered,
    LowRank,
    ModelInput,
    RowRun,
    Source,
)
from workers.task import PART, MergePiece, part_id

pytestmark = pytest.mark.fast

ROWS, COLUMNS, RANK = 11, 7, 3
NUMEL = ROWS * COLUMNS


TENSOR = ref("base", NUMEL, "BF16")
CHANGE = Change(ref("a", RANK * COLUMNS), ref("b", ROWS * RANK), 0.5, False)
TURNED = Change(ref("a", RANK * ROWS), ref("b", COLUMNS * RANK), 0.5, True)
ADAPTED = LowRank("low_rank", TENSOR, (CHANGE, TURNED), (ROWS, COLUMNS), 0)
ROWS_OF_TWO = Gathered(
    "gathered",
    (TENSOR, ADAPTED),
    (
        RowRun(2 * COLUMNS, ((0, COLUMNS),)),
        RowRun(COLUMNS, ()),
        RowRun(COLUMNS, ((0, 0), (1, 10 * COLUMNS), (1, 3))),
        RowRun(7 * COLUMNS, ((1, 2 * COLUMNS),)),
    ),
    "BF16",
)
MERGED = Derived(
    "derived",
    Arithmetic(
        "w", "linear", {"normalize": True}, None,
        (ModelInput(0, ROWS_OF_TWO, {"weight": 1.0}), ModelInput(1, ref("m", NUMEL), {"weight": 2.0})),
        7, NUMEL, 0, NUMEL,
    ),
    "F16",
)  # fmt: skip
ALL: list[Source] = [TENSOR, ADAPTED, ROWS_OF_TWO, MERGED, replace(ADAPTED, source=MERGED)]


def test_parts_of_plain_operands_keep_the_ids_that_they_had_before_there_were_others() -> None:
    assert part_id(PART_OF_THREE) == "a3c357ed8d6cdb59b43a0a1858d08953"


@pytest.mark.parametrize("source", ALL)
def test_sources_round_trip_through_json(source: Source) -> None:
    assert SOURCE.validate_json(SOURCE.dump_json(source)) == source
    merged = PART_OF_THREE.pieces[2]
    assert isinstance(merged, MergePiece)
    arithmetic = replace(merged.arithmetic, base=source, models=(ModelInput(0, source),))
    part = replace(PART_OF_THREE, pieces=(replace(merged, arithmetic=arithmetic),))
    again = PART.validate_json(PART.dump_json(part))
    assert (again, part_id(again)) == (part, part_id(part))
    assert part.refs == source.reads * 2


def test_what_a_part_is_made_of_is_in_its_id() -> None:
    merged = PART_OF_THREE.pieces[2]
    assert isinstance(merged, MergePiece)
    others = [
        replace(ADAPTED, first=1),
        replace(ADAPTED, changes=(CHANGE,)),
        replace(ADAPTED, changes=(replace(CHANGE, scale=0.25), TURNED)),
        replace(ADAPTED, changes=(replace(CHANGE, transposed=True), TURNED)),
        replace(ROWS_OF_TWO, dtype="F16"),
        replace(ROWS_OF_TWO, runs=ROWS_OF_TWO.runs[1:]),
        replace(MERGED, dtype="BF16"),
    ]
    sources = [*ALL, *others]
    parts = [
        replace(PART_OF_THREE, pieces=(replace(merged, arithmetic=replace(merged.arithmetic, base=source)),))
        for source in sources
    ]
    assert len({part_id(part) for part in parts}) == len(sources)


@pytest.mark.parametrize("kind", ["lowrank", "", None])
def test_a_source_of_an_unknown_kind_is_refused(kind: str | None) -> None:
    document = SOURCE.dump_python(ADAPTED, mode="json") | {"kind": kind}
    with pytest.raises(ValidationError, match="kind"):
        SOURCE.validate_python(document)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(ALL), st.lists(st.integers(0, NUMEL), min_size=4, max_size=4))
def test_a_run_of_a_run_is_a_run(source: Source, bounds: list[int]) -> None:
    first, begin, end, last = sorted(bounds)
    outer = source.elements(first, last)
    within = outer.elements(begin - first, end - first)
    direct = source.elements(begin, end)
    assert SOURCE.dump_python(within) == SOURCE.dump_python(direct)
    assert direct.nbytes == (end - begin) * source.nbytes // NUMEL
    assert direct.dtype == source.dtype
    assert source.elements(0, NUMEL) == source
    everything = Arrangement(source.reads)
    for read in direct.reads:  # is among what the whole reads
        everything.position(read)


def test_a_run_of_an_adapted_tensor_reads_the_rows_of_b_that_it_has_elements_of() -> None:
    run = ADAPTED.elements(2 * COLUMNS + 3, 4 * COLUMNS + 1)
    plain, turned = run.changes
    assert (plain.a, turned) == (CHANGE.a, TURNED)
    assert plain.b == CHANGE.b.elements(2 * RANK, 5 * RANK)
    assert (run.first, run.last) == (2 * COLUMNS + 3, 4 * COLUMNS + 1)
    assert (plain.rank(run.shape), turned.rank(run.shape)) == (RANK, RANK)
    assert run.source == TENSOR.elements(run.first, run.last)


def test_rows_that_lie_near_each_other_are_read_together_and_others_are_not() -> None:
    far = 4 * (2 * 100 + JOINED_BYTES // 2)
    table = ref("t", far + 100, "BF16", start=6)
    runs = (RowRun(100, ((0, far),)), RowRun(100, ((0, 100),)), RowRun(50, ((0, 220),)), RowRun(9, ()))
    gathered = Gathered("gathered", (table,), runs, "BF16")
    assert gathered.nbytes == 259 * 2
    assert gathered.reads == (table.elements(100, 270), table.elements(far, far + 100))
    apart = 100 + JOINED_BYTES // 2
    for gap, reads in [(0, 1), (1, 2)]:
        runs = (RowRun(100, ((0, 0),)), RowRun(100, ((0, apart + gap),)))
        assert len(Gathered("gathered", (table,), runs, "BF16").reads) == reads


def test_scratch_holds_all_operands_and_the_most_that_making_one_of_them_takes() -> None:
    def padded(numel: int, width: int) -> int:
        return -(-numel * width // 64) * 64

    bf16 = padded(NUMEL, 2)
    means = 2 * padded(COLUMNS, 2)  # two of the three sources of the third run are not plain
    assert scratch_bytes([TENSOR, TENSOR]) == 0
    assert scratch_bytes([TENSOR, ADAPTED]) == bf16
    assert scratch_bytes([ADAPTED, ADAPTED]) == 2 * bf16
    assert scratch_bytes([ROWS_OF_TWO]) == bf16 + means
    assert scratch_bytes([ROWS_OF_TWO, ADAPTED]) == max(bf16 + means, 2 * bf16)
    assert scratch_bytes([ADAPTED, ROWS_OF_TWO]) == 2 * bf16 + means
    assert scratch_bytes([MERGED]) == padded(NUMEL, 2) + bf16 + means
    assert scratch_bytes([replace(ADAPTED, source=MERGED)]) == scratch_bytes([MERGED])


def test_the_merges_within_a_source_are_found_however_deep() -> None:
    deeper = replace(MERGED.arithmetic, base=replace(ADAPTED, source=MERGED))
    top = Gathered("gathered", (TENSOR, Derived("derived", deeper, "F32")), (), "F32")
    assert inner(top) == (deeper, MERGED.arithmetic)
    assert not MERGED.is_plain
    assert not deeper.is_plain
    assert replace(deeper, base=TENSOR, models=()).is_plain
