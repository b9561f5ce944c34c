"""What a run under load showed: how long answers took, whether anything was lost, and the order of the queue. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN = "<!-- made by benchmarks.load: begin -->"
END = "<!-- made by benchmarks.load: end -->"


@dataclass(frozen=True, slots=True)
class Queued:
    """One job, as it was submitted."""

    id: str
    """Its id; sorts by when it was accepted."""
    key: str
    """Whose it is."""
    priority: int
    """Its priority."""


@dataclass(frozen=True, slots=True)
class Order:
    """How the queue was drained."""

    out_of_priority: int
    """How many were begun while one of a higher priority waited."""
    out_of_age: int
    """How many were begun while an older one of the same key and priority waited."""
    spread: int
    """Most by which a key was ahead of another while both had jobs of the highest priority waiting."""


def order_of(queued: Sequence[Queued], claims: Sequence[str]) -> Order:
    """Whether jobs, all of which waited before the first was begun, were begun in their turn."""
    jobs = {job.id: job for job in queued}
    begun = [jobs[claim] for claim in dict.fromkeys(claims) if claim in jobs]
    waiting = {job.id: job for job in sorted(queued, key=lambda job: (-job.priority, job.id))}
    tops = Counter((job.priority, job.key) for job in queued)
    ahead: Counter[str] = Counter()
    level, out_of_priority, out_of_age, spread = None, 0, 0, 0
    for job in begun:
        first = next(iter(waiting.values()))
        oldest = next(
            other for other in waiting.values() if (other.key, other.priority) == (job.key, job.priority)
        )
        out_of_priority += first.priority > job.priority
        out_of_age += oldest.id != job.id
        if job.priority != level:
            level, ahead = job.priority, Counter()
        del waiting[job.id]
        tops[level, job.key] -= 1
        ahead[job.key] += 1
        both = [ahead[key] for (priority, key), left in tops.items() if priority == level and left]
        spread = max(spread, max(both, default=0) - min(both, default=0))
    return Order(out_of_priority, out_of_age, spread)


def quantile(times: Iterable[float], share: float) -> float:
    """The smallest time that a share of them does not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))] if ordered else 0.0


def whole(versions: Sequence[int]) -> bool:
    """Whether a stream told of every change of its job: versions without a gap, from the first."""
    changes = list(dict.fromkeys(versions))
    return changes == list(range(1, len(changes) + 1))


def table(times: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    """Lines of Markdown: how long answers took, by phase and kind."""
    yield "| phase | what | how many | p50, ms | p99, ms | longest, ms |"
    yield "|---|---|---:|---:|---:|---:|"
    for phase, kinds in times.items():
        for kind, found in kinds.items():
            if found:
                shown = (f"{1000 * quantile(found, share):.1f}" for share in (0.5, 0.99, 1.0))
                yield f"| {phase} | {kind} | {len(found):,} | {' | '.join(shown)} |"


def write_between_marks(path: Path, text: str) -> None:
    """Replace what is between the marks of a page."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    path.write_text(f"{before}{begin}\n{text}{end}{after}")
