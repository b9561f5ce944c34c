"""The embedded stack: Valkey, the API and a scheduler with its Ray, as children of this process."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import httpx

from mergemill.children import Child
from mergemill.stack_key import KEY_FILE, own_key, revoke_own
from mergemill.stack_lock import StackLock
from service.valkey import EmbeddedValkey
from workers.errors import JobStoreUnavailableError, StackError

START_TIMEOUT_S: Final = 180.0
"""Longest wait for everything to be up, in seconds."""

STOP_TIMEOUT_S: Final = 20.0
"""Longest wait for a child to let go of its work, in seconds, before it is killed."""

POLL_S: Final = 0.1
"""Time between two looks at the children, in seconds."""

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
"""Addresses that only users of this machine reach."""

FILE_ROOTS: Final = "MERGEMILL_STORE__FILE_ROOTS"
"""The setting of the directories that `file:` URIs may lie in."""

log = logging.getLogger(__name__)


class EmbeddedStack:
    """All of Mergemill on this machine, started at once, ended by :meth:`stop`; a context manager.

    It is up when the constructor returns: the API answers and the scheduler has its compute. A child that
    dies is started again, with the same address, and jobs go on. However this process ends, kill -9
    included, nothing that it started outlives it. Ctrl-C at a terminal reaches this process alone.
    It makes an admin key for itself, :attr:`api_key`, which :attr:`key_file` holds for its user alone.

    :param state_dir: where Valkey's data, Ray's sockets and the logs go. The same directory again finds the
        jobs of the last time. A temporary one, removed at the end, by default.
    :param port: the API's port; 0 for a free one.
    :param host: the address that the API listens on.
    :param ray_address: a Ray cluster to use; else ``RAY_ADDRESS``; else a local Ray is started.
    :param redis_url: a Redis to use in place of an embedded Valkey.
    :param start_timeout_s: longest wait for everything to be up, in seconds.
    :param settings: fields of :class:`service.settings.Settings` that go before the environment's.
    :raises StackError: something did not come up; the message holds the end of its log.
    """

    def __init__(
        self,
        state_dir: Path | str | None = None,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        ray_address: str | None = None,
        redis_url: str | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        **settings: Any,
    ) -> None:
        self._temporary = state_dir is None
        self._host = host
        self.state_dir = Path(state_dir or tempfile.mkdtemp(prefix="mergemill-")).expanduser().resolve()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self._lock = StackLock(self.state_dir)
        try:
            self._socket = _listen(host, port)
        except StackError:
            self._lock.release()
            raise
        shown = "127.0.0.1" if host in {"0.0.0.0", ""} else host  # noqa: S104 - compared, not bound
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        """Where the API answers."""
        self._lock.tell(self.url)
        self.api_key: str | None = None
        """What to ask it with; ``None`` where authentication is off."""
        self.key_file = self.state_dir / KEY_FILE
        """Where that is kept, for the user of this process alone."""
        overrides = {"ray_address": ray_address, **settings}
        self._settings = {name: value for name, value in overrides.items() if value is not None}
        self._redis_url = redis_url
        self._ready_file = self.state_dir / "scheduler.ready"
        self._valkey: EmbeddedValkey | None = None
        self._children: tuple[Child, ...] = ()
        self._start_timeout_s = start_timeout_s
        self._up = threading.Event()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        # Linux kills the children when the thread that started them ends: it has to live as long as the stack
        self._thread = threading.Thread(target=self._supervise, name="stack", daemon=True)
        self._thread.start()
        try:
            self._up.wait()
        except BaseException:
            self.stop()
            raise
        if self._failure is not None:
            self.stop()
            raise self._failure

    @property
    def pids(self) -> Mapping[str, int]:
        """Process ids of ``valkey``, ``serve`` and ``schedule``."""
        found = {child.name: child.pid for child in self._children}
        if self._valkey is not None:
            found["valkey"] = self._valkey.pid
        return {name: pid for name, pid in found.items() if pid is not None}

    def wait(self) -> None:
        """Return when it has been stopped.

        :raises BaseException: what kept it from keeping its children up; they have been ended then.
        """
        self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End everything in order: the API, the scheduler and its Ray, then Valkey. Again is no error."""
        self._stopping.set()
        # Not `join` alone: an interrupt in the middle of one makes the next return at once (CPython 3.11 and before)
        self._ended.wait()
        self._thread.join()
        self._socket.close()
        self._lock.release()
        if self._temporary:
            shutil.rmtree(self.state_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedStack(state_dir={str(self.state_dir)!r}, url={self.url!r})"

    # From here on: the supervising thread, which owns the children.

    def _supervise(self) -> None:
        try:
            self._start()
            self._wait_until_up()
            self._up.set()
            while not self._stopping.wait(POLL_S):
                self._revive()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits for us
            self._failure = error
        finally:
            try:
                self._end()
            finally:
                self._up.set()
                self._ended.set()

    def _start(self) -> None:
        redis_url = self._redis_url
        if redis_url is None:
            self._valkey = EmbeddedValkey(self.state_dir / "valkey")
            redis_url = self._valkey.url
        env = child_environment(
            self._settings, host=self._host, redis_url=redis_url, state_dir=self.state_dir
        )
        self._namespace = env.get("MERGEMILL_NAMESPACE", "mergemill")
        if env.get("MERGEMILL_AUTH") != "off":
            self.api_key = own_key(self.state_dir, redis_url, self._namespace)
        listener = self._socket.fileno()
        self._ready_file.unlink(missing_ok=True)
        schedule = ["schedule", "--ready-file", str(self._ready_file)]
        self._children = (
            Child("serve", ["serve", "--fd", str(listener)], env, self.state_dir / "serve.log", [listener]),
            Child("schedule", schedule, env, self.state_dir / "schedule.log"),
        )
        for child in self._children:
            child.start()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        with httpx.Client(base_url=self.url, timeout=2.0) as http:
            while not (self._ready_file.exists() and _is_ready(http)):
                for child in self._children:
                    if not child.is_running:
                        raise StackError(
                            f"`mergemill {child.name}` ended with status {child.exit_status}:\n{child.last_words()}"
                        )
                if time.monotonic() > deadline:
                    late = self._children[0 if self._ready_file.exists() else 1]
                    patience = f"{self._start_timeout_s:g} s"
                    raise StackError(
                        f"`mergemill {late.name}` was not ready in {patience}:\n{late.last_words()}"
                    )
                if self._stopping.wait(POLL_S):
                    return

    def _revive(self) -> None:
        if self._valkey is not None and not self._valkey.is_running:
            log.warning("Valkey ended and is started again")
            try:  # the same directory and port, so everybody else just connects again
                self._valkey = EmbeddedValkey(self._valkey.data_dir, self._valkey.port)
            except JobStoreUnavailableError:
                if self._stopping.wait(1.0):  # its old port may be taken for a moment
                    return
        for child in self._children:
            child.revive()

    def _end(self) -> None:
        # Before it was up there is nothing to let go of, and Ray may take its time to start
        patience = STOP_TIMEOUT_S if self._up.is_set() else 1.0
        for child in self._children:
            child.ask_to_end()
        for child in self._children:
            child.end(patience)
        if self._valkey is not None:
            self._valkey.stop()
        elif self._temporary and self.api_key is not None and self._redis_url is not None:
            self._forget_key(self._redis_url)

    def _forget_key(self, redis_url: str) -> None:
        """Leave no key behind in a Redis that is not ours: its token goes with the temporary directory."""
        try:
            revoke_own(self.api_key or "", redis_url, self._namespace)
        except JobStoreUnavailableError as error:
            log.warning("could not revoke the stack's own API key: %s", error)


def child_environment(
    settings: Mapping[str, Any], *, host: str, redis_url: str, state_dir: Path
) -> dict[str, str]:
    """This process's environment, and the settings over it."""
    own = {"log_format": "console", **settings, "redis_url": redis_url, "state_dir": state_dir}
    env = {name: value for name, value in os.environ.items() if name != "MERGEMILL_API_KEY"}  # the client's
    for name, value in own.items():
        env[f"MERGEMILL_{name.upper()}"] = json.dumps(value) if isinstance(value, dict | list) else str(value)
    if host in LOOPBACK and "file_roots" not in env.get("MERGEMILL_STORE", ""):
        env.setdefault(FILE_ROOTS, '["/"]')  # whoever asks is a user of this machine
    return env


def _listen(host: str, port: int) -> socket.socket:
    """A socket for the API to accept on. It is ours, so the address stays while the API is started again."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        taken = "; choose another port with --port" if error.errno == errno.EADDRINUSE else ""
        raise StackError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}{taken}"
        ) from error


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").is_success
    except httpx.HTTPError:  # not up yet
        return False
