"""Tasks: JSON round trips, ids that depend on the bytes alone, canonical JSON, digests that compose."""

from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from workers.task import (
    BLOCK_BYTES,
    PART,
    PART_RESULT,
    SURVEY_TASK,
    Arithmetic,
    CopyPiece,
    HeaderPiece,
    MergePiece,
    ModelInput,
    Part,
    PartResult,
    SurveyTask,
    TensorDigest,
    TensorRef,
    block_count,
    canonical_json,
    digest,
    part_id,
    tensor_digest,
)

pytestmark = pytest.mark.fast

REF = TensorRef("file:///m/λ.safetensors", "e1", 10, 50, "F32")
ARITHMETIC = Arithmetic(
    "w",
    "ties",
    {"lambda": 1.0, "normalize": True},
    REF,
    (ModelInput(2, REF, {"density": 0.3}),),
    7,
    100,
    90,
    100,
)
PART_OF_THREE = Part(
    "model-00001-of-00001.safetensors",
    3,
    64,
    (
        HeaderPiece("header", '{"λ":1} '),
        CopyPiece("copy", "c", replace(REF, dtype="BOOL"), BLOCK_BYTES),
        MergePiece("merge", ARITHMETIC, "BF16", "s1"),
        MergePiece("merge", ARITHMETIC, "BF16", "s1"),
        MergePiece("merge", replace(ARITHMETIC, base=None), "F16", None),
    ),
    1,
)


def test_sizes_are_bytes_of_the_output() -> None:
    header, copied, merged, _, _ = PART_OF_THREE.pieces
    assert header.nbytes == 8 + 9  # λ takes two bytes
    assert copied.nbytes == 40
    assert (merged.nbytes, merged.offset) == (20, 180)  # type: ignore[union-attr]
    assert PART_OF_THREE.nbytes == 17 + 40 + 20 * 3
    assert PART_OF_THREE.surveys == ("s1",)
    assert ARITHMETIC.refs == (REF, REF)


def test_a_run_of_elements_is_measured_in_its_own_dtype() -> None:
    assert REF.elements(2, 5) == replace(REF, start=18, end=30)
    assert replace(REF, dtype="BF16").elements(2, 5) == replace(REF, dtype="BF16", start=14, end=20)
    assert REF.elements(3, 3).nbytes == 0


def test_tasks_and_results_round_trip_through_json() -> None:
    runs = (ARITHMETIC, replace(ARITHMETIC, name="v"))
    survey = SurveyTask("s1", 1, runs, {"trim_high": [[7, 1], None], "x": 0.1}, allow_nonfinite=True)
    assert survey.refs == (REF,) * 4
    result = PartResult(
        "id",
        "shard",
        3,
        9,
        "e",
        (TensorDigest("w", 2, ("ab", "cd")),),
        5,
        {"w: m": 2},
        1 << 30,
        {"read": 0.25},
    )
    assert PART.validate_json(PART.dump_json(PART_OF_THREE)) == PART_OF_THREE
    assert (
        PART.validate_python(json.loads(json.dumps(PART.dump_python(PART_OF_THREE, mode="json"))))
        == PART_OF_THREE
    )
    assert SURVEY_TASK.validate_json(SURVEY_TASK.dump_json(survey)) == survey
    assert PART_RESULT.validate_json(PART_RESULT.dump_json(result)) == result
    again = PART.validate_json(PART.dump_json(PART_OF_THREE))
    assert part_id(again) == part_id(PART_OF_THREE)


def test_a_piece_of_an_unknown_kind_is_refused() -> None:
    document = PART.dump_python(PART_OF_THREE, mode="json")
    document["pieces"][0]["kind"] = "zeros"
    with pytest.raises(ValidationError, match="zeros"):
        PART.validate_python(document)


def test_tasks_are_frozen() -> None:
    for task in (REF, ARITHMETIC, PART_OF_THREE):
        with pytest.raises(FrozenInstanceError):
            setattr(task, fields(task)[0].name, "other")


def test_a_parts_id_changes_with_everything_that_decides_its_bytes() -> None:
    copied, merged = PART_OF_THREE.pieces[1], PART_OF_THREE.pieces[2]
    assert isinstance(copied, CopyPiece)
    assert isinstance(merged, MergePiece)
    model = ARITHMETIC.models[0]

    def arithmetic(changed: Arithmetic) -> Part:
        return replace(PART_OF_THREE, pieces=(replace(merged, arithmetic=changed),))

    others = [
        replace(PART_OF_THREE, shard="model-00002-of-00002.safetensors"),
        replace(PART_OF_THREE, number=4),
        replace(PART_OF_THREE, offset=65),
        replace(PART_OF_THREE, semantics_version=2),
        replace(PART_OF_THREE, allow_nonfinite=True),
        replace(PART_OF_THREE, pieces=PART_OF_THREE.pieces[1:]),
        replace(PART_OF_THREE, pieces=(replace(copied, ref=replace(copied.ref, etag="e2")),)),
        arithmetic(ARITHMETIC),
        arithmetic(replace(ARITHMETIC, seed=8)),
        arithmetic(replace(ARITHMETIC, parameters={**ARITHMETIC.parameters, "lambda": 0.5})),
        arithmetic(replace(ARITHMETIC, base=replace(REF, etag="e2"))),
        arithmetic(replace(ARITHMETIC, models=(replace(model, index=1),))),
        arithmetic(replace(ARITHMETIC, models=(replace(model, parameters={"density": 0.4}),))),
        arithmetic(replace(ARITHMETIC, first=80)),
        replace(PART_OF_THREE, pieces=(replace(merged, survey=None),)),
        replace(PART_OF_THREE, pieces=(replace(merged, dtype="F16"),)),
    ]
    ids = {part_id(part) for part in (PART_OF_THREE, *others)}
    assert len(ids) == 1 + len(others)


def test_a_parts_id_depends_on_no_upload_no_job_and_no_order_of_parameters() -> None:
    assert {field.name for field in fields(Part)} == {
        "shard", "number", "offset", "pieces", "semantics_version", "allow_nonfinite",
    }  # fmt: skip
    merged = PART_OF_THREE.pieces[2]
    assert isinstance(merged, MergePiece)
    turned = replace(ARITHMETIC, parameters=dict(reversed(ARITHMETIC.parameters.items())))
    pieces = (*PART_OF_THREE.pieces[:2], replace(merged, arithmetic=turned), *PART_OF_THREE.pieces[3:])
    assert part_id(replace(PART_OF_THREE, pieces=pieces)) == part_id(PART_OF_THREE)
    assert len(part_id(PART_OF_THREE)) == 32


def test_a_parts_id_knows_a_staged_file_by_its_name_and_not_by_its_place() -> None:
    def reading(place: str, stage: str) -> str:
        ref = replace(REF, uri=f"{place}/.mergemill/stage-{stage}-model-00001-of-00001.safetensors", etag="")
        return part_id(
            replace(PART_OF_THREE, pieces=(MergePiece("merge", replace(ARITHMETIC, base=ref), "F16", None),))
        )

    assert reading("s3://one/out", "a" * 32) == reading("file:///other", "a" * 32)
    assert reading("s3://one/out", "a" * 32) != reading("s3://one/out", "b" * 32)


def test_canonical_json_is_written_one_way() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "λ"}) == '{"a":"λ","b":[1,2.5,null,true]}'
    assert (
        digest([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    )  # sha256sum of "[]"
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(number)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 255))
def test_a_tensors_digest_does_not_depend_on_how_its_blocks_came(sizes: list[int], fill: int) -> None:
    blocks = [hashlib.sha256(bytes([fill]) * size).digest() for size in sizes]
    expected = hashlib.sha256(b"".join(blocks)).hexdigest()
    assert tensor_digest([block.hex() for block in blocks]) == expected


@pytest.mark.parametrize(
    ("nbytes", "blocks"), [(0, 0), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2), (5 << 40, 5 << 20)]
)
def test_blocks_are_a_mebibyte_and_the_last_may_be_short(nbytes: int, blocks: int) -> None:
    assert block_count(nbytes) == blocks
