"""Those who use the service while it is struck: they submit, cancel, follow, overwrite an input, and delete."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from service.jobs.pages import JobStatus
from tests.chaos.inputs import NONFINITE_RECIPE, POISON_RECIPE, RECIPES, SMALL, Recipe, put_swapped
from tests.chaos.invariants import Outcome
from tests.chaos.places import Place
from tests.chaos.plan import STAGES, Fate, Job, Stage, When
from tests.chaos.stack import Stack
from tests.chaos.told import SECRET, Follower
from workers.store import join

SWAPPED_RECIPE: Final = Recipe("linear", ("base", "swapped"), SMALL, {}, {})


@dataclass
class Case:
    """A job on its way."""

    job: Job
    """What was planned."""
    output: str
    """Where it goes."""
    outcome: Outcome
    """What is known about it."""
    id: str | None = None
    """Its id, when it was accepted."""
    status: JobStatus | None = None
    """How it stood when it was looked at last."""
    owner: str | None = None
    """The scheduler that had it then, or had had it last."""
    reached: dict[Stage, float] = field(default_factory=dict)
    """When it came to each stage, on the steady clock."""
    followers: list[Follower] = field(default_factory=list)
    """Who follows it; of one that was submitted again, several."""
    is_gone: bool = False
    """Whether Redis was emptied after it had ended: nobody knows it any more."""

    @property
    def is_open(self) -> bool:
        """Whether it was accepted and has not ended, as far as was seen."""
        return self.id is not None and Stage.ENDED not in self.reached

    def has_come(self, when: When) -> bool:
        """Whether this moment has come for it."""
        found = [self.reached[stage] for stage in STAGES[STAGES.index(when.stage) :] if stage in self.reached]
        if self.outcome.refused is not None:
            return True
        return bool(found) and time.monotonic() >= min(found) + when.delay_s


class Clients:
    """One client for each case, in a thread of its own, and one that follows it, in another.

    :param hook: URL that webhooks go to.
    """

    def __init__(self, stack: Stack, place: Place, root: str, seed: int, hook: str) -> None:
        self.submitting = threading.RLock()
        """Held while anything is being submitted: a request whose answer is still to come."""
        self._stack, self._place, self._root = stack, place, root
        self._seed, self._hook = seed, hook
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start = time.monotonic()

    def begin(self, cases: Sequence[Case]) -> None:
        """Let all of them begin; times of the plan count from here."""
        self._start = time.monotonic()
        for case in cases:
            self._run(self._be_client, case)

    def end(self, within_s: float = 0.0) -> None:
        """Wait for all of them to have done what they were to do, but no longer than so; have them stop."""
        deadline = time.monotonic() + within_s
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._over.set()
        for thread in list(self._threads):
            thread.join()

    def submit(self, case: Case, again: bool = False) -> None:
        """Submit a job until it is accepted or refused; from then on it is followed.

        :param again: whether it was accepted before, and lost.
        """
        job = case.job
        fates = {
            Fate.NONFINITE: NONFINITE_RECIPE,
            Fate.POISON: POISON_RECIPE,
            Fate.SWAPPED: SWAPPED_RECIPE,
        }
        recipe = fates.get(job.fate, RECIPES[job.recipe])
        document = recipe.at(self._place.root, swapped=join(self._root, "swapped"))
        body = {
            "recipe": document,
            "output": case.output,
            "options": dict(recipe.options),
            "webhook": {"url": self._hook, "secret": SECRET},
        }
        headers = {"Idempotency-Key": f"{self._seed}-{job.number}{'-again' if again else ''}"}
        with self._stack.client() as http, self.submitting:
            answer = self._ask(http, "/v1/merges", json=body, headers=headers)
            if answer is None or not answer.is_success:
                case.id, case.outcome.record = None, None
                case.outcome.refused = "nobody answered" if answer is None else answer.text
                return
            case.id = answer.json()["id"]
            self.follow(case)

    def follow(self, case: Case) -> None:
        """Follow a job, from its beginning."""
        if case.id is not None:
            case.followers.append(Follower(case.id))
            self._run(self._follow, case.followers[-1])

    def _be_client(self, case: Case) -> None:
        """Submit a job; cancel it at its moment, or overwrite its input."""
        job = case.job
        self._over.wait(max(0.0, self._start + job.at_s - time.monotonic()))
        self.submit(case)
        if case.id is None:
            return
        if job.cancel is not None and self._sleep_until_moment(case, job.cancel):
            with self._stack.client() as http:
                answer = self._ask(http, f"/v1/merges/{case.id}/cancel")
                case.outcome.cancelled = None if answer is None else answer.status_code
        if job.fate == Fate.SWAPPED and self._sleep_until_moment(case, When(job.number, Stage.RUNNING, 0.2)):
            put_swapped(self._place.store, join(self._root, "swapped"), self._seed + 1)

    def _follow(self, follower: Follower) -> None:
        with self._stack.client() as http:
            follower.follow(http, self._over)

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

    def _sleep_until_moment(self, case: Case, when: When) -> bool:
        """Whether it came before all was over."""
        while not self._over.wait(0.01):
            if case.has_come(when):
                return True
        return False

    def _run(self, action: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=action, args=arguments)
        thread.start()
        self._threads.append(thread)


def delete(http: httpx.Client, job: str, within_s: float) -> str | None:
    """Delete a job that has ended; what is wrong, if it is still there then."""
    deadline = time.monotonic() + within_s
    while (answer := http.delete(f"/v1/merges/{job}")).status_code != httpx.codes.NO_CONTENT:
        # Its output may still be cleared away.
        if answer.status_code != httpx.codes.CONFLICT or time.monotonic() > deadline:
            return f"{job} cannot be deleted: {answer.text}"
        time.sleep(0.1)
    found = http.get(f"/v1/merges/{job}").status_code
    return None if found == httpx.codes.NOT_FOUND else f"{job} was deleted, and then answered with {found}"
