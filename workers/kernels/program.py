"""Small programs over a formula's terms, said as data: how methods combine models that neither add them up nor elect.

A program is a list of steps; each makes one row of elements from rows before it, by one float32 operation, exact or
rounded once. The first rows are the terms'. So :mod:`workers.kernels.torch_kernels` (one torch operation a step, on
any device) and :mod:`workers.kernels.cpu` (a tile at a time, compiled once for all programs) give the same bits.

A :class:`Writer` writes one the way a paper's formula is written: its rows take ``+ - * / abs`` and comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Operation = Literal[
    "constant", "add", "subtract", "multiply", "divide", "absolute", "less", "greater", "choose"
]
"""What a step does. Comparisons give 1.0 or 0.0, and 0.0 where NaN is compared; ``choose`` gives its second row
where its first is not 0.0, else its third."""

OPERATIONS: tuple[Operation, ...] = (
    "constant", "add", "subtract", "multiply", "divide", "absolute", "less", "greater", "choose",
)  # fmt: skip
"""All of them; their places are their codes in compiled programs."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation."""

    operation: Operation
    """What it does."""
    rows: tuple[int, ...] = ()
    """What it does that with: numbers of rows before it."""
    value: float = 0.0
    """What a constant's elements all are, once rounded to float32."""


@dataclass(frozen=True, slots=True)
class Program:
    """Steps, and which rows come out of them. Rows are numbered from 0: the terms', then the steps'."""

    terms: int
    """How many terms there are."""
    steps: tuple[Step, ...]
    """In order."""
    outputs: tuple[int, ...]
    """The rows that it is for: of a merge one, of a statistic any number."""

    @property
    def last_uses(self) -> tuple[int, ...]:
        """For each row the number of the last step that reads it: after it, its room is free; outputs stay."""
        uses = [-1] * (self.terms + len(self.steps))
        for number, step in enumerate(self.steps):
            for row in step.rows:
                uses[row] = number
        for row in self.outputs:
            uses[row] = len(self.steps)
        return tuple(uses)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A row of a program that is being written."""

    writer: Writer
    """Who writes it."""
    number: int
    """Its number."""

    def __add__(self, other: Row | float) -> Row:
        return self.writer.step("add", self, other)

    def __sub__(self, other: Row | float) -> Row:
        return self.writer.step("subtract", self, other)

    def __mul__(self, other: Row | float) -> Row:
        return self.writer.step("multiply", self, other)

    def __truediv__(self, other: Row | float) -> Row:
        return self.writer.step("divide", self, other)

    def __rtruediv__(self, other: float) -> Row:
        return self.writer.step("divide", other, self)

    def __rsub__(self, other: float) -> Row:
        return self.writer.step("subtract", other, self)

    def __abs__(self) -> Row:
        return self.writer.step("absolute", self)

    def __lt__(self, other: Row | float) -> Row:
        return self.writer.step("less", self, other)

    def __gt__(self, other: Row | float) -> Row:
        return self.writer.step("greater", self, other)


class Writer:
    """Writes a program, step by step."""

    def __init__(self, terms: int) -> None:
        """
        :param terms: how many terms the formula has.
        """
        self._steps: list[Step] = []
        self._constants: dict[float, Row] = {}
        self.terms = tuple(Row(self, number) for number in range(terms))
        """The terms' rows."""

    def step(self, operation: Operation, *operands: Row | float) -> Row:
        """The row that an operation gives; numbers among its operands are constants."""
        rows = tuple(self._row(operand).number for operand in operands)
        return self._append(Step(operation, rows))

    def choose(self, condition: Row, then: Row | float, otherwise: Row | float) -> Row:
        """``then`` where ``condition`` is not 0.0, else ``otherwise``."""
        return self.step("choose", condition, then, otherwise)

    def total(self, rows: Sequence[Row]) -> Row:
        """The sum of one or more rows, added in order."""
        found = rows[0]
        for row in rows[1:]:
            found = found + row
        return found

    def program(self, *outputs: Row) -> Program:
        """What was written."""
        return Program(len(self.terms), tuple(self._steps), tuple(row.number for row in outputs))

    def constant(self, value: float) -> Row:
        """A row of one value."""
        if value not in self._constants:
            self._constants[value] = self._append(Step("constant", value=value))
        return self._constants[value]

    def _row(self, operand: Row | float) -> Row:
        return operand if isinstance(operand, Row) else self.constant(operand)

    def _append(self, step: Step) -> Row:
        self._steps.append(step)
        return Row(self, len(self.terms) + len(self._steps) - 1)
