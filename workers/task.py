"""What a worker is handed, and what it hands back: frozen, and JSON round-trips.

A :class:`Part` is one contiguous byte range of one output shard with all that is needed to make it; a
:class:`SurveyTask` is a share of one survey pass. Neither names a job, an upload or a credential, so a
part's id (:func:`part_id`) depends on the bytes that it makes and on nothing else.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from workers.canonical import (
    BLOCK_BYTES,
    DTYPE_BYTES,
    MERGEABLE_DTYPES,
    PAGE_BYTES,
    SURVEY_ELEMENTS,
    JSONValue,
    canonical_json,
)
from workers.factors import FactorsPiece
from workers.scratch import most_scratch_bytes
from workers.sources import Arithmetic, ModelInput, TensorRef, refs_of

__all__ = [
    "BLOCK_BYTES",
    "DTYPE_BYTES",
    "MERGEABLE_DTYPES",
    "PAGE_BYTES",
    "PART",
    "PART_RESULT",
    "STAGED",
    "SURVEY_ELEMENTS",
    "SURVEY_TASK",
    "Arithmetic",
    "CopyPiece",
    "FactorsPiece",
    "Facts",
    "HeaderPiece",
    "JSONValue",
    "MergePiece",
    "ModelInput",
    "Part",
    "PartResult",
    "Piece",
    "Survey",
    "SurveyTask",
    "TensorDigest",
    "TensorRef",
    "block_count",
    "canonical_json",
    "continues",
    "digest",
    "part_id",
    "refs_of",
    "tensor_digest",
]

STAGED = ".mergemill/stage-"
"""What the names of files below an output begin with that hold an earlier merge of the same job."""
_PLACE = re.compile(r'"[^"]*/(' + re.escape(STAGED) + "[0-9a-f]{32}-)")

Facts = dict[str, JSONValue]
"""What a survey found out about one tensor, or a model (thresholds, norms): small, JSON, exact."""


@dataclass(frozen=True, slots=True)
class HeaderPiece:
    """Literal bytes: a shard's safetensors header with its length prefix and padding."""

    kind: Literal["header"]
    text: str
    """The header's JSON, padded with spaces; the 8-byte little-endian length comes before it."""

    @property
    def nbytes(self) -> int:
        """Length in bytes in the output."""
        return 8 + len(self.text.encode())

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads: none."""
        return ()


@dataclass(frozen=True, slots=True)
class CopyPiece:
    """Input bytes that go to the output as they are."""

    kind: Literal["copy"]
    name: str
    """The tensor's name."""
    ref: TensorRef
    """The bytes."""
    offset: int
    """Where in the output tensor they begin, in bytes; a multiple of :data:`BLOCK_BYTES`."""

    @property
    def nbytes(self) -> int:
        """Length in bytes in the output."""
        return self.ref.nbytes

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads."""
        return (self.ref,)


@dataclass(frozen=True, slots=True)
class MergePiece:
    """A run of merged elements."""

    kind: Literal["merge"]
    arithmetic: Arithmetic
    """What to compute."""
    dtype: str
    """Safetensors dtype of the output."""
    survey: str | None
    """Id of the survey whose facts this needs; ``None`` when it can do without or surveys its whole tensor itself."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.arithmetic.name

    @property
    def nbytes(self) -> int:
        """Length in bytes in the output."""
        return (self.arithmetic.last - self.arithmetic.first) * DTYPE_BYTES[self.dtype]

    @property
    def offset(self) -> int:
        """Where in the output tensor it begins, in bytes."""
        return self.arithmetic.first * DTYPE_BYTES[self.dtype]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads."""
        return self.arithmetic.refs


Piece = Annotated[HeaderPiece | CopyPiece | MergePiece | FactorsPiece, Field(discriminator="kind")]


def continues(one: Piece, two: Piece) -> bool:
    """Whether two pieces copy bytes of one object that follow each other."""
    if not isinstance(one, CopyPiece) or not isinstance(two, CopyPiece):
        return False
    return (one.ref.uri, one.ref.etag, one.ref.end) == (two.ref.uri, two.ref.etag, two.ref.start)


@dataclass(frozen=True, slots=True)
class Part:
    """One contiguous byte range of one output shard, and all that is needed to make it."""

    shard: str
    """File name of the shard within the output."""
    number: int
    """Part number in the shard's multipart upload, from 1."""
    offset: int
    """First byte within the shard."""
    pieces: tuple[Piece, ...]
    """What makes up the bytes, in order, without gaps."""
    semantics_version: int
    """Version of the mathematics; part of the id, so that two versions never share a part."""
    allow_nonfinite: bool = False
    """Let NaN and Inf in inputs through instead of failing."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads."""
        return tuple(ref for piece in self.pieces for ref in piece.refs)

    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """What is computed for it, in order."""
        return tuple(piece.arithmetic for piece in self.pieces if isinstance(piece, MergePiece))

    @property
    def scratch_bytes(self) -> int:
        """Memory that its operands are made in, where they are not plain: one arithmetic's at a time."""
        return most_scratch_bytes(self.arithmetics)

    @property
    def lead(self) -> int:
        """Bytes left free before a buffer's part, so that its pages lie in memory as they do in the file."""
        return self.offset % PAGE_BYTES

    @property
    def source(self) -> TensorRef | None:
        """The one byte range that the part is a copy of, when it is nothing else: a store can copy that by itself."""
        first = last = self.pieces[0]
        if not isinstance(first, CopyPiece):
            return None
        for piece in self.pieces[1:]:
            if not continues(last, piece):
                return None
            last = piece
        return TensorRef(first.ref.uri, first.ref.etag, first.ref.start, last.refs[-1].end, "U8")

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """What a worker fetches for it: a copy of one range as that range, else the ranges of all its pieces."""
        return self.refs if self.source is None else (self.source,)

    @property
    def surveys(self) -> tuple[str, ...]:
        """Ids of the surveys whose facts it needs."""
        wanted = (piece.survey for piece in self.pieces if isinstance(piece, MergePiece))
        return tuple(dict.fromkeys(survey for survey in wanted if survey is not None))


@dataclass(frozen=True, slots=True)
class Survey:
    """A statistic of one tensor that is too big to be held by one task, or of all tensors of a model together."""

    id: str
    """Hash of the arithmetic over all that it is taken of."""
    passes: int
    """How often every byte is read before the merge itself, at most: a pass that turns out needless is left out."""
    tasks: tuple[tuple[Arithmetic, ...], ...]
    """What each task of a pass sees: runs of elements, on multiples of :data:`SURVEY_ELEMENTS`; every element of the
    tensors is in exactly one."""
    numel: int
    """Elements in all of them."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(run.name for task in self.tasks for run in task)


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """One pass over some of a survey's runs of elements."""

    survey: str
    """Id of the survey."""
    index: int
    """Which pass, from 0."""
    arithmetics: tuple[Arithmetic, ...]
    """The runs of elements to summarise together; they share their method and parameters."""
    facts: Facts
    """What the passes before this one found."""
    allow_nonfinite: bool = False
    """Leave NaN and Inf out of the statistic instead of failing."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads."""
        return refs_of(self.arithmetics)

    @property
    def scratch_bytes(self) -> int:
        """Memory that its operands are made in, where they are not plain: one arithmetic's at a time."""
        return most_scratch_bytes(self.arithmetics)


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """SHA-256 digests of the 1 MiB blocks of a run of one output tensor."""

    name: str
    """The tensor's name."""
    first_block: int
    """Number of the first block within the tensor."""
    blocks: tuple[str, ...]
    """Hex SHA-256 of each block, the last one maybe short."""


@dataclass(frozen=True, slots=True)
class PartResult:
    """What is recorded, once, about a finished part."""

    part: str
    """The part's id."""
    shard: str
    """File name of the shard."""
    number: int
    """Part number."""
    size: int
    """Bytes uploaded."""
    etag: str
    """The store's ETag of the uploaded part."""
    digests: tuple[TensorDigest, ...]
    """Digests of the tensor runs in it."""
    bytes_read: int
    """Input bytes fetched."""
    nonfinite: dict[str, int]
    """Non-finite input elements that were let through, by ``tensor: model``."""
    peak_bytes: int
    """VmHWM of the worker process when the part was done."""
    seconds: dict[str, float]
    """Wall seconds by stage: read, merge, digest, write; waiting is not counted."""
    retries: dict[str, int] = field(default_factory=dict)
    """Requests to the store that the worker sent again since the part that it told about before, by cause."""
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each adapter's weight, by the name of its A: squared norms of what its factors leave out, and of the whole."""


PART = TypeAdapter(Part)
_PIECE: TypeAdapter[Piece] = TypeAdapter(Piece)
PART_RESULT = TypeAdapter(PartResult)
SURVEY_TASK = TypeAdapter(SurveyTask)


def digest(value: JSONValue) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``; of files that a job stages it has the names, which say what is in
    them, and not the place, which is the output's.
    """
    return hashlib.sha256(_placeless(canonical_json(value))).hexdigest()


def _placeless(text: str) -> bytes:
    return (_PLACE.sub(r'"\1', text) if STAGED in text else text).encode()


def part_id(part: Part) -> str:
    """The part's id: the first 32 hex digits of the SHA-256 of its canonical JSON, as :func:`digest` reads it.

    The text is hashed piece by piece: of tens of thousands of pieces it would be tens of megabytes.
    """
    without = canonical_json(PART.dump_python(replace(part, pieces=()), mode="json"))
    before, after = without.split('"pieces":[]', maxsplit=1)
    hashed = hashlib.sha256(_placeless(f'{before}"pieces":['))
    for number, piece in enumerate(part.pieces):
        text = canonical_json(_PIECE.dump_python(piece, mode="json"))
        hashed.update(_placeless(f",{text}" if number else text))
    hashed.update(_placeless(f"]{after}"))
    return hashed.hexdigest()[:32]


def tensor_digest(blocks: Iterable[str]) -> str:
    """A tensor's digest: SHA-256 over the binary SHA-256 of its 1 MiB blocks, as hex. No blocks is the empty tensor."""
    return hashlib.sha256(b"".join(bytes.fromhex(block) for block in blocks)).hexdigest()


def block_count(nbytes: int) -> int:
    """How many digest blocks ``nbytes`` bytes make."""
    return math.ceil(nbytes / BLOCK_BYTES)
