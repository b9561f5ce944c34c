"""The child process that talks to Ray: started, listened to and ended, whatever state it is in."""

from __future__ import annotations

import json
import os
import queue
import secrets
import select
import shutil
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from service.cluster import warden
from service.cluster.dispatch import Policy

WORKER_ENV: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
"""Environment of the workers. Buffers of 2 MiB and more go back to the system when freed, which glibc's
sliding threshold would put off; what is smaller stays on the heap, free of page faults."""

QUIET_ENV: Mapping[str, str] = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
}
"""What a Ray of our own need not do: count, and tell its dashboard, which is not there, of every task."""

LOOPBACK_ENV: Mapping[str, str] = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What makes a Ray of our own take 127.0.0.1 for its address, and so listen nowhere else: it is how Ray keeps to one
machine where it supports no cluster. Given as an argument it would be replaced by the machine's address."""

LOCAL = "local"
"""The address that means a Ray of our own, as it does to Ray."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Which Ray to use, and within which bounds."""

    address: str | None = None
    """The cluster's address; else ``RAY_ADDRESS``; ``local``, or neither, starts a Ray on this machine."""
    num_cpus: int | None = None
    """CPU cores of a Ray started here; ``None`` is what the machine has."""
    num_gpus: int | None = None
    """GPUs of a Ray started here; ``None`` is what the machine has."""
    memory_bytes: int | None = None
    """Memory for the tasks of a Ray started here; ``None`` leaves it to Ray."""
    object_store_bytes: int = 128 << 20
    """Ray's shared memory; hardly used."""
    state_dir: Path | None = None
    """Where Ray's sockets and logs go, in a new directory; ``TMPDIR`` when it is too long for sockets."""
    start_timeout_s: float = 120.0
    """How long a start may take."""
    silence_s: float = 60.0
    """How long the child may be silent before it counts as dead; it speaks every second."""
    max_starts: int = 5
    """Starts in a row without a finished task before everything unfinished fails."""
    max_losses: int = 10
    """How often one request may lose the child under it before it is given up."""
    module: str = "service.cluster.fleet"
    """What is run; tests put a fake here."""
    policy: Policy = field(default_factory=Policy)
    """Bounds on tries and on tasks at once."""


class FleetProcess:
    """A running ``service.cluster.fleet`` under its warden.

    Linux ties the warden's life to the thread that makes this object: it has to outlive the child.
    """

    def __init__(self, settings: FleetSettings, directory: Path, lines: Iterable[str]) -> None:
        """Start it, with everything of Ray's and its log in ``directory``, and ``lines`` to send it first."""
        self.ready = False
        """Whether it has been connected to Ray."""
        self.why = ""
        """Why :meth:`messages` came to an end."""
        self._settings = settings
        self._vital: list[int] = []
        self._log = directory / "driver.log"
        self._outbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        address = settings.address or os.environ.get("RAY_ADDRESS") or LOCAL
        local = address == LOCAL
        temp_dir = directory / "ray"
        shutil.rmtree(temp_dir, ignore_errors=True)
        self._results, results_out = os.pipe()
        with self._log.open("wb") as printed:
            command = [*_python(settings.module), str(results_out)]
            # S603: the command is our own
            self._process = subprocess.Popen(  # noqa: S603
                [
                    *_python("service.cluster.warden"),
                    str(os.getpid()),
                    "--scratch",
                    str(directory),
                    "--",
                    *command,
                ],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=(results_out,),
                start_new_session=True,
                env=_environment(local=local),
            )
        os.close(results_out)
        config = {
            "address": None if local else address,
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "memory_bytes": settings.memory_bytes,
            "object_store_bytes": settings.object_store_bytes,
            "temp_dir": str(temp_dir),
            "worker_env": dict(WORKER_ENV),
            "policy": asdict(settings.policy),
        }
        for line in (json.dumps(config), *lines):
            self.send(line)
        writer = threading.Thread(target=self._write, args=(self._process.stdin,), name="fleet-writer")
        writer.daemon = True
        writer.start()

    @property
    def pid(self) -> int:
        """The warden's process id."""
        return self._process.pid

    def send(self, line: str | None) -> None:
        """Send a line, soon; ``None`` asks it to end. Never blocks, and does not fail when it is dead."""
        self._outbox.put(line)

    def _write(self, pipe: IO[bytes]) -> None:
        try:
            with pipe:
                for lines in iter(self._take_lines, []):
                    pipe.write("".join(f"{line}\n" for line in lines).encode())
                    pipe.flush()
        except BrokenPipeError:
            return  # it died: the end of its messages tells

    def _take_lines(self) -> list[str]:
        """What there is to send, as soon as there is something, all at once; nothing when it is to end."""
        lines: list[str] = []
        while not lines or not self._outbox.empty():
            line = self._outbox.get()
            if line is None:
                self._outbox.put(None)  # once more, when what came before it is sent
                break
            lines.append(line)
        return lines

    def messages(self, closing: Callable[[], bool]) -> Iterator[Message]:
        """What it says, until it ends, hangs, or ``closing()`` becomes true."""
        poll = select.poll()
        poll.register(self._results, select.POLLIN)
        buffer = b""
        deadline = time.monotonic() + self._settings.start_timeout_s
        while not self.why:
            events = poll.poll(max(0.0, min(0.5, deadline - time.monotonic())) * 1000)
            if any(descriptor != self._results for descriptor, _ in events):
                self.why = "Ray's control process or node died"
            elif events:
                data = os.read(self._results, 1 << 20)
                if not data:
                    self.why = "it ended"
                self.ready = True
                deadline = time.monotonic() + self._settings.silence_s
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if message["op"] == "vital":
                        self._watch(message["pids"], poll)
                    else:
                        yield message
            elif closing():
                self.why = "it was closed"
            elif time.monotonic() >= deadline:
                self.why = "it fell silent" if self.ready else "it did not start in time"

    def _watch(self, pids: Iterable[int], poll: select.poll) -> None:
        for pid in pids:
            try:
                self._vital.append(os.pidfd_open(pid))
            except ProcessLookupError:
                self.why = "Ray's control process or node died"
            except OSError:  # not in this sandbox: then its silence will tell, later
                return
            else:
                poll.register(self._vital[-1], select.POLLIN)

    def last_words(self, lines: int = 12) -> str:
        """The last lines that it printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def end(self, *, gently: bool) -> bool:
        """End it and all that it started; whether nothing is left. ``gently`` leaves it time to finish."""
        self.send(None)
        process = self._process
        if not gently:
            process.terminate()
        for action in (process.terminate, process.kill):
            try:
                process.wait(timeout=10.0)
                break
            except subprocess.TimeoutExpired:
                action()
        process.wait()
        for descriptor in (self._results, *self._vital):
            os.close(descriptor)
        # A warden that ended in its own way has left nothing; one that was killed could not see to it.
        return process.returncode != -signal.SIGKILL or warden.kill_session(process.pid)


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _environment(*, local: bool) -> dict[str, str]:
    """Our environment, with what Ray has to find there: it reads most of it when it is imported."""
    defaults = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    fixed: dict[str, str] = {}
    if local:
        if "RAY_AUTH_MODE" not in os.environ:
            # Nobody else needs its token, so it is not Ray's default, a file in the home directory.
            fixed |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        defaults |= QUIET_ENV
        fixed |= {**LOOPBACK_ENV, **WORKER_ENV}
    root = str(Path(__file__).resolve().parent.parent)
    if root not in site.getsitepackages():  # run from a source tree
        path = os.environ.get("PYTHONPATH")
        fixed["PYTHONPATH"] = root if not path else f"{root}{os.pathsep}{path}"
    return {**defaults, **os.environ, **fixed}
