"""Object URIs as text: pure functions, no I/O.

``file:`` URIs are percent-encoded as :meth:`pathlib.Path.as_uri` does it. ``s3:`` URIs hold the key as it is,
as every S3 tool writes them, so ``s3://bucket/a%20b`` is the key ``a%20b``.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from urllib.parse import quote, unquote_to_bytes

from workers.errors import StoreError

SCHEMES = ("s3", "file")
"""The schemes that there are stores for."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def scheme(uri: str) -> str:
    """The lower-case scheme of ``uri``.

    >>> scheme("s3://bucket/key")
    's3'

    :raises StoreError: it has none, or one that no store knows.
    """
    found, separator, _ = uri.partition("://")
    if not separator or found.lower() not in SCHEMES:
        raise StoreError(f"{uri!r} is not an object URI; supported are s3://bucket/key and file:///path")
    return found.lower()


def normalise(uri: str) -> str:
    """The one way to write ``uri``: no doubled or trailing slash, no ``.``; an absolute path becomes ``file://``.

    >>> normalise("/models//base/./")
    'file:///models/base'
    >>> normalise("S3://bucket//run 1/")
    's3://bucket/run 1'

    :raises StoreError: it has a ``..``, no bucket, a relative path, or a scheme that no store knows.
    """
    if uri.startswith("/"):
        return from_path(uri)
    if scheme(uri) == "file":
        return from_path(to_path(uri))
    bucket, names = _split_s3(uri)
    return "/".join([f"s3://{bucket}", *names])


def join(uri: str, *names: str) -> str:
    """``uri`` with more segments; ``names`` are plain (not encoded) and may hold slashes.

    >>> join("file:///models", "run 1", "config.json")
    'file:///models/run%201/config.json'

    :raises StoreError: as :func:`normalise`.
    """
    encode = _encode if scheme(uri) == "file" else str
    return normalise("/".join([uri, *map(encode, names)]))


def parent(uri: str) -> str:
    """The URI one segment up.

    >>> parent("s3://bucket/run/model.safetensors")
    's3://bucket/run'

    :raises StoreError: there is none above; else as :func:`normalise`.
    """
    whole = normalise(uri)
    above = whole.rpartition("/")[0]
    if above in ("s3:/", "file://"):
        if above == "file://" and whole != "file:///":
            return "file:///"
        raise StoreError(f"{uri!r} has nothing above it")
    return above


def name(uri: str) -> str:
    """The last segment, decoded; empty for a bucket or the root.

    >>> name("file:///models/run%201")
    'run 1'

    :raises StoreError: as :func:`normalise`.
    """
    whole = normalise(uri)
    if scheme(whole) == "file":
        return PurePosixPath(to_path(whole)).name
    return (_split_s3(whole)[1] or [""])[-1]


def to_path(uri: str) -> str:
    """The absolute, normalised path that a ``file:`` URI names.

    :raises StoreError: another scheme or host, a relative path, a ``..``, a NUL, or a bare ``?`` or ``#``.
    """
    if scheme(uri) != "file":
        raise StoreError(f"{uri!r} is no file: URI")
    host, slash, encoded = uri.partition("://")[2].partition("/")
    if host.lower() not in ("", "localhost"):
        raise StoreError(f"{uri!r} names a directory on host {host!r}; write file:///path for a local one")
    if not slash:
        raise StoreError(f"{uri!r} has no path")
    if "?" in encoded or "#" in encoded:
        raise StoreError(f"{uri!r} has a bare '?' or '#'; write %3F or %23")
    return _normal_path(uri, os.fsdecode(unquote_to_bytes(_bytes(uri, "/" + encoded))))


def from_path(path: str) -> str:
    """The ``file:`` URI of an absolute path.

    :raises StoreError: the path is relative, or has a ``..`` or a NUL.
    """
    _bytes(path, path)
    return "file://" + _encode(_normal_path(path, path))


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3:`` URI that names an object, the key exactly as it stands.

    :raises StoreError: there is no bucket or no key, or a segment of the key is ``..``.
    """
    bucket, _ = _split_s3(uri)
    key = uri.partition("://")[2].partition("/")[2]
    if not key:
        raise StoreError(f"{uri!r} names a bucket, not an object")
    return bucket, key


def _split_s3(uri: str) -> tuple[str, list[str]]:
    if scheme(uri) != "s3":
        raise StoreError(f"{uri!r} is no s3: URI")
    bucket, *segments = uri.partition("://")[2].split("/")
    if not bucket:
        raise StoreError(f"{uri!r} has no bucket")
    if not _BUCKET.fullmatch(bucket):  # boto3 takes an access point's ARN as well, and that is another host
        raise StoreError(f"{uri!r}: {bucket[:100]!r} is no name of a bucket")
    if ".." in segments:
        raise StoreError(f"{uri!r} has a '..'")
    if not uri.isascii() and any("\ud800" <= char <= "\udfff" for char in uri):
        raise StoreError(f"{uri!r} holds half a character: no object has such a name")
    return bucket, [segment for segment in segments if segment not in ("", ".")]


def _normal_path(given: str, path: str) -> str:
    if not path.startswith("/"):
        raise StoreError(f"{given!r} is a relative path")
    segments = path.split("/")
    if ".." in segments or "\0" in path:
        raise StoreError(f"{given!r} has a '..' or a NUL")
    return "/" + "/".join(segment for segment in segments if segment not in ("", "."))


def _bytes(given: str, path: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError as error:
        raise StoreError(f"{given!r} holds half a character: no file has such a name") from error


def _encode(path: str) -> str:
    return quote(os.fsencode(path))
