"""One output on the object store: claimed, filled, committed, or given up.

The object store knows no leases, so what makes a paused scheduler harmless is given to it: the claim object,
multipart uploads that an abort or a completion ends, an index that is put only where none is, and with every
change the time after which it must have no effect.
Until ``model.safetensors.index.json`` exists there is no merged checkpoint; after it exists it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from math import inf
from pathlib import Path

import structlog

from service.adapters.reading import CONFIG as ADAPTER_CONFIG
from service.adapters.reading import WEIGHTS as ADAPTER_WEIGHTS
from service.planning.checkpoint import (
    CONFIG_FILE,
    HIDDEN,
    INDEX_FILE,
    MANIFEST_FILE,
    PLAN_METADATA,
    SINGLE_FILE,
    is_copied,
    is_shard,
    is_staged,
    is_tokenizer_file,
)
from service.planning.plan import Plan, Shard
from service.running.claim import CLAIM, Claim, read_claim
from service.running.sidecars import CARD
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
from workers.store.fence import Permit, fenced
from workers.store.uris import join, scheme, to_path
from workers.store.uris import name as file_name

MAX_SMALL_BYTES = 1 << 30
"""Longest file that is copied or read whole."""

log = structlog.get_logger(__name__)


class Output:
    """The output of one job. Every method can be repeated after a crash.

    :param guard: asked right before every change until when it may be made; raises when this process may make none.
    """

    def __init__(self, store: ObjectStore, uri: str, job: str, guard: Permit) -> None:
        self.store = store
        self.uri = uri
        self.job = job
        self._guard = guard
        self._made = 0

    def existing(self) -> str | None:
        """What makes the output a checkpoint already, or what is left of one, or None."""
        if (name := self._loadable()) is not None:
            return name
        for prefix in ("model", "adapter_"):
            names = (file_name(info.uri) for info in self.store.list(f"{self.uri}/{prefix}", beside=True))
            if found := [name for name in names if name.endswith(".safetensors") or name == ADAPTER_CONFIG]:
                return found[0]
        return None

    def claim(
        self,
        wanted: Claim,
        is_over: Callable[[str], bool],
        name_of: Callable[[str], str] = "the job {}".format,
    ) -> dict[str, str]:
        """Claim the output; the upload ids that an earlier claim of this very job recorded.

        :param is_over: whether another job, by id, has ended for good.
        :param name_of: what to call it where it is told of: it may be none of those that its reader may know.
        :raises OutputConflictError: another job's claim is there.
        """
        uri = join(self.uri, CLAIM)
        self._made = _missing_directories(self.uri)
        while True:
            try:
                with self._owned():
                    self.store.put_if_absent(uri, self._as_ours(wanted).to_bytes())
                return {}
            except AlreadyExistsError:
                held = read_claim(self.store, self.uri)
            except StoreError:  # a full disk has room for directories, and none for a file in them
                _remove_directories(self.uri, self._made)
                raise
            if held is None:
                continue  # its owner removed it in between
            self._made = held.made
            if held.job != self.job:
                if not is_over(held.job):
                    raise OutputConflictError(
                        f"{self.uri} is claimed by {name_of(held.job)}; wait for it or cancel it. If no service "
                        f"knows that job any more, `mergemill recover {self.uri}` has it go on, or delete {uri}"
                    )
                log.warning("taking over the claim of a job that has ended", output=self.uri, job=held.job)
            elif held.plan_digest == wanted.plan_digest:
                return dict(held.uploads)
            self._abort(held.shards)
            with self._owned():
                self.store.put(uri, self._as_ours(wanted).to_bytes())
            return {}

    def open_uploads(self, plan: Plan, claim: Claim, known: Mapping[str, str]) -> dict[str, str]:
        """Open one upload a shard, adopt those recorded in ``known``, abort the rest, and record all in the claim.

        Shards of earlier merges that are staged have theirs, too.
        """
        uploads = {}
        for shard in (shard for each in plan.whole for shard in each.shards):
            uri = join(self.uri, shard.name)
            wanted = known.get(shard.name)
            for upload in self.store.list_uploads(uri):
                if upload.id == wanted:
                    uploads[shard.name] = upload.id
                else:
                    with self._owned():
                        self.store.abort(upload)
            if shard.name not in uploads:
                with self._owned():
                    opened = self.store.open_upload(uri, shard.size, {PLAN_METADATA: plan.digest})
                uploads[shard.name] = opened.id
        with self._owned():
            self.store.put(join(self.uri, CLAIM), self._as_ours(claim, uploads).to_bytes())
        return uploads

    def upload(self, shard: str, uploads: Mapping[str, str]) -> Upload:
        """The open upload of a shard."""
        return Upload(join(self.uri, shard), uploads[shard])

    def held_parts(self, shard: str, uploads: Mapping[str, str]) -> list[UploadedPart]:
        """The parts that the store holds for a shard.

        :raises UploadNotFoundError: the upload is gone.
        """
        return self.store.list_parts(self.upload(shard, uploads))

    def make_room(self, shards: Container[str] = ()) -> None:
        """Before the first completion of an overwrite: take away what would make a mixture loadable.

        An index of the same text goes as well: it is the old checkpoint's, whose shards have the same names.

        :param shards: what is completed; before an adapter's weights its config goes, too.
        """
        for name in (INDEX_FILE, SINGLE_FILE, *((ADAPTER_CONFIG,) if ADAPTER_WEIGHTS in shards else ())):
            with self._owned():
                self.store.delete(join(self.uri, name))

    def complete(self, shard: Shard, uploads: Mapping[str, str], plan_digest: str) -> None:
        """Complete a shard's upload; after a lost answer, recognise that it is complete.

        :raises UploadNotFoundError: it is gone, and the shard is not there.
        """
        upload = self.upload(shard.name, uploads)
        for attempt in (1, 2):
            try:
                parts = self.store.list_parts(upload)
                held = sum(part.size for part in parts)
                if (len(parts), held) != (shard.parts, shard.size):
                    raise UploadNotFoundError(
                        f"the upload of {upload.uri} holds {held} of {shard.size} bytes in "
                        f"{len(parts)} of {shard.parts} parts"
                    )
                with self._owned():
                    self.store.complete(upload, parts)
                return
            except (UploadNotFoundError, StoreUnavailableError):
                made = self.made_by(upload.uri, plan_digest)
                if made is not None and made.size == shard.size:
                    return
                raise
            except InvalidPartError:
                if attempt == 2:
                    raise

    def made_by(self, uri: str, plan_digest: str) -> ObjectInfo | None:
        """The object, if a plan of this digest made it."""
        try:
            info = self.store.head(uri)
        except ObjectNotFoundError:
            return None
        return info if info.metadata.get(PLAN_METADATA) == plan_digest else None

    def put(self, name: str, data: bytes, plan_digest: str | None = None) -> None:
        """Write one small file; the metadata of one that is to be seen tells which plan made it, as a shard's does."""
        with self._owned():
            self.store.put(join(self.uri, name), data, {PLAN_METADATA: plan_digest} if plan_digest else None)

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

        That is its shards, its tokenizer's files and the config of an adapter, with which transformers would load the
        adapter's base, but for those in ``ours``; whatever else lies there stays.
        """
        for info in list(self.store.list(self.uri + "/", beside=True)):
            own = file_name(info.uri)
            if own not in ours and (is_shard(own) or is_tokenizer_file(own) or own == ADAPTER_CONFIG):
                with self._owned():
                    self.store.delete(info.uri)

    def put_index(self, plan: Plan) -> None:
        """Write the commit marker.

        :raises OutputConflictError: another index is there.
        """
        uri, data = join(self.uri, INDEX_FILE), plan.index.encode()
        try:
            with self._owned():
                self.store.put_if_absent(uri, data)
        except AlreadyExistsError:
            if not self._is(uri, data):
                raise OutputConflictError(f"{uri} was written by somebody else in the meantime") from None

    def clear(self, shards: Iterable[str]) -> None:
        """Remove everything hidden, the claim last, so that a crash in between still finds it claimed.

        Uploads for ``shards`` that nobody knows go too: a lost answer, or a paused scheduler, may leave some.
        """
        # Of a claim there is an upload only while somebody finds out whether it can be put.
        self._abort((*shards, CLAIM))
        self._clear_hidden()
        with self._owned():
            self.store.delete(join(self.uri, CLAIM))

    def give_up(self) -> None:
        """Abort every upload, delete what this job wrote without a commit, and remove its claim.

        Nothing is touched where the claim is not this job's, nor any file of a checkpoint that can be loaded:
        that is the one from before, which the same plan may have made.
        """
        held = read_claim(self.store, self.uri)
        if held is None:
            with suppress(
                StoreError
            ):  # nothing is known to be there, and it may be the output that is the problem
                self._abort((CLAIM,))
            return
        if held.job != self.job:
            return
        self._abort(held.shards)
        beside = self.store.list(self.uri + "/", beside=True) if self._loadable() is None else ()
        for info in list(beside):
            if _is_written(file_name(info.uri)) and self.made_by(info.uri, held.plan_digest):
                with self._owned():
                    self.store.delete(info.uri)
        self.clear(held.shards)
        _remove_directories(self.uri, held.made)

    def sweep(self, is_abandoned: Callable[[str, float], bool]) -> int:
        """Remove what this job, which has ended, and whoever died on the way left here; how much that was.

        Nothing is touched where another job's claim is: that job clears up at its end.

        :param is_abandoned: whether an upload will be ended by nobody, by its file's name and when it was opened.
        """
        held = read_claim(self.store, self.uri)
        if held is not None:
            if held.job != self.job:
                return 0
            self.give_up()
        below = self.store.uploads_below(join(self.uri, HIDDEN))  # a directory's own are among them
        hidden = [(upload, at) for upload, at in below if is_staged(file_name(upload.uri))]
        beside = self.store.uploads_below(self.uri)
        found = list({upload.id: (upload, at) for upload, at in (*hidden, *beside)}.values())
        abandoned = [upload for upload, opened_at in found if is_abandoned(file_name(upload.uri), opened_at)]
        for upload in abandoned:
            with self._owned():
                self.store.abort(upload)
        removed = int(held is not None) + len(abandoned)
        if len(abandoned) < len(found):  # of a directory, uploads are hidden, too
            return removed
        return removed + self._clear_hidden()

    def _clear_hidden(self) -> int:
        """Remove everything hidden but the claim; how much that was."""
        claim = join(self.uri, CLAIM)
        found = [info.uri for info in self.store.list(join(self.uri, HIDDEN) + "/") if info.uri != claim]
        for uri in found:
            with self._owned():
                self.store.delete(uri)
        return len(found)

    def _loadable(self) -> str | None:
        """The file that makes the output loadable, or None."""
        for name in (INDEX_FILE, SINGLE_FILE):
            try:
                self.store.head(join(self.uri, name))
            except ObjectNotFoundError:
                continue
            return name
        return None

    def _owned(self) -> AbstractContextManager[None]:
        """What is changed within is changed only as long as this process may."""
        return fenced(self._guard)

    def _as_ours(self, claim: Claim, uploads: Mapping[str, str] | None = None) -> Claim:
        """What a claim says of this output, beside what the job does."""
        return claim.model_copy(update={"uploads": dict(uploads or {}), "made": self._made})

    def _abort(self, shards: Iterable[str]) -> None:
        """Abort all uploads for these shards: also those that were opened and not yet recorded."""
        for shard in shards:
            for upload in self.store.list_uploads(join(self.uri, shard)):
                with self._owned():
                    self.store.abort(upload)

    def _is(self, uri: str, data: bytes) -> bool:
        try:
            return self.store.head(uri).size == len(data) and self.read(uri) == data
        except ObjectNotFoundError:
            return False


def holds_checkpoint(store: ObjectStore, uri: str) -> str | None:
    """What is wrong with an output that holds a checkpoint, or what is left of one; None where there is none.

    :raises StoreError: the store does not tell.
    """
    there = Output(store, uri, job="", guard=for_ever).existing()
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


def _is_written(name: str) -> bool:
    """Whether a job writes files of this name."""
    files = {CARD, CONFIG_FILE, MANIFEST_FILE, ADAPTER_CONFIG}
    return is_shard(name) or is_copied(name) or name in files


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
                with suppress(FileNotFoundError):
                    each.rmdir()


def for_ever() -> float:
    """The guard of an output that is only looked at."""
    return inf
