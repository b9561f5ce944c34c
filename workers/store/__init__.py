"""Object stores: ``file:`` and ``s3:`` URIs behind one protocol."""

from workers.store.base import Buffer, ObjectInfo, ObjectStore, Upload, UploadedPart
from workers.store.settings import StoreSettings
from workers.store.stores import Stores, open_stores, read_bytes, read_range
from workers.store.uris import from_path, join, name, normalise, parent, scheme, to_path

__all__ = [
    "Buffer",
    "ObjectInfo",
    "ObjectStore",
    "StoreSettings",
    "Stores",
    "Upload",
    "UploadedPart",
    "from_path",
    "join",
    "name",
    "normalise",
    "open_stores",
    "parent",
    "read_bytes",
    "read_range",
    "scheme",
    "to_path",
]
