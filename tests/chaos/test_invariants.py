"""Every invariant, broken once: what is wrong is said. What is not wrong is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from service.jobs.record import HistoryEntry, JobRecord, JobState, new_job
from tests.chaos import invariants
from tests.chaos.inputs import NONFINITE, POISON, digests
from tests.chaos.invariants import Blown, Outcome
from tests.chaos.places import Place
from tests.chaos.plan import Fate, Job, Kind
from tests.chaos.processes import below, kill, life_of, still_there
from workers.store import StoreSettings, from_path, join, open_stores

pytestmark = pytest.mark.fast

PLAIN = Job(0, "linear", 0.0, Fate.PLAIN)


def record(state: JobState, *events: str, error: dict[str, Any] | None = None) -> JobRecord:
    """A record that ended so, with these events before."""
    queued = new_job({}, "file:///out", {}, 1.0)
    entries = [HistoryEntry(at=1.0, event=event, state=JobState.RUNNING) for event in events]
    if state.is_terminal:
        entries.append(HistoryEntry(at=2.0, event=str(state), state=state))
    changes = {"state": state, "error": error, "history": (*queued.history, *entries)}
    return queued.model_copy(update=changes)


def outcome(state: JobState, fate: Fate = Fate.PLAIN, *events: str, **more: Any) -> Outcome:
    """The outcome of a job of that fate."""
    error = {"type": "E", "detail": more.pop("error")} if "error" in more else None
    return Outcome(Job(0, "linear", 0.0, fate), record(state, *events, error=error), told=str(state), **more)


def said(found: Iterable[str]) -> str:
    """All that is wrong."""
    return "\n".join(found)


SUCCEEDED, FAILED, CANCELLED = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED


@pytest.mark.parametrize(
    "fine",
    [
        outcome(SUCCEEDED),
        outcome(CANCELLED, Fate.CANCELLED, cancelled=202),
        outcome(SUCCEEDED, Fate.CANCELLED, cancelled=409),
        outcome(FAILED, Fate.NONFINITE, error=f"tensor {NONFINITE}"),
        outcome(FAILED, Fate.POISON, error=f"{POISON}: given up"),
        outcome(FAILED, Fate.SWAPPED, error="s3://b/swapped/model.safetensors changed"),
        outcome(FAILED, Fate.RIVAL, error="OutputConflictError"),
        outcome(FAILED, Fate.CANCELLED, cancelled=404, lost=True, error="out-1 already holds a checkpoint"),
        Outcome(Job(1, "linear", 0.0, Fate.RIVAL), None, refused="it holds a checkpoint"),
    ],
)
def test_ends_that_are_as_they_should_be(fine: Outcome) -> None:
    assert said(invariants.ends(fine, [])) == ""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (outcome(JobState.RUNNING), "did not end"),
        (outcome(FAILED, error="no reason"), "no reason"),
        (outcome(CANCELLED), "is cancelled"),
        (outcome(SUCCEEDED, Fate.CANCELLED, cancelled=202), "is succeeded"),
        (outcome(FAILED, Fate.CANCELLED, cancelled=404, lost=True, error="no reason"), "no reason"),
        (outcome(SUCCEEDED, Fate.NONFINITE), "is succeeded"),
        (outcome(FAILED, Fate.POISON, error="some part"), "is not in the error"),
        (outcome(SUCCEEDED, Fate.PLAIN, "restarted"), "started over"),
        (outcome(SUCCEEDED, Fate.PLAIN, "x"), ""),
        (Outcome(PLAIN, None, refused="500"), "was refused: 500"),
        (Outcome(PLAIN, record(SUCCEEDED), told="running"), "the API says running"),
    ],
)
def test_ends_that_are_not(wrong: Outcome, words: str) -> None:
    assert words in said(invariants.ends(wrong, [str(Kind.KILL_API)]))


def test_two_winners_and_none() -> None:
    won, lost = outcome(SUCCEEDED), outcome(FAILED, error="OutputConflictError")
    assert said(invariants.rivals([won, lost])) == ""
    assert "2 of" in said(invariants.rivals([won, won]))
    assert "0 of" in said(invariants.rivals([lost, lost]))
    full = outcome(FAILED, error="cannot write: No space left on device; free some space")
    assert "0 of" in said(invariants.rivals([full, lost], []))
    assert said(invariants.rivals([full, lost], [str(Kind.FULL_DISK)])) == ""


def test_what_a_job_may_fail_for_where_it_was_struck_so_and_nowhere_else() -> None:
    full = outcome(FAILED, Fate.POISON, error="cannot write: No space left on device; free some space")
    assert said(invariants.ends(full, [str(Kind.FULL_DISK)])) == ""
    assert "is not in the error" in said(invariants.ends(full, [str(Kind.STORE_EXPIRED)]))
    over = outcome(
        FAILED, error="403 ExpiredToken; the credentials have run out or were withdrawn: renew them"
    )
    assert said(invariants.ends(over, [str(Kind.STORE_EXPIRED)])) == ""
    assert "is failed" in said(invariants.ends(over, [str(Kind.FULL_DISK)]))


def test_a_cancel_may_be_forgotten_with_redis_and_by_nobody_else() -> None:
    forgotten = outcome(SUCCEEDED, Fate.CANCELLED, cancelled=202, lost=True)
    assert said(invariants.ends(forgotten, [])) == ""


def test_parts_that_redis_lost_may_be_made_again() -> None:
    blows = [Blown(1.0, frozenset("ab"), 9, 1), Blown(2.0, frozenset("a"), 9, 1, lost=1)]
    made = outcome(SUCCEEDED, begun=list("abcdbcd"), blows=blows)
    assert said(invariants.repeated(made, 2, restarts_allowed=False)) == ""
    assert "part a was made 2 times" in said(
        invariants.repeated(outcome(SUCCEEDED, begun=list("aba"), blows=blows), 2, restarts_allowed=False)
    )


@pytest.fixture
def where(tmp_path: Path) -> Place:
    """A directory with an output of two files."""
    made = Place(from_path(str(tmp_path)), StoreSettings(), open_stores(StoreSettings()))
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        made.store.put(join(made.root, "out", name), name.encode())
    return made


def test_a_flipped_byte_a_missing_file_and_one_too_many(where: Place, tmp_path: Path) -> None:
    out, done = join(where.root, "out"), outcome(SUCCEEDED)
    wanted = digests(where.store, out)

    def wrong() -> str:
        return said(invariants.content(done, where.digests(out), [wanted], others=False, late=False))

    assert wrong() == ""
    shard = tmp_path / "out" / "model-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "other bytes than undisturbed in ['model-00001-of-00001.safetensors']" in wrong()
    shard.unlink()
    assert "other bytes" in wrong()
    shard.write_bytes(whole)
    (tmp_path / "out" / "more").touch()
    assert "has ['more'] besides" in wrong()


def test_what_a_job_that_failed_has_left(where: Place) -> None:
    out, failed = join(where.root, "out"), outcome(FAILED)
    there = where.digests(out)
    assert "and left" in said(invariants.content(failed, there, [], others=False, late=False))
    assert said(invariants.content(failed, there, [], others=True, late=False)) == ""
    assert said(invariants.content(failed, {}, [], others=False, late=False)) == ""


def test_hidden_files_and_an_upload_that_is_open(where: Place) -> None:
    out, done = join(where.root, "out"), outcome(SUCCEEDED)
    wanted = digests(where.store, out)
    assert where.uploads(where.root) == []
    where.store.open_upload(join(out, "model-00002-of-00002.safetensors"), 3, {})
    assert len(where.uploads(where.root)) == 1
    left = said(invariants.content(done, where.digests(out), [wanted], others=False, late=True))
    assert ".mergemill/uploads/" in left


def test_a_write_of_a_scheduler_that_slept_is_forgiven_where_one_did(where: Place) -> None:
    out, done = join(where.root, "out"), outcome(SUCCEEDED)
    wanted = digests(where.store, out)
    where.store.put(join(out, ".mergemill", "progress-00000.json"), b"{}")
    there = where.digests(out)
    assert said(invariants.content(done, there, [wanted], others=False, late=True)) == ""
    assert "progress-00000" in said(invariants.content(done, there, [wanted], others=False, late=False))


def blown(*recorded: str, total: int = 9) -> Blown:
    return Blown(1.0, frozenset(recorded), total, 1)


def test_parts_that_are_made_again() -> None:
    def wrong(begun: str, *blows: Blown) -> str:
        made = outcome(SUCCEEDED, begun=list(begun), blows=list(blows))
        return said(invariants.repeated(made, 2, restarts_allowed=False))

    assert wrong("abc") == ""
    assert "part b was made 2 times, and 0 blows" in wrong("abcb")
    assert wrong("abcb", blown("a")) == ""
    assert "part a was made 2 times" in wrong("abca", blown("a"))
    assert wrong("abcdcd", blown("a", "b")) == ""
    assert "3 parts were made again, and at most 2" in wrong("abcdbcd", blown("a"))
    assert "1 parts were made again, and at most 0" in wrong("aa", blown(total=0))
    assert wrong("abbb", blown("a"), blown("a")) == ""


def test_keys_that_only_unfinished_jobs_have() -> None:
    job = new_job({}, "file:///out", {}, 1.0).id
    kept = ["jobs", "jobs:failed", "jobs@k1:queued", "leases", "queues", f"job:{job}", f"job:{job}:parts"]
    assert said(invariants.keys(kept)) == ""
    for key in ("active", "output:file:///out", f"job:{job}:lease", "queue:k1", "leases:held", "new"):
        assert said(invariants.keys([*kept, key])) == f"Redis still has {key}"


def test_a_process_that_is_left() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        life = life_of(child.pid)
        assert life is not None
        assert life in below(os.getpid())
        assert still_there([life], within_s=0.0) == [life]
        assert kill(child.pid)
        assert still_there([life], within_s=5.0) == []  # though nobody has waited for it yet
    assert life_of(child.pid) is None
    assert not kill(child.pid)
