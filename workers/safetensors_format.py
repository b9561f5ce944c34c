"""The safetensors file format: header bytes to tensor entries and back, with one strict check.

A file is an 8-byte little-endian header length N, N bytes of JSON and then raw little-endian tensor data.
Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.canonical import DTYPE_BYTES
from workers.errors import HeaderError
from workers.json_text import most_values

LENGTH_BYTES = 8
"""Bytes of the length prefix."""

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is accepted, as in the reference implementation."""

MAX_TENSORS = 1 << 18
"""Most tensors of one file, and of one checkpoint: about twice as many as any known one has."""

MAX_VALUES = 10 * MAX_TENSORS
"""Most JSON values of a header; a tensor of four dimensions takes ten. More would only take memory."""

MAX_NAME = 1024
"""Longest name of a tensor, in characters: names are repeated in plans, manifests and messages."""

MAX_SIZE = 2**63 - 1
"""Largest dimension, position and number of elements."""

_METADATA = "__metadata__"
_SHOWN = 200
"""Characters of a foreign name that a message repeats."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file."""

    name: str
    """Its key."""
    dtype: str
    """Safetensors dtype name."""
    shape: tuple[int, ...]
    """Sizes of its dimensions; empty for a scalar."""
    start: int
    """First byte, counted from the end of the header."""
    end: int
    """One past the last byte, counted from the end of the header."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header, checked."""

    entries: tuple[Entry, ...]
    """The tensors in the order of their bytes."""
    metadata: Mapping[str, str]
    """The free-form ``__metadata__``."""
    data_start: int
    """Where in the file the tensor data begins."""


def header_length(prefix: bytes, file_size: int) -> int:
    """The header's length in bytes, from the first eight bytes of a file of ``file_size`` bytes.

    :raises HeaderError: the file is too short, or the length is impossible.
    """
    if len(prefix) < LENGTH_BYTES:
        raise HeaderError(f"the file has {len(prefix)} bytes; a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed: not a safetensors file?"
        )
    if LENGTH_BYTES + length > file_size:
        raise HeaderError(
            f"the header claims {length} bytes but the file has {file_size}: it is truncated or corrupt"
        )
    return int(length)


def parse(text: bytes, file_size: int) -> Header:
    """Read and check a header: ``text`` is its JSON without the length prefix.

    :raises HeaderError: anything is malformed; one message per cause.
    """
    if not text.startswith(b"{"):  # white space before it is legal JSON, and refused by the specification
        raise HeaderError("the header does not begin with '{': it is not the JSON of a safetensors file")
    if most_values(text) > MAX_VALUES:
        raise HeaderError(
            f"the header holds more than {MAX_VALUES} values: it is not one of up to {MAX_TENSORS} tensors"
        )
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not valid JSON: {type(error).__name__}: {error}") from error
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("__metadata__ must map strings to strings")
    if len(document) > MAX_TENSORS:
        raise HeaderError(
            f"the header names {len(document)} tensors, more than the {MAX_TENSORS} that are read"
        )
    entries = sorted(
        (_entry(name, value) for name, value in document.items()), key=lambda e: (e.start, e.end)
    )
    data_start = LENGTH_BYTES + len(text)
    validate(entries, file_size - data_start)
    return Header(tuple(entries), metadata, data_start)


def validate(entries: Sequence[Entry], data_bytes: int) -> None:
    """Check tensors sorted by offset against the size of the data: no gap, no overlap, every size right.

    :raises HeaderError: names the first tensor that is wrong.
    """
    position = 0
    for entry in entries:
        expected = _numel(entry) * DTYPE_BYTES[entry.dtype]
        if entry.nbytes != expected:
            raise HeaderError(
                f"{_label(entry.name)}: {entry.dtype} of shape {clip(str(list(entry.shape)))} takes {expected} bytes, "
                f"but its data_offsets span {entry.nbytes}"
            )
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise HeaderError(f"{_label(entry.name)} {what}: starts at {entry.start}, expected {position}")
        position = entry.end
    if position != data_bytes:
        what = "is truncated" if position > data_bytes else "has bytes that no tensor owns"
        raise HeaderError(f"the file {what}: tensors end at {position}, the data is {data_bytes} bytes long")


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Entry, ...]:
    """Place ``(name, dtype, shape)`` one after the other, without gaps."""
    entries = []
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        entries.append(Entry(name, dtype, shape, position, end))
        position = end
    return tuple(entries)


def encode(entries: Iterable[Entry], metadata: Mapping[str, str]) -> str:
    """The header's JSON, padded with spaces so that the data begins on a multiple of eight bytes."""
    document: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def prefix(text: str) -> bytes:
    """The bytes of a header: its length and its JSON."""
    body = text.encode()
    return struct.pack("<Q", len(body)) + body


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``.

    :raises HeaderError: a key is there twice: which one counts, nobody can say.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise HeaderError(f"it has the key {clip(repr(key))} twice")
        found[key] = value
    return found


def _entry(name: str, value: Any) -> Entry:
    label = _label(name)
    if len(name) > MAX_NAME:
        raise HeaderError(
            f"{label} has a name of {len(name)} characters, more than the {MAX_NAME} that are read"
        )
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise HeaderError(f"{label} has a name that is not Unicode text: it holds half a surrogate pair")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{label} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise HeaderError(f"{label} has the dtype {clip(repr(dtype))}, which is unknown here")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise HeaderError(f"{label} has a shape that is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise HeaderError(f"{label} has data_offsets that are not two positions")
    if offsets[0] > offsets[1]:
        raise HeaderError(f"{label} ends before it begins: {offsets}")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _numel(entry: Entry) -> int:
    """Elements of a shape; multiplied in order and stopped at the first overflow, as the reference implementation."""
    count = 1
    for size in entry.shape:
        count *= size
        if count > MAX_SIZE:
            raise HeaderError(f"{_label(entry.name)} has a shape that overflows: {clip(str(entry.shape))}")
    return count


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _label(name: str) -> str:
    return f"tensor {clip(repr(name))}"


def clip(text: str) -> str:
    """A foreign text, short enough for a message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
