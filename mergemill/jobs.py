"""What the client returns: jobs, their progress and their files, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from service.jobs.progress import Progress

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
"""States in which nothing can happen any more."""


@dataclass(frozen=True, slots=True)
class Job:
    """A merge job as the API last described it."""

    id: str
    """Its id."""
    state: str
    """`queued`, `planning`, `running`, `committing`, `succeeded`, `failed` or `cancelled`."""
    output: str
    """Where the checkpoint goes."""
    created_at: datetime
    """When it was accepted."""
    updated_at: datetime
    """When it last changed."""
    cancel_requested: bool
    """Whether somebody asked for its end."""
    progress: Progress
    """How far it is."""
    error: Mapping[str, Any] | None
    """Why it failed: `type`, `detail` and, where there are several, `problems`."""
    body: Mapping[str, Any] = field(repr=False)
    """All that the API said: recipe, options, price, notices and history too."""

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read what the API says."""
        return cls(
            id=body["id"],
            state=body["state"],
            output=body["output"],
            created_at=datetime.fromisoformat(body["created_at"]),
            updated_at=datetime.fromisoformat(body["updated_at"]),
            cancel_requested=body["cancel_requested"],
            progress=Progress.from_json(body["progress"]),
            error=body["error"],
            body=body,
        )

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen any more."""
        return self.state in TERMINAL_STATES

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes read and written so far, and all that will be: how far it is; ``(0, 0)`` until it is planned.

        Reading is part of it since surveys only read. What turns out not to be needed counts as done in the end.
        """
        progress = self.progress
        total = progress.bytes_total + int((self.price or {}).get("bytes_read", 0))
        if self.state in {"committing", "succeeded"}:
            return total, total
        read = progress.bytes_read if self.price else 0
        return min(progress.bytes_done + read, total), total

    @property
    def percent(self) -> int | None:
        """How far it is; ``None`` until it is planned."""
        done, total = self.moved
        return 100 * done // total if total else None

    @property
    def ended_at(self) -> datetime | None:
        """When it ended, if it has."""
        return self.updated_at if self.is_terminal else None

    def __str__(self) -> str:
        share = "" if self.percent is None or self.is_terminal else f" {self.percent} %"
        return f"{self.id} {self.state}{share}"

    @property
    def notices(self) -> tuple[str, ...]:
        """What the planner wants you to know."""
        return tuple(self.body.get("notices") or ())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What was asked for."""
        found: Mapping[str, Any] = self.body["recipe"]
        return found

    @property
    def version(self) -> int:
        """Grows with every change of the job; 0 where the service does not tell."""
        return int(self.body.get("version", 0))

    @property
    def method(self) -> str:
        """The recipe's merge method; of several documents all of theirs."""
        documents = self.recipe.get("documents", [self.recipe])
        return ", ".join(dict.fromkeys(str(document["merge_method"]) for document in documents))

    @property
    def price(self) -> Mapping[str, Any] | None:
        """What it costs, once planned: see :class:`service.planning.price.Price`."""
        return self.body.get("price")


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of jobs, newest first."""

    jobs: tuple[Job, ...]
    """The jobs."""
    next_cursor: str | None
    """What to ask for the next page with; ``None`` on the last one."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a merged checkpoint."""

    name: str
    """File name."""
    size: int
    """Length in bytes."""
    digest: str
    """``sha256:`` of the bytes, or ``sha256-tree-1mib:`` for shards, then hex digits."""
    url: str
    """Where to download it."""
