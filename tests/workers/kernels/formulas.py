"""Operands and formulas, ordinary and mean, for the tests that hold the two kernels equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from workers.kernels.base import (
    DROP_NUMBERS,
    KEEP_ALL,
    NO_CEILING,
    Election,
    Formula,
    Kernels,
    Operands,
    Term,
)
from workers.kernels.program import OPERATIONS, Program, Step
from workers.task import SURVEY_ELEMENTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

ODD = np.array(
    [
        0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x33800000, 0x387FC000,
        0x38800000, 0x477FE000, 0x477FF000, 0x47800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
        0x7FC00000, 0xFFC00001, 0x7F800001, 0x7FA12345, 0xFFFFFFFF, 0x3F800000, 0xBF800000, 0x3F808000,
    ],
    dtype=np.uint32,
)  # fmt: skip
"""Zeros, subnormals, the edges of float16's and float32's ranges, infinities, NaN with payloads, a tie to even."""

SIZES = (1, 2, 3, 5, 15, 16, 17, 63, 65, 1000, 1023, 1024, 1025, 2049, 4150)


def elements(kind: str, numel: int, dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor:
    """``numel`` elements: random bits, a few coarse values (ties, cancellations), ordinary ones, or odd ones."""
    if kind == "bits":
        raw = rng.integers(0, 256, numel * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype)
    if kind == "coarse":
        return torch.from_numpy(rng.integers(-2, 3, numel).astype(np.float32) / 4).to(dtype)
    if kind == "odd":
        values = torch.from_numpy(rng.choice(ODD, numel).view(np.float32))
        return values.to(dtype)
    x = rng.normal(0, 0.02, numel).astype(np.float32)
    few = rng.random(numel) < 0.002
    x[few] = rng.choice(ODD, int(few.sum())).view(np.float32)
    return torch.from_numpy(x).to(dtype)


KINDS = st.sampled_from(["bits", "coarse", "ordinary", "ordinary", "odd"])

WEIGHTS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 0.1, 1e-45, 1e-300, 1e-30, 1e30, 3.4e38, -3.4e38, 1e300]),
    st.floats(-3, 3),
)


@st.composite
def operands(draw: st.DrawFn, base: bool, models: int, sizes: tuple[int, ...] = SIZES) -> Operands:
    """A run of one of ``sizes``, whose inputs are of any dtype and kind."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    numel = draw(st.sampled_from(sizes))
    known = models if draw(st.booleans()) else 0
    made = [
        elements(draw(KINDS), numel, draw(st.sampled_from(DTYPES)), rng) for _ in range(models + base + known)
    ]
    # Elements that are equal in several inputs cancel exactly.
    for other in range(1, len(made)):
        same = torch.from_numpy(rng.random(numel) < 0.1)
        made[other] = torch.where(same, made[0].to(made[other].dtype), made[other])
    return Operands(
        first=draw(st.sampled_from([0, 1, 5, 1 << 17])) * SURVEY_ELEMENTS,
        base=made[0] if base else None,
        models=tuple(made[base : base + models]),
        mask_keys=tuple(draw(st.integers(0, (1 << 64) - 1)) for _ in range(models)),
        statistics=tuple(made[base + models :]),
    )


@st.composite
def terms(draw: st.DrawFn, run: Operands, task_vectors: bool) -> tuple[Term, ...]:
    """Terms of some of the models, in any order; thresholds are often the magnitude of an element."""
    found = []
    which = draw(st.lists(st.integers(0, len(run.models) - 1), min_size=1, max_size=len(run.models)))
    every = draw(st.booleans())
    for model in range(len(run.models)) if every else which:
        term = Term(
            model,
            weight=draw(WEIGHTS),
            keep_below=draw(st.sampled_from([KEEP_ALL, KEEP_ALL, 0, 1, 1 << 31, (1 << 32) - 1])),
            factor=draw(st.sampled_from([1.0, 2.0, 1 / 0.3, 0.0, 1e-30, 1e38, 1e300])),
        )
        vector = run.models[model].float()
        if task_vectors and run.base is not None:
            vector = vector - run.base.float()
        threshold = int(vector[draw(st.integers(0, run.numel - 1))].view(torch.int32)) & 0x7FFFFFFF
        threshold = draw(st.sampled_from([0, threshold, 1, DROP_NUMBERS]))
        block = run.first // SURVEY_ELEMENTS
        cut = draw(
            st.one_of(
                st.none(),
                st.tuples(st.sampled_from([0, block, block + 1]), st.sampled_from([0, 1, 2, 7, 1 << 20])),
            )
        )
        # Surveys find thresholds among numbers, and NaN is above them whatever its payload is.
        top = DROP_NUMBERS if cut is None else DROP_NUMBERS - 1
        ceiling = draw(st.sampled_from([NO_CEILING, NO_CEILING, threshold + 1, 0x3C000000, 0]))
        found.append(replace(term, threshold=min(threshold, top), cut=cut, ceiling=min(ceiling, NO_CEILING)))
    return tuple(found)


@st.composite
def programs(draw: st.DrawFn, terms: int, outputs: int = 1) -> Program:
    """Any steps on any rows before them, unused ones among them."""
    steps = []
    for number in range(draw(st.integers(0, 12))):
        operation = draw(st.sampled_from(OPERATIONS))
        count = {"constant": 0, "absolute": 1, "choose": 3}.get(operation, 2)
        rows = tuple(draw(st.integers(0, terms + number - 1)) for _ in range(count))
        steps.append(Step(operation, rows, draw(WEIGHTS) if operation == "constant" else 0.0))
    some = st.integers(0, terms + len(steps) - 1)
    return Program(terms, tuple(steps), tuple(draw(some) for _ in range(outputs)))


def programs_alone(terms: int) -> Program:
    """The first term, in place of a program that is drawn later."""
    return Program(terms, (), (0,))


@st.composite
def programmed(draw: st.DrawFn, models: tuple[int, int] = (1, 5)) -> tuple[Operands, Formula, torch.dtype]:
    """As :func:`cases`, with a program in place of an election, which may read statistics."""
    run, formula, dtype = draw(cases(models))
    if run.statistics:
        drawn = tuple(replace(term, statistic=draw(st.booleans())) for term in formula.terms)
        formula = replace(formula, terms=drawn, program=programs_alone(len(drawn)))
    task_vectors = draw(st.sampled_from([formula.task_vectors, None]))
    program = draw(programs(len(formula.terms)))
    return run, replace(formula, election=None, task_vectors=task_vectors, program=program), dtype


@st.composite
def cases(draw: st.DrawFn, models: tuple[int, int] = (1, 5)) -> tuple[Operands, Formula, torch.dtype]:
    """A run, a formula for it, and the dtype of its output."""
    base = draw(st.booleans())
    run = draw(operands(base, draw(st.integers(*models))))
    task_vectors = base and draw(st.booleans())
    election = Election(
        draw(st.sampled_from([1, -1])), draw(st.sampled_from([None, "abs_weights", "count", "weights"]))
    )
    formula = Formula(
        draw(terms(run, task_vectors)),
        task_vectors,
        draw(st.sampled_from([None, election])),
        draw(st.sampled_from([None, 1.0, 0.3, -2.5, 1e-45, 0.0])),
        draw(st.sampled_from([1.0, 0.7, 0.0, -1.0, 1e38, 1e-40])),
    )
    return run, formula, draw(st.sampled_from(DTYPES))


def merged(kernels: Kernels, run: Operands, formula: Formula, dtype: torch.dtype) -> tuple[bytes, Any]:
    """The bits that come out, and what was found. The elements after the run's are not touched."""
    room = torch.full((run.numel + 3,), 7.0, dtype=dtype)
    found = kernels.merge(run, formula, room[: run.numel])
    assert room[run.numel :].tolist() == [7.0] * 3
    return room.view(torch.uint8).numpy().tobytes(), found


def statistics(kernels: Kernels, run: Operands, formula: Formula) -> dict[str, Any]:
    """All statistics of a formula, as comparable values: floats by their bits."""
    high = np.zeros((len(formula.terms), 1 << 16), dtype=np.int64)
    kernels.histogram(run, formula, None, high)
    bins = [int(counts.argmax()) for counts in high]
    low = np.ones_like(high)  # counts are added
    kernels.histogram(run, formula, bins, low)
    thresholds = [(bin_ << 16) | int(counts.argmax()) for bin_, counts in zip(bins, low, strict=True)]
    uncut = replace(formula, terms=tuple(replace(term, cut=None) for term in formula.terms))
    every = [(one, two) for one in range(len(formula.terms)) for two in range(one + 1)]
    return {
        "high": high.tobytes(),
        "low": low.tobytes(),
        "equal_counts": kernels.equal_counts(run, formula, thresholds).tolist(),
        "nan_is_zero": kernels.equal_counts(run, formula, [0] * len(bins)).tolist(),
        "largest": [
            kernels.largest(run, formula, [rank] * len(bins))
            for rank in sorted({1, run.numel // 3, run.numel} - {0})
        ],
        "elected": kernels.elected(run, formula),
        "norms": kernels.norms(run, formula).tobytes(),
        "products": kernels.products(run, uncut, every).tobytes(),
        "nonfinite": kernels.nonfinite(run),
    }


def program_statistics(kernels: Kernels, run: Operands, formula: Formula) -> dict[str, Any]:
    """All statistics of a formula with a program of three outputs, as comparable values."""
    high = np.zeros((3, 1 << 16), dtype=np.int64)
    kernels.histogram(run, formula, None, high)
    bins = [int(counts.argmax()) for counts in high]
    low = np.zeros_like(high)
    kernels.histogram(run, formula, bins, low)
    uncut = replace(formula, terms=tuple(replace(term, cut=None) for term in formula.terms))
    pairs = [(one, two) for one in range(3) for two in range(3)] * 2  # more than are added up at once
    return {
        "high": high.tobytes(),
        "low": low.tobytes(),
        "products": kernels.products(run, uncut, pairs).tobytes(),
    }
