"""Check a downloaded file against the digest that its merge recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from workers.errors import HeaderError, StoreError
from workers.safetensors_format import LENGTH_BYTES, header_length, parse
from workers.task import BLOCK_BYTES

TREE = "sha256-tree-1mib"
"""Of a safetensors file: SHA-256 over the SHA-256 of its header (length prefix and padding included) and the digest of
each tensor in the order of the file; a tensor's is SHA-256 over the SHA-256 of its 1 MiB blocks."""


def verify(path: Path, size: int, digest: str) -> None:
    """Check a file's length and content.

    :param digest: ``sha256:`` or :data:`TREE` with a colon, then hex digits.
    :raises StoreError: the file is not what the merge wrote, or the digest is of an unknown kind.
    """
    found = path.stat().st_size
    if found != size:
        raise StoreError(f"{path.name}: {found} bytes came, not {size}")
    kind, _, expected = digest.partition(":")
    with path.open("rb") as file:
        if kind == "sha256":
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        elif kind == TREE:
            try:
                actual = _tree(file, size)
            except HeaderError as error:
                raise StoreError(f"{path.name}: {error}") from error
        else:
            raise StoreError(
                f"{path.name} has a digest of the unknown kind {kind!r}: a newer client may know it"
            )
    if actual != expected:
        raise StoreError(
            f"{path.name}: the bytes that came have the {kind} digest {actual}, the merge recorded {expected}"
        )


def _tree(file: BinaryIO, size: int) -> str:
    prefix = file.read(LENGTH_BYTES)
    text = file.read(header_length(prefix, size))
    tree = hashlib.sha256(hashlib.sha256(prefix + text).digest())
    for entry in parse(text, size).entries:
        tensor = hashlib.sha256()
        left = entry.nbytes
        while left:
            block = file.read(min(left, BLOCK_BYTES))
            if not block:
                raise StoreError(f"tensor {entry.name!r} ends early: the file changes while it is read")
            tensor.update(hashlib.sha256(block).digest())
            left -= len(block)
        tree.update(tensor.digest())
    return tree.hexdigest()
