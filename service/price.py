"""What a plan costs: bytes moved, requests, parts, and the peak memory of a task. Pure.

The memory model is a promise (measured peak <= priced peak is a test), and adds up what a task holds, copy
by copy: the inputs of all its pieces, its output, the workspace of the arithmetic, and the task's own
description, on top of the baseline of a worker process that has imported everything and done nothing. The
figures were measured; ``docs/decisions/2026-11-22-what-a-task-holds.md`` has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from workers.ranges import READ_BYTES, coalesce
from workers.task import (
    BLOCK_BYTES,
    SURVEY_ELEMENTS,
    Arithmetic,
    CopyPiece,
    HeaderPiece,
    MergePiece,
    Part,
    Piece,
    Survey,
    TensorRef,
)

BASELINE_BYTES = 384 << 20
"""VmHWM of a Ray worker that has imported torch, boto3 and `workers`, before its first byte."""

WORKSPACE_BYTES = 64 << 20
"""Float32 blocks, masks and digests of the step being merged, and allocator slack."""

WORKSPACE_BYTES_PER_INPUT = 6 << 20
"""The part of the workspace that grows with the number of inputs: float32 blocks and histograms."""

STEP_BYTES_PER_INPUT = 256
"""What stays of a block of :data:`SURVEY_ELEMENTS` once it is done: sums of a survey, digests of the output."""

PIECE_BYTES = 3 << 10
"""A piece of a part in JSON, as objects and in the result, its texts not counted."""

REF_BYTES = 3 << 10
"""One of a task's input ranges in JSON, as objects and as a read of its own, its texts not counted."""

TEXT_COPIES = 6
"""How often a worker holds a text of its task (a name, URI, ETag or header): per character of its JSON."""

MAX_PARTS = 10_000
"""Most parts of one S3 multipart upload."""
MIN_PART_BYTES = 5 << 20
"""Smallest part of an S3 multipart upload, the last one excepted."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a merge will cost, before it runs."""

    bytes_read: int
    """Input bytes fetched, surveys included."""
    bytes_written: int
    """Output bytes of all shards."""
    input_bytes: int
    """Bytes of the input tensors, counted once."""
    requests: int
    """Ranged reads of tensors, each of at most ``READ_BYTES``, and part uploads. Not counted: headers and
    small files, looking up, opening, listing and completing (a few for each file), and repeats."""
    shards: int
    """Output files with weights."""
    parts: int
    """Part tasks."""
    survey_tasks: int
    """Survey tasks over all passes."""
    surveyed_tensors: int
    """Tensors that are read more than once because no task can hold them."""
    most_reads: int
    """How often the most often read byte is read."""
    peak_bytes: int
    """Peak memory of the worst task, the worker's baseline included."""
    worst: str
    """The tensor (or tensors) of the worst task."""


def merge_bytes(arithmetic: Arithmetic, output_width: int) -> int:
    """Bytes that a run of merged elements holds: its inputs and its output."""
    return sum(ref.nbytes for ref in arithmetic.refs) + (arithmetic.last - arithmetic.first) * output_width


def workspace_bytes(inputs: int) -> int:
    """Bytes of the arithmetic's workspace for that many inputs."""
    return WORKSPACE_BYTES + WORKSPACE_BYTES_PER_INPUT * inputs


def description_bytes(piece: Piece) -> int:
    """Bytes that a worker holds of a piece besides tensors: its description, and what is told about it."""
    text = piece.text if isinstance(piece, HeaderPiece) else piece.name
    return PIECE_BYTES + TEXT_COPIES * len(json.dumps(text)) + _refs_bytes(piece_refs(piece))


def piece_refs(piece: Piece) -> tuple[TensorRef, ...]:
    """All byte ranges that a piece is made of."""
    if isinstance(piece, MergePiece):
        return piece.arithmetic.refs
    return (piece.ref,) if isinstance(piece, CopyPiece) else ()


def part_refs(part: Part) -> tuple[TensorRef, ...]:
    """All byte ranges that a part reads."""
    return tuple(ref for piece in part.pieces for ref in piece_refs(piece))


def part_peak_bytes(part: Part, baseline_bytes: int = BASELINE_BYTES) -> int:
    """Peak memory of the task that makes this part."""
    return baseline_bytes + _reads(part_refs(part))[0] + _made_bytes(part)


def survey_peak_bytes(arithmetic: Arithmetic, baseline_bytes: int = BASELINE_BYTES) -> int:
    """Peak memory of one survey task."""
    return baseline_bytes + _reads(arithmetic.refs)[0] + _surveyed_bytes(arithmetic)


def price(
    parts: Sequence[Part], surveys: Sequence[Survey], shards: int, baseline_bytes: int = BASELINE_BYTES
) -> Price:
    """Add up a plan."""
    bytes_read = bytes_written = requests = 0
    peak, worst = baseline_bytes, "nothing"
    for part in parts:
        read, reads = _reads(part_refs(part))
        bytes_read += read
        bytes_written += part.nbytes
        requests += reads + 1
        if (needed := baseline_bytes + read + _made_bytes(part)) > peak:
            peak, worst = needed, part_label(part)
    input_bytes = bytes_read  # every tensor is in exactly one part or split over several, so once
    survey_tasks = 0
    for survey in surveys:
        for piece in survey.pieces:
            read, reads = _reads(piece.refs)
            bytes_read += read * survey.passes
            requests += reads * survey.passes
            survey_tasks += survey.passes
            if (needed := baseline_bytes + read + _surveyed_bytes(piece)) > peak:
                peak, worst = needed, piece.name
    return Price(
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        input_bytes=input_bytes,
        requests=requests,
        shards=shards,
        parts=len(parts),
        survey_tasks=survey_tasks,
        surveyed_tensors=len(surveys),
        most_reads=1 + max((survey.passes for survey in surveys), default=0),
        peak_bytes=peak,
        worst=worst,
    )


def part_label(part: Part) -> str:
    """A part's tensors, for people: ``model.norm.weight and 3 more``."""
    names = list(dict.fromkeys(piece.name for piece in part.pieces if not isinstance(piece, HeaderPiece)))
    if not names:
        return f"header of {part.shard}"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _made_bytes(part: Part) -> int:
    """Bytes of a part's output, its description, and the workspace to make it."""
    merges = [piece.arithmetic for piece in part.pieces if isinstance(piece, MergePiece)]
    workspace = workspace_bytes(max((len(arithmetic.refs) for arithmetic in merges), default=1))
    steps = part.nbytes // BLOCK_BYTES * STEP_BYTES_PER_INPUT + sum(map(_steps_bytes, merges))
    return part.nbytes + workspace + steps + sum(map(description_bytes, part.pieces))


def _surveyed_bytes(arithmetic: Arithmetic) -> int:
    """Bytes that a survey task holds besides its inputs."""
    inputs = arithmetic.refs
    described = PIECE_BYTES + TEXT_COPIES * len(json.dumps(arithmetic.name)) + _refs_bytes(inputs)
    return workspace_bytes(len(inputs)) + _steps_bytes(arithmetic) + described


def _steps_bytes(arithmetic: Arithmetic) -> int:
    steps = (arithmetic.last - arithmetic.first) // SURVEY_ELEMENTS
    return steps * STEP_BYTES_PER_INPUT * len(arithmetic.refs)


def _refs_bytes(refs: Sequence[TensorRef]) -> int:
    texts = sum(_json_length(ref.uri) + _json_length(ref.etag) for ref in refs)
    return REF_BYTES * len(refs) + TEXT_COPIES * texts


@lru_cache(maxsize=1024)
def _json_length(text: str) -> int:
    return len(json.dumps(text))


def _reads(refs: Iterable[TensorRef]) -> tuple[int, int]:
    runs = coalesce(refs)
    return sum(run.nbytes for run in runs), sum(math.ceil(run.nbytes / READ_BYTES) for run in runs)
