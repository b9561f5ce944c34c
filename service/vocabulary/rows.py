"""The output's vocabulary as rows: where each row of each model's embeddings comes from, as runs of ranges. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.checkpoint import StoredTensor
from workers.task import RowRun, Gathered, Source

Takes = tuple[tuple[str, int], ...]
"""Rows of models whose mean a row is: none is zeros, one is that row itself."""


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokens, and the rows that stand for them in every model."""

    tokens: Mapping[str, int]
    """Every token's number in the output."""
    size: int
    """Rows of the output's embeddings: those of the tokens, and what padding adds."""
    own: Mapping[str, Sequence[int]]
    """For each model, for each row of the output, which of its own rows is the same token's; -1 where it has none."""
    fills: Mapping[int, Takes]
    """What stands for a row in models that have none of their own; zeros where nothing is said."""
    forced: frozenset[int] = frozenset()
    """Rows for which that stands in all models."""

    def takes(self, model: str, row: int, rows: Callable[[str], int]) -> Takes:
        """What a row of a model's embedding is made of.

        :param rows: how many rows each model's tensor has: one with fewer than it has tokens lacks the last ones.
        """
        own = self.own[model][row]
        if 0 <= own < rows(model) and row not in self.forced:
            return ((model, own),)
        return tuple(taken for taken in self.fills.get(row, ()) if taken[1] < rows(taken[0]))
