"""Prices, term by term: the sizes are distinct primes (of bytes or of MiB), so that no term can hide in another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.price import (
    BASELINE_BYTES,
    PIECE_BYTES,
    REF_BYTES,
    STEP_BYTES_PER_INPUT,
    TEXT_COPIES,
    description_bytes,
    merge_bytes,
    part_label,
    part_peak_bytes,
    price,
    survey_peak_bytes,
    workspace_bytes,
)
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
SURVEY = Survey("s", 3, (arithmetic("big", 10_000_019, 11 * MIB), arithmetic("big", 90_000_049, 2 * MIB + 1)))


def test_every_term_is_there_once() -> None:
    found = price([FIRST, SECOND], [SURVEY], 2, BASELINE)
    first, second = 101 + 8 * 1009, 8 * (13 * MIB + 1)
    assert found.bytes_read == first + second + 3 * 8 * (13 * MIB + 1)
    assert found.input_bytes == first + second
    assert found.bytes_written == 104 + 101 + 4 * 1009 + 2 * (13 * MIB + 1)
    # 8 MiB a read. First: buffer, base and two models. Second: 52 MiB of base, 26 MiB a model, and some bytes.
    reads = (1 + 1 + 2) + (7 + 4 + 4)
    # Survey: 44 MiB and 22 MiB twice; 8 MiB and 4 MiB twice, and some bytes; three times. And two puts.
    assert found.requests == reads + 2 + 3 * ((6 + 3 + 3) + (2 + 1 + 1))
    assert (found.shards, found.parts, found.survey_tasks, found.surveyed_tensors) == (2, 2, 6, 1)
    assert found.most_reads == 4
    blocks = 26 + 52 * 3  # of digests, and of a survey's sums a model
    made = 2 * (13 * MIB + 1) + workspace_bytes(3) + blocks * STEP_BYTES_PER_INPUT + description_bytes(BIG)
    assert found.peak_bytes == BASELINE + second + made
    assert found.worst == "big"


def test_the_peak_of_a_part_is_baseline_inputs_output_workspace_and_description() -> None:
    inputs, output = 101 + 8 * 1009, 104 + 101 + 4 * 1009
    described = sum(map(description_bytes, (HEADER, COPY, SMALL)))
    assert part_peak_bytes(FIRST, BASELINE) == BASELINE + inputs + output + workspace_bytes(3) + described
    assert part_peak_bytes(FIRST) - part_peak_bytes(FIRST, 0) == BASELINE_BYTES
    assert workspace_bytes(3) - workspace_bytes(2) == workspace_bytes(2) - workspace_bytes(1) > 0
    assert merge_bytes(SMALL.arithmetic, 4) == 8 * 1009 + 4 * 1009


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
    expected = BASELINE + 8 * 11 * MIB + workspace_bytes(3) + described
    assert survey_peak_bytes(SURVEY.pieces[0], BASELINE) == expected


def test_a_survey_can_be_the_worst_task() -> None:
    found = price([FIRST], [SURVEY], 1, BASELINE)
    assert found.peak_bytes == survey_peak_bytes(SURVEY.pieces[0], BASELINE)
    assert found.worst == "big"


def test_what_two_pieces_share_is_read_and_held_once() -> None:
    twice = Part("s", 1, 0, (SMALL, SMALL), 1)
    assert price([twice], [], 1, 0).bytes_read == 8 * 1009
    assert part_peak_bytes(twice, 0) == 8 * 1009 + 2 * (
        4 * 1009 + description_bytes(SMALL)
    ) + workspace_bytes(3)
    assert len(twice.refs) == 6


def test_neighbours_cost_one_request() -> None:
    neighbours = tuple(CopyPiece("copy", f"t{i}", ref("base", 1000 + 10 * i, 10, "U8"), 0) for i in range(50))
    assert price([Part("s", 1, 0, neighbours, 1)], [], 1, 0).requests == 2


def test_an_empty_plan_costs_the_worker() -> None:
    found = price([], [], 0, BASELINE)
    assert (found.bytes_read, found.bytes_written, found.requests, found.peak_bytes) == (0, 0, 0, BASELINE)
    assert (found.most_reads, found.worst) == (1, "nothing")


def test_parts_are_named_by_their_tensors() -> None:
    assert part_label(FIRST) == "buffer and 1 more"
    assert part_label(SECOND) == "big"
    assert part_label(Part("model-x", 1, 0, (HEADER,), 1)) == "header of model-x"
