"""Objects in S3 and in what speaks its language, for ``s3:`` URIs.

Servers differ, so nothing is taken on trust: where the signature does not cover the bytes, one that does not
confirm a CRC32 gets Content-MD5 (Ceph 16 accepts a wrong CRC32 in silence), a copy's source is looked up before
and after (Ceph 16 and moto ignore ``x-amz-copy-source-if-match``), and keys with a percent sign are copied
through this process (Ceph 16 decodes the copy source twice, and then copies another object or dies).
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from workers.errors import (
    AlreadyExistsError,
    InvalidPartError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedReadError,
    UploadNotFoundError,
)
from workers.store import fence, s3_bytes
from workers.store.base import Buffer, ObjectInfo, Upload, UploadedPart
from workers.store.copying import copy_through
from workers.store.s3_client import S3Connection
from workers.store.s3_errors import code_of, status_of
from workers.store.settings import StoreSettings
from workers.store.uris import scheme, split_s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

PAGE = 1000
"""Entries asked for at a time when listing: the most that S3 gives."""


class S3Store:
    """The :class:`~workers.store.base.ObjectStore` of ``s3:`` URIs."""

    def __init__(self, settings: StoreSettings | None = None) -> None:
        self._settings = settings or StoreSettings()
        self._connection = S3Connection(self._settings)
        self._sends_md5 = False

    @property
    def _client(self) -> S3Client:
        return self._connection.client

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        self._connection.close()

    def head(self, uri: str) -> ObjectInfo:
        """See :meth:`ObjectStore.head`."""
        bucket, key = split_s3(uri)
        answer = self._connection.call(
            "look up", uri, lambda: self._client.head_object(Bucket=bucket, Key=key)
        )
        return ObjectInfo(uri, answer["ContentLength"], _plain(answer["ETag"]), _lower(answer["Metadata"]))

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """See :meth:`ObjectStore.read_into`. Long ranges are read as several at once."""
        view, step = buffer.cast("B"), self._settings.s3_read_bytes
        if not view or (etag is None and len(view) > step):
            info = self.head(uri)  # an empty range cannot be asked for, and several must be of one version
            if etag not in (None, info.etag):
                raise ObjectChangedError(_changed(uri, etag))
            if start + len(view) > info.size:
                raise TruncatedReadError(_ends_early(uri, start, len(view), info.size))
            etag = info.etag
        if len(view) <= step:
            if view:
                self._read_range(uri, start, view, etag)
            return
        readers = self._connection.readers
        reads = [
            readers.submit(self._read_range, uri, start + span.start, view[span], etag)
            for span in s3_bytes.spans(len(view), step)
        ]
        # Nobody may write into the caller's buffer any more once we have returned or raised.
        try:
            wait(reads, return_when="FIRST_EXCEPTION")
        finally:
            for read in reads:
                read.cancel()
            wait(reads)
        for read in reads:
            if not read.cancelled() and (error := read.exception()) is not None:
                raise error

    def _read_range(self, uri: str, start: int, view: memoryview, etag: str | None) -> None:
        bucket, key = split_s3(uri)
        pin: dict[str, Any] = {} if etag is None else {"IfMatch": etag}
        span = f"bytes={start}-{start + len(view) - 1}"

        def read() -> None:
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key, Range=span, **pin)
            except ClientError as error:
                if status_of(error) == 412:
                    raise ObjectChangedError(_changed(uri, etag)) from error
                if status_of(error) == 416:
                    raise TruncatedReadError(f"{uri} ends before byte {start}") from error
                raise
            body = answer["Body"]
            try:
                if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                    raise StoreError(
                        f"cannot read {uri}: the store ignores ranges ({answer.get('ContentRange')!r})"
                    )
                if answer["ContentLength"] != len(view):
                    raise TruncatedReadError(
                        _ends_early(uri, start, len(view), start + answer["ContentLength"])
                    )
                s3_bytes.fill(view, body)
            finally:
                body.close()

        self._connection.call("read", uri, read)

    def put(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put`."""
        return self._put(uri, data, metadata or {}, {})

    def put_if_absent(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put_if_absent`."""
        lost_answers: builtins.list[BaseException] = []
        try:
            return self._put(uri, data, metadata or {}, {"IfNoneMatch": "*"}, lost_answers)
        except AlreadyExistsError:
            ours = self._ours(uri, data, metadata or {}) if lost_answers else None
            if ours is None:
                raise
            return ours

    def _put(
        self,
        uri: str,
        data: Buffer,
        metadata: Mapping[str, str],
        condition: dict[str, Any],
        failures: builtins.list[BaseException] | None = None,
    ) -> ObjectInfo:
        bucket, key = split_s3(uri)
        names: dict[str, Any] = {"Bucket": bucket, "Key": key, "Metadata": _lower(metadata)}
        names |= condition
        if (
            fence.is_active() or not self._connection.signs_payloads
        ):  # a signature that expires covers no payload
            names |= s3_bytes.md5_header(memoryview(data))

        def send() -> Any:
            try:
                return self._client.put_object(**names, Body=s3_bytes.body(data))
            except ClientError as error:
                if condition and status_of(error) == 412:
                    raise AlreadyExistsError(f"{uri} is already there") from error
                raise

        note = None if failures is None else failures.append
        answer = self._connection.change("write", uri, send, note)
        return ObjectInfo(uri, memoryview(data).nbytes, _plain(answer["ETag"]), _lower(metadata))

    def _ours(self, uri: str, data: Buffer, metadata: Mapping[str, str]) -> ObjectInfo | None:
        """The object at ``uri`` if it is what we sent: an answer was lost, and the retry met our own."""
        info = self.head(uri)
        if info.size != memoryview(data).nbytes or info.metadata != _lower(metadata):
            return None
        found = bytearray(info.size)
        self.read_into(uri, 0, memoryview(found), info.etag)
        return info if found == bytes(data) else None

    def delete(self, uri: str) -> None:
        """See :meth:`ObjectStore.delete`."""
        bucket, key = split_s3(uri)
        try:
            self._connection.change("delete", uri, lambda: self._client.delete_object(Bucket=bucket, Key=key))
        except ObjectNotFoundError as error:
            if code_of(error.__cause__ or error) == "NoSuchBucket":
                raise

    def check_writable(self, uri: str) -> None:
        """See :meth:`ObjectStore.check_writable`. An upload that is opened and aborted is no object at any time."""
        self.abort(self.open_upload(uri, 0, {}))

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        if scheme(prefix) != "s3":
            raise StoreError(f"{prefix!r} is no s3: URI")
        bucket, _, key = prefix.partition("://")[2].partition("/")
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": key, "MaxKeys": PAGE}
        if beside:
            query["Delimiter"] = "/"
        while True:
            page = self._connection.call("list", prefix, lambda: self._client.list_objects_v2(**query))
            for item in page.get("Contents", []):
                yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], _plain(item["ETag"]))
            if not page.get("IsTruncated"):
                return
            query.update(ContinuationToken=page["NextContinuationToken"])

    def presign(self, uri: str, expires_s: int) -> str | None:
        """See :meth:`ObjectStore.presign`. Nothing is sent; seven days at most."""
        bucket, key = split_s3(uri)
        return self._connection.call(
            "sign a URL for",
            uri,
            lambda: self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s
            ),
        )

    def open_upload(self, uri: str, size: int, metadata: Mapping[str, str]) -> Upload:
        """See :meth:`ObjectStore.open_upload`. A retry after a lost answer leaves an empty upload behind."""
        bucket, key = split_s3(uri)
        answer = self._connection.change(
            "open an upload for",
            uri,
            lambda: self._client.create_multipart_upload(Bucket=bucket, Key=key, Metadata=_lower(metadata)),
        )
        return Upload(uri, answer["UploadId"])

    def put_part(self, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        """See :meth:`ObjectStore.put_part`. S3 places parts by number; ``offset`` is not sent."""
        view = memoryview(data).cast("B")
        if self._connection.signs_payloads:
            return UploadedPart(number, len(view), _plain(self._send_part(upload, number, data, {})["ETag"]))
        if not self._sends_md5:
            crc32 = s3_bytes.crc32_header(view)
            answer = self._send_part(upload, number, data, crc32)
            if crc32.items() <= answer.items():
                return UploadedPart(number, len(view), _plain(answer["ETag"]))
            log.warning(
                "the store ignores CRC32; parts carry Content-MD5 from now on (s3_checksums=when_required)"
            )
            self._sends_md5 = True
            if _plain(answer["ETag"]) == s3_bytes.md5(view).hex():
                return UploadedPart(number, len(view), _plain(answer["ETag"]))
        answer = self._send_part(upload, number, data, s3_bytes.md5_header(view))
        return UploadedPart(number, len(view), _plain(answer["ETag"]))

    def _send_part(
        self, upload: Upload, number: int, data: Buffer, checksum: dict[str, str]
    ) -> dict[str, Any]:
        names: dict[str, Any] = _upload_names(upload) | {"PartNumber": number} | checksum

        def send() -> dict[str, Any]:
            return {**self._client.upload_part(**names, Body=s3_bytes.body(data))}

        return self._connection.call(f"write part {number} of", upload.uri, send, self._raise_if_gone(upload))

    def copy_part(
        self, upload: Upload, number: int, offset: int, source: str, start: int, end: int, etag: str
    ) -> UploadedPart:
        """See :meth:`ObjectStore.copy_part`."""
        bucket, key = split_s3(source)
        if "%" in key or start == end:
            return copy_through(self, self, upload, number, offset, source, start, end, etag)
        names = _upload_names(upload) | {"PartNumber": number, "CopySource": {"Bucket": bucket, "Key": key}}

        def copy() -> Any:
            try:
                return self._client.upload_part_copy(
                    **names, CopySourceRange=f"bytes={start}-{end - 1}", CopySourceIfMatch=etag
                )
            except ClientError as error:
                if status_of(error) == 412:
                    raise ObjectChangedError(_changed(source, etag)) from error
                raise

        self._check_source(source, end, etag)
        answer = self._connection.call(
            f"copy into part {number} of {upload.uri} from", source, copy, self._raise_if_gone(upload)
        )
        self._check_source(source, end, etag)
        return UploadedPart(number, end - start, _plain(answer["CopyPartResult"]["ETag"]))

    def _check_source(self, source: str, end: int, etag: str) -> None:
        info = self.head(source)
        if info.etag != etag:
            raise ObjectChangedError(_changed(source, etag))
        if end > info.size:
            raise TruncatedReadError(_ends_early(source, 0, end, info.size))

    def list_parts(self, upload: Upload) -> builtins.list[UploadedPart]:
        """See :meth:`ObjectStore.list_parts`."""
        query = _upload_names(upload) | {"MaxParts": PAGE}
        parts: builtins.list[UploadedPart] = []
        while True:
            try:
                page = self._connection.call(
                    "list the parts of", upload.uri, lambda: self._client.list_parts(**query)
                )
            except ObjectNotFoundError as error:  # Ceph 16 answers NoSuchKey
                raise UploadNotFoundError(str(error)) from error
            parts += [
                UploadedPart(part["PartNumber"], part["Size"], _plain(part["ETag"]))
                for part in page.get("Parts", [])
            ]
            if not page.get("IsTruncated"):
                return parts
            query.update(PartNumberMarker=page["NextPartNumberMarker"])

    def list_uploads(self, uri: str) -> builtins.list[Upload]:
        """See :meth:`ObjectStore.list_uploads`."""
        bucket, key = split_s3(uri)
        return [Upload(uri, item["UploadId"]) for item in self._open(bucket, key) if item["Key"] == key]

    def uploads_below(self, prefix: str) -> builtins.list[tuple[Upload, float]]:
        """See :meth:`ObjectStore.uploads_below`."""
        bucket, _, key = prefix.partition("://")[2].partition("/")
        beginning = f"{key}/" if key else ""
        return [
            (Upload(f"s3://{bucket}/{item['Key']}", item["UploadId"]), item["Initiated"].timestamp())
            for item in self._open(bucket, beginning, Delimiter="/")
            if item["Key"].startswith(beginning) and "/" not in item["Key"].removeprefix(beginning)
        ]

    def _open(self, bucket: str, prefix: str, **more: str) -> Iterator[Any]:
        """The open uploads whose key begins so."""
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxUploads": PAGE} | more
        while True:
            page = self._connection.call(
                "list the uploads of",
                f"s3://{bucket}/{prefix}",
                lambda: self._client.list_multipart_uploads(**query),
            )
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            query.update(KeyMarker=page["NextKeyMarker"], UploadIdMarker=page["NextUploadIdMarker"])

    def complete(self, upload: Upload, parts: Sequence[UploadedPart]) -> None:
        """See :meth:`ObjectStore.complete`.

        Servers may answer a second completion with success as long as the first made the object.
        """
        if not parts:
            raise InvalidPartError(f"cannot complete {upload.uri}: no part was named")
        ordered = sorted(parts, key=lambda part: part.number)
        body: Any = {"Parts": [{"PartNumber": part.number, "ETag": part.etag} for part in ordered]}
        self._connection.change(
            "complete",
            upload.uri,
            lambda: self._client.complete_multipart_upload(**_upload_names(upload), MultipartUpload=body),
            self._raise_if_gone(upload),
        )

    def abort(self, upload: Upload) -> None:
        """See :meth:`ObjectStore.abort`."""
        try:
            self._connection.change(
                "abort the upload of",
                upload.uri,
                lambda: self._client.abort_multipart_upload(**_upload_names(upload)),
            )
        except (UploadNotFoundError, ObjectNotFoundError) as error:
            if code_of(error.__cause__ or error) == "NoSuchBucket":
                raise

    def _raise_if_gone(self, upload: Upload) -> Any:
        """Look before a retry: Ceph 16 answers 500 for ever when an aborted upload is completed."""

        def look(error: BaseException) -> None:
            if status_of(error) == 500:
                self.list_parts(upload)

        return look


def _upload_names(upload: Upload) -> dict[str, Any]:
    bucket, key = split_s3(upload.uri)
    return {"Bucket": bucket, "Key": key, "UploadId": upload.id}


def _lower(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in metadata.items()}


def _plain(etag: str) -> str:
    return etag.strip('"')


def _changed(uri: str, etag: str | None) -> str:
    return f"{uri} has changed since it was planned with: its ETag is no longer {etag}"


def _ends_early(uri: str, start: int, size: int, end: int) -> str:
    return f"{uri} ends at byte {end}; bytes {start} to {start + size} were asked for"
