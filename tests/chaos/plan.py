"""What happens in one run, all of it from a seed: which jobs, and what is done to them and when. Pure.

A moment is a stage of a job, not a time of the clock: on a slow machine the same seed kills the same process in the
same state. What a kill meets within that stage is chance, so a seed is the same run, and not the same interleaving.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """How far a job has come, in this order."""

    QUEUED = "queued"
    PLANNING = "planning"
    RUNNING = "running"
    HALF = "half"
    """Half of its parts are recorded."""
    COMMITTING = "committing"
    ENDED = "ended"


STAGES = tuple(Stage)
"""The stages in their order."""


class Kind(StrEnum):
    """What may be done to the stack."""

    KILL_API = "kill -9 of the API"
    KILL_SCHEDULER = "kill -9 of a scheduler"
    KILL_DRIVER = "kill -9 of Ray's driver"
    KILL_WARDEN = "kill -9 of the warden above a local Ray"
    KILL_WORKER = "kill -9 of a Ray worker"
    KILL_RAYLET = "kill -9 of a raylet"
    KILL_GCS = "kill -9 of Ray's control process"
    KILL_REDIS = "kill -9 of Redis"
    PAUSE_SCHEDULER = "a scheduler stopped past its lease, then continued"
    PAUSE_COMMIT = "a scheduler stopped past its lease at a step of a commit, then continued"
    PARTITION_REDIS = "Redis out of reach"
    EMPTY_REDIS = "Redis back empty, and `mergemill recover`"
    POWER_CUT = "kill -9 of everything, and a cold start"
    LOSE_UPLOAD = "an upload aborted behind the job's back"
    FULL_DISK = "a full disk"
    STORE_ERRORS = "500 and 503 SlowDown from the store"
    STORE_RESETS = "connections to the store reset"
    STORE_TRUNCATED = "bodies from the store cut short"
    STORE_FLIPS = "bits flipped on the way to the store"
    STORE_READ_FLIPS = "bits flipped on the way from the store"
    STORE_LOST_ANSWERS = "answers of the store lost after it acted"
    STORE_SLOW = "a store that stalls"
    STORE_EXPIRED = "credentials of the store that run out"


class Fate(StrEnum):
    """What is special about a job."""

    PLAIN = "plain"
    """It has to succeed."""
    CANCELLED = "cancelled"
    """Somebody cancels it: it is cancelled, or was too far."""
    NONFINITE = "a NaN in a model"
    """It has to fail, and name the tensor."""
    POISON = "a part that kills its worker"
    """It has to fail, and name the tensor."""
    RIVAL = "two jobs for one output"
    """It and the one before it: exactly one succeeds, unless the first is over when the second begins."""
    SWAPPED = "an input overwritten half-way"
    """It fails and names the file, or was past reading it."""


ON_STORE = (
    Kind.STORE_ERRORS,
    Kind.STORE_RESETS,
    Kind.STORE_TRUNCATED,
    Kind.STORE_FLIPS,
    Kind.STORE_READ_FLIPS,
    Kind.STORE_LOST_ANSWERS,
    Kind.STORE_SLOW,
    Kind.STORE_EXPIRED,
)
"""What a proxy before an S3 server does; a directory has none."""

ON_DISK = (Kind.FULL_DISK,)
"""What only a directory has."""

ONCE = (
    Kind.POWER_CUT,
    Kind.EMPTY_REDIS,
    Kind.PAUSE_SCHEDULER,
    Kind.PAUSE_COMMIT,
    Kind.LOSE_UPLOAD,
    Kind.FULL_DISK,
    Kind.STORE_READ_FLIPS,
    Kind.STORE_EXPIRED,
)
"""What comes once in a run at most; everything else twice."""

ON_FLEET = (Kind.KILL_DRIVER, Kind.KILL_WARDEN, Kind.KILL_RAYLET, Kind.KILL_GCS)
"""What ends a scheduler's local Ray: two of them at one scheduler in a run are enough."""


@dataclass(frozen=True, slots=True)
class When:
    """A moment: so long after a job has come to a stage, or at once when it is past it."""

    job: int
    """Number of the job."""
    stage: Stage
    """The stage."""
    delay_s: float
    """How long after it, in seconds."""

    def __str__(self) -> str:
        return f"{self.delay_s:.2f} s after job {self.job} is {self.stage}"


@dataclass(frozen=True, slots=True)
class Job:
    """A merge that is submitted."""

    number: int
    """Its number, from 0."""
    recipe: str
    """Its recipe's name, see :mod:`tests.chaos.inputs`."""
    at_s: float
    """When it is submitted, in seconds after the beginning."""
    fate: Fate
    """What is special about it."""
    cancel: When | None = None
    """When it is cancelled, if it is."""
    deleted: bool = False
    """Whether it is deleted when all have ended."""

    def __str__(self) -> str:
        special = "" if self.fate == Fate.PLAIN else f", {self.fate}"
        cancelled = f", cancelled {self.cancel}" if self.cancel else ""
        deleted = ", deleted in the end" if self.deleted else ""
        return f"job {self.number}: {self.recipe} at {self.at_s:.1f} s{special}{cancelled}{deleted}"


@dataclass(frozen=True, slots=True)
class Strike:
    """One thing that is done."""

    kind: Kind
    """What."""
    owner: bool
    """To the scheduler that has the job at that moment, or to the other one."""
    lasts_s: float
    """How long, where it lasts."""
    step: int = 0
    """At which change of a commit, from 0, where it waits for one."""

    def __str__(self) -> str:
        whose = {True: " (owner)", False: " (other)"}[self.owner]
        return (
            f"{self.kind}{whose if self.kind in AT_SCHEDULER else ''}"
            + (f" for {self.lasts_s:.1f} s" if self.lasts_s else "")
            + (f", at change {self.step}" if self.kind == Kind.PAUSE_COMMIT else "")
        )


@dataclass(frozen=True, slots=True)
class Blow:
    """Strikes that come together."""

    when: When
    """The moment."""
    strikes: tuple[Strike, ...]
    """What comes then, one right after the other."""

    def __str__(self) -> str:
        return f"{self.when}: {' + '.join(map(str, self.strikes))}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    seed: int
    """What it was made from."""
    store: str
    """``files`` or ``s3``."""
    part_pause_s: float
    """How long every part is held up, so that more of them are met half-way."""
    jobs: tuple[Job, ...]
    """The jobs, in the order of their numbers."""
    blows: tuple[Blow, ...]
    """What is done to them."""

    def __str__(self) -> str:
        lines = [f"seed {self.seed} on {self.store}, {self.part_pause_s:.2f} s more a part"]
        return "\n  ".join([*lines, *map(str, self.jobs), *map(str, self.blows)])

    @property
    def injected(self) -> Counter[str]:
        """How often each thing is done."""
        return Counter(
            [
                *(str(strike.kind) for blow in self.blows for strike in blow.strikes),
                *(str(job.fate) for job in self.jobs if job.fate != Fate.PLAIN),
            ]
        )


AT_SCHEDULER = (Kind.KILL_SCHEDULER, Kind.PAUSE_SCHEDULER, Kind.KILL_WORKER, *ON_FLEET)
"""What is done to one scheduler or to its Ray."""

_WEIGHTS: Mapping[Kind, int] = {
    **{kind: 1 if kind in ON_STORE else 2 for kind in Kind},
    Kind.PAUSE_COMMIT: 3,
    Kind.EMPTY_REDIS: 1,
}
_FATES: Mapping[Fate, int] = {
    Fate.PLAIN: 10,
    Fate.CANCELLED: 4,
    Fate.RIVAL: 2,
    Fate.NONFINITE: 1,
    Fate.SWAPPED: 1,
    Fate.POISON: 1,
}
_LASTS: Mapping[Kind, tuple[float, float]] = {
    Kind.PAUSE_SCHEDULER: (4.0, 6.0),  # leases last three
    Kind.PAUSE_COMMIT: (4.0, 6.0),
    Kind.PARTITION_REDIS: (0.5, 6.0),
    Kind.POWER_CUT: (0.2, 4.0),
    Kind.FULL_DISK: (0.2, 1.0),
    **dict.fromkeys(ON_STORE, (0.5, 3.0)),
    Kind.STORE_EXPIRED: (0.2, 1.0),
}
_AFTER: Mapping[Stage, float] = {
    Stage.QUEUED: 0.1,
    Stage.PLANNING: 0.1,
    Stage.RUNNING: 0.8,
    Stage.HALF: 0.3,
    Stage.COMMITTING: 0.15,
}
"""Longest delay after a stage, in seconds: about as long as it takes."""
_COMMIT_STEPS = 24
"""As many changes as most commits make, and more than some."""


def make_plan(seed: int, store: str, recipes: Sequence[str]) -> Plan:
    """The run of a seed; the same of all three is the same plan.

    :param store: ``files`` or ``s3``.
    :param recipes: names of recipes that succeed.
    """
    chance = random.Random(f"{seed} {store}")
    jobs = tuple(_jobs(chance, recipes))
    return Plan(seed, store, chance.choice([0.0, 0.02, 0.1]), jobs, tuple(_blows(chance, len(jobs), store)))


def _jobs(chance: random.Random, recipes: Sequence[str]) -> Iterable[Job]:
    at_s, once = 0.0, {Fate.POISON, Fate.SWAPPED}
    for number in range(chance.randint(3, 5)):
        fate = chance.choices(list(_FATES), list(_FATES.values()))[0]
        if number == 0 or (fate in {Fate.POISON, Fate.SWAPPED} and fate not in once):
            fate = Fate.PLAIN
        once.discard(fate)
        if fate != Fate.RIVAL:  # a rival comes at once
            at_s += chance.uniform(0.0, 2.5)
        cancel = None
        if fate == Fate.CANCELLED:
            cancel = _moment(chance, number)
        yield Job(number, chance.choice(recipes), round(at_s, 1), fate, cancel, chance.random() < 0.2)


def _blows(chance: random.Random, jobs: int, store: str) -> Iterable[Blow]:
    kinds = [kind for kind in Kind if kind not in (ON_DISK if store == "s3" else ON_STORE)]
    left = Counter({kind: 1 if kind in ONCE else 2 for kind in kinds})
    fleets = 3  # each takes a new Ray some seconds, which is most of what a run takes
    for _ in range(chance.randint(2, 5)):
        strikes: list[Strike] = []
        for _ in range(chance.choices([1, 2, 3], [6, 3, 1])[0]):
            taken = {strike.kind for strike in strikes}
            open_ = [
                kind
                for kind in kinds
                if left[kind] and kind not in taken and (fleets or kind not in (*ON_FLEET, Kind.POWER_CUT))
            ]
            kind = chance.choices(open_, [_WEIGHTS[kind] for kind in open_])[0]
            left[kind] -= 1
            fleets -= kind in (*ON_FLEET, Kind.POWER_CUT)
            lasts_s = round(chance.uniform(*_LASTS[kind]), 1) if kind in _LASTS else 0.0
            if kind == Kind.STORE_EXPIRED and chance.random() < 0.6:
                lasts_s = 0.0  # others are there before these have run out
            step = chance.randrange(_COMMIT_STEPS) if kind == Kind.PAUSE_COMMIT else 0
            strikes.append(Strike(kind, chance.random() < 0.8, lasts_s, step))
        # What is everywhere at once comes last: nothing is left to be struck after it.
        strikes.sort(key=lambda strike: strike.kind == Kind.POWER_CUT)
        yield Blow(_moment(chance, chance.randrange(jobs)), tuple(strikes))


def _moment(chance: random.Random, job: int) -> When:
    stage = chance.choices(list(_AFTER), [1, 2, 4, 4, 4])[0]
    return When(job, stage, round(chance.uniform(0.0, _AFTER[stage]), 2))
