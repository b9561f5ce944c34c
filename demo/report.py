"""The table at the end of the demo and the sentence under it, computed from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    """Which model or method."""
    settings: str
    """What the validation images chose."""
    scores: tuple[float, ...]
    """Test accuracy on each task, 0 to 1."""

    @property
    def mean(self) -> float:
        """Test accuracy on average over the tasks."""
        return sum(self.scores) / len(self.scores)


def table(tasks: Sequence[str], singles: Sequence[Row], merges: Sequence[Row]) -> Table:
    """Test accuracy of every model on every task, the best of each column in bold."""
    shown = Table(
        title="Test accuracy, %. Settings are chosen on the validation images.", title_justify="left"
    )
    shown.add_column("model", no_wrap=True)
    shown.add_column("settings")
    for task in (*tasks, "mean"):
        shown.add_column(task, justify="right")
    best = [max(column) for column in zip(*(_values(row) for row in (*singles, *merges)), strict=True)]
    for group in (singles, merges):
        for row in group:
            cells = [
                f"[bold]{100 * value:.1f}[/bold]" if value == top else f"{100 * value:.1f}"
                for value, top in zip(_values(row), best, strict=True)
            ]
            shown.add_row(row.name, row.settings, *cells)
        shown.add_section()
    return shown


def verdict(singles: Sequence[Row], merges: Sequence[Row]) -> str:
    """Which merges beat every single model on the mean over the tasks, and which did not."""
    best = max(singles, key=lambda row: row.mean)
    won = [row for row in merges if row.mean > best.mean]
    lost = [row for row in merges if row.mean <= best.mean]
    winners = f"{_names(won)} beat{'s' if len(won) == 1 else ''}" if won else "no merge beats"
    sentence = f"On the mean over the tasks {winners} the base and every fine-tune (best: {_names([best])})"
    return f"{sentence}; {_names(lost)} {'does' if len(lost) == 1 else 'do'} not." if lost else f"{sentence}."


def _values(row: Row) -> tuple[float, ...]:
    return (*row.scores, row.mean)


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row.name} {100 * row.mean:.1f}" for row in rows)
