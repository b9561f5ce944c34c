"""What has to hold at the end of a run, whatever was done to it: each check says what is wrong, in words. Pure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from service.jobs.record import JobRecord, JobState
from tests.chaos.inputs import NONFINITE, POISON
from tests.chaos.plan import Fate, Job, Kind

HIDDEN = ".mergemill/"

KEYS = re.compile(
    r"jobs(:[a-z]+)?|jobs@[^:]+(:[a-z]+)?|leases|events|queues|once:.*|keys|key:[^:]+(:rate)?|schedulers|scheduler:.*"
    r"|ended|unswept|sweeper|forgotten:.*|webhooks:claim:.*"
    r"|job:merge-[0-9a-z]{26}(:(events|writes|parts|surveys|progress|webhook|deliveries|tries))?"
)
"""What may be in Redis when all jobs have ended, after the namespace; see the tables of keys in ``service/``."""


EXCUSES: Mapping[Kind, tuple[str, ...]] = {
    Kind.FULL_DISK: ("No space left on device",),
    # An answer without a body does not say why.
    Kind.STORE_EXPIRED: ("the credentials have run out or were withdrawn", "check the credentials"),
}
"""What a job may fail for where it was struck so, in its own words; it is to leave nothing all the same."""


@dataclass(frozen=True, slots=True)
class Blown:
    """How a job stood when something was done to the stack."""

    at: float
    """When, in Unix seconds."""
    recorded: Collection[str]
    """Ids of its parts that were recorded."""
    total: int
    """How many it has."""
    attempt: int
    """How often its planning had begun."""
    lost: int = 0
    """How many parts had been recorded, and were not any more."""


@dataclass(slots=True)
class Outcome:
    """All that is known about one job at the end."""

    job: Job
    """What was planned."""
    record: JobRecord | None
    """Its record; None when it was refused."""
    refused: str | None = None
    """Why it was refused."""
    cancelled: int | None = None
    """What the API answered to a cancel."""
    told: str = ""
    """The state that the API tells."""
    begun: Sequence[str] = ()
    """Ids of the parts that workers began, each as often as they did."""
    blows: list[Blown] = field(default_factory=list)
    """How it stood at each blow while it was running."""
    lost: bool = False
    """Whether Redis was emptied when it was there: a cancel of it may be forgotten, or done."""

    @property
    def name(self) -> str:
        """What it is called in complaints."""
        return f"{self.job} ({self.record.id if self.record else 'refused'})"

    @property
    def state(self) -> JobState | None:
        """Its state."""
        return self.record.state if self.record else None

    @property
    def was_recovered(self) -> bool:
        """Whether it was made again from what lay at its output."""
        return self.record is not None and any(entry.event == "recovered" for entry in self.record.history)

    def is_excused(self, struck: Collection[str]) -> bool:
        """Whether it failed for something that nobody could have gone on after, and says so."""
        said = (words for kind, each in EXCUSES.items() if str(kind) in struck for words in each)
        return self.state == JobState.FAILED and any(words in self.error for words in said)

    @property
    def error(self) -> str:
        """All that its error says."""
        return str(self.record.error) if self.record and self.record.error else ""


def ends(outcome: Outcome, struck: Collection[str]) -> Iterator[str]:
    """Every accepted job has come to the one end that its fate allows, and history and API agree."""
    record, fate, name = outcome.record, outcome.job.fate, outcome.name
    if record is None:
        if fate != Fate.RIVAL:
            yield f"{name} was refused: {outcome.refused}"
        return
    if not record.state.is_terminal:
        yield f"{name} did not end: {record.state}, {[entry.event for entry in record.history]}"
        return
    ended = [entry.event for entry in record.history if entry.state.is_terminal]
    if ended != [str(record.state)] and record.state != JobState.CANCELLED:
        yield f"{name} ended as {ended}"
    if outcome.told != record.state:
        yield f"{name} is {record.state}, and the API says {outcome.told}"
    excused = outcome.is_excused(struck)
    if record.state not in _allowed(outcome) and not excused:
        yield f"{name} is {record.state}: {outcome.error}"
    for word in _words(outcome):
        if word not in outcome.error and not excused:
            yield f"{name}: {word} is not in the error {outcome.error}"
    restarts = [entry for entry in record.history if entry.event == "restarted"]
    if (
        restarts
        and not {str(Kind.LOSE_UPLOAD), str(Kind.STORE_LOST_ANSWERS)} & {*struck}
        and fate != Fate.SWAPPED
    ):
        yield f"{name} started over: {[entry.detail for entry in restarts]}"


def _allowed(outcome: Outcome) -> set[JobState]:
    match outcome.job.fate:
        case Fate.CANCELLED if outcome.lost:
            return {JobState.CANCELLED, JobState.SUCCEEDED, *_conflict(outcome)}
        case Fate.CANCELLED if outcome.cancelled == 202:
            return {JobState.CANCELLED}
        case Fate.NONFINITE | Fate.POISON:
            return {JobState.FAILED}
        case Fate.SWAPPED:
            return {JobState.SUCCEEDED, JobState.FAILED}
        case Fate.RIVAL:
            return {JobState.SUCCEEDED, *_conflict(outcome)}
        case _:
            return {JobState.SUCCEEDED, *_conflict(outcome)}


def _conflict(outcome: Outcome) -> set[JobState]:
    lost = "OutputConflictError" in outcome.error or "already holds a checkpoint" in outcome.error
    return {JobState.FAILED} if lost else set()


def _words(outcome: Outcome) -> Iterable[str]:
    if outcome.state != JobState.FAILED or _conflict(outcome):
        return []
    words = {Fate.NONFINITE: NONFINITE, Fate.POISON: POISON, Fate.SWAPPED: "swapped"}
    return [words[outcome.job.fate]] if outcome.job.fate in words else []


def rivals(outcomes: Iterable[Outcome], struck: Collection[str] = ()) -> Iterator[str]:
    """Of the jobs of one output one succeeds, if one could."""
    of_output: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.record is not None:
            of_output[outcome.record.output].append(outcome)
    for output, group in of_output.items():
        won = [each for each in group if each.state == JobState.SUCCEEDED]
        sure = [each for each in group if each.job.fate in {Fate.PLAIN, Fate.RIVAL}]
        # Who lost to one that failed for an excuse lost all the same.
        could = all(each in sure and not each.is_excused(struck) for each in group)
        if len(won) > 1 or (not won and could):
            yield f"{output}: {len(won)} of {[each.name for each in group]} succeeded"


def content(
    outcome: Outcome, there: Mapping[str, str], wanted: Sequence[Mapping[str, str]], others: bool, late: bool
) -> Iterator[str]:
    """What succeeded is what it would be undisturbed, to the byte; what did not has left nothing.

    :param there: SHA-256 by name of what is at the output, all that is hidden included.
    :param wanted: the same of what may be there, of a job that succeeded; an empty digest is any.
    :param others: whether another job of the same output succeeded.
    :param late: whether a scheduler slept: the write that it was in the middle of comes when it wakes.
    """
    hidden = {name for name in there if name.startswith(HIDDEN)}
    if late:
        hidden = {name for name in hidden if not name.startswith(f"{HIDDEN}progress-")}
    if hidden:
        yield f"{outcome.name}: left {sorted(hidden)}"
    visible = {name: digest for name, digest in there.items() if not name.startswith(HIDDEN)}
    if outcome.state == JobState.SUCCEEDED:
        wrong = [
            sorted(name for name, own in each.items() if visible.get(name) != (own or visible.get(name, "")))
            for each in wanted
        ]
        if all(wrong):
            yield f"{outcome.name}: other bytes than undisturbed in {wrong[0]}"
        if extra := sorted(set(visible) - set(wanted[0])):
            yield f"{outcome.name}: has {extra} besides"
    elif visible and not others:
        yield f"{outcome.name}: is {outcome.state} and left {sorted(visible)}"


def repeated(outcome: Outcome, in_flight: int, restarts_allowed: bool) -> Iterator[str]:
    """No part was made again whose record was durable, and of the others no more than were in flight.

    :param in_flight: parts of a job that are in flight at once.
    """
    record = outcome.record
    if record is None or outcome.job.fate in {Fate.POISON, Fate.SWAPPED}:
        return
    times = Counter(outcome.begun)
    lives = 1 + sum(entry.event == "restarted" for entry in record.history)
    if lives > 1 and restarts_allowed:
        return  # its parts were void
    for part, count in times.items():
        unrecorded = sum(part not in blow.recorded for blow in outcome.blows)
        if count > 1 + unrecorded:
            yield f"{outcome.name}: part {part} was made {count} times, and {unrecorded} blows came before its record"
    repeats = sum(times.values()) - len(times)
    spent = sum(min(in_flight, blow.total - len(blow.recorded)) + blow.lost for blow in outcome.blows)
    if repeats > spent:
        yield f"{outcome.name}: {repeats} parts were made again, and at most {spent} were in flight when blows came"


def keys(found: Iterable[str]) -> Iterator[str]:
    """Nothing is left in Redis that only unfinished jobs have."""
    for key in sorted(found):
        if not KEYS.fullmatch(key):
            yield f"Redis still has {key}"
