"""What a plan costs: bytes moved, requests, parts, and the peak memory of a worker. Pure.

The memory model is a promise (measured peak <= priced peak is a test), and adds up what a worker holds, copy
by copy: the arena with the inputs and outputs of the tasks that are under way, the workspace of the arithmetic,
and the tasks' own descriptions, on top of the baseline of a worker process that has imported everything and
done nothing. The figures were measured; ``docs/decisions/2026-11-22-what-a-worker-holds.md`` has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from service.planning.labels import label_of, part_label
from workers.arena import padded
from workers.binding import whole_of
from workers.kernels.moves import device_bytes
from workers.ranges import READ_BYTES, Arrangement, coalesce
from workers.scratch import inner, most_scratch_bytes, scratch_bytes
from workers.sources import Gathered, LowRank, Source
from workers.task import (
    BLOCK_BYTES,
    DTYPE_BYTES,
    SURVEY_ELEMENTS,
    Arithmetic,
    FactorsPiece,
    HeaderPiece,
    MergePiece,
    Part,
    Piece,
    Survey,
    TensorRef,
    refs_of,
)

BASELINE_BYTES = 512 << 20
"""VmHWM of a Ray worker that has imported torch, numba, boto3 and `workers` and compiled all kernels, before its first
byte; one that finds them compiled takes less."""

WORKSPACE_BYTES = 16 << 20
"""Tiles, digests, what is told, and allocator slack."""

WORKSPACE_BYTES_PER_INPUT = 2 << 20
"""The part of the workspace that grows with the number of inputs: histograms, as counts and packed."""

STEP_BYTES_PER_INPUT = 256
"""What stays of a block of :data:`SURVEY_ELEMENTS` once it is done: sums of a survey, digests of the output."""

PIECE_BYTES = 3 << 10
"""A piece of a part in JSON, as objects and in the result, its texts not counted."""

REF_BYTES = 3 << 10
"""One of a task's input ranges in JSON, as objects and as a read of its own, its texts not counted."""

MADE_BYTES = 2 << 10
"""What says how one operand is made that is not plain, beside what it is made of."""

TAKE_BYTES = 512
"""A run of gathered elements in JSON, as objects and while it is copied."""

TEXT_COPIES = 6
"""How often a worker holds a text of its task (a name, URI, ETag or header): per character of its JSON."""

DESCRIPTIONS = 8
"""Descriptions that a worker holds: of a task in each stage and before it, and the texts of the rest of its stream."""

GPU_BASELINE_BYTES = 1 << 30
"""Device memory of CUDA's context and torch's kernels in one process, and slack of its allocator: an allowance."""

GPU_HOST_BYTES = 2 << 30
"""Main memory that CUDA's libraries and context take beside a worker's: an allowance, not measured."""

_WIDEST = 4
"""Bytes of the widest element that arithmetic is done on."""

MAX_PARTS = 10_000
"""Most parts of one S3 multipart upload."""
MIN_PART_BYTES = 5 << 20
"""Smallest part of an S3 multipart upload, the last one excepted."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a merge will cost, before it runs."""

    bytes_read: int
    """Input bytes fetched, every pass of the surveys included; passes that turn out needless fetch nothing."""
    bytes_written: int
    """Output bytes of all shards."""
    bytes_copied: int
    """Of these, bytes in parts that only copy: a store can move them by itself."""
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
    """Survey tasks over all passes, none of them left out."""
    surveyed_tensors: int
    """Tensors that are read more than once: because no task can hold them, or as part of the whole model's survey."""
    most_reads: int
    """How often the most often read byte is read, when no pass of a survey turns out needless."""
    peak_bytes: int
    """Peak memory of a worker process, its baseline included: what each task of the job reserves."""
    arena_bytes: int
    """The part of it that holds inputs and outputs: room for the task that holds most, and for others beside it."""
    gpu_bytes: int
    """Peak device memory of a worker that computes on a GPU; 0 when there is nothing to compute."""
    worst: str
    """The tensor (or tensors) of the task that holds most."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What each task of a job asks of the cluster."""

    memory_bytes: int
    """Main memory."""
    cpus: float
    """CPU cores."""
    gpus: float
    """Share of one GPU; above 1 no GPU is big enough."""
    device: str
    """The torch device that it computes on."""


@dataclass(frozen=True, slots=True)
class _Load:
    """What one task puts on a worker."""

    label: str
    read: int
    """Bytes that it fetches."""
    reads: int
    """Requests for them."""
    inputs: int
    """Bytes of the arena for them."""
    output: int
    """Bytes of the arena for what it makes."""
    workspace: int
    """Bytes of the arithmetic."""
    description: int
    """Bytes of its description, and of what stays of each block."""
    device: int
    """Device memory of the arithmetic where it runs on a GPU; 0 when there is none."""

    @property
    def held(self) -> int:
        """Bytes of the arena."""
        return self.inputs + self.output


def merge_bytes(arithmetic: Arithmetic, output_width: int) -> int:
    """Bytes that a run of merged elements holds: what it reads, what it makes of that, and its output."""
    output = (arithmetic.last - arithmetic.first) * output_width
    if arithmetic.is_plain:
        return sum(ref.nbytes for ref in arithmetic.refs) + output
    return Arrangement(arithmetic.refs).nbytes + scratch_bytes(arithmetic.sources) + output


def whole_bytes(arithmetic: Arithmetic) -> int:
    """Bytes of workspace of a tensor that is merged as a whole; 0 for one that is merged element by element."""
    whole = whole_of(arithmetic)
    if whole is None:
        return 0
    statistic = max((ref.nbytes // DTYPE_BYTES[ref.dtype] for ref in arithmetic.statistics), default=0)
    return whole.bytes_per_element * arithmetic.numel + whole.bytes_per_statistic * statistic


def workspace_bytes(inputs: int) -> int:
    """Bytes of the arithmetic's workspace for that many inputs."""
    return WORKSPACE_BYTES + WORKSPACE_BYTES_PER_INPUT * inputs


def description_bytes(piece: Piece) -> int:
    """Bytes that a worker holds of a piece besides tensors: its description, and what is told about it."""
    text = piece.text if isinstance(piece, HeaderPiece) else piece.name
    sources = piece.arithmetic.sources if isinstance(piece, MergePiece) else piece.refs
    return PIECE_BYTES + TEXT_COPIES * len(json.dumps(text)) + sum(map(_source_bytes, sources))


def part_peak_bytes(part: Part, baseline_bytes: int = BASELINE_BYTES) -> int:
    """Peak memory of a worker that makes this part and nothing else."""
    return baseline_bytes + _alone(_part_load(part))


def survey_peak_bytes(arithmetics: Sequence[Arithmetic], baseline_bytes: int = BASELINE_BYTES) -> int:
    """Peak memory of a worker that does this survey task and nothing else."""
    return baseline_bytes + _alone(_survey_load(arithmetics))


def price(
    parts: Sequence[Part],
    surveys: Sequence[Survey],
    shards: int,
    baseline_bytes: int = BASELINE_BYTES,
    worker_memory_bytes: int | None = None,
) -> Price:
    """Add up a plan.

    :param worker_memory_bytes: what a worker may hold: reading ahead stays below it. ``None`` is no limit.
    """
    made = [_part_load(part) for part in parts]
    surveyed = [(survey.passes, _survey_load(task)) for survey in surveys for task in survey.tasks]
    loads = [*made, *(load for _, load in surveyed)]
    fixed = baseline_bytes + max((load.workspace for load in loads), default=0)
    fixed += DESCRIPTIONS * max((load.description for load in loads), default=0)
    worst = max(loads, key=_alone, default=None)
    arena = _arena_bytes(loads, None if worker_memory_bytes is None else worker_memory_bytes - fixed)
    return Price(
        bytes_read=sum(load.read for load in made) + sum(passes * load.read for passes, load in surveyed),
        bytes_written=sum(part.nbytes for part in parts),
        bytes_copied=sum(part.nbytes for part in parts if part.source),
        input_bytes=_input_bytes(parts, made),
        requests=sum(load.reads + 1 for load in made) + sum(passes * load.reads for passes, load in surveyed),
        shards=shards,
        parts=len(parts),
        survey_tasks=sum(passes for passes, _ in surveyed),
        surveyed_tensors=sum(len(survey.names) for survey in surveys),
        most_reads=1 + max((survey.passes for survey in surveys), default=0),
        peak_bytes=fixed + arena,
        arena_bytes=arena,
        gpu_bytes=_gpu_bytes(loads),
        worst="nothing" if worst is None else worst.label,
    )


def combined(prices: Sequence[Price], parts: Iterable[Part]) -> Price:
    """What merges of these parts cost that one job runs one after the other, the one last that makes the output."""
    dearest = max(prices, key=lambda each: each.peak_bytes)
    inputs = (ref for part in parts for ref in part.reads if ref.etag)  # what an earlier one makes has none
    return Price(
        bytes_read=sum(each.bytes_read for each in prices),
        bytes_written=sum(each.bytes_written for each in prices),
        bytes_copied=sum(each.bytes_copied for each in prices),
        input_bytes=_distinct_bytes(inputs),
        requests=sum(each.requests for each in prices),
        shards=prices[-1].shards,
        parts=sum(each.parts for each in prices),
        survey_tasks=sum(each.survey_tasks for each in prices),
        surveyed_tensors=sum(each.surveyed_tensors for each in prices),
        most_reads=max(each.most_reads for each in prices),
        peak_bytes=dearest.peak_bytes,
        arena_bytes=max(each.arena_bytes for each in prices),
        gpu_bytes=max(each.gpu_bytes for each in prices),
        worst=dearest.worst,
    )


def needs(price: Price, gpu_memory_bytes: int = 0) -> Needs:
    """What a job's tasks ask of a cluster whose GPUs have ``gpu_memory_bytes`` each; 0 computes on the CPU.

    A task is single-threaded and takes one core, and of a GPU the share that its device memory is. Where there is
    nothing to compute, none is taken.
    """
    if not gpu_memory_bytes or not price.gpu_bytes:
        return Needs(price.peak_bytes, 1, 0, "cpu")
    share = math.ceil(100 * price.gpu_bytes / gpu_memory_bytes) / 100
    return Needs(price.peak_bytes + GPU_HOST_BYTES, 1, share, "cuda")


def _input_bytes(parts: Sequence[Part], loads: Sequence[_Load]) -> int:
    """A plain tensor is in one part or split over several, so read once; what others are made of may be read again."""
    plain = sum(load.read for part, load in zip(parts, loads, strict=True) if not part.scratch_bytes)
    refs = chain.from_iterable(part.reads for part in parts if part.scratch_bytes)
    return plain + _distinct_bytes(refs)


def _distinct_bytes(refs: Iterable[TensorRef]) -> int:
    return sum(run.nbytes for run in coalesce(refs))


def _part_load(part: Part) -> _Load:
    arrangement = Arrangement(part.reads)
    merges = part.arithmetics
    factors = [piece.workspace_bytes for piece in part.pieces if isinstance(piece, FactorsPiece)]
    steps = part.nbytes // BLOCK_BYTES * STEP_BYTES_PER_INPUT + sum(map(_steps_bytes, merges))
    return _Load(
        label=part_label(part),
        read=arrangement.bytes_read,
        reads=_requests(arrangement),
        inputs=padded(arrangement.nbytes) + padded(part.scratch_bytes),
        output=0 if part.source else padded(part.lead + part.nbytes),
        workspace=workspace_bytes(max(map(_operands, merges), default=1))
        + max([*map(whole_bytes, merges), *factors], default=0),
        description=steps + sum(map(description_bytes, part.pieces)),
        device=max(
            (
                _device_bytes(piece.arithmetic, DTYPE_BYTES[piece.dtype])
                for piece in part.pieces
                if isinstance(piece, MergePiece)
            ),
            default=0,
        ),
    )


def _survey_load(arithmetics: Sequence[Arithmetic]) -> _Load:
    arrangement = Arrangement(refs_of(arithmetics))
    texts = sum(len(json.dumps(arithmetic.name)) for arithmetic in arithmetics)
    described = PIECE_BYTES * len(arithmetics) + TEXT_COPIES * texts
    described += sum(_source_bytes(source) for arithmetic in arithmetics for source in arithmetic.sources)
    return _Load(
        label=label_of(arithmetic.name for arithmetic in arithmetics),
        read=arrangement.bytes_read,
        reads=_requests(arrangement),
        inputs=padded(arrangement.nbytes) + padded(most_scratch_bytes(arithmetics)),
        output=0,
        workspace=workspace_bytes(max(map(_operands, arithmetics))),
        description=sum(map(_steps_bytes, arithmetics)) + described,
        device=max(_device_bytes(arithmetic, 0) for arithmetic in arithmetics),
    )


def _alone(load: _Load) -> int:
    return load.workspace + DESCRIPTIONS * load.description + load.held


def _arena_bytes(loads: Sequence[_Load], most: int | None) -> int:
    """Room for the task that holds most; and, within ``most``, for as big a one that is read meanwhile, and for an
    output that is written."""
    biggest = max((load.held for load in loads), default=0)
    wanted = min(
        2 * biggest + max((load.output for load in loads), default=0), sum(load.held for load in loads)
    )
    return max(biggest, wanted if most is None else min(wanted, most))


def _steps_bytes(arithmetic: Arithmetic) -> int:
    steps = (arithmetic.last - arithmetic.first) // SURVEY_ELEMENTS
    return steps * STEP_BYTES_PER_INPUT * len(arithmetic.sources)


def _operands(arithmetic: Arithmetic) -> int:
    """Operands that a computation has, or one whose outcome is an operand of it."""
    if arithmetic.is_plain:  # as nearly all are
        return len(arithmetic.sources)
    return max(len(each.sources) for each in _all_of(arithmetic))


def _all_of(arithmetic: Arithmetic) -> Iterator[Arithmetic]:
    """It and those whose outcomes it is made of."""
    yield arithmetic
    for source in arithmetic.sources:
        yield from inner(source)


def _source_bytes(source: Source) -> int:
    if isinstance(source, TensorRef):
        return REF_BYTES + TEXT_COPIES * (_json_length(source.uri) + _json_length(source.etag))
    if isinstance(source, LowRank):
        return MADE_BYTES + sum(map(_source_bytes, (source.source, *source.factors)))
    if isinstance(source, Gathered):
        runs = TAKE_BYTES * sum(1 + len(run.takes) for run in source.runs)
        return MADE_BYTES + runs + sum(map(_source_bytes, (*source.sources, *source.reads)))
    name = TEXT_COPIES * _json_length(source.arithmetic.name)
    return MADE_BYTES + name + sum(map(_source_bytes, source.arithmetic.sources))


@lru_cache(maxsize=1024)
def _json_length(text: str) -> int:
    return len(json.dumps(text))


def _gpu_bytes(loads: Sequence[_Load]) -> int:
    """CUDA's own, and what the arithmetic of the task that needs most has there: a few chunks, however big the task."""
    most = max((load.device for load in loads), default=0)
    return GPU_BASELINE_BYTES + most if most else 0


def _device_bytes(arithmetic: Arithmetic, output_width: int) -> int:
    if not arithmetic.is_plain:
        return max(_chunk_bytes(each, max(output_width, _WIDEST)) for each in _all_of(arithmetic))
    return _chunk_bytes(arithmetic, output_width)


def _chunk_bytes(arithmetic: Arithmetic, output_width: int) -> int:
    widths = [DTYPE_BYTES[source.dtype] for source in arithmetic.sources]
    return device_bytes(arithmetic.last - arithmetic.first, widths, output_width)


def _requests(arrangement: Arrangement) -> int:
    return sum(math.ceil(run.nbytes / READ_BYTES) for run, _ in arrangement.runs)
