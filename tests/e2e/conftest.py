"""What the tests of whole jobs share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.e2e.bench import Bench


@pytest.fixture
def bench(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A runner to break.

    Nothing is synced to disk: the death of a process loses nothing that was written, and that of a machine
    is not what these tests are about.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    made = Bench(valkey_url, f"test-{uuid.uuid4().hex}")
    with made.jobs:
        yield made
