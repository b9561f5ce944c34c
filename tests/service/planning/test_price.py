"""Prices, term by term: the sizes are distinct primes (of bytes or of MiB), so that no term can hide in another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.planning.labels import part_label
from service.planning.price import (
    BASELINE_BYTES,
    DESCRIPTIONS,
    GPU_BASELINE_BYTES,
    GPU_HOST_BYTES,
    PIECE_BYTES,
    REF_BYTES,
    STEP_BYTES_PER_INPUT,
    TEXT_COPIES,
    Needs,
    description_bytes,
    merge_bytes,
    needs,
    part_peak_bytes,
    price,
    survey_peak_bytes,
    workspace_bytes,
)
from workers.arena import ALIGNMENT, padded
from workers.ranges import Arrangement
from workers.task import Arithmetic, CopyPiece, HeaderPiece, MergePiece, ModelInput, Part, Survey, TensorRef

pytestmark = pytest.mark.fast

MIB = 1 << 20
BASELINE = 7 * MIB + 3


def ref(name: str, start: int, nbytes: int, dtype: str = "BF16") -> TensorRef:
    return TensorRef(f"file:///{name}/model.safetensors", "e", start, start + nbytes, dtype)


def arithmetic(name: str, start: int, elements: int, base: str | None = "F32") -> Arithmetic:
    """A run that reads a float32 base and two bfloat16 models."""
    models = tuple(ModelInput(i, ref(f"m{i}", start, 2 * elements)) for i in range(2))
    own = None if base is None else ref("base", start, 4 * elements, base)
    return Arithmetic(name, "ties", {}, own, models, 0, elements, 0, elements)


HEADER = HeaderPiece("header", " " * 96)
COPY = CopyPiece("copy", "buffer", ref("base", 1_000_003, 101, "U8"), 0)
SMALL = MergePiece("merge", arithmetic("small", 5_000_011, 1009), "F32", None)
FIRST = Part("model-00001-of-00002.safetensors", 1, 0, (HEADER, COPY, SMALL), 1)
BIG = MergePiece("merge", arithmetic("big", 10_000_019, 13 * MIB + 1), "F16", "s")
SECOND = Part("model-00002-of-00002.safetensors", 1, 0, (BIG,), 1)
RUNS = arithmetic("big", 10_000_019, 11 * MIB), arithmetic("big", 90_000_049, 2 * MIB + 1)
SURVEY = Survey("s", 3, ((RUNS[0],), (RUNS[1],)), 13 * MIB + 1)

HELD_BIG = padded(Arrangement(BIG.refs).nbytes)


def test_every_term_is_there_once() -> None:
    found = price([FIRST, SECOND], [SURVEY], 2, BASELINE)
    first, second = 101 + 8 * 1009, 8 * (13 * MIB + 1)
    assert found.bytes_read == first + second + 3 * 8 * (13 * MIB + 1)
    assert found.input_bytes == first + second
    assert found.bytes_written == 104 + 101 + 4 * 1009 + 2 * (13 * MIB + 1)
    # 16 MiB a read. First: buffer, base and two models. Second: 52 MiB of base, 26 MiB a model, and some bytes.
    reads = (1 + 1 + 2) + (4 + 2 + 2)
    # Survey: 44 MiB and 22 MiB twice; 8 MiB and 4 MiB twice, and some bytes; three times. And two puts.
    assert found.requests == reads + 2 + 3 * ((3 + 2 + 2) + (1 + 1 + 1))
    assert (found.shards, found.parts, found.survey_tasks, found.surveyed_tensors) == (2, 2, 6, 1)
    assert found.most_reads == 4
    assert found.worst == "big"


def test_the_peak_is_baseline_workspace_descriptions_and_arena() -> None:
    blocks = 26 + 52 * 3  # of digests, and of a survey's sums a model
    described = description_bytes(BIG) + blocks * STEP_BYTES_PER_INPUT
    held = HELD_BIG + padded(2 * (13 * MIB + 1))
    alone = BASELINE + workspace_bytes(3) + DESCRIPTIONS * described + held
    assert part_peak_bytes(SECOND, BASELINE) == alone
    assert price([SECOND], [], 1, BASELINE).peak_bytes == alone  # there is nothing to read ahead
    assert part_peak_bytes(SECOND) - part_peak_bytes(SECOND, 0) == BASELINE_BYTES
    assert workspace_bytes(3) - workspace_bytes(2) == workspace_bytes(2) - workspace_bytes(1) > 0
    assert merge_bytes(SMALL.arithmetic, 4) == 8 * 1009 + 4 * 1009


def test_the_arena_holds_the_biggest_task_another_one_and_an_output_as_far_as_there_is_room() -> None:
    output = padded(2 * (13 * MIB + 1))
    parts = [SECOND] * 3
    found = price(parts, [], 1, BASELINE)
    assert found.arena_bytes == 2 * (HELD_BIG + output) + output
    fixed = found.peak_bytes - found.arena_bytes
    for less in (1, output, HELD_BIG + output):
        assert price(parts, [], 1, BASELINE, found.peak_bytes - less).peak_bytes == found.peak_bytes - less
    # A worker that cannot even hold one is priced with what it would need.
    assert price(parts, [], 1, BASELINE, 1).peak_bytes == fixed + HELD_BIG + output
    assert price(parts, [], 1, BASELINE, 1 << 40).peak_bytes == found.peak_bytes
    assert price([SECOND] * 2, [], 1, BASELINE).arena_bytes == 2 * (HELD_BIG + output)


def test_a_part_that_is_a_copy_holds_its_bytes_once() -> None:
    pieces = tuple(
        CopyPiece("copy", name, ref("base", start, 7919, "U8"), 0)
        for name, start in [("a", 64), ("b", 64 + 7919)]
    )
    copied = Part("s", 1, 0, pieces, 1)
    assert copied.source == TensorRef("file:///base/model.safetensors", "e", 64, 64 + 2 * 7919, "U8")
    assert price([copied], [], 1).arena_bytes == padded(2 * 7919)
    assert price([copied, FIRST], [], 1).bytes_copied == 2 * 7919
    for other in (pieces[::-1], (*pieces, HEADER), (HEADER, *pieces)):
        apart = Part("s", 1, 0, other, 1)
        assert apart.source is None
        assert price([apart], [], 1).arena_bytes == padded(2 * 7919) + padded(apart.nbytes)


def test_a_description_counts_pieces_refs_and_texts_as_json_has_them() -> None:
    texts = len('"small"') + 3 * len('"e"') + len('"file:///base/model.safetensors"')
    texts += 2 * len('"file:///m0/model.safetensors"')
    assert description_bytes(SMALL) == PIECE_BYTES + 3 * REF_BYTES + TEXT_COPIES * texts
    texts = len('"buffer"') + len('"e"') + len('"file:///base/model.safetensors"')
    assert description_bytes(COPY) == PIECE_BYTES + REF_BYTES + TEXT_COPIES * texts
    assert description_bytes(HEADER) == PIECE_BYTES + TEXT_COPIES * (96 + 2)
    wide = replace(COPY, name="\N{GRINNING FACE}")  # a surrogate pair, escaped
    assert description_bytes(wide) - description_bytes(COPY) == TEXT_COPIES * (12 - 6)


def test_the_peak_of_a_survey_task_has_no_output() -> None:
    described = description_bytes(BIG) + 44 * 3 * STEP_BYTES_PER_INPUT
    held = Arrangement(RUNS[0].refs).nbytes
    assert 8 * 11 * MIB <= held < 8 * 11 * MIB + 3 * ALIGNMENT
    expected = BASELINE + padded(held) + workspace_bytes(3) + DESCRIPTIONS * described
    assert survey_peak_bytes(SURVEY.tasks[0], BASELINE) == expected


def test_a_survey_task_of_several_tensors_joins_their_reads_and_holds_all_of_them() -> None:
    small = arithmetic("small", 64, 1009), arithmetic("smaller", 64 + 4 * 1009, 503), RUNS[1]
    survey = Survey("all", 2, (small, (RUNS[0],)), 13 * MIB + 1 + 1009 + 503)
    found = price([FIRST, SECOND], [survey], 2, BASELINE)
    without = price([FIRST, SECOND], [], 2, BASELINE)
    assert found.bytes_read - without.bytes_read == 2 * 8 * survey.numel
    assert (found.survey_tasks, found.surveyed_tensors, found.most_reads) == (4, 3, 3)
    # Bases of the two small tensors touch: one read. Their models' do not: two each. Then 8 and 4 MiB of RUNS[1].
    assert found.requests - without.requests == 2 * ((1 + 2 * 2 + 3) + (3 + 2 + 2))
    arrangement = Arrangement([ref for run in small for ref in run.refs])
    alone = [
        survey_peak_bytes((run,), 0) - padded(Arrangement(run.refs).nbytes) - workspace_bytes(3)
        for run in small
    ]
    assert survey_peak_bytes(small, BASELINE) == (
        BASELINE + padded(arrangement.nbytes) + workspace_bytes(3) + sum(alone)
    )
    assert price([FIRST], [replace(survey, tasks=(small,))], 1, BASELINE, 1).worst == "small and 2 more"


def test_a_survey_can_be_the_worst_task() -> None:
    found = price([FIRST], [SURVEY], 1, BASELINE, 1)
    assert found.peak_bytes == survey_peak_bytes(SURVEY.tasks[0], BASELINE)
    assert found.worst == "big"


def test_what_two_pieces_share_is_read_and_held_once() -> None:
    twice = Part("s", 1, 0, (SMALL, SMALL), 1)
    assert price([twice], [], 1, 0).bytes_read == 8 * 1009
    held = Arrangement(SMALL.refs).nbytes
    assert price([twice], [], 1, 0).arena_bytes == padded(held) + padded(8 * 1009)
    assert len(twice.refs) == 6


def test_a_task_takes_a_core_its_memory_and_its_share_of_a_gpu() -> None:
    found = price([SECOND], [], 1, BASELINE)
    assert needs(found) == Needs(found.peak_bytes, 1, 0, "cpu")
    # Two chunks of 8 Mi elements with what they become, and of the one that is computed 40 bytes and a float an input.
    assert (
        found.gpu_bytes
        == GPU_BASELINE_BYTES + 8 * MIB * (2 * (4 + 2 + 2 + 2) + 40 + 3 * 4) + (3 * 2 + 8) * MIB
    )
    on_gpu = needs(found, 4 * found.gpu_bytes)
    assert on_gpu == Needs(found.peak_bytes + GPU_HOST_BYTES, 1, 0.25, "cuda")
    assert needs(found, 4 * found.gpu_bytes - 1).gpus == 0.26  # never less than it is
    assert needs(found, found.gpu_bytes - 1).gpus > 1


def test_a_gpu_holds_a_few_chunks_however_big_the_tensor() -> None:
    small, big, bigger = (
        price(
            [Part("s", 1, 0, (MergePiece("merge", arithmetic("t", 0, n), "F16", None),), 1)], [], 1
        ).gpu_bytes
        for n in (1 << 20, 1 << 23, 1 << 26)
    )
    assert small < big == bigger
    surveyed = price([FIRST], [SURVEY], 1).gpu_bytes
    assert surveyed == GPU_BASELINE_BYTES + 8 * MIB * (2 * (4 + 2 + 2) + 40 + 3 * 4) + (3 * 2 + 8) * MIB
    assert price([FIRST], [], 1).gpu_bytes < small


def test_nothing_to_compute_needs_no_gpu() -> None:
    copied = Part("s", 1, 0, (HEADER, COPY), 1)
    assert price([copied], [], 1).gpu_bytes == 0
    assert needs(price([copied], [], 1), 1 << 40).device == "cpu"


def test_neighbours_cost_one_request() -> None:
    neighbours = tuple(CopyPiece("copy", f"t{i}", ref("base", 1000 + 10 * i, 10, "U8"), 0) for i in range(50))
    assert price([Part("s", 1, 0, neighbours, 1)], [], 1, 0).requests == 2


def test_an_empty_plan_costs_the_worker() -> None:
    found = price([], [], 0, BASELINE)
    assert (found.bytes_read, found.bytes_written, found.requests, found.peak_bytes) == (0, 0, 0, BASELINE)
    assert found.arena_bytes == 0
    assert (found.most_reads, found.worst) == (1, "nothing")


def test_parts_are_named_by_their_tensors() -> None:
    assert part_label(FIRST) == "buffer and 1 more"
    assert part_label(SECOND) == "big"
    assert part_label(Part("model-x", 1, 0, (HEADER,), 1)) == "header of model-x"
