"""Where a key's merges may read and write: what is granted to a job, and a store that keeps to it.

What a place is called decides first, and without a look at it, so that nobody learns from a refusal whether there
is anything. Of a directory the resolved path has to lie within as well: links do not lead out.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.keys import EVERYWHERE, HUB, Access, ApiKey, Limits, lies_in
from service.planning.places import resolve_model
from service.planning.price import Price
from workers.errors import ForbiddenError, RecipeError
from workers.store.base import Buffer, ObjectInfo, ObjectStore, Upload, UploadedPart
from workers.store.files import etag_of
from workers.store.uris import from_path, scheme, to_path

_PATHS: Final = ("s3://", "file://", "/")


def grant(
    key: ApiKey, names: Iterable[str], output: str | None, model_roots: Mapping[str, str], limits: Limits
) -> Access:
    """What a key grants to a merge of the models ``names`` into the normalised ``output``.

    Names that lead nowhere are not its business: planning says what is wrong with them.

    :raises ForbiddenError: it does not allow all of them; names every one that it does not.
    """
    refused: list[str] = []
    mapped: list[str] = []
    for name in dict.fromkeys(names):
        try:
            uri = resolve_model(name, model_roots)
        except RecipeError:
            continue
        if HUB in key.inputs and not name.lower().startswith(_PATHS):
            mapped.append(uri)
        elif not is_within(uri, key.inputs):
            refused.append(f"{name}: the key {key.id} does not allow reading there")
    if output is not None and not is_within(output, key.outputs):
        refused.append(f"{output}: the key {key.id} does not allow writing there")
    if refused:
        raise ForbiddenError(*refused)
    return Access(
        inputs=tuple(prefix for prefix in key.inputs if prefix != HUB),
        outputs=key.outputs,
        mapped=tuple(dict.fromkeys(mapped)),
        input_bytes=limits.input_bytes,
    )


def size_problems(access: Access | None, price: Price | None) -> list[str]:
    """What is wrong with a merge that reads more than its key may have read for one job."""
    if access is None or price is None or not 0 < access.input_bytes < price.input_bytes:
        return []
    return [
        f"the inputs hold {price.input_bytes} bytes of tensors, and the API key allows {access.input_bytes} for one "
        "job: merge smaller models, or have the limit raised"
    ]


def is_within(uri: str, prefixes: Sequence[str]) -> bool:
    """Whether a place lies in one of these prefixes: by its name and, of a directory, in truth."""
    if EVERYWHERE in prefixes:
        return lies_in(uri, prefixes)
    places = [from_path(os.path.realpath(to_path(each))) for each in prefixes if each.startswith("file:")]
    if not lies_in(uri, [*prefixes, *places]):
        return False
    return scheme(uri) != "file" or lies_in(from_path(os.path.realpath(to_path(uri))), places)


def check_place(fd: int, uri: str, access: Access | None) -> None:
    """Refuse an open file of a job's output that lies elsewhere than the job may write, by the kernel's word.

    :raises ForbiddenError: it does.
    """
    place = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - bytes of the kernel, not a path of ours
    if access is not None and not is_within(from_path(place), access.outputs):
        raise ForbiddenError(f"{uri}: the API key of this merge does not allow reading there")


def confine(store: ObjectStore, access: Access | None, output: str | None = None) -> ObjectStore:
    """The store as one job sees it: the inputs and the output that it may have; all of it without ``access``."""
    return store if access is None else ConfinedStore(store, access, output)


@dataclass(frozen=True)
class ConfinedStore:
    """An :class:`ObjectStore` that raises :class:`ForbiddenError` for everything that its job has no access to."""

    store: ObjectStore
    """The store behind it."""
    access: Access
    """Where the job may read and write."""
    output: str | None = None
    """Where it does write: there it may read too."""

    def head(self, uri: str) -> ObjectInfo:
        """See :meth:`ObjectStore.head`."""
        self._check_readable(uri)
        info = self.store.head(uri)
        self._check_opened(info)
        return info

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """See :meth:`ObjectStore.read_into`; what is read is what was found to lie within."""
        self._check_readable(uri)
        self.store.read_into(uri, start, buffer, etag or self.head(uri).etag)

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        self._check_readable(prefix.rpartition("/")[0])
        found = list(self.store.list(prefix, beside=beside))
        self._refuse([info.uri for info in found if not self._is_readable(info.uri)], "reading")
        return iter(found)

    def presign(self, uri: str, expires_s: int) -> str | None:
        """See :meth:`ObjectStore.presign`."""
        self._check_readable(uri)
        return self.store.presign(uri, expires_s)

    def put(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put`."""
        self._check_writable(uri)
        return self.store.put(uri, data, metadata)

    def put_if_absent(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put_if_absent`."""
        self._check_writable(uri)
        return self.store.put_if_absent(uri, data, metadata)

    def delete(self, uri: str) -> None:
        """See :meth:`ObjectStore.delete`."""
        self._check_writable(uri)
        self.store.delete(uri)

    def check_writable(self, uri: str) -> None:
        """See :meth:`ObjectStore.check_writable`."""
        self._check_writable(uri)
        self.store.check_writable(uri)

    def open_upload(self, uri: str, size: int, metadata: Mapping[str, str]) -> Upload:
        """See :meth:`ObjectStore.open_upload`."""
        self._check_writable(uri)
        return self.store.open_upload(uri, size, metadata)

    def put_part(self, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        """See :meth:`ObjectStore.put_part`."""
        self._check_writable(upload.uri)
        return self.store.put_part(upload, number, offset, data)

    def copy_part(
        self, upload: Upload, number: int, offset: int, source: str, start: int, end: int, etag: str
    ) -> UploadedPart:
        """See :meth:`ObjectStore.copy_part`."""
        self._check_readable(source)
        self._check_writable(upload.uri)
        return self.store.copy_part(upload, number, offset, source, start, end, etag)

    def list_parts(self, upload: Upload) -> builtins.list[UploadedPart]:
        """See :meth:`ObjectStore.list_parts`."""
        self._check_writable(upload.uri)
        return self.store.list_parts(upload)

    def list_uploads(self, uri: str) -> builtins.list[Upload]:
        """See :meth:`ObjectStore.list_uploads`."""
        self._check_writable(uri)
        return self.store.list_uploads(uri)

    def uploads_below(self, prefix: str) -> builtins.list[tuple[Upload, float]]:
        """See :meth:`ObjectStore.uploads_below`."""
        self._check_writable(prefix)
        return self.store.uploads_below(prefix)

    def complete(self, upload: Upload, parts: Sequence[UploadedPart]) -> None:
        """See :meth:`ObjectStore.complete`."""
        self._check_writable(upload.uri)
        self.store.complete(upload, parts)

    def abort(self, upload: Upload) -> None:
        """See :meth:`ObjectStore.abort`."""
        self._check_writable(upload.uri)
        self.store.abort(upload)

    def _check_readable(self, uri: str) -> None:
        self._refuse([] if self._is_readable(uri) else [uri], "reading")

    def _check_writable(self, uri: str) -> None:
        self._refuse([] if self._is_writable(uri) else [uri], "writing")

    def _is_readable(self, uri: str) -> bool:
        # Where the operator maps hub names to is the operator's, links included
        if lies_in(uri, self.access.mapped) or is_within(uri, self.access.inputs):
            return True
        return self._is_writable(uri)

    def _is_writable(self, uri: str) -> bool:
        return self.output is not None and lies_in(uri, [self.output]) and is_within(uri, self.access.outputs)

    def _check_opened(self, info: ObjectInfo) -> None:
        """Refuse what lay elsewhere just when it was looked up, however quickly links were swapped.

        A file's path is asked of the kernel by an open descriptor, and the ETag tells that it is the same file;
        whoever reads it later names the ETag. Where no kernel tells, its resolved path is looked at again.
        """
        if scheme(info.uri) != "file" or lies_in(info.uri, self.access.mapped):
            return
        places = [*self.access.inputs, *(self.access.outputs if self.output is not None else ())]
        if EVERYWHERE not in places and not is_within(_opened_at(info), places):
            self._refuse([info.uri], "reading")

    @staticmethod
    def _refuse(uris: Sequence[str], what: str) -> None:
        if uris:
            raise ForbiddenError(
                *(f"{uri}: the API key of this merge does not allow {what} there" for uri in uris)
            )


def _opened_at(info: ObjectInfo) -> str:
    """Where the file with this ETag is, by the kernel's word; else by its name."""
    path = Path(to_path(info.uri))
    if hasattr(os, "O_PATH"):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return info.uri  # it went; whoever reads it finds out
        try:
            place = Path(f"/proc/self/fd/{fd}").readlink()
            if etag_of(os.fstat(fd)) == info.etag and place.is_absolute():
                return from_path(str(place))
        finally:
            os.close(fd)
        raise ForbiddenError(f"{info.uri}: it changed while it was looked at")
    return info.uri
