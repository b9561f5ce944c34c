"""The real stack of one run: Valkey, the API and two schedulers, each with a local Ray, and proxies before the stores.

Whatever dies is started again, as a service manager would do it; that is all the help there is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import httpx

from mergemill.children import Child
from mergemill.credentials import BearerAuth
from service.jobs.jobstore import JobStore
from service.valkey import EmbeddedValkey
from tests.chaos import inputs
from tests.chaos.credentials import Credentials, Key
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.holding import Hold
from tests.chaos.processes import Life, below, kill, life_of
from tests.chaos.tcp_proxy import TcpProxy
from tests.servers.keys import make_key
from workers.errors import JobStoreUnavailableError
from workers.store import StoreSettings

NAMESPACE = "chaos"
LEASE_S = 3.0
PARTS_IN_FLIGHT = 2
"""Parts of a job that are in flight at once: the most that a kill may cost."""

SCHEDULERS = ("schedule-0", "schedule-1")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
_TICK_S = 0.05
_WATCH = Path(__file__).parent / "watch"


class Stack:
    """A stack that is struck; a context manager that has it up, and leaves nothing of it.

    :param directory: where all of it is kept.
    :param scratch: where Ray keeps its sockets, which takes a short path.
    :param store: how the store is reached without a proxy.
    :param keys: those that open it, where it takes some.
    :param part_pause_s: how long each part is held up.
    """

    def __init__(
        self,
        directory: Path,
        scratch: Path,
        store: StoreSettings,
        keys: tuple[Key, ...] = (),
        part_pause_s: float = 0.0,
    ) -> None:
        self.directory = directory
        self.witness = directory / "parts.jsonl"
        """A line for each part that a worker began."""
        self.owners = directory / "owners.jsonl"
        """A line for each thing that was done under a lease, by whoever."""
        self.hold = Hold(directory / "hold.json")
        """Where a scheduler is told to stop itself."""
        self.credentials = Credentials(directory / "credentials", keys) if keys else None
        """What opens the store to the stack."""
        self.doomed: list[Life] = []
        """What ran below something that was killed, and has to be gone soon."""
        self._held = threading.Event()
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._failure: BaseException | None = None
        self._store, self._pause_s, self._scratch = store, part_pause_s, scratch
        self._lock = threading.RLock()
        self._redis_away = 0
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
            self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
            """Where the API answers."""
            self.s3: FaultProxy | None = None
            """What stands before the store."""
            if store.s3_endpoint_url is not None:
                self.s3 = stack.enter_context(
                    FaultProxy(
                        store.s3_endpoint_url, self.credentials, journal=directory / "store-faults.jsonl"
                    )
                )
            # Linux ties the children to the thread that starts them.
            self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
            self._thread.start()
            self._up.wait()
            stack.callback(self._end)
            if self._failure is not None:
                raise self._failure
            self.jobs = stack.enter_context(JobStore(self.valkey.url, NAMESPACE))
            """The job store, past every proxy."""
            self._closing = stack.pop_all()

    def close(self) -> None:
        """End everything, as somebody who stops the service does."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def client(self) -> httpx.Client:
        """A client of the API, with a key for everything."""
        return httpx.Client(base_url=self.url, timeout=10.0, auth=BearerAuth(self.url, self.key))

    @property
    def key_id(self) -> str:
        """What that key is called."""
        return self.key.split("_")[1]

    @contextlib.contextmanager
    def without_redis(self) -> Iterator[None]:
        """Nobody but who goes past the proxy reaches Redis while the block runs, whoever else says so."""
        with self._lock:
            self._redis_away += 1
            self.redis.partition()
        try:
            yield
        finally:
            with self._lock:
                self._redis_away -= 1
                if not self._redis_away:
                    self.redis.heal()

    def pid(self, name: str) -> int | None:
        """Process id of ``serve`` or of a scheduler, while it runs."""
        child = self._children[name]
        return child.pid if child.is_running else None

    def is_running(self) -> bool:
        """Whether every process of the stack is there, and both schedulers have their compute."""
        return (
            self.valkey.is_running
            and all(child.is_running for child in self._children.values())
            and all(self._ready_file(name).exists() for name in SCHEDULERS)
        )

    def kill(self, pid: int, tree: int | None = None) -> bool:
        """``kill -9`` of one process; whether it was there. All below it, or below ``tree``, has to end, too."""
        top = tree or pid
        doomed = [life for life in (life_of(top), *below(top)) if life is not None]
        if not kill(pid):
            return False
        self.doomed += doomed
        return True

    def power_cut(self, lasts_s: float) -> None:
        """Kill all of it at once, the Rays too, and start it again after a while; what it kept on disk is there."""
        with self._lock:
            self._held.set()
            everything = [self.valkey.pid, *(child.pid for child in self._children.values() if child.pid)]
            below_them = [life for pid in everything for life in below(pid)]
            for pid in (*everything, *(life.pid for life in below_them)):
                kill(pid)
            self.doomed += below_them
        time.sleep(lasts_s)
        self._held.clear()

    # From here on: the supervising thread.

    def _supervise(self) -> None:
        try:
            self._start()
            self._wait_until_up()
            self._up.set()
            while not self._stopping.wait(_TICK_S):
                if not self._held.is_set():
                    with self._lock:
                        self._revive()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for us
            self._failure = error
        finally:
            try:
                self._stop()
            finally:
                self._up.set()

    def _start(self) -> None:
        self.valkey = EmbeddedValkey(self.directory / "valkey")
        self.redis = TcpProxy("127.0.0.1", self.valkey.port)
        self.key = make_key(self.valkey.url, NAMESPACE)
        fd = self._listener.fileno()
        self._children = {
            "serve": Child(
                "serve",
                ["serve", "--fd", str(fd)],
                self.environment("serve"),
                self.directory / "serve.log",
                [fd],
            )
        }
        for name in SCHEDULERS:
            command = ["schedule", "--ready-file", str(self._ready_file(name))]
            log_path = self.directory / f"{name}.log"
            self._children[name] = Child(name, command, self.environment(name), log_path)
        for child in self._children.values():
            child.start()

    def environment(self, name: str) -> dict[str, str]:
        at = urlsplit(self.valkey.url)
        through = at._replace(netloc=at.netloc.replace(f":{at.port}", f":{self.redis.port}"))
        store = self._store
        settings: dict[str, Any] = {
            "redis_url": urlunsplit(through),
            "namespace": NAMESPACE,
            "state_dir": self._scratch,
            "ray_cpus": 1,
            "lease_seconds": LEASE_S,
            "poll_seconds": 0.05,
            "progress_seconds": 0.2,
            "max_parts_in_flight": PARTS_IN_FLIGHT,
            "metrics_port": 0,
            "log_format": "json",
            "store__file_roots": '["/"]',
            "chaos_witness": self.witness,
            "chaos_pause_s": self._pause_s,
            "chaos_poison": inputs.POISON,
            "chaos_owners": self.owners,
            "chaos_hold": self.hold.path,
            "webhook_allow_private": '["127.0.0.1"]',
            "sweep_seconds": 1.0,
        }
        if self.s3 is not None:
            settings |= {
                "store__s3_endpoint_url": self.s3.url,
                "store__s3_region": store.s3_region,
                "store__s3_addressing_style": store.s3_addressing_style,
                "store__s3_checksums": store.s3_checksums,
                "store__s3_read_timeout_s": 5.0,
                "store__s3_connect_timeout_s": 2.0,
                "store__s3_retry_wait_max_s": 1.0,
            }
        own = {f"MERGEMILL_{key.upper()}": str(value) for key, value in settings.items()}
        root = Path(__file__).parent.parent.parent
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MERGEMILL_", "RAY_", "OTEL_", "AWS_"))
        }
        if self.credentials is not None:
            kept["AWS_SHARED_CREDENTIALS_FILE"] = str(self.credentials.path)
        return {**kept, **own, "PYTHONPATH": f"{_WATCH}{os.pathsep}{root}", "RAY_USAGE_STATS_ENABLED": "0"}

    def _ready_file(self, name: str) -> Path:
        return self.directory / f"{name}.ready"

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(base_url=self.url, timeout=2.0) as http:
            while not (self.is_running() and _is_ready(http)):
                for child in self._children.values():
                    if not child.is_running or time.monotonic() > deadline:
                        raise RuntimeError(f"{child.name} did not come up:\n{child.last_words()}")
                if self._stopping.wait(_TICK_S):
                    return

    def _revive(self) -> None:
        if not self.valkey.is_running:
            # Its old port may be taken for a moment.
            with contextlib.suppress(JobStoreUnavailableError):
                self.valkey = EmbeddedValkey(self.valkey.data_dir, self.valkey.port)
        for name, child in self._children.items():
            if name != "serve" and not child.is_running:
                self._ready_file(name).unlink(missing_ok=True)  # its last life's
            child.revive()

    def _stop(self) -> None:
        patience = STOP_TIMEOUT_S if self._up.is_set() else 1.0
        for child in self._running():
            child.ask_to_end()
        for child in self._running():
            child.end(patience)
        if hasattr(self, "valkey"):
            self.redis.close()
            self.valkey.stop()

    def _running(self) -> Iterator[Child]:
        yield from getattr(self, "_children", {}).values()

    def _end(self) -> None:
        self._stopping.set()
        self._thread.join()


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").is_success
    except httpx.HTTPError:  # not up yet
        return False
