"""Do one task: read byte ranges, merge, write the bytes. The only place where I/O meets mathematics.

Both functions are pure in effect: run twice, anywhere, in any order, they give the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from workers.binding import bind
from workers.errors import NonFiniteError
from workers.kernels.reference import TORCH_DTYPES, round_to, to_float32
from workers.methods.base import Block, Summary
from workers.methods.evaluate import survey
from workers.random import mask_key
from workers.ranges import coalesce
from workers.safetensors_format import prefix
from workers.store.base import ObjectStore, Upload
from workers.store.uris import parent
from workers.task import (
    BLOCK_BYTES,
    DTYPE_BYTES,
    MERGEABLE_DTYPES,
    SURVEY_ELEMENTS,
    Arithmetic,
    CopyPiece,
    Facts,
    HeaderPiece,
    MergePiece,
    Part,
    PartResult,
    SurveyTask,
    TensorDigest,
    TensorRef,
    part_id,
)

READ_THREADS = 4
"""Ranges read at once; more gain nothing on one worker's share of the network."""


def run_part(
    part: Part, upload: Upload, facts: Mapping[str, Facts], store: ObjectStore, device: str = "cpu"
) -> PartResult:
    """Make one part of a shard and upload it.

    :param facts: what the surveys in ``part.surveys`` found, by survey id.
    :param device: the torch device that the arithmetic runs on; buffers stay in main memory.
    :raises NonFiniteError: an input holds NaN or Inf and the part does not allow it, or an output overflowed.
    :raises StoreError: reading or uploading failed.
    """
    clock = _Clock()
    with clock.stage("read"):
        inputs = _InputBytes(store, _refs(part), device)
    output = bytearray(part.nbytes)
    view = memoryview(output)
    problems = _NonFinite()
    digests: list[TensorDigest] = []
    with clock.stage("merge"):
        position = 0
        for piece in part.pieces:
            target = view[position : position + piece.nbytes]
            position += piece.nbytes
            if isinstance(piece, HeaderPiece):
                target[:] = prefix(piece.text)
                continue
            if isinstance(piece, CopyPiece):
                _copy(piece, inputs, target, problems)
            else:
                _merge(piece, inputs, target, facts[piece.survey] if piece.survey else {}, problems)
            digests.append(TensorDigest(piece.name, piece.offset // BLOCK_BYTES, _block_digests(target)))
    if problems and not part.allow_nonfinite:
        raise problems.error()
    with clock.stage("write"):
        uploaded = store.put_part(upload, part.number, part.offset, output)
    return PartResult(
        part=part_id(part),
        shard=part.shard,
        number=part.number,
        size=len(output),
        etag=uploaded.etag,
        digests=tuple(digests),
        bytes_read=inputs.nbytes,
        nonfinite=problems.counts,
        peak_bytes=peak_bytes(),
        seconds=clock.seconds,
    )


def run_survey(task: SurveyTask, store: ObjectStore, device: str = "cpu") -> Summary:
    """Summarise one pass over one run of a tensor's elements.

    :raises NonFiniteError: an input holds NaN or Inf and the task does not allow it.
    :raises StoreError: reading failed.
    """
    inputs = _InputBytes(store, task.arithmetic.refs, device)
    method = bind(task.arithmetic)
    problems = _NonFinite()
    counted = problems if task.index == 0 else None
    summary = method.passes[task.index].accumulate(_blocks(task.arithmetic, inputs, counted), task.facts)
    if problems and not task.allow_nonfinite:
        raise problems.error()
    return summary


def peak_bytes() -> int:
    """VmHWM of this process: the most memory that was ever resident, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _merge(
    piece: MergePiece, inputs: _InputBytes, target: memoryview, facts: Facts, problems: _NonFinite
) -> None:
    method = bind(piece.arithmetic)
    if method.passes and piece.survey is None:
        facts = survey(method.passes, lambda: _blocks(piece.arithmetic, inputs, None), piece.arithmetic.numel)
    out = torch.frombuffer(target, dtype=TORCH_DTYPES[piece.dtype])
    for block in _blocks(piece.arithmetic, inputs, problems):
        merged = round_to(method.merge(block, facts), TORCH_DTYPES[piece.dtype])
        start = block.first - piece.arithmetic.first
        out[start : start + merged.numel()] = merged
        _check_overflow(piece, block, merged, problems)


def _copy(piece: CopyPiece, inputs: _InputBytes, target: memoryview, problems: _NonFinite) -> None:
    target[:] = inputs.view(piece.ref)
    if piece.ref.dtype in MERGEABLE_DTYPES:
        count = piece.ref.nbytes // DTYPE_BYTES[piece.ref.dtype]
        for first in range(0, count, SURVEY_ELEMENTS):
            last = min(first + SURVEY_ELEMENTS, count)
            problems.look(piece.name, piece.ref, to_float32(inputs.tensor(piece.ref, first, last)))


def _blocks(arithmetic: Arithmetic, inputs: _InputBytes, problems: _NonFinite | None) -> Iterator[Block]:
    """The run's elements in float32, block by block; non-finite ones are counted where ``problems`` is given."""
    keys = tuple(mask_key(arithmetic.seed, model.index, arithmetic.name) for model in arithmetic.models)
    for first in range(arithmetic.first, arithmetic.last, SURVEY_ELEMENTS):
        start = first - arithmetic.first
        stop = min(first + SURVEY_ELEMENTS, arithmetic.last) - arithmetic.first
        tensors = []
        for number, ref in enumerate(arithmetic.refs):
            elements = to_float32(inputs.tensor(ref, start, stop))
            if (
                problems is not None and ref not in arithmetic.refs[:number]
            ):  # a model listed twice counts once
                problems.look(arithmetic.name, ref, elements)
            tensors.append(elements)
        base = None if arithmetic.base is None else tensors.pop(0)
        yield Block(first, base, tuple(tensors), keys)


def _check_overflow(piece: MergePiece, block: Block, merged: torch.Tensor, problems: _NonFinite) -> None:
    """Finite inputs must give finite outputs; what does not is the output dtype's range, and is reported."""
    if bool(torch.isfinite(merged).all()):
        return
    finite = torch.ones(merged.numel(), dtype=torch.bool, device=merged.device)
    for elements in (*block.models, *(() if block.base is None else (block.base,))):
        finite &= torch.isfinite(elements)
    problems.overflow(piece, int((finite & ~torch.isfinite(merged)).sum()))


def _block_digests(view: memoryview) -> tuple[str, ...]:
    return tuple(
        hashlib.sha256(view[start : start + BLOCK_BYTES]).hexdigest()
        for start in range(0, len(view), BLOCK_BYTES)
    )


def _refs(part: Part) -> list[TensorRef]:
    refs: list[TensorRef] = []
    for piece in part.pieces:
        if isinstance(piece, MergePiece):
            refs.extend(piece.arithmetic.refs)
        elif isinstance(piece, CopyPiece):
            refs.append(piece.ref)
    return refs


class _InputBytes:
    """The bytes that a task reads: neighbours joined, each range fetched once, into one buffer each."""

    def __init__(self, store: ObjectStore, refs: Iterable[TensorRef], device: str) -> None:
        self._device = device
        self._runs = coalesce(refs)
        self._starts = [(run.uri, run.etag, run.start) for run in self._runs]
        self._buffers = [bytearray(run.nbytes) for run in self._runs]

        def fetch(index: int) -> None:
            run = self._runs[index]
            store.read_into(run.uri, run.start, memoryview(self._buffers[index]), run.etag)

        if len(self._runs) == 1:
            fetch(0)
        elif self._runs:
            with ThreadPoolExecutor(min(READ_THREADS, len(self._runs))) as pool:
                list(pool.map(fetch, range(len(self._runs))))

    @property
    def nbytes(self) -> int:
        """Bytes fetched."""
        return sum(run.nbytes for run in self._runs)

    def view(self, ref: TensorRef) -> memoryview:
        """The bytes of one range."""
        at = bisect_right(self._starts, (ref.uri, ref.etag, ref.start)) - 1
        run = self._runs[at]
        if at >= 0 and (run.uri, run.etag) == (ref.uri, ref.etag) and ref.end <= run.end:
            return memoryview(self._buffers[at])[ref.start - run.start : ref.end - run.start]
        raise LookupError(f"{ref} was not read")

    def tensor(self, ref: TensorRef, first: int, last: int) -> torch.Tensor:
        """Elements ``[first, last)`` of one range, in its own dtype; on the CPU without a copy, where aligned."""
        width = DTYPE_BYTES[ref.dtype]
        view = self.view(ref)[first * width : last * width]
        found = torch.frombuffer(view, dtype=TORCH_DTYPES[ref.dtype])
        if (
            found.data_ptr() % width
        ):  # a header of odd length: legal, rare, and slow or undefined to compute on
            found = torch.frombuffer(bytearray(view), dtype=TORCH_DTYPES[ref.dtype])
        return found.to(self._device)


class _NonFinite:
    """Counts of what should not be there, by tensor and model."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._said: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._said)

    def look(self, tensor: str, ref: TensorRef, elements: torch.Tensor) -> None:
        """Count the non-finite ones among some float32 elements."""
        finite = torch.isfinite(elements)
        if bool(finite.all()):
            return
        key = f"{tensor}: {parent(ref.uri)}"
        self.counts[key] = self.counts.get(key, 0) + int((~finite).sum())
        self._said[key] = f"tensor {tensor!r} of {parent(ref.uri)} holds {self.counts[key]} NaN or Inf"

    def overflow(self, piece: MergePiece, count: int) -> None:
        """Count outputs that became non-finite though all inputs were finite."""
        if count == 0:
            return
        key = f"{piece.name}: output"
        self.counts[key] = self.counts.get(key, 0) + count
        self._said[key] = (
            f"{self.counts[key]} merged value(s) of tensor {piece.name!r} overflow {piece.dtype}"
        )

    def error(self) -> NonFiniteError:
        """One error that names everything found in this task."""
        return NonFiniteError("; ".join(self._said.values()) + " (set allow_nonfinite to merge all the same)")


class _Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 6)
