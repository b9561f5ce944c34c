"""Processes of the embedded stack: started so that they cannot outlive it, and started again when they die.

Run as a module it is the first thing in such a process: ``python -m mergemill.children PARENT_PID ARGUMENTS...``
has the kernel kill it when its parent dies, however that dies, and then is ``mergemill ARGUMENTS...``.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.cluster.warden import die_with_parent

LONG_LIFE_S = 30.0
"""A child that lived this long is started again without delay, in seconds."""

LONGEST_WAIT_S = 30.0
"""Longest wait before a child that keeps dying is started again, in seconds."""

LOG_BYTES = 16 << 20
"""A log that is longer is set aside at the start of a stack; one older log is kept."""


log = logging.getLogger(__name__)


class Child:
    """``mergemill`` as a child process. Linux ties its life to the *thread* that calls :meth:`start`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        log_path: Path,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._arguments = arguments
        self._env = dict(env)
        self._pass_fds = tuple(pass_fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._born = 0.0
        self._deaths = 0
        self._not_before = 0.0
        if log_path.exists() and log_path.stat().st_size > LOG_BYTES:
            log_path.replace(log_path.with_suffix(".old.log"))

    @property
    def pid(self) -> int | None:
        """Its process id, if it was started."""
        return None if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """What it ended with; ``-n`` for signal n."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it, for the first time or again."""
        command = [sys.executable, "-m", "mergemill.children", str(os.getpid()), *self._arguments]
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                pass_fds=self._pass_fds,
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which ends us in order
            )
        self._born = time.monotonic()

    def revive(self) -> bool:
        """Start it again if it has ended and it is time to; whether it was started."""
        if self.is_running:
            return False
        now = time.monotonic()
        if self._not_before <= self._born:  # just seen dead
            self._deaths = 0 if now - self._born > LONG_LIFE_S else self._deaths + 1
            self._not_before = now + min(LONGEST_WAIT_S, 0.1 * 2**self._deaths)
            log.warning(
                "`mergemill %s` ended with status %s and is started again", self.name, self.exit_status
            )
        if now < self._not_before:
            return False
        self.start()
        return True

    def ask_to_end(self) -> None:
        """Send it SIGTERM."""
        if self._process is not None:
            self._process.terminate()

    def end(self, timeout_s: float) -> None:
        """Wait until it has ended, and kill it when it takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self, lines: int = 15) -> str:
        """The last lines that it has logged since it was started."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - (64 << 10)))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])


def main() -> None:
    """Be ``mergemill``, for as long as the parent lives."""
    # All that was acknowledged is in Redis and in the store, so nothing is lost by a kill
    die_with_parent(int(sys.argv[1]), signal.SIGKILL)
    from mergemill.cli import app  # noqa: PLC0415 - not before the kernel knows, and nothing for the parent

    app(sys.argv[2:], prog_name="mergemill")


if __name__ == "__main__":
    main()
