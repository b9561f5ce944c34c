"""Do tasks: read byte ranges, merge, write the bytes. The only place where I/O meets mathematics.

A task is pure in effect: run twice, anywhere, in any order, it makes the same bytes. It goes through three stages,
read, merge and write, so that a worker can have one task in each of them (:func:`run_tasks`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path

import torch

from workers.arena import Arena, padded
from workers.binding import bind
from workers.errors import ObjectChangedError, StoreError, TruncatedReadError, UploadNotFoundError
from workers.inputs import Inputs, Known, aligned
from workers.kernels import kernels_of, pin_of
from workers.kernels.base import Operands
from workers.kernels.reference import TORCH_DTYPES, round_to
from workers.methods.base import Summary, Tensors, Whole
from workers.methods.survey import Tally, survey
from workers.nonfinite import NonFinite
from workers.pipeline import Pipeline
from workers.safetensors_format import prefix
from workers.stages import Task, Tools
from workers.store.base import ObjectStore, Upload, UploadedPart
from workers.store.retries import RETRIES
from workers.store.uris import scheme
from workers.task import (
    BLOCK_BYTES,
    MERGEABLE_DTYPES,
    PART_RESULT,
    CopyPiece,
    Facts,
    HeaderPiece,
    MergePiece,
    Part,
    PartResult,
    SurveyTask,
    TensorDigest,
    part_id,
)

log = logging.getLogger(__name__)

MIN_COPY_BYTES = 5 << 20
"""Shortest range that S3 copies by itself: of a source below 5 MiB it copies no range."""


class SurveyRun(Task):
    """One pass over some runs of elements."""

    def __init__(self, task: SurveyTask, tools: Tools, known: Known | None = None) -> None:
        super().__init__(tools, Inputs(task.refs, known or {}), 0, task.scratch_bytes)
        self._task = task
        self._summary: Summary = None

    @property
    def value(self) -> Summary:
        """What the pass found."""
        return self._summary

    def merge(self) -> None:
        """See :meth:`Task.merge`."""
        task, kernels = self._task, self._tools.kernels
        survey_pass = bind(task.arithmetics[0]).passes[task.index]
        tally = Tally(survey_pass)
        for arithmetic in task.arithmetics:
            # Later passes make the same operands anew, of which all has been told.
            operands = self._operands(arithmetic, NonFinite() if task.index else self._problems)
            if task.index == 0:
                self._problems.add_inputs(arithmetic.name, arithmetic.sources, kernels.nonfinite(operands))
            tally.add(survey_pass.accumulate(kernels, operands, task.facts))
        self._refuse_nonfinite(task.allow_nonfinite)
        self._summary = tally.total
        self.release()

    def write(self) -> None:
        """See :meth:`Task.write`: a survey writes nothing."""


class PartRun(Task):
    """One part of a shard."""

    def __init__(
        self,
        part: Part,
        upload: Upload,
        facts: Mapping[str, Facts],
        tools: Tools,
        known: Known | None = None,
    ) -> None:
        """
        :param facts: what the surveys in ``part.surveys`` found, by survey id.
        :param known: digests of what it reads, where there are any.
        """
        # Only what is merged needs room of its own: a copy is written from where it was read.
        output_bytes = 0 if part.source else part.lead + part.nbytes
        super().__init__(tools, Inputs(part.reads, known or {}), output_bytes, part.scratch_bytes)
        self._part = part
        self._upload = upload
        self._facts = facts
        self._digests: list[TensorDigest] = []
        self._uploaded: UploadedPart | None = None
        self._retries: dict[str, int] = {}

    def merge(self) -> None:
        """See :meth:`Task.merge`."""
        with self._clock("merge"):
            position = 0
            for piece in self._part.pieces:
                target = self._output[position : position + piece.nbytes]
                position += piece.nbytes
                if isinstance(piece, HeaderPiece):
                    target[:] = prefix(piece.text)
                    continue
                try:
                    if isinstance(piece, CopyPiece):
                        self._copy(piece, target)
                    else:
                        self._merge(piece, target)
                except Exception as error:  # a defect: whoever reads of it can act on the tensor alone
                    error.add_note(f"while the tensor {piece.name} was made")
                    raise
        self._refuse_nonfinite(self._part.allow_nonfinite)
        if not self._part.source:
            self._scratch = memoryview(b"")
            self._tools.arena.give_back(self._extents.pop())

    def write(self) -> None:
        """See :meth:`Task.write`."""
        part, store = self._part, self._tools.store
        with self._clock("digest"):
            self._digest()
        with self._clock("write"):
            self._uploaded = self._copied() or store.put_part(
                self._upload, part.number, part.offset, self._output
            )
        self._retries = RETRIES.take()
        log.info("part written", extra={"shard": part.shard, "number": part.number, "bytes": part.nbytes})

    def _copied(self) -> UploadedPart | None:
        """The part, copied by the store alone; ``None`` where it cannot, since its bytes are here as well."""
        part, source, upload = self._part, self._part.source, self._upload
        if source is None or part.nbytes < MIN_COPY_BYTES or scheme(source.uri) != scheme(upload.uri):
            return None
        try:
            return self._tools.store.copy_part(
                upload, part.number, part.offset, source.uri, source.start, source.end, source.etag
            )
        except (ObjectChangedError, TruncatedReadError, UploadNotFoundError):
            raise
        except StoreError as error:  # no such request, another region, a policy
            log.warning("%s; the part is uploaded instead", error)
            return None

    @property
    def value(self) -> str:
        """JSON text of its result."""
        return PART_RESULT.dump_json(self.result).decode()

    @property
    def result(self) -> PartResult:
        """What is recorded, once the part is written."""
        if self._uploaded is None:
            raise ValueError("the part is not written")
        part = self._part
        return PartResult(
            part=part_id(part),
            shard=part.shard,
            number=part.number,
            size=part.nbytes,
            etag=self._uploaded.etag,
            digests=tuple(self._digests),
            bytes_read=self._inputs.bytes_read,
            nonfinite=self._problems.counts,
            peak_bytes=peak_bytes(),
            seconds=self._seconds,
            retries=self._retries,
        )

    @property
    def _output(self) -> memoryview:
        source = self._part.source
        return self._inputs.view(source) if source else self._extents[0].view[self._part.lead :]

    def _copy(self, piece: CopyPiece, target: memoryview) -> None:
        if not self._part.source:
            target[:] = self._inputs.view(piece.ref)
        if piece.ref.dtype in MERGEABLE_DTYPES:
            kernels = kernels_of("cpu")  # a look at every byte is not worth a trip to a device
            for elements in aligned(
                self._inputs.view(piece.ref) if not self._part.source else target, piece.ref.dtype
            ):
                self._problems.add(
                    piece.name, piece.ref, *kernels.nonfinite(Operands(0, None, (elements,), ()))
                )

    def _merge(self, piece: MergePiece, target: memoryview) -> None:
        kernels, method = self._tools.kernels, bind(piece.arithmetic)
        operands = self._operands(piece.arithmetic, self._problems)
        if method.whole is not None:
            self._merge_whole(piece, method.whole, operands, target)
            return
        facts = self._facts[piece.survey] if piece.survey else survey(method.passes, operands, kernels)
        out = torch.frombuffer(target, dtype=TORCH_DTYPES[piece.dtype])
        found = kernels.merge(operands, method.formula(facts), out)
        self._problems.add_inputs(piece.name, piece.arithmetic.sources, found.nonfinite)
        self._problems.add_overflow(piece, found.overflowed)

    def _merge_whole(self, piece: MergePiece, whole: Whole, operands: Operands, target: memoryview) -> None:
        """Merge what no formula merges: here, whatever the device, a whole tensor at a time."""
        shape = piece.arithmetic.shape
        base = None if operands.base is None else operands.base.view(shape)
        models = tuple(model.view(shape) for model in operands.models)
        merged = whole.merge(Tensors(base, models, operands.mask_keys)).reshape(-1)
        bad = ~torch.isfinite(merged)
        for elements in operands.inputs:
            bad &= torch.isfinite(elements)
        found = kernels_of("cpu").nonfinite(operands)
        self._problems.add_inputs(piece.name, piece.arithmetic.sources, found)
        out = torch.frombuffer(target, dtype=TORCH_DTYPES[piece.dtype])
        out.copy_(round_to(merged, out.dtype))
        bad |= torch.isinf(out) & torch.isfinite(merged)
        self._problems.add_overflow(piece, int(torch.count_nonzero(bad)))

    def _digest(self) -> None:
        position = 0
        for piece in self._part.pieces:
            view = self._output[position : position + piece.nbytes]
            position += piece.nbytes
            if not isinstance(piece, HeaderPiece):
                blocks = (view[start : start + BLOCK_BYTES] for start in range(0, len(view), BLOCK_BYTES))
                hashes = tuple(hashlib.sha256(block).hexdigest() for block in blocks)
                self._digests.append(TensorDigest(piece.name, piece.offset // BLOCK_BYTES, hashes))


def run_tasks(makers: Sequence[Callable[[], Task]]) -> Generator[tuple[int, Task | Exception]]:
    """Take tasks through their stages at once; yields each one's number and itself, or its error, as it is done.

    A task is made when its turn to read comes. No task's result depends on the others. The arena must have room for
    the biggest of them; the more it has, the further reading runs ahead.
    """
    tasks: list[Task | None] = [None] * len(makers)
    # What a task binds for its logs and its trace goes with it from thread to thread.
    contexts = [copy_context() for _ in makers]

    def make_and_read(number: int) -> None:
        task = tasks[number] = makers[number]()
        task.read()

    def read(number: int) -> None:
        contexts[number].run(make_and_read, number)

    def then(stage: Callable[[Task], None]) -> Callable[[int], None]:
        def step(number: int) -> None:
            if (task := tasks[number]) is not None:
                contexts[number].run(stage, task)

        return step

    stages = {
        "read": read,
        "merge": then(lambda task: task.merge()),
        "write": then(lambda task: task.write()),
    }
    for number, error in Pipeline(stages, then(lambda task: task.release())).run(range(len(makers))):
        task, tasks[number] = tasks[number], None
        if error is not None:
            yield number, error
        elif task is not None:
            yield number, task


def run_part(
    part: Part, upload: Upload, facts: Mapping[str, Facts], store: ObjectStore, device: str = "cpu"
) -> PartResult:
    """Make one part of a shard and upload it, in an arena of its own.

    :param facts: what the surveys in ``part.surveys`` found, by survey id.
    :param device: the torch device that the arithmetic runs on.
    :raises NonFiniteError: an input holds NaN or Inf and the part does not allow it, or an output overflowed.
    :raises StoreError: reading or uploading failed.
    """
    made = padded(part.scratch_bytes) + padded(part.lead + part.nbytes)
    arena = Arena(padded(Inputs(part.reads).nbytes) + made, pin_of(device))
    run = PartRun(part, upload, facts, Tools(store, arena, kernels_of(device)))
    _alone(run)
    return run.result


def run_survey(task: SurveyTask, store: ObjectStore, device: str = "cpu") -> Summary:
    """Summarise one pass over some runs of elements, in an arena of its own.

    :raises NonFiniteError: an input holds NaN or Inf and the task does not allow it.
    :raises StoreError: reading failed.
    """
    arena = Arena(padded(Inputs(task.refs).nbytes) + padded(task.scratch_bytes), pin_of(device))
    run = SurveyRun(task, Tools(store, arena, kernels_of(device)))
    _alone(run)
    return run.value


def peak_bytes() -> int:
    """VmHWM of this process: the most memory that was resident, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_bytes() -> None:
    """Let :func:`peak_bytes` begin anew from what is resident now, where the system allows that."""
    with suppress(
        OSError
    ):  # some sandboxes do not: then an earlier job's peak is told, which is more, never less
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _alone(task: Task) -> None:
    try:
        task.read()
        task.merge()
        task.write()
    finally:
        task.release()
