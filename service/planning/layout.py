"""Geometry: output tensors into shards, shards into pieces, pieces into parts. Pure.

Every byte of every shard belongs to exactly one piece of exactly one part; parts are contiguous, at least
5 MiB but for a shard's last, and no task holds more than it may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from service.planning.checkpoint import StoredTensor
from service.planning.matching import OutputTensor
from service.planning.price import DESCRIPTIONS, MIN_PART_BYTES, description_bytes, merge_bytes
from service.planning.statistics import surveyed
from workers.binding import bind, whole_of
from workers.sources import SOURCE, Source, TensorRef
from workers.task import (
    BLOCK_BYTES,
    DTYPE_BYTES,
    SURVEY_ELEMENTS,
    Arithmetic,
    CopyPiece,
    FactorsPiece,
    MergePiece,
    Piece,
    Survey,
    continues,
    digest,
)

GRAIN_ELEMENTS = math.lcm(SURVEY_ELEMENTS, BLOCK_BYTES // 2, BLOCK_BYTES // 4)
"""Merged tensors are split on multiples of it: survey blocks and digest blocks of every output dtype at once."""

FACTS_VERSION = 2
"""Version of what a survey's passes tell each other: facts that another version recorded are never gone on with."""

PART_REFS = 1024
"""Input ranges that a part aims at, at most: what describes it stays small beside what it holds."""

_SCOPES = ("trim_scope", "count_scope")
"""Parameters that say whether each tensor is surveyed by itself, or the whole model as one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a task may hold and make."""

    part_bytes: int
    """Output bytes that a part aims at."""
    whole_bytes: int
    """Output bytes up to which a tensor that needs a survey stays in one part and is read once."""
    held_bytes: int
    """Input and output bytes that a task may hold at once."""

    @property
    def packed_bytes(self) -> int:
        """Bytes that a part should hold, so that there is room to read the next and to write the last beside it."""
        return self.held_bytes * 2 // 5


def shards_of(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    """Fill shards in order up to ``shard_bytes`` of data, as Hugging Face does; a bigger tensor has its own.

    Within a shard wider dtypes come first, so that every tensor is aligned to its elements.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]) for shard in shards]


def shard_name(number: int, count: int) -> str:
    """Hugging Face's name of shard ``number`` of ``count``, also when there is only one."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def model_survey(tensors: Iterable[OutputTensor], semantics_version: int) -> str | None:
    """Id of the survey that is taken of all tensors together; ``None`` when there is none.

    A tensor that is tied to another one has no elements of its own, and no part in it.
    """
    of = [
        arithmetic_json(tensor.source)
        for tensor in tensors
        if isinstance(tensor.source, Arithmetic) and tensor.is_counted and _with_others(tensor.source)
    ]
    return survey_id(of, semantics_version) if of else None


def survey_problem(tensors: Iterable[OutputTensor]) -> str | None:
    """What keeps tensors from being surveyed together: that their parameters differ."""
    first: Arithmetic | None = None
    for tensor in tensors:
        whole = tensor.source
        if not isinstance(whole, Arithmetic) or not tensor.is_counted or not _with_others(whole):
            continue
        first = first or whole
        if _said(first) != _said(whole):
            switch = next(name for name in _SCOPES if first.parameters.get(name) == "model")
            return (
                f"parameters: under `{switch}: model` all tensors are surveyed as one, so no parameter may differ "
                f"between them, as they do between {first.name} and {whole.name}; set `{switch}: tensor`"
            )
    return None


def _said(whole: Arithmetic) -> object:
    return whole.parameters, [model.parameters for model in whole.models]


def pieces_of(
    tensor: OutputTensor, limits: Limits, semantics_version: int, together: str | None = None
) -> tuple[list[Piece], Survey | None]:
    """Cut one output tensor into pieces that a task can hold, with the survey that they then need.

    :param together: id of the survey of the whole model, which pieces refer to that are to be surveyed with others.
    """
    if tensor.numel == 0:
        return [], None
    if isinstance(tensor.source, StoredTensor):
        return list(_copies(tensor, tensor.source, min(limits.part_bytes, limits.packed_bytes // 2))), None
    whole = tensor.source
    shared = together if together is not None and _with_others(whole) else None
    held = merge_bytes(whole, DTYPE_BYTES[tensor.dtype])
    alone = MergePiece("merge", whole, tensor.dtype, shared)

    def fits(output_bytes: int, held_bytes: int) -> bool:
        return tensor.nbytes <= output_bytes and held <= held_bytes

    if whole_of(whole) or fits(min(limits.part_bytes, limits.whole_bytes), limits.packed_bytes):
        return [alone], None  # with a survey or without: asking the method would be half of planning
    passes = 0 if shared else len(bind(whole).passes)
    if passes and fits(limits.whole_bytes, limits.held_bytes):
        return [alone], None
    step = _step(whole, tensor.dtype, limits)
    runs = list(_runs(whole, step))
    if len(runs) == 1:  # smaller than the grain: it cannot be split, and is whole after all
        return [alone], None
    survey = None
    if passes:
        identity = survey_id(arithmetic_json(whole), semantics_version)
        survey = Survey(identity, passes, tuple((surveyed(run),) for run in runs), whole.numel)
        shared = survey.id
    return [MergePiece("merge", run, tensor.dtype, shared) for run in runs], survey


def survey_together(identity: str, pieces: Iterable[MergePiece], limits: Limits) -> Survey:
    """The survey of all tensors that ``pieces`` merge: a task sees about as many neighbours as a part has."""
    groups = pack(pieces, limits.part_bytes, limits.packed_bytes, held_by, minimum=1)
    tasks = tuple(
        tuple(surveyed(piece.arithmetic) for piece in group if isinstance(piece, MergePiece))
        for group in groups
    )
    numel = sum(run.last - run.first for task in tasks for run in task)
    return Survey(identity, len(bind(tasks[0][0]).passes), tasks, numel)


def survey_id(of: object, semantics_version: int) -> str:
    """Id of the survey of what this JSON identifies."""
    return digest([semantics_version, FACTS_VERSION, of])[:32]


def _with_others(whole: Arithmetic) -> bool:
    """Whether a tensor is surveyed together with all others, and not by itself."""
    if "model" not in map(whole.parameters.get, _SCOPES):  # binding every tensor would be half of planning
        return False
    bound = bind(whole)
    return bound.parameters.survey_scope == "model" and bool(bound.passes)


def arithmetic_json(arithmetic: Arithmetic) -> object:
    """JSON that identifies an arithmetic."""
    sources = [_source_json(source) for source in arithmetic.sources]
    models = [[model.index, model.parameters] for model in arithmetic.models]
    return [arithmetic.name, arithmetic.method, arithmetic.parameters, models, sources, arithmetic.seed]


def _source_json(source: Source) -> object:
    if isinstance(source, TensorRef):
        return [source.uri, source.etag, source.start, source.end, source.dtype]
    return SOURCE.dump_python(source, mode="json")


def pack(
    pieces: Iterable[Piece],
    target: int,
    limit: int,
    held: Callable[[Piece], int],
    minimum: int = MIN_PART_BYTES,
) -> Iterator[list[Piece]]:
    """Group consecutive pieces into parts of about ``target`` bytes that hold at most ``limit``.

    Nor does a part have more than ``PART_REFS`` inputs, and what is a copy of one range is kept apart from the rest,
    since a store can copy that by itself. But a part is closed only once it has ``minimum`` bytes, so every part but
    the last has at least as many, and tiny tensors may need more inputs for that.
    """
    group: list[Piece] = []
    size = holding = inputs = 0
    copying = False
    for piece in pieces:
        adds, reads = held(piece), len(piece.refs)
        full = size + piece.nbytes > target or holding + adds > limit or inputs + reads > PART_REFS
        follows = not group or continues(group[-1], piece)
        apart = not follows if copying else isinstance(piece, CopyPiece) and piece.nbytes >= minimum
        if size >= minimum and (full or apart):
            yield group
            group, size, holding, inputs, follows = [], 0, 0, 0, True
        copying = follows and isinstance(piece, CopyPiece) and (copying or not group)
        group.append(piece)
        size += piece.nbytes
        holding += adds
        inputs += reads
    if group:
        yield group


def held_by(piece: Piece) -> int:
    """Bytes that a task holds for a piece: its inputs, its output and its description."""
    if isinstance(piece, MergePiece):
        held = merge_bytes(piece.arithmetic, DTYPE_BYTES[piece.dtype])
    elif isinstance(piece, FactorsPiece):
        held = piece.nbytes + sum(ref.nbytes for ref in piece.refs)
    else:
        held = 2 * piece.nbytes if isinstance(piece, CopyPiece) else piece.nbytes
    return held + DESCRIPTIONS * description_bytes(piece)


def _step(whole: Arithmetic, dtype: str, limits: Limits) -> int:
    """Elements a piece: what fills a part and fits in memory, on the grain, and enough for S3's smallest part."""
    width = DTYPE_BYTES[dtype]
    each = max(1, merge_bytes(whole, width) // whole.numel)
    wanted = min(limits.part_bytes // width, limits.packed_bytes // each)
    least = math.ceil(MIN_PART_BYTES / width / GRAIN_ELEMENTS) * GRAIN_ELEMENTS
    step = max(least, wanted // GRAIN_ELEMENTS * GRAIN_ELEMENTS)
    while step > least and not _fits(whole, dtype, step, limits):
        step = max(least, step // 2 // GRAIN_ELEMENTS * GRAIN_ELEMENTS)
    return step


def _fits(whole: Arithmetic, dtype: str, step: int, limits: Limits) -> bool:
    """Whether every run of ``step`` elements can be held, and reads few enough ranges.

    Plain operands are as many bytes and ranges in every run. Of others, some are needed in each: an adapter's A.
    """
    if whole.is_plain:
        return True
    for run in _runs(whole, step):
        piece = MergePiece("merge", run, dtype, None)
        if held_by(piece) > limits.packed_bytes or len(run.refs) > PART_REFS:
            return False
    return True


def _runs(arithmetic: Arithmetic, step: int) -> Iterator[Arithmetic]:
    """Its runs of ``step`` elements, cut by halves: a hundred thousand gathered rows are not gone through for each."""
    numel = arithmetic.last - arithmetic.first
    if numel <= step:
        yield arithmetic
        return
    half = math.ceil(numel / step) // 2 * step
    yield from _runs(arithmetic.elements(0, half), step)
    yield from _runs(arithmetic.elements(half, numel), step)


def _copies(tensor: OutputTensor, source: StoredTensor, most: int) -> Iterator[CopyPiece]:
    step = max(MIN_PART_BYTES, most // BLOCK_BYTES * BLOCK_BYTES)
    ref = source.ref
    for start in range(0, ref.nbytes, step):
        end = min(start + step, ref.nbytes)
        piece = type(ref)(ref.uri, ref.etag, ref.start + start, ref.start + end, ref.dtype)
        yield CopyPiece("copy", tensor.name, piece, start)
