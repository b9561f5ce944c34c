"""The output's vocabulary as rows: where each row of each model's embeddings comes from, as runs of ranges. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from service.planning.checkpoint import StoredTensor
from service.vocabulary.tensors import row_shape, with_rows
from workers.sources import Gathered, RowRun

Takes = tuple[tuple[str, int], ...]
"""Rows of models, by name and number, whose mean a row is: none is zeros, one is that row itself."""


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokens, and the rows that stand for them in every model. A model is known by its first name
    in the recipe: with an adapter it is another one than without, at the same URI."""

    tokens: Mapping[str, int]
    """Every token's number in the output."""
    size: int
    """Rows of the output's embeddings: those of the tokens, and what padding adds."""
    own: Mapping[str, NDArray[np.int64]] = field(repr=False)
    """For each model, for each row of the output, which of its own rows is the same token's; -1 where it has none."""
    fills: Mapping[int, Takes] = field(repr=False)
    """What stands for a row in models that have none of their own; zeros where nothing is said."""
    forced: frozenset[int] = frozenset()
    """Rows for which that stands in all models."""


def seen_through(vocabulary: Vocabulary, model: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """A model's tensor with the rows of the output's vocabulary.

    :param tensors: each model's tensor of that name, by model; those that lack it, or whose rows have other sizes than
        this one's, give no rows.
    :returns: the stored tensor itself where its rows are the output's.
    """
    stored = tensors[model]
    rows, width = row_shape(stored.shape)
    givers = {
        other: tensor
        for other, tensor in tensors.items()
        if tensor.is_float and row_shape(tensor.shape)[1] == width and len(tensor.shape) == len(stored.shape)
    }
    counts = {other: row_shape(tensor.shape)[0] for other, tensor in givers.items()}
    runs = list(_runs(vocabulary, model, counts))
    shape = with_rows(stored.shape, vocabulary.size)
    if runs == [(vocabulary.size, ((model, 0),))] and rows == vocabulary.size:
        return stored
    used = list(dict.fromkeys(other for _, takes in runs for other, _ in takes)) or [model]
    numbers = {other: number for number, other in enumerate(used)}
    dtypes = {givers[other].dtype for other in used}
    is_exact = len(dtypes) == 1 and all(len(takes) < 2 for _, takes in runs)
    gathered = Gathered(
        "gathered",
        tuple(givers[other].source for other in used),
        tuple(
            RowRun(count * width, tuple((numbers[other], row * width) for other, row in takes))
            for count, takes in runs
        ),
        dtypes.pop() if is_exact else "F32",  # a mean is rounded once, with the merge's outcome
    )
    return replace(stored, shape=shape, gathered=gathered, changes=())  # which the rows have already


def _runs(vocabulary: Vocabulary, model: str, counts: Mapping[str, int]) -> Iterator[tuple[int, Takes]]:
    """Consecutive rows that come from consecutive ones: how many, and where the first of them is from."""
    pending: tuple[int, Takes] | None = None
    for count, takes in _spans(vocabulary, model, counts):
        if pending is not None and _follows(pending, takes):
            pending = pending[0] + count, pending[1]
            continue
        if pending is not None:
            yield pending
        pending = count, takes
    if pending is not None:
        yield pending


def _follows(run: tuple[int, Takes], takes: Takes) -> bool:
    count, first = run
    return len(first) == len(takes) and all(
        (model, row + count) == taken for (model, row), taken in zip(first, takes, strict=True)
    )


def _spans(vocabulary: Vocabulary, model: str, counts: Mapping[str, int]) -> Iterator[tuple[int, Takes]]:
    """As :func:`_runs`: what a model has itself as runs, every other row by itself."""
    own = vocabulary.own[model].copy()
    own[own >= counts[model]] = -1  # fewer rows than tokens: it lacks the last of these
    own[list(vocabulary.forced)] = -1
    has = own >= 0
    cuts = np.flatnonzero((has[1:] != has[:-1]) | (has[1:] & (np.diff(own) != 1))) + 1
    ends = [*map(int, cuts), len(own)]
    for first, last in zip([0, *ends], ends, strict=False):
        if last > first and has[first]:
            yield last - first, ((model, int(own[first])),)
            continue
        for row in range(first, last):
            takes = vocabulary.fills.get(row, ())
            yield 1, tuple(taken for taken in takes if taken[1] < counts.get(taken[0], 0))
