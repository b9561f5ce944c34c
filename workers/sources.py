"""Where the elements of an arithmetic come from: a range of a file, or what is made of ranges on the way.

An operand of a merge is a :data:`Source`. The plain one is a :class:`TensorRef`, whose elements are computed with
where they were read. The others are made of ranges, and of each other, in scratch memory before the method runs: a
tensor under an adapter (:class:`LowRank`), rows from here and there (:class:`Gathered`), the outcome of an earlier
merge (:class:`Derived`). What an element is depends on its place within the whole tensor and on nothing else, so a
source may be cut into runs anywhere. All have, in any run,

* ``dtype``: the safetensors dtype of their elements, one of ``MERGEABLE_DTYPES`` where they are not plain;
* ``nbytes``: the bytes of the elements that they stand for;
* ``reads``: the byte ranges that are needed for these;
* ``elements(first, last)``: the run ``[first, last)`` of their elements, counted from their own first.

A tensor that is nothing but a source, such as an embedding whose rows are put into another order, is merged by
``passthrough``: it is exact, and reading, pricing and cutting know no other case. A plain range alone is copied.

Frozen, JSON round-trips, and no import of torch: this is what plans are made of.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from workers.canonical import DTYPE_BYTES, JSONValue

JOINED_BYTES: Final = 64 << 10
"""Rows of one tensor that lie this close together are read in one request: what is between costs less than another."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of one input, or a run of its elements: where its bytes are, never the bytes."""

    uri: str
    """The object that holds it."""
    etag: str
    """The object's ETag when it was planned with; reads are pinned to it. Empty where the object's name says all that
    can be in it, since it is made by the same job."""
    start: int
    """First byte within the object."""
    end: int
    """One past the last byte within the object."""
    dtype: str
    """Safetensors dtype name."""

    @property
    def is_plain(self) -> bool:
        """Whether its elements are bytes of a file: they are."""
        return True

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads: itself."""
        return (self,)

    def elements(self, first: int, last: int) -> TensorRef:
        """The run of elements ``[first, last)`` of this one."""
        width = DTYPE_BYTES[self.dtype]
        return TensorRef(
            self.uri, self.etag, self.start + first * width, self.start + last * width, self.dtype
        )


@dataclass(frozen=True, slots=True)
class Change:
    """What one adapter adds to a tensor: ``scale * (b @ a)``, or that transposed."""

    a: TensorRef
    """LoRA's A, shape ``[rank, in]``, whole."""
    b: TensorRef
    """LoRA's B, shape ``[out, rank]``: the rows that the run has elements of; whole where ``transposed``."""
    scale: float
    """What the product is multiplied by, once rounded to float32: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    transposed: bool
    """Whether the tensor is ``[in, out]`` (``fan_in_fan_out``, embeddings) rather than ``[out, in]``."""

    def rank(self, shape: tuple[int, int]) -> int:
        """The rank, of a change to a tensor of this shape."""
        columns = shape[0] if self.transposed else shape[1]
        return self.a.nbytes // (DTYPE_BYTES[self.a.dtype] * columns) if columns else 0

    def rows(self, shape: tuple[int, int], first: int, last: int) -> Change:
        """What the rows ``[first, last)``, counted from the first that this one has, take of it."""
        if self.transposed:
            return self
        rank = self.rank(shape)
        return replace(self, b=self.b.elements(first * rank, last * rank))


class _Made:
    """A source that is made of others."""

    __slots__ = ()

    @property
    def is_plain(self) -> bool:
        """Whether its elements are bytes of a file: they are not."""
        return False


@dataclass(frozen=True, slots=True)
class LowRank(_Made):
    """A run of a matrix under adapters, LoRA's in PEFT's form (arXiv:2106.09685).

    An element is widened to float32. For each change, in order, the products ``b * a`` are added up over the ranks,
    from the first to the last, beginning with zero; the sum is multiplied by the scale, and added. Each of these is
    one float32 operation, rounded by itself (none is fused); the outcome is rounded once more, to the source's dtype.
    PEFT's merge rounds once as well, unless ``safe_merge`` or ``autocast_adapter_dtype=False`` has it round the
    product first.
    """

    kind: Literal["low_rank"]
    source: Source
    """The run of the tensor without adapters."""
    changes: tuple[Change, ...]
    """What is added to it, in order."""
    shape: tuple[int, int]
    """Rows and columns of the whole tensor."""
    first: int
    """First element of the run within the whole tensor."""

    @property
    def dtype(self) -> str:
        """Safetensors dtype of its elements."""
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        """Length of its elements in bytes."""
        return self.source.nbytes

    @property
    def last(self) -> int:
        """One past the last element of the run within the whole tensor."""
        return self.first + self.nbytes // DTYPE_BYTES[self.dtype]

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """Each change's A and B."""
        return tuple(chain.from_iterable((change.a, change.b) for change in self.changes))

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads: those of the source, then the factors."""
        return (*self.source.reads, *self.factors)

    def elements(self, first: int, last: int) -> LowRank:
        """The run of elements ``[first, last)`` of this one."""
        columns = max(1, self.shape[1])
        begin, above = self.first + first, self.first // columns
        rows = begin // columns - above, -(-(self.first + last) // columns) - above
        return LowRank(
            "low_rank",
            self.source.elements(first, last),
            tuple(change.rows(self.shape, *rows) for change in self.changes),
            self.shape,
            begin,
        )


class RowRun(NamedTuple):
    """Some elements that come from one place, or are the mean of several."""

    numel: int
    """How many."""
    takes: tuple[tuple[int, int], ...]
    """Where they come from: the number of the source, and the first element there. None: they are zeros."""

    def elements(self, first: int, last: int) -> RowRun:
        """The run of elements ``[first, last)`` of this one."""
        return RowRun(last - first, tuple((number, at + first) for number, at in self.takes))


@dataclass(frozen=True, slots=True)
class Gathered(_Made):
    """Runs of other sources, one after the other: the rows of an embedding in the order of another vocabulary.

    Elements with one source are that source's, rounded to ``dtype`` where it has another. The mean of several is their
    sum in float32, in order, divided by their number in float32, and rounded once to ``dtype``.
    """

    kind: Literal["gathered"]
    sources: tuple[Source, ...]
    """What is taken from; a source may be longer than what is taken of it."""
    runs: tuple[RowRun, ...]
    """What is taken, in order: together, the elements."""
    dtype: str
    """Safetensors dtype of the elements."""

    @property
    def nbytes(self) -> int:
        """Length of its elements in bytes."""
        return sum(run.numel for run in self.runs) * DTYPE_BYTES[self.dtype]

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads, by source, in the order of the files; near ones are joined."""
        taken: dict[int, list[tuple[int, int]]] = {}
        for numel, takes in self.runs:
            for number, first in takes:
                taken.setdefault(number, []).append((first, first + numel))
        reads: dict[TensorRef, None] = {}
        for number, spans in sorted(taken.items()):
            source = self.sources[number]
            gap = JOINED_BYTES // DTYPE_BYTES[source.dtype]
            for first, last in _joined(spans, gap):
                reads |= dict.fromkeys(source.elements(first, last).reads)
        return tuple(reads)

    def taken(self, run: RowRun) -> tuple[Source, ...]:
        """The runs of the sources that one of the runs is made of."""
        return tuple(self.sources[number].elements(at, at + run.numel) for number, at in run.takes)

    def elements(self, first: int, last: int) -> Gathered:
        """The run of elements ``[first, last)`` of this one."""
        ends = list(accumulate([run.numel for run in self.runs]))
        begun, ended = bisect_right(ends, first), bisect_left(ends, last)
        runs = list(self.runs[begun : ended + 1]) if first < last else []
        if runs:
            runs[-1] = runs[-1].elements(0, runs[-1].numel - (ends[ended] - last))
            skipped = first - (ends[begun] - self.runs[begun].numel)
            runs[0] = runs[0].elements(skipped, runs[0].numel)
        return Gathered("gathered", self.sources, tuple(runs), self.dtype)


@dataclass(frozen=True, slots=True)
class Derived(_Made):
    """What an earlier merge makes of these elements, by a method that is elementwise and needs no survey."""

    kind: Literal["derived"]
    arithmetic: Arithmetic
    """The earlier merge, of the same run."""
    dtype: str
    """Safetensors dtype that its outcome is rounded to."""

    @property
    def nbytes(self) -> int:
        """Length of its elements in bytes."""
        return (self.arithmetic.last - self.arithmetic.first) * DTYPE_BYTES[self.dtype]

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads."""
        return self.arithmetic.refs

    def elements(self, first: int, last: int) -> Derived:
        """The run of elements ``[first, last)`` of this one."""
        return Derived("derived", self.arithmetic.elements(first, last), self.dtype)


Source = Annotated[
    TensorRef | Annotated[LowRank | Gathered | Derived, Field(discriminator="kind")],
    Field(union_mode="left_to_right"),
]
"""Where the elements of one operand come from. The plain ones, which are nearly all, are looked for first."""


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One model's share in a merge."""

    index: int
    """Position in the recipe's ``models``; seeds its DARE mask and decides the order of summation."""
    ref: Source
    """Its elements."""
    parameters: dict[str, JSONValue] = field(default_factory=dict)
    """The model's own parameters, resolved for this tensor."""
    statistic: Annotated[TensorRef | None, Field(exclude_if=lambda value: value is None)] = None
    """What the method has to know of the model's data: its Fisher's elements, or its whole Gram matrix."""

    def elements(self, first: int, last: int) -> ModelInput:
        """The run of elements ``[first, last)`` of this one."""
        statistic = None if self.statistic is None else self.statistic.elements(first, last)
        return ModelInput(self.index, self.ref.elements(first, last), self.parameters, statistic)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A method applied to a run of elements of one tensor: common to merging and to surveying it."""

    name: str
    """The tensor's name."""
    method: str
    """Name of the merge method."""
    parameters: dict[str, JSONValue]
    """The method's global parameters, resolved for this tensor."""
    base: Source | None
    """The base model's elements, for methods that have one."""
    models: tuple[ModelInput, ...]
    """The models' elements, in the recipe's order."""
    seed: int
    """The recipe's random seed."""
    numel: int
    """Elements in the whole tensor."""
    first: int
    """First element of this run."""
    last: int
    """One past the last element of this run."""
    shape: tuple[int, ...] = ()
    """The whole tensor's shape, where the method asks for it."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the elements of all operands come from: the base first, then the models, then their statistics."""
        base = () if self.base is None else (self.base,)
        return base + tuple(model.ref for model in self.models) + self.statistics

    @property
    def statistics(self) -> tuple[TensorRef, ...]:
        """The models' statistics, where the method takes any."""
        return tuple(model.statistic for model in self.models if model.statistic is not None)

    @property
    def is_plain(self) -> bool:
        """Whether all operands are bytes of files: nothing has to be made before the method runs."""
        return all(source.is_plain for source in self.sources)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads: those of the base first, then of the models."""
        return tuple(chain.from_iterable(source.reads for source in self.sources))

    def elements(self, first: int, last: int) -> Arithmetic:
        """The run of elements ``[first, last)`` of this one, counted from its own first."""
        return Arithmetic(
            self.name,
            self.method,
            self.parameters,
            None if self.base is None else self.base.elements(first, last),
            tuple(model.elements(first, last) for model in self.models),
            self.seed,
            self.numel,
            self.first + first,
            self.first + last,
            self.shape,
        )


SOURCE: TypeAdapter[Source] = TypeAdapter(Source)


def refs_of(arithmetics: Iterable[Arithmetic]) -> tuple[TensorRef, ...]:
    """All byte ranges that some runs read."""
    return tuple(ref for arithmetic in arithmetics for ref in arithmetic.refs)


def _joined(spans: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Spans in order, those joined that overlap or lie at most ``gap`` apart."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined
