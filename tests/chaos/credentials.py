"""Credentials that run out: two keys of the same user of a store, of which one is good at a time."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.chaos.faults import Fault, Kind, Request

Key = tuple[str, str]
"""Access key id, and secret access key."""


class Credentials:
    """A shared credentials file, as a rotating agent keeps it; also the policy of a proxy that knows which are over.

    :param keys: those that there are; with one alone nothing can run out.
    """

    def __init__(self, path: Path, keys: tuple[Key, ...]) -> None:
        self.path = path
        """The file."""
        self._keys = keys
        self._current = 0
        self._over = ""
        self._lock = threading.Lock()
        self._write(keys[0])

    @property
    def can_run_out(self) -> bool:
        """Whether there are others to go on with."""
        return len(self._keys) > 1

    def decide(self, request: Request) -> Fault | None:
        """See :meth:`tests.chaos.faults.Policy.decide`."""
        signed = request.headers.get("authorization", "") + request.query.get("X-Amz-Credential", "")
        return Fault(Kind.EXPIRED_TOKEN) if self._over and f"{self._over}/" in signed else None

    def renew(self) -> None:
        """Put the others in the file, in one step; the store knows them."""
        with self._lock:
            self._current = 1 - self._current
            self._write(self._keys[self._current])

    def run_out(self, key: int) -> None:
        """These are over from now on, and the others good."""
        with self._lock:
            self._over = self._keys[key][0]

    @property
    def current(self) -> int:
        """Which are in the file."""
        return self._current

    def _write(self, key: Key) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(f"[default]\naws_access_key_id = {key[0]}\naws_secret_access_key = {key[1]}\n")
        fresh.replace(self.path)
