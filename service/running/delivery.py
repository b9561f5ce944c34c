"""Whether an output still holds what a job wrote there: what is handed out must be what is listed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from service.jobs.pages import JobPage
from service.jobs.record import JobRecord, JobState
from service.planning.checkpoint import INDEX_FILE
from service.running.sidecars import MANIFEST
from workers.errors import NotReadyError, ObjectNotFoundError, OutputReplacedError
from workers.store.base import ObjectStore
from workers.store.stores import read_bytes
from workers.store.uris import join

MAX_BYTES = 1 << 30
"""Longest manifest that is read."""

_PAGE = 200
_PAGES = 5


class Jobs(Protocol):
    """Jobs that may be told of: the caller's own (:class:`~service.jobs.ownjobs.OwnJobs`), or all."""

    def list(self, limit: int, cursor: str | None = None, state: JobState | None = None) -> JobPage:
        """A page of them, newest first."""
        ...


def listed(record: JobRecord) -> list[dict[str, Any]]:
    """The files of a job that has succeeded: ``name``, ``size`` and ``digest`` of each.

    :raises NotReadyError: it has not.
    """
    if record.state != JobState.SUCCEEDED or record.summary is None:
        raise NotReadyError(f"{record.id} is {record.state}: there are files once it has succeeded")
    found: list[dict[str, Any]] = record.summary["files"]
    return found


def check_in_place(record: JobRecord, jobs: Jobs, store: ObjectStore) -> None:
    """Find out whether the output is still what the job committed.

    The manifest holds a digest of every file and its own is in the job's record, so two jobs have the same one only
    when they made the same files. The index is away while a later job replaces them.

    :raises OutputReplacedError: it is not; names the job of ``jobs`` that replaced it, if one did.
    :raises StoreError: the store refuses or fails.
    """
    files = {file["name"]: file for file in listed(record)}
    if _is_there(store, record.output, [files[name] for name in (MANIFEST, INDEX_FILE) if name in files]):
        return
    later = _replaced_by(record, jobs)
    if later is not None:
        raise OutputReplacedError(
            f"the output of {record.id} was replaced since by {later}, at {record.output}"
        )
    raise OutputReplacedError(
        f"the output of {record.id} was replaced since, is being replaced or was deleted: {record.output}"
    )


def _is_there(store: ObjectStore, output: str, files: Sequence[Mapping[str, Any]]) -> bool:
    for file in files:
        uri = join(output, file["name"])
        try:
            if store.head(uri).size != file["size"]:
                return False
            data = read_bytes(store, uri, MAX_BYTES)
        except ObjectNotFoundError:
            return False
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != file["digest"]:
            return False
    return True


def _replaced_by(record: JobRecord, jobs: Jobs) -> str | None:
    """The job that ended there last, looked for among the newest ones; another key's is not told of."""
    found: list[JobRecord] = []
    cursor = None
    for _ in range(_PAGES):
        page = jobs.list(_PAGE, cursor, JobState.SUCCEEDED)
        found += [
            other
            for other in page.records
            if other.output == record.output and other.updated_at > record.updated_at
        ]
        cursor = page.cursor
        if cursor is None:
            break
    return max(found, key=lambda other: other.updated_at).id if found else None
