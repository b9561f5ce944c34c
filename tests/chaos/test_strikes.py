"""What strikes with is what it says: flips of known bytes alone, credentials that run out, a disk that is full."""

from __future__ import annotations

import configparser
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.chaos.credentials import Credentials
from tests.chaos.disk import small_disk
from tests.chaos.faults import Kind, Request, Storm
from tests.chaos.holding import Hold, came_back, notes
from tests.chaos.inputs import data_begins
from tests.chaos.known import OfKnown, header_of, put_known
from tests.checkpoints import write_checkpoint
from workers.store import StoreSettings, from_path, join, open_stores

pytestmark = pytest.mark.fast


def get(key: str, first: int, last: int, nth: int = 0) -> Request:
    return Request(
        0, nth, "GET", "GET", f"/bucket/{key}", {}, {"range": f"bytes={first}-{last}", "authorization": ""}
    )


def test_only_known_bytes_flip_and_none_twice() -> None:
    policy = OfKnown(Storm(1, {Kind.FLIP: 1.0}), {"models/a.safetensors": 100})
    other = Request(0, 0, "GET", "GET", "/bucket/models/a.safetensors", {}, {"range": "bytes=-9"})
    assert policy.decide(get("models/config.json", 200, 299)) is None
    assert policy.decide(get("models/a.safetensors", 0, 299)) is None
    assert policy.decide(other) is None
    fault = policy.decide(get("models/a.safetensors", 200, 299))
    assert fault is not None
    assert fault.kind == Kind.FLIP
    assert policy.decide(get("models/a.safetensors", 250, 260)) is None  # read again
    assert policy.decide(get("models/a.safetensors", 100, 200)) is None
    assert policy.decide(get("models/a.safetensors", 300, 399)) is not None


def test_what_is_told_of_a_model_is_what_a_job_takes_for_known(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(700_000.0), "b": torch.ones(3)}
    directory = write_checkpoint(tmp_path / "made", tensors)
    store, uri = open_stores(StoreSettings()), join(from_path(str(tmp_path)), "models", "m")
    put_known(store, uri, directory)
    told = json.loads((tmp_path / "models" / "m" / "mergemill.json").read_text())
    data = (directory / "model.safetensors").read_bytes()
    begins = data_begins(store, from_path(str(tmp_path)))
    assert list(begins.values()) == [header_of(data).data_start]
    assert {name: len(text) for name, text in told["blocks"].items()} == {"a": 128, "b": 44}


def test_credentials_are_over_when_they_are_said_to_be(tmp_path: Path) -> None:
    keys = ("ONE", "secret 1"), ("TWO", "secret 2")
    credentials = Credentials(tmp_path / "credentials", keys)

    def refused(key: str) -> bool:
        signed = Request(0, 0, "GET", "GET", "/b/k", {}, {"authorization": f"AWS4 Credential={key}/2026"})
        late = Request(0, 0, "PUT", "PUT", "/b/k", {"X-Amz-Credential": f"{key}/2026"})
        assert credentials.decide(signed) == credentials.decide(late)
        return credentials.decide(signed) is not None

    def there() -> str:
        parser = configparser.ConfigParser()
        parser.read(credentials.path)
        return parser["default"]["aws_access_key_id"]

    assert (there(), refused("ONE"), refused("TWO")) == ("ONE", False, False)
    credentials.run_out(credentials.current)
    assert (there(), refused("ONE"), refused("TWO")) == ("ONE", True, False)
    credentials.renew()
    assert there() == "TWO"
    credentials.renew()
    credentials.run_out(1)
    assert (there(), refused("ONE"), refused("TWO")) == ("ONE", False, True)
    assert not Credentials(tmp_path / "credentials", keys[:1]).can_run_out


def test_a_disk_is_full_to_the_last_byte_and_then_is_not(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        disk.fill()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (tmp_path / "disk" / "more").write_bytes(b"1")
        disk.empty()
        (tmp_path / "disk" / "more").write_bytes(b"1" * (1 << 20))
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_lease_that_comes_back_is_seen() -> None:
    def done(token: str, began: float, ended: float) -> dict[str, object]:
        return {"job": "j", "token": token, "what": "renew", "began": began, "ended": ended}

    fine = [done("a", 0, 1), done("a", 2, 3), done("b", 4, 5), done("b", 6, 7)]
    assert list(came_back(fine)) == []
    assert list(came_back([*fine, done("a", 4.5, 9)])) == []  # at the same time: nobody knows the order
    assert list(came_back([*fine, done("a", 5.5, 6)])) == ["j: renew under a after renew under b"]
    assert list(came_back([*fine, {**done("a", 5.5, 6), "job": "another"}])) == []


def test_what_a_kill_cut_short_is_no_note(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text('{"job": 1}\n{"jo')
    assert notes(tmp_path / "notes") == [{"job": 1}]
    assert notes(tmp_path / "none") == []


_COMMITS = """
import os, sys, threading, types
import sitecustomize
class Store:
    def renew(self, lease): pass
    def apply(self, job, event, token=None): pass
    record_part = record_survey = warn = claim_output = release_output = renew
    def claim_next(self, *arguments): return None
sitecustomize.watch_leases(types.SimpleNamespace(JobStore=Store))
class CommitStarted: pass
store, lease = Store(), types.SimpleNamespace(job="j", token="t")
store.renew(lease)
store.apply("j", CommitStarted(), "t")
for change in range(4):
    store.renew(lease)
    print(change, flush=True)
"""


def test_a_process_stops_at_the_change_that_it_is_told(tmp_path: Path) -> None:
    hold = Hold(tmp_path / "hold.json")
    hold.ask(2)
    root = Path(__file__).parent
    told = {
        "MERGEMILL_CHAOS_OWNERS": str(tmp_path / "owners"),
        "MERGEMILL_CHAOS_HOLD": str(hold.path),
        "PYTHONPATH": str(root / "watch"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", _COMMITS], stdout=subprocess.PIPE, text=True, env={**os.environ, **told}
    ) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        _, how = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(how)
        assert hold.taken() == child.pid
        child.send_signal(signal.SIGCONT)
        assert child.stdout.read() == "2\n3\n"
    assert child.returncode == 0
    assert [note["what"] for note in notes(tmp_path / "owners")] == ["renew", "apply", *["renew"] * 4]
