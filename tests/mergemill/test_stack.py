"""The embedded stack as a user has it: it comes up, merges, survives what dies in it, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergemill import Client
from mergemill.children import Child
from mergemill.stack import EmbeddedStack
from service.cluster import warden
from tests import waiting
from tests.checkpoints import write_checkpoint
from tests.processes import running
from workers.errors import StackError, UnauthenticatedError

pytest_plugins = ["tests.servers.valkey"]
pytestmark = [
    pytest.mark.valkey,
    pytest.mark.ray,
    pytest.mark.usefixtures("valkey_url"),
    pytest.mark.timeout(300),
]

RECIPE = "merge_method: linear\nmodels:\n  - model: a\n  - model: b\n"


until = partial(waiting.until, seconds=90)


def descendants(root: int) -> set[int]:
    """Processes below ``root``, orphans of theirs not counted."""
    children: dict[int, list[int]] = {}
    for process in warden.processes():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting.extend(below)
    return found


def alive(pids: set[int]) -> set[int]:
    return pids & {process.pid for process in warden.processes()}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStack]:
    with EmbeddedStack(tmp_path_factory.mktemp("stack"), ray_cpus=1) as found:
        yield found


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b")):
        write_checkpoint(
            tmp_path / name, {"w": torch.full((300,), float(number)), "n": torch.arange(5)}, {"x": 1}
        )
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def recipe(models: Path) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": (models / name).as_uri()} for name in "ab"]}


def test_its_key_is_in_one_file_and_nowhere_else(
    stack: EmbeddedStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MERGEMILL_API_KEY", raising=False)
    assert stack.api_key is not None
    secret = stack.api_key.rpartition("_")[2].encode()
    assert stack.key_file.stat().st_mode & 0o777 == 0o600
    files = [path for path in stack.state_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 3
    assert [path for path in files if secret in path.read_bytes()] == [stack.key_file]
    for pid in descendants(os.getpid()):
        for what in ("cmdline", "environ"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                assert secret not in Path(f"/proc/{pid}/{what}").read_bytes()
    assert secret.decode() not in repr(stack)
    with Client(stack.url) as nobody, pytest.raises(UnauthenticatedError, match="MERGEMILL_API_KEY"):
        nobody.list()


def test_a_merge_from_recipe_to_download(stack: EmbeddedStack, models: Path, tmp_path: Path) -> None:
    states: list[str] = []
    with Client(stack.url, api_key=stack.api_key) as client:
        job = client.submit(recipe(models), (tmp_path / "merged").as_uri())
        done = client.wait(job.id, lambda job: states.append(job.state), timeout=120)
        client.download(job.id, tmp_path / "down")
    assert done.progress.bytes_done == done.progress.bytes_total > 0
    names = {path.name for path in (tmp_path / "down").iterdir()}
    assert names == {path.name for path in (tmp_path / "merged").iterdir() if not path.name.startswith(".")}
    merged = load_file(tmp_path / "down" / "model-00001-of-00001.safetensors")
    assert torch.equal(merged["w"], torch.full((300,), 0.5))
    assert torch.equal(merged["n"], torch.arange(5))


def test_a_flipped_bit_of_a_real_shard_is_noticed(stack: EmbeddedStack, models: Path, tmp_path: Path) -> None:
    with Client(stack.url, api_key=stack.api_key) as client:
        job = client.submit(recipe(models), (tmp_path / "merged").as_uri()).id
        client.wait(job, timeout=120)
        shard = tmp_path / "merged" / "model-00001-of-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(OSError, match="digest"):
            client.download(job, tmp_path / "down")


@pytest.mark.parametrize("victim", ["serve", "schedule", "valkey"])
def test_what_dies_is_started_again_and_jobs_are_still_there(
    stack: EmbeddedStack, models: Path, tmp_path: Path, victim: str
) -> None:
    with Client(stack.url, api_key=stack.api_key) as client:
        before = client.submit(recipe(models), (tmp_path / "before").as_uri()).id
        old = stack.pids[victim]
        os.kill(old, signal.SIGKILL)
        client.wait(before, timeout=120)
        until(
            lambda: stack.pids[victim] != old and bool(alive({stack.pids[victim]})), f"{victim} is not back"
        )
        after = client.submit(recipe(models), (tmp_path / "after").as_uri()).id
        client.wait(after, timeout=120)
        assert before in [job.id for job in client.jobs()]
    shards = [tmp_path / name / "model-00001-of-00001.safetensors" for name in ("before", "after")]
    assert shards[0].read_bytes() == shards[1].read_bytes()


def test_the_command_line_on_a_stack_of_its_own(models: Path) -> None:
    """Merge, with everything started for it and stopped after it."""
    env = {**os.environ, "MERGEMILL_RAY_CPUS": "1", "TMPDIR": str(models / "tmp")}
    env.pop("MERGEMILL_URL", None)
    (models / "tmp").mkdir()
    command = [sys.executable, "-m", "mergemill", "merge", "recipe.yml", "out", "--json"]
    with running(command, cwd=models, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()
    assert json.loads(printed)["state"] == "succeeded"
    assert (models / "out" / "model.safetensors.index.json").exists()
    assert list((models / "tmp").glob("mergemill-*")) == []


def up(state: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """``mergemill up`` on a free port; what it prints is at ``stdout``."""
    env = {**os.environ, "MERGEMILL_RAY_CPUS": "1", "MERGEMILL_STATE_DIR": str(state), "MERGEMILL_PORT": "0"}
    # Whoever started the tests may have had them ignore it, as shells do in the background.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "mergemill", "up"]
    return running(command, env=env, stdout=subprocess.PIPE, start_new_session=True)


def url_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert line.startswith("Mergemill is up at http://127.0.0.1:"), line
    return line.split()[4]


def test_nothing_outlives_up_when_it_is_killed_and_its_jobs_are_there_the_next_time(
    tmp_path: Path, models: Path
) -> None:
    state = tmp_path / "state"
    with up(state) as process:
        url = url_of(process)
        below = descendants(process.pid)
        assert len(below) > 5  # Valkey, API, scheduler, and Ray's own
        (scheduler,) = [
            pid for pid in below if b"schedule" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ]
        os.kill(scheduler, signal.SIGSTOP)  # so that the job is not done yet
        with Client(url, api_key=(state / "api-key").read_text()) as client:
            job = client.submit(recipe(models), (tmp_path / "out").as_uri()).id
        process.kill()
    until(lambda: not alive(below), "processes are left", seconds=15)
    with EmbeddedStack(state, ray_cpus=1) as stack, Client(stack.url, api_key=stack.api_key) as client:
        pids = set(stack.pids.values())
        assert client.wait(job, timeout=120).state == "succeeded"
    assert not alive(pids)
    stack.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_stops_everything_before_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    with up(tmp_path) as process:
        url_of(process)
        below = descendants(process.pid)
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.read().endswith(b"Stopped.\n")
        assert process.wait(60) == 0
        assert not alive(below)
        assert not (tmp_path / "scheduler.ready").exists()  # it was let end by itself


def test_what_does_not_come_up_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    before = descendants(os.getpid())
    with pytest.raises(StackError, match=r"`mergemill (serve|schedule)` ended with status 2:\n.*log_format"):
        EmbeddedStack(tmp_path, log_format="xml")
    assert descendants(os.getpid()) <= before
    with pytest.raises(StackError, match="was not ready in"):
        EmbeddedStack(tmp_path, start_timeout_s=0.01)
    assert descendants(os.getpid()) <= before


def test_a_second_stack_is_led_to_the_first(stack: EmbeddedStack) -> None:
    begun = time.monotonic()
    with pytest.raises(
        StackError, match=f"already running in {stack.state_dir} at {stack.url}: .*--state-dir"
    ):
        EmbeddedStack(stack.state_dir)
    assert time.monotonic() - begun < 2  # it is seen at once
    with Client(stack.url) as client:
        assert client.ready()["status"] == "ready"


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for _ in range(2):  # the directory is free again
            with pytest.raises(StackError, match=f"127.0.0.1:{port}: Address already in use; .* --port"):
                EmbeddedStack(tmp_path, port)


def test_a_child_that_keeps_dying_is_started_ever_more_rarely(tmp_path: Path) -> None:
    child = Child("methods", ["--version"], os.environ, tmp_path / "log")
    child.start()
    births = [time.monotonic()]
    while len(births) < 4:
        if child.revive():
            births.append(time.monotonic())
        time.sleep(0.01)
    child.end(30)
    assert child.exit_status == 0
    assert child.last_words() == f"mergemill {version('mergemill')}"
    for number, (earlier, later) in enumerate(pairwise(births), start=1):
        assert later - earlier > 0.1 * 2**number
