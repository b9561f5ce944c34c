"""One output on the object store: claimed, filled, committed, or given up.

The object store knows no leases, so what makes a paused scheduler harmless is written there: the claim
object, multipart uploads that an abort or a completion ends, and an index that is put only where none is.
Until ``model.safetensors.index.json`` exists there is no merged checkpoint; after it exists it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from service.checkpoint import INDEX_FILE, SINGLE_FILE, is_shard, is_tokenizer_file
from service.plan import Plan, Shard
from workers.errors import (
    AlreadyExistsError,
    InvalidPartError,
    ObjectNotFoundError,
    OutputConflictError,
    StoreError,
    StoreUnavailableError,
    UploadNotFoundError,
)
from workers.store.base import ObjectInfo, ObjectStore, Upload, UploadedPart
from workers.store.uris import join, scheme, to_path
from workers.store.uris import name as file_name
from workers.task import canonical_json

HIDDEN = ".mergemill"
"""Everything that is there only while a job runs is below it."""
CLAIM = f"{HIDDEN}/claim.json"
PLAN_METADATA = "mergemill-plan"
"""User metadata of every shard: the digest of the plan that made it."""

MAX_SMALL_BYTES = 1 << 30
"""Longest file that is copied or read whole."""

log = structlog.get_logger(__name__)


class Output:
    """The output of one job. Every method can be repeated after a crash.

    :param guard: called before every change; raises when this process may no longer make any.
    """

    def __init__(self, store: ObjectStore, uri: str, job: str, guard: Callable[[], None]) -> None:
        self.store = store
        self.uri = uri
        self.job = job
        self._guard = guard
        self._made = 0

    def existing(self) -> str | None:
        """What makes the output a checkpoint already, or what is left of one, or None."""
        if (name := self._loadable()) is not None:
            return name
        names = (file_name(info.uri) for info in self.store.list(self.uri + "/model", beside=True))
        return next((name for name in names if name.endswith(".safetensors")), None)

    def claim(self, document: Mapping[str, Any], is_over: Callable[[str], bool]) -> dict[str, str]:
        """Claim the output; the upload ids that an earlier claim of this very job recorded.

        :param is_over: whether another job, by id, has ended for good.
        :raises OutputConflictError: another job's claim is there.
        """
        uri = join(self.uri, CLAIM)
        self._made = _missing_directories(self.uri)
        while True:
            body = {**document, "job": self.job, "uploads": {}, "made": self._made}
            self._guard()
            try:
                self.store.put_if_absent(uri, canonical_json(body).encode())
                return {}
            except AlreadyExistsError:
                held = self._claim()
            if held is None:
                continue  # its owner removed it in between
            self._made = held.get("made", 0)
            body["made"] = self._made
            if held["job"] != self.job:
                if not is_over(held["job"]):
                    raise OutputConflictError(
                        f"{self.uri} is claimed by the job {held['job']}; wait for it or cancel it. If no service "
                        f"knows that job any more, delete {uri}"
                    )
                log.warning("taking over the claim of a job that has ended", output=self.uri, job=held["job"])
                self._abort(held["shards"])
                self.store.put(uri, canonical_json(body).encode())
                return {}
            if held["plan_digest"] != document["plan_digest"]:
                self._abort(held["shards"])
                self.store.put(uri, canonical_json(body).encode())
                return {}
            return dict(held["uploads"])

    def open_uploads(
        self, plan: Plan, document: Mapping[str, Any], known: Mapping[str, str]
    ) -> dict[str, str]:
        """Open one upload a shard, adopt those recorded in ``known``, abort the rest, and record all in the claim."""
        uploads = {}
        for shard in plan.shards:
            uri = join(self.uri, shard.name)
            wanted = known.get(shard.name)
            for upload in self.store.list_uploads(uri):
                if upload.id == wanted:
                    uploads[shard.name] = upload.id
                else:
                    self._guard()
                    self.store.abort(upload)
            if shard.name not in uploads:
                self._guard()
                uploads[shard.name] = self.store.open_upload(uri, shard.size, {PLAN_METADATA: plan.digest}).id
        self._guard()
        body = {**document, "job": self.job, "uploads": uploads, "made": self._made}
        self.store.put(join(self.uri, CLAIM), canonical_json(body).encode())
        return uploads

    def upload(self, shard: str, uploads: Mapping[str, str]) -> Upload:
        """The open upload of a shard."""
        return Upload(join(self.uri, shard), uploads[shard])

    def held_parts(self, shard: str, uploads: Mapping[str, str]) -> list[UploadedPart]:
        """The parts that the store holds for a shard.

        :raises UploadNotFoundError: the upload is gone.
        """
        return self.store.list_parts(self.upload(shard, uploads))

    def make_room(self) -> None:
        """Before the first completion of an overwrite: take away what would make a mixture loadable.

        An index of the same text goes as well: it is the old checkpoint's, whose shards have the same names.
        """
        for name in (INDEX_FILE, SINGLE_FILE):
            self._guard()
            self.store.delete(join(self.uri, name))

    def complete(self, shard: Shard, uploads: Mapping[str, str], plan_digest: str) -> None:
        """Complete a shard's upload; after a lost answer, recognise that it is complete.

        :raises UploadNotFoundError: it is gone, and the shard is not there.
        """
        upload = self.upload(shard.name, uploads)
        for attempt in (1, 2):
            self._guard()
            try:
                parts = self.store.list_parts(upload)
                held = sum(part.size for part in parts)
                if (len(parts), held) != (shard.parts, shard.size):
                    raise UploadNotFoundError(
                        f"the upload of {upload.uri} holds {held} of {shard.size} bytes in "
                        f"{len(parts)} of {shard.parts} parts"
                    )
                self.store.complete(upload, parts)
                return
            except (UploadNotFoundError, StoreUnavailableError):
                made = self._made_by(upload.uri, plan_digest)
                if made is not None and made.size == shard.size:
                    return
                raise
            except InvalidPartError:
                if attempt == 2:
                    raise

    def put(self, name: str, data: bytes) -> None:
        """Write one small file."""
        self._guard()
        self.store.put(join(self.uri, name), data)

    def read(self, uri: str, etag: str | None = None) -> bytes:
        """Read one small object whole."""
        info = self.store.head(uri)
        if info.size > MAX_SMALL_BYTES:
            raise StoreError(f"{uri} has {info.size} bytes, more than the {MAX_SMALL_BYTES} that are copied")
        buffer = bytearray(info.size)
        if buffer:
            self.store.read_into(uri, 0, memoryview(buffer), etag or info.etag)
        return bytes(buffer)

    def delete_stale(self, ours: Container[str]) -> None:
        """Delete what an overwritten checkpoint left and would be loaded with the new one.

        That is its shards and its tokenizer's files, but for those in ``ours``; whatever else lies there stays.
        """
        for info in list(self.store.list(self.uri + "/", beside=True)):
            own = file_name(info.uri)
            if own not in ours and (is_shard(own) or is_tokenizer_file(own)):
                self._guard()
                self.store.delete(info.uri)

    def put_index(self, plan: Plan) -> None:
        """Write the commit marker.

        :raises OutputConflictError: another index is there.
        """
        uri, data = join(self.uri, INDEX_FILE), plan.index.encode()
        self._guard()
        try:
            self.store.put_if_absent(uri, data)
        except AlreadyExistsError:
            if not self._is(uri, data):
                raise OutputConflictError(f"{uri} was written by somebody else in the meantime") from None

    def clear(self, shards: Iterable[str]) -> None:
        """Remove everything hidden, the claim last, so that a crash in between still finds it claimed.

        Uploads for ``shards`` that nobody knows go too: a lost answer, or a paused scheduler, may leave some.
        """
        self._abort(shards)
        claim = join(self.uri, CLAIM)
        for info in list(self.store.list(join(self.uri, HIDDEN) + "/")):
            if info.uri != claim:
                self._guard()
                self.store.delete(info.uri)
        self._guard()
        self.store.delete(claim)

    def give_up(self) -> None:
        """Abort every upload, delete shards that this job completed without a commit, and remove its claim.

        Nothing is touched where the claim is not this job's, nor any shard of a checkpoint that can be loaded:
        that is the one from before, which the same plan may have made.
        """
        held = self._claim()
        if held is None:
            with suppress(
                StoreError
            ):  # nothing is known to be there, and it may be the output that is the problem
                self._abort(())
            return
        if held["job"] != self.job:
            return
        self._abort(held["shards"])
        for shard in held["shards"] if self._loadable() is None else ():
            uri = join(self.uri, shard)
            if self._made_by(uri, held["plan_digest"]):
                self._guard()
                self.store.delete(uri)
        self.clear(held["shards"])
        _remove_directories(self.uri, held.get("made", 0))

    def _loadable(self) -> str | None:
        """The file that makes the output loadable, or None."""
        for name in (INDEX_FILE, SINGLE_FILE):
            try:
                self.store.head(join(self.uri, name))
            except ObjectNotFoundError:
                continue
            return name
        return None

    def _claim(self) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = json.loads(self.read(join(self.uri, CLAIM)))
        except ObjectNotFoundError:
            return None
        return held

    def _abort(self, shards: Iterable[str]) -> None:
        """Abort all uploads for these shards: also those that were opened and not yet recorded.

        And those for the claim, which whoever looked whether the output is writable has left, if it was killed then.
        """
        for name in (*shards, CLAIM):
            for upload in self.store.list_uploads(join(self.uri, name)):
                self._guard()
                self.store.abort(upload)

    def _is(self, uri: str, data: bytes) -> bool:
        try:
            return self.store.head(uri).size == len(data) and self.read(uri) == data
        except ObjectNotFoundError:
            return False

    def _made_by(self, uri: str, plan_digest: str) -> ObjectInfo | None:
        """The object, if a plan of this digest made it."""
        try:
            info = self.store.head(uri)
        except ObjectNotFoundError:
            return None
        return info if info.metadata.get(PLAN_METADATA) == plan_digest else None


def holds_checkpoint(store: ObjectStore, uri: str) -> str | None:
    """What is wrong with an output that holds a checkpoint, or what is left of one; None where there is none.

    :raises StoreError: the store does not tell.
    """
    there = Output(store, uri, job="", guard=_nothing).existing()
    return None if there is None else _taken(uri, there)


def output_problems(store: ObjectStore, uri: str, overwrite: bool) -> list[str]:
    """What is wrong with a place for a checkpoint: no permission to look or to write, or what it holds is to stay."""
    problems = []
    try:
        taken = holds_checkpoint(store, uri)
        if taken is not None and not overwrite:
            problems.append(taken)
        store.check_writable(join(uri, CLAIM))
    except StoreError as error:
        problems.append(f"output {uri}: {error}")
    return problems


def _taken(uri: str, there: str) -> str:
    return (
        f"output {uri} already holds a checkpoint ({there}): to replace it, give --overwrite on the command line, "
        '`?overwrite=true` beside YAML, or `"options": {"overwrite": true}` in JSON'
    )


def _missing_directories(uri: str) -> int:
    """How many directories a first object in the output will make: its own, and those above it."""
    if scheme(uri) != "file":
        return 0
    path = Path(to_path(uri))
    return sum(not each.exists() for each in (path, *path.parents))


def _remove_directories(uri: str, made: int) -> None:
    """Remove the directories that a job made, as far as they are empty: not one that was there before it."""
    if scheme(uri) == "file":
        path = Path(to_path(uri))
        with suppress(OSError):
            for each in (path, *path.parents)[:made]:
                each.rmdir()


def _nothing() -> None:
    """The guard of an output that is only looked at."""
