"""Price and geometry of operands that are made: every term once, and runs that a task can hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from service.planning.layout import GRAIN_ELEMENTS, PART_REFS, Limits, held_by, pieces_of
from service.planning.matching import OutputTensor
from service.planning.price import (
    DESCRIPTIONS,
    GPU_BASELINE_BYTES,
    MADE_BYTES,
    PIECE_BYTES,
    REF_BYTES,
    TAKE_BYTES,
    TEXT_COPIES,
    description_bytes,
    merge_bytes,
    part_peak_bytes,
    price,
    workspace_bytes,
)
from tests.workers.made import ref
from workers.arena import padded
from workers.kernels.moves import device_bytes
from workers.ranges import Arrangement
from workers.scratch import scratch_bytes
from workers.sources import (
    JOINED_BYTES,
    Arithmetic,
    Change,
    Derived,
    Gathered,
    LowRank,
    ModelInput,
    RowRun,
    Source,
    TensorRef,
)
from workers.task import MergePiece, Part

pytestmark = pytest.mark.fast

MIB = 1 << 20


def arithmetic(numel: int, *models: Source) -> Arithmetic:
    """Their weighted sum."""
    inputs = tuple(ModelInput(k, model, {"weight": 1.0}) for k, model in enumerate(models))
    return Arithmetic("w", "linear", {}, None, inputs, 7, numel, 0, numel)


ROWS, COLUMNS, RANK = 1009, 2003, 13
NUMEL = ROWS * COLUMNS
A, B = ref("a", RANK * COLUMNS), ref("b", ROWS * RANK)
ADAPTED = LowRank("low_rank", ref("base", NUMEL, "BF16"), (Change(A, B, 1.0, False),), (ROWS, COLUMNS), 0)
MERGED = Derived("derived", arithmetic(NUMEL, ADAPTED, *(ref(f"m{k}", NUMEL) for k in range(3))), "F32")


def test_a_merge_holds_what_it_reads_what_it_makes_and_its_output() -> None:
    whole = arithmetic(NUMEL, ADAPTED, MERGED)
    reads = Arrangement(whole.refs).nbytes
    bf16, f32 = -(-2 * NUMEL // 64) * 64, -(-4 * NUMEL // 64) * 64
    assert scratch_bytes(whole.sources) == bf16 + f32 + bf16
    assert merge_bytes(whole, 2) == reads + bf16 + f32 + bf16 + 2 * NUMEL
    # The base and the adapter are read once, though two operands are made of them.
    assert reads - (2 * NUMEL + 3 * 4 * NUMEL + A.nbytes + B.nbytes) < 6 * 4096


def test_every_term_of_a_part_is_priced() -> None:
    whole = arithmetic(NUMEL, ADAPTED, MERGED)
    piece = MergePiece("merge", whole, "BF16", None)
    part = Part("s", 1, 0, (piece,), 1)
    held = padded(Arrangement(whole.refs).nbytes) + padded(scratch_bytes(whole.sources)) + padded(2 * NUMEL)
    found = price([part], [], 1, 0)
    assert found.arena_bytes == held
    steps = NUMEL // (1 << 18) * 256 * 2 + 2 * NUMEL // MIB * 256
    described = DESCRIPTIONS * (description_bytes(piece) + steps)
    assert (
        part_peak_bytes(part, 0) == held + workspace_bytes(4) + described
    )  # four operands are merged within
    read = 2 * NUMEL + 3 * 4 * NUMEL + A.nbytes + B.nbytes
    assert (found.bytes_read, found.input_bytes) == (read, read)
    inner = device_bytes(NUMEL, [2, 4, 4, 4], 4)  # the earlier merge has more operands
    assert found.gpu_bytes == GPU_BASELINE_BYTES + inner
    # Cut in two, each part reads the adapter's A, and one row of B that both have elements of.
    cut = [
        replace(part, number=number, pieces=(replace(piece, arithmetic=whole.elements(*run)),))
        for number, run in enumerate([(0, 500 * COLUMNS + 1), (500 * COLUMNS + 1, NUMEL)], start=1)
    ]
    found = price(cut, [], 1, 0)
    assert (found.bytes_read, found.input_bytes) == (read + A.nbytes + 4 * RANK, read)


def test_a_description_counts_all_that_says_how_an_operand_is_made() -> None:
    def texts(*refs: TensorRef) -> int:
        return sum(REF_BYTES + TEXT_COPIES * (len(each.uri) + len(each.etag) + 4) for each in refs)

    def described(source: Source) -> int:
        piece = MergePiece("merge", arithmetic(NUMEL, source), "F32", None)
        return description_bytes(piece) - PIECE_BYTES - TEXT_COPIES * 3

    base = ref("base", NUMEL, "BF16")
    adapted = MADE_BYTES + texts(base, A, B)
    assert described(ADAPTED) == adapted
    models = texts(*(ref(f"m{k}", NUMEL) for k in range(3)))
    assert described(MERGED) == MADE_BYTES + TEXT_COPIES * 3 + adapted + models
    far = JOINED_BYTES // 2 + 8
    gathered = Gathered("gathered", (base,), (RowRun(7, ()), RowRun(7, ((0, 0), (0, far)))), "BF16")
    assert described(gathered) == MADE_BYTES + 4 * TAKE_BYTES + texts(base, base, base)


@pytest.mark.parametrize("columns", [1024, 1 << 20])
def test_a_tensor_is_cut_so_that_each_run_is_held_beside_what_all_of_them_need(columns: int) -> None:
    rank, numel = 64, 48 << 20
    rows = numel // columns
    change = Change(ref("a", rank * columns), ref("b", rows * rank), 1.0, False)
    source = LowRank("low_rank", ref("base", numel, "BF16"), (change,), (rows, columns), 0)
    limits = Limits(64 * MIB, 64 * MIB, 1 << 30)
    tensor = OutputTensor("w", (rows, columns), "BF16", arithmetic(numel, source), numel)
    pieces, survey = pieces_of(tensor, limits, 1)
    assert survey is None
    assert len(pieces) > 1
    assert all(held_by(piece) <= limits.packed_bytes for piece in pieces)
    assert sum(piece.nbytes for piece in pieces) == tensor.nbytes
    # 256 MiB of A leave little of 410 MiB, so runs are shorter.
    step = pieces[0].nbytes
    assert step == (64 * MIB if columns == 1024 else 32 * MIB)


@pytest.mark.parametrize(
    ("columns", "models", "rows_each"),
    [
        (8192, 1, PART_REFS),  # half of what would fill a part
        (4096, 4, 3 * GRAIN_ELEMENTS // 4096),  # no part of S3's may be shorter
        (65536, 1, 256),  # fills a part
    ],
)
def test_a_run_reads_no_more_ranges_than_a_part_may_unless_it_is_as_short_as_one_may_be(
    columns: int, models: int, rows_each: int
) -> None:
    rows = 1 << 14
    numel = rows * columns
    order = random.Random(0).sample(range(rows), rows)
    runs = tuple(RowRun(columns, ((0, row * columns),)) for row in order)
    sources = [Gathered("gathered", (ref(f"m{k}", numel),), runs, "F32") for k in range(models)]
    tensor = OutputTensor("w", (rows, columns), "F32", arithmetic(numel, *sources), numel)
    pieces, _ = pieces_of(tensor, Limits(64 * MIB, 64 * MIB, 1 << 34), 1)
    assert {piece.nbytes // columns // 4 for piece in pieces[:-1]} == {rows_each}
    assert sum(piece.nbytes for piece in pieces) == tensor.nbytes
    taken: list[RowRun] = []
    for piece in pieces:
        assert isinstance(piece, MergePiece)
        model = piece.arithmetic.models[0]
        assert isinstance(model.ref, Gathered)
        taken += model.ref.runs
    assert tuple(taken) == runs
