"""One run: a stack, the jobs of a plan, what is done to it, and what holds at the end."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import redis

from service.jobpages import JobStatus
from service.jobrecord import JobState
from tests.chaos import invariants
from tests.chaos.inputs import (
    NONFINITE_RECIPE,
    POISON_RECIPE,
    RECIPES,
    SMALL,
    Recipe,
    Undisturbed,
    put_swapped,
)
from tests.chaos.invariants import Blown, Outcome
from tests.chaos.places import Place
from tests.chaos.plan import STAGES, Blow, Fate, Job, Kind, Plan, Stage, When
from tests.chaos.processes import below, reap, still_there
from tests.chaos.stack import LEASE_S, NAMESPACE, PARTS_IN_FLIGHT, Stack
from tests.chaos.strikes import Striker
from workers.errors import JobStoreUnavailableError, MergemillError
from workers.store import join

STRIKE_WITHIN_S = 45.0
"""How long after the last job was submitted blows wait for their moments: then they come at once."""
END_WITHIN_S = 150.0
"""How long jobs may take once nothing is done any more."""
GONE_WITHIN_S = 20.0
"""How long what was killed, or below it, may be there afterwards."""

SWAPPED_RECIPE = Recipe("linear", ("base", "swapped"), SMALL, {}, {})


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run."""

    plan: Plan
    """The plan."""
    wrong: tuple[str, ...]
    """What did not hold; nothing, if all went well."""
    injected: dict[str, int]
    """What was done, and how often."""
    states: dict[str, int]
    """Jobs by the state that they ended in."""
    parts: int
    """Parts that were made."""
    repeats: int
    """How many of them had been begun before."""
    seconds: float
    """How long it took."""


@dataclass
class _Case:
    """A job on its way."""

    job: Job
    output: str
    outcome: Outcome
    id: str | None = None
    status: JobStatus | None = None
    owner: str | None = None
    thread: threading.Thread | None = None
    reached: dict[Stage, float] = field(default_factory=dict)


class Run:
    """One run of a plan.

    :param directory: what it keeps: a log of each process, and ``run.log`` of what was done to them when.
    :param scratch: a short path.
    :param place: the store, with the models.
    """

    def __init__(
        self, plan: Plan, directory: Path, scratch: Path, place: Place, undisturbed: Undisturbed
    ) -> None:
        self._plan = plan
        self._directory, self._scratch = directory, scratch
        self._place = place
        self._undisturbed = undisturbed
        self._root = join(place.root, "runs", f"{plan.seed}")
        self._over = threading.Event()
        outputs: list[str] = []
        self._cases = []
        for job in plan.jobs:
            outputs.append(outputs[-1] if job.fate == Fate.RIVAL else join(self._root, f"out-{job.number}"))
            self._cases.append(_Case(job, outputs[-1], Outcome(job, None)))

    def run(self) -> Result:
        """Do it all, and look."""
        began, before = time.monotonic(), {life.pid for life in below(os.getpid())}
        if any(job.fate == Fate.SWAPPED for job in self._plan.jobs):
            for version in ("swapped-old", "swapped"):
                put_swapped(self._place.store, join(self._root, version), self._plan.seed)
            put_swapped(self._place.store, join(self._root, "swapped-new"), self._plan.seed + 1)
        wrong: list[str] = []
        self._note(str(self._plan))
        with Stack(self._directory, self._scratch, self._place.settings, self._plan.part_pause_s) as stack:
            self._note("the stack is up")
            self._stack = stack
            striker = self._striker = Striker(stack, self._place.store, self._plan.seed)
            self._start = time.monotonic()
            try:
                for case in self._cases:
                    case.thread = threading.Thread(target=self._be_client, args=(case,))
                    case.thread.start()
                self._strike()
                striker.wait()
                self._wait_for_ends()
            finally:
                striker.wait()
                self._over.set()
                for case in self._cases:
                    if case.thread is not None:
                        case.thread.join()
            injected = dict(+striker.done)
            if stack.s3 is not None:
                injected |= {f"requests: {kind}": count for kind, count in stack.s3.injected.items()}
            self._gather()
            wrong += self._redis_keys()
            self._note("the stack is stopped")
        left = [life for life in below(os.getpid()) if life.pid not in before]
        wrong += [f"still runs: {life}" for life in still_there([*stack.doomed, *left], GONE_WITHIN_S)]
        reap()
        self._note("nothing runs any more")
        wrong += self._check(injected)
        states: dict[str, int] = defaultdict(int)
        for case in self._cases:
            states[str(case.outcome.state or "refused")] += 1
            if case.job.fate != Fate.PLAIN:
                injected[str(case.job.fate)] = injected.get(str(case.job.fate), 0) + 1
        made = [case.outcome.begun for case in self._cases]
        return Result(
            self._plan,
            tuple(wrong),
            injected,
            dict(states),
            sum(len(set(each)) for each in made),
            sum(len(each) - len(set(each)) for each in made),
            round(time.monotonic() - began, 1),
        )

    # The clients of the API

    def _be_client(self, case: _Case) -> None:
        """Submit a job until it is accepted or refused; cancel it at its moment."""
        job = case.job
        self._sleep_until(self._start + job.at_s)
        recipe = {
            Fate.NONFINITE: NONFINITE_RECIPE,
            Fate.POISON: POISON_RECIPE,
            Fate.SWAPPED: SWAPPED_RECIPE,
        }.get(job.fate, RECIPES[job.recipe])
        document = recipe.at(self._place.root, swapped=join(self._root, "swapped"))
        body = {"recipe": document, "output": case.output, "options": dict(recipe.options)}
        headers = {"Idempotency-Key": f"{self._plan.seed}-{job.number}"}
        with self._stack.client() as http:
            answer = self._ask(http, "/v1/merges", json=body, headers=headers)
            if answer is None or not answer.is_success:
                case.outcome.refused = "nobody answered" if answer is None else answer.text
                return
            case.id = answer.json()["id"]
            if job.cancel is not None and self._sleep_until_moment(job.cancel):
                answer = self._ask(http, f"/v1/merges/{case.id}/cancel")
                case.outcome.cancelled = None if answer is None else answer.status_code
            if job.fate == Fate.SWAPPED and self._sleep_until_moment(When(job.number, Stage.RUNNING, 0.2)):
                put_swapped(self._place.store, join(self._root, "swapped"), self._plan.seed + 1)

    def _ask(self, http: httpx.Client, path: str, **content: Any) -> httpx.Response | None:
        """POST until somebody answers who could do something about it."""
        while not self._over.is_set():
            try:
                answer = http.post(path, **content)
            except httpx.HTTPError:  # it was killed, and is started again
                self._over.wait(0.05)
                continue
            if answer.status_code < 500 and answer.status_code != 429:
                return answer
            self._over.wait(0.1)
        return None

    def _sleep_until(self, moment: float) -> None:
        self._over.wait(max(0.0, moment - time.monotonic()))

    def _sleep_until_moment(self, when: When) -> bool:
        """Whether it came before all was over."""
        while not self._over.wait(0.01):
            if self._has_come(when):
                return True
        return False

    # What is done to the stack

    def _strike(self) -> None:
        blows = list(self._plan.blows)
        latest = self._start + max(job.at_s for job in self._plan.jobs) + STRIKE_WITHIN_S
        while blows:
            self._look()
            due = [blow for blow in blows if self._has_come(blow.when) or time.monotonic() > latest]
            for blow in due:
                blows.remove(blow)
                self._blow(blow)
            time.sleep(0.015)

    def _blow(self, blow: Blow) -> None:
        status = self._cases[blow.when.job].status
        self._note_blow()
        for strike in blow.strikes:
            record, owner = (status.record, status.owner) if status else (None, None)
            done = self._striker.strike(strike, record, owner)
            self._note(f"{blow.when}: {strike}{'' if done else ', which found nothing to strike'}")

    def _note(self, what: str) -> None:
        with (self._directory / "run.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {what}\n")

    def _note_blow(self) -> None:
        """Keep how the jobs stand before anything is done."""
        for case in self._cases:
            if case.id is not None and Stage.ENDED not in case.reached:
                with contextlib.suppress(JobStoreUnavailableError):
                    self._keep(case, case.id)

    def _keep(self, case: _Case, job: str) -> None:
        """Keep how a job stands: what is recorded now must not be made again."""
        recorded = frozenset(self._stack.jobs.parts(job))
        record = self._stack.jobs.get(job)
        if record.state == JobState.RUNNING:
            case.outcome.blows.append(Blown(time.time(), recorded, record.parts_total, record.attempt))

    def _has_come(self, when: When) -> bool:
        case = self._cases[when.job]
        found = [case.reached[stage] for stage in STAGES[STAGES.index(when.stage) :] if stage in case.reached]
        if case.outcome.refused is not None:
            return True
        return bool(found) and time.monotonic() >= min(found) + when.delay_s

    def _look(self) -> None:
        """See how far every job is."""
        for case in self._cases:
            if case.id is not None and Stage.ENDED not in case.reached:
                with contextlib.suppress(JobStoreUnavailableError):
                    case.status = self._stack.jobs.status(case.id)
                    if case.status.owner not in {case.owner, None}:
                        if case.owner is not None:  # also by a lease that ran out because the machine is slow
                            self._keep(case, case.id)
                        case.owner = case.status.owner
                    stage = _stage(case.status)
                    if stage not in case.reached:
                        case.reached[stage] = time.monotonic()
                        self._note(f"job {case.job.number} {case.id} is {stage}, of {case.status.owner}")

    def _wait_for_ends(self) -> None:
        deadline = time.monotonic() + END_WITHIN_S
        while time.monotonic() < deadline:
            self._look()
            if all(case.outcome.refused or Stage.ENDED in case.reached for case in self._cases):
                break
            time.sleep(0.05)
        # A cancel may be on its way to a job that has ended.
        for case in self._cases:
            if case.thread is not None:
                case.thread.join(max(0.0, deadline - time.monotonic()))

    # What holds at the end

    def _gather(self) -> None:
        begun = defaultdict(list)
        if self._stack.witness.exists():
            for line in self._stack.witness.read_text().splitlines():
                note = json.loads(line)
                begun[note["job"]].append(note["part"])
        with self._stack.client() as http:
            for case in self._cases:
                if case.id is not None:
                    case.outcome.record = self._stack.jobs.get(case.id)
                    case.outcome.begun = begun[case.id]
                    case.outcome.told = http.get(f"/v1/merges/{case.id}").json().get("state", "")

    def _redis_keys(self) -> list[str]:
        """What is wrong with the keys in Redis, when what expires has had the time to."""
        deadline = time.monotonic() + LEASE_S + 3.0
        with redis.Redis.from_url(self._stack.valkey.url, decode_responses=True) as client:
            while True:
                found = [key.removeprefix(f"{NAMESPACE}:") for key in client.scan_iter(f"{NAMESPACE}:*")]
                wrong = list(invariants.keys(found))
                if not wrong or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            known = client.zcard(f"{NAMESPACE}:jobs")
        if known != (accepted := sum(case.id is not None for case in self._cases)):
            wrong.append(f"Redis has {known} jobs, and {accepted} were accepted")
        return wrong

    def _check(self, struck: dict[str, int]) -> Iterator[str]:
        outcomes = [case.outcome for case in self._cases]
        late = str(Kind.PAUSE_SCHEDULER) in struck
        for case in self._cases:
            outcome = case.outcome
            yield from invariants.ends(outcome, struck)
            if outcome.record is None:
                continue
            others = any(
                each is not outcome and each.record is not None and each.record.output == case.output
                and each.state == JobState.SUCCEEDED
                for each in outcomes
            )  # fmt: skip
            if not (others and outcome.state != JobState.SUCCEEDED):
                there = self._place.digests(case.output)
                yield from invariants.content(outcome, there, self._wanted(case), others, late)
            void = str(Kind.LOSE_UPLOAD) in struck or str(Kind.STORE_LOST_ANSWERS) in struck
            yield from invariants.repeated(outcome, PARTS_IN_FLIGHT, void)
        yield from invariants.rivals(outcomes)
        yield from (f"an upload is left: {upload}" for upload in self._place.uploads(self._root))

    def _wanted(self, case: _Case) -> list[dict[str, str]]:
        """What may be at the output of a job that succeeded."""
        if case.outcome.state != JobState.SUCCEEDED:
            return []
        if case.job.fate != Fate.SWAPPED:
            return [self._undisturbed.of(RECIPES[case.job.recipe])]
        recipe, made = SWAPPED_RECIPE, []
        for version in ("swapped-old", "swapped-new"):
            found = self._undisturbed.of(recipe, swapped=join(self._root, version))
            # The small files name the model that it was made from.
            made.append({name: own if name.endswith(".safetensors") else "" for name, own in found.items()})
        return made

    def clean(self) -> None:
        """Remove what the run left at its place."""
        with contextlib.suppress(MergemillError):
            for info in list(self._place.store.list(self._root + "/")):
                self._place.store.delete(info.uri)


def _stage(status: JobStatus) -> Stage:
    record = status.record
    if record.state.is_terminal:
        return Stage.ENDED
    if (
        record.state == JobState.RUNNING
        and record.parts_total
        and 2 * status.parts_done >= record.parts_total
    ):
        return Stage.HALF
    return Stage(str(record.state))
