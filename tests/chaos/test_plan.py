"""A plan is a function of its seed, and over many seeds nothing is left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.inputs import RECIPES
from tests.chaos.plan import ON_DISK, ON_FLEET, ON_STORE, STAGES, Fate, Kind, Plan, make_plan

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
NAMES = tuple(RECIPES)
SEEDS = range(400)


def plans(store: str) -> list[Plan]:
    return [make_plan(seed, store, NAMES) for seed in SEEDS]


@pytest.mark.parametrize("store", ["files", "s3"])
def test_the_same_seed_is_the_same_plan(store: str) -> None:
    assert plans(store) == plans(store)
    assert len(set(map(str, plans(store)))) == len(SEEDS)


def test_the_store_is_part_of_it() -> None:
    assert str(make_plan(1, "files", NAMES)) != str(make_plan(1, "s3", NAMES))


@pytest.mark.parametrize("store", ["files", "s3"])
def test_everything_is_done_sometimes_and_in_every_state(store: str) -> None:
    wanted = {kind for kind in Kind if kind not in (ON_DISK if store == "s3" else ON_STORE)}
    done = sum((plan.injected for plan in plans(store)), Counter[str]())
    assert set(done) == {*map(str, wanted), *(str(fate) for fate in Fate if fate != Fate.PLAIN)}
    assert min(done.values()) >= len(SEEDS) / 20
    met = {
        (strike.kind, blow.when.stage)
        for plan in plans(store)
        for blow in plan.blows
        for strike in blow.strikes
    }
    assert met >= {(kind, stage) for kind in wanted for stage in STAGES[:-1] if kind not in ON_STORE}


@pytest.mark.parametrize("store", ["files", "s3"])
def test_plans_are_such_as_every_job_can_outlive(store: str) -> None:
    for plan in plans(store):
        assert [job.number for job in plan.jobs] == list(range(len(plan.jobs)))
        assert plan.jobs[0].fate == Fate.PLAIN  # so one at least has to succeed
        assert {job.recipe for job in plan.jobs} <= set(NAMES)
        assert all((job.cancel is not None) == (job.fate == Fate.CANCELLED) for job in plan.jobs)
        assert all(
            earlier.at_s <= later.at_s for earlier, later in zip(plan.jobs, plan.jobs[1:], strict=False)
        )
        kinds = Counter(strike.kind for blow in plan.blows for strike in blow.strikes)
        assert max(kinds.values()) <= 2
        assert sum(kinds[kind] for kind in (*ON_FLEET, Kind.POWER_CUT)) <= 3
        assert all(blow.strikes and blow.when.job < len(plan.jobs) for blow in plan.blows)


def test_the_runs_of_ci_meet_the_worst() -> None:
    asked = re.findall(r"make chaos SEED=(\d+) STORE=(\w+)", (ROOT / ".ci" / "run").read_text())
    met = [make_plan(int(seed), store, NAMES) for seed, store in asked]
    worst = (
        Kind.PAUSE_COMMIT,
        Kind.POWER_CUT,
        Kind.FULL_DISK,
        Kind.LOSE_UPLOAD,
        Kind.EMPTY_REDIS,
        Kind.STORE_EXPIRED,
        Kind.STORE_READ_FLIPS,
    )
    assert {kind for plan in met for kind in plan.injected} >= set(map(str, worst))
    assert all("staged ties" in {job.recipe for job in plan.jobs} for plan in met)
    assert {store for _, store in asked} == {"files", "s3"}
