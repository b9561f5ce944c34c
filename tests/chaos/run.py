"""One run: a stack, the jobs of a plan, what is done to it, and what holds at the end."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from service.jobs.pages import JobStatus
from service.jobs.record import HistoryEntry, JobState
from tests.chaos import invariants, told
from tests.chaos.clients import SWAPPED_RECIPE, Case, Clients, delete
from tests.chaos.disk import Disk, small_disk
from tests.chaos.holding import came_back, notes
from tests.chaos.inputs import RECIPES, Undisturbed, put_swapped
from tests.chaos.invariants import Blown, Outcome
from tests.chaos.lost import Known, empty
from tests.chaos.places import Place
from tests.chaos.plan import ON_DISK, Blow, Fate, Kind, Plan, Stage
from tests.chaos.processes import below, reap, still_there
from tests.chaos.stack import NAMESPACE, PARTS_IN_FLIGHT, Stack
from tests.chaos.strikes import Striker
from tests.servers.receiver import Receiver, status
from workers.errors import JobStoreUnavailableError, MergemillError
from workers.store import join
from workers.store.uris import to_path

STRIKE_WITHIN_S = 45.0
"""How long after the last job was submitted blows wait for their moments: then they come at once."""
END_WITHIN_S = 150.0
"""How long jobs may take once nothing is done any more."""
GONE_WITHIN_S = 20.0
"""How long what was killed, or below it, may be there afterwards."""

TOLD_WITHIN_S = 20.0
"""How long a client may take to hear of the last end."""
DELETED_WITHIN_S = 75.0
SWEPT_WITHIN_S = 75.0
"""How long a sweep, or the lease of one that was killed, may be waited for."""


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
    told: dict[str, int]
    """What was told of them: events that were followed, how often followers came again, webhooks, deletions."""
    seconds: float
    """How long it took."""


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
        self._told: Counter[str] = Counter()
        outputs: list[str] = []
        self._cases = []
        for job in plan.jobs:
            outputs.append(outputs[-1] if job.fate == Fate.RIVAL else join(self._root, f"out-{job.number}"))
            self._cases.append(Case(job, outputs[-1], Outcome(job, None)))

    def run(self) -> Result:
        """Do it all, and look; nothing is left at the place."""
        with contextlib.ExitStack() as stack:
            disk = None
            if any(strike.kind in ON_DISK for blow in self._plan.blows for strike in blow.strikes):
                disk = stack.enter_context(small_disk(Path(to_path(self._root))))
                if disk is None:
                    self._note("no file system may be mounted here, so none will be full")
            stack.callback(self._clean)
            return self._run(disk)

    def _run(self, disk: Disk | None) -> Result:
        began, before = time.monotonic(), {life.pid for life in below(os.getpid())}
        if any(job.fate == Fate.SWAPPED for job in self._plan.jobs):
            for version in ("swapped-old", "swapped"):
                put_swapped(self._place.store, join(self._root, version), self._plan.seed)
            put_swapped(self._place.store, join(self._root, "swapped-new"), self._plan.seed + 1)
        wrong: list[str] = []
        refused = self._plan.seed % 2
        self._note(str(self._plan))
        place = self._place
        with (
            Receiver(*[status(500)] * refused) as receiver,
            Stack(
                self._directory, self._scratch, place.settings, place.keys, self._plan.part_pause_s
            ) as stack,
        ):
            self._note("the stack is up")
            self._stack = stack
            striker = self._striker = Striker(stack, place, disk, self._plan.seed, self._note_blow)
            clients = self._clients = Clients(stack, place, self._root, self._plan.seed, receiver.url)
            self._start = time.monotonic()
            try:
                clients.begin(self._cases)
                self._strike()
                while not striker.is_over:
                    self._look()
                    time.sleep(0.05)
                self._wait_for_ends()
                clients.end(TOLD_WITHIN_S)
            finally:
                striker.wait()
                clients.end()
            injected = dict(+striker.done)
            if stack.s3 is not None:
                injected |= {f"requests: {kind}": count for kind, count in stack.s3.injected.items()}
            self._gather()
            wrong += self._check_told(receiver, refused)
            wrong += self._left()
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
            dict(self._told),
            round(time.monotonic() - began, 1),
        )

    # What is done to the stack

    def _strike(self) -> None:
        blows = list(self._plan.blows)
        latest = self._start + max(job.at_s for job in self._plan.jobs) + STRIKE_WITHIN_S
        while blows:
            self._look()
            due = [
                blow
                for blow in blows
                if self._cases[blow.when.job].has_come(blow.when) or time.monotonic() > latest
            ]
            for blow in due:
                blows.remove(blow)
                self._blow(blow)
            time.sleep(0.015)

    def _blow(self, blow: Blow) -> None:
        status = self._cases[blow.when.job].status
        self._note_blow()
        for strike in blow.strikes:
            record, owner = (status.record, status.owner) if status else (None, None)
            if strike.kind == Kind.EMPTY_REDIS:
                self._empty_redis()
            done = self._striker.strike(strike, record, owner)
            self._note(f"{blow.when}: {strike}{'' if done else ', which found nothing to strike'}")

    def _note(self, what: str) -> None:
        with (self._directory / "run.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {what}\n")

    def _note_blow(self) -> None:
        """Keep how the jobs stand before anything is done."""
        for case in self._cases:
            if case.is_open and case.id is not None:
                with contextlib.suppress(JobStoreUnavailableError):
                    self._keep(case, case.id)

    def _keep(self, case: Case, job: str) -> None:
        """Keep how a job stands: what is recorded now must not be made again."""
        recorded = frozenset(self._stack.jobs.parts(job))
        record = self._stack.jobs.get(job)
        if record.state == JobState.RUNNING:
            case.outcome.blows.append(Blown(time.time(), recorded, record.parts_total, record.attempt))

    def _empty_redis(self) -> None:
        """Lose Redis, and do what an operator does then: recover what had begun, submit again what had not."""
        with self._clients.submitting:  # what is being submitted has its answer, and its client knows of it
            self._look()
            outputs = {case.id: case.output for case in self._cases if case.id and not case.is_gone}
            known = empty(self._stack, outputs)
            for case in self._cases:
                if case.id is not None and case.id in known:
                    self._go_on(case, known[case.id])

    def _go_on(self, case: Case, known: Known) -> None:
        """Have a job go on that was recovered; submit another in its place, unless all was done but for saying so."""
        outcome, was = case.outcome, known.status.record
        outcome.lost, outcome.record = True, was
        for follower in case.followers:
            follower.is_void = True
        if known.kept is not None:
            lost = len(known.recorded - known.kept)
            outcome.blows.append(Blown(time.time(), known.kept, was.parts_total, was.attempt, lost))
            case.reached.pop(Stage.ENDED, None)
            self._clients.follow(case)
        elif was.state.is_terminal:
            case.is_gone = True
            case.reached.setdefault(Stage.ENDED, time.monotonic())
        elif was.state == JobState.COMMITTING and any(
            name.endswith(".index.json") for name in self._place.digests(case.output)
        ):
            entry = HistoryEntry(at=time.time(), event="succeeded", state=JobState.SUCCEEDED)
            changes = {"state": JobState.SUCCEEDED, "history": (*was.history, entry)}
            outcome.record = was.model_copy(update=changes)
            case.is_gone, case.reached[Stage.ENDED] = True, time.monotonic()
        else:
            outcome.blows.clear()
            self._clients.submit(case, again=True)
        self._note(f"job {case.job.number} {was.id} goes on as {case.id}")

    def _look(self) -> None:
        """See how far every job is."""
        for case in self._cases:
            if case.is_open and case.id is not None:
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

    # What holds at the end

    def _gather(self) -> None:
        begun = defaultdict(list)
        for note in notes(self._stack.witness):
            begun[note["job"]].append(note["part"])
        with self._stack.client() as http:
            for case in self._cases:
                outcome = case.outcome
                if case.id is not None:
                    outcome.begun = begun[case.id]
                if case.is_gone:
                    outcome.told = str(outcome.state)
                elif case.id is not None:
                    outcome.record = self._stack.jobs.get(case.id)
                    outcome.told = http.get(f"/v1/merges/{case.id}").json().get("state", "")

    def _check_told(self, receiver: Receiver, refused: int) -> Iterator[str]:
        """What is wrong with what clients heard, and with what they had deleted."""
        with self._stack.client() as http, redis.Redis.from_url(self._stack.valkey.url) as client:
            heard = [case for case in self._cases if case.id is not None and not case.is_gone]
            for case in heard:
                follower, found = case.followers[-1], client.xrange(f"{NAMESPACE}:job:{case.id}:events")
                entries: Any = found
                written = [(key.decode(), fields[b"event"].decode()) for key, fields in entries]
                yield from told.events(
                    case.outcome.name, [(each.id, each.event) for each in follower.heard], written
                )
                self._told["events followed"] += len(follower.heard)
                self._told["times that a follower came again"] += follower.again
            # A job that is recovered has nobody any more who wants to be told: that was in Redis alone.
            states = {
                case.id: str(case.outcome.state)
                for case in heard
                if case.id is not None and not (case.outcome.was_recovered)
            }
            was_lost = any(case.outcome.lost for case in self._cases)
            yield from told.wait_for_deliveries(states, receiver, 0 if was_lost else refused)
            self._told["webhooks received"] = len(receiver.received)
            for case in heard:
                state = case.outcome.state
                if case.job.deleted and case.id is not None and state is not None and state.is_terminal:
                    if (problem := delete(http, case.id, DELETED_WITHIN_S)) is not None:
                        yield problem
                        continue
                    case.is_gone = True
                    self._told["jobs deleted"] += 1
                    if client.keys(f"{NAMESPACE}:job:{case.id}*"):
                        yield f"{case.outcome.name} was deleted, and Redis has keys of it"

    def _left(self) -> list[str]:
        """What is left in Redis and at outputs, when what expires or is swept has had the time to."""
        deadline = time.monotonic() + SWEPT_WITHIN_S
        with redis.Redis.from_url(self._stack.valkey.url, decode_responses=True) as client:
            while True:
                found = [key.removeprefix(f"{NAMESPACE}:") for key in client.scan_iter(f"{NAMESPACE}:*")]
                wrong = list(invariants.keys(found))
                wrong += [f"an upload is left: {upload}" for upload in self._place.uploads(self._root)]
                wrong += [
                    f"{case.outcome.name} is not swept"
                    for case in self._cases
                    if client.hexists(f"{NAMESPACE}:job:{case.id}", "left")
                ]
                if not wrong or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            known = client.zcard(f"{NAMESPACE}:jobs")
        accepted = sum(case.id is not None and not case.is_gone for case in self._cases)
        if known != accepted:
            wrong.append(f"Redis has {known} jobs, and {accepted} were accepted")
        return wrong

    def _check(self, struck: dict[str, int]) -> Iterator[str]:
        outcomes = [case.outcome for case in self._cases]
        late = bool({str(Kind.PAUSE_SCHEDULER), str(Kind.PAUSE_COMMIT)} & {*struck})
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
        yield from invariants.rivals(outcomes, struck)
        yield from came_back(notes(self._directory / "owners.jsonl"))

    def _wanted(self, case: Case) -> list[dict[str, str]]:
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

    def _clean(self) -> None:
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
