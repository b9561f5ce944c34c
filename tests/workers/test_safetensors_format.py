"""The safetensors format: what is accepted, what is refused, and that the reference library agrees."""

from __future__ import annotations

import copy
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from tests.fuzzing import fuzzed
from workers.errors import HeaderError
from workers.safetensors_format import (
    MAX_HEADER_BYTES,
    Entry,
    Header,
    encode,
    header_length,
    layout,
    parse,
    prefix,
)
from workers.task import DTYPE_BYTES

pytestmark = pytest.mark.fast

CALM = fuzzed(100)
"""Other processes share the machine: slowness of one example says nothing."""

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), max_size=8).map(
    lambda found: [(name, dtype, shape) for name, (dtype, shape) in found.items()]
)
METADATA = st.dictionaries(NAMES, st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=3)


def data_bytes(entries: tuple[Entry, ...]) -> int:
    return entries[-1].end if entries else 0


def document(**tensors: Any) -> dict[str, Any]:
    return dict(tensors)


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def read(value: Any, size: int = 8) -> Header:
    """Parse a header that belongs to ``size`` bytes of data."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse(text, 8 + len(text) + size)


@CALM
@given(TENSORS, METADATA)
def test_what_is_encoded_is_parsed_back(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    entries = layout(tensors)
    text = encode(entries, metadata).encode()
    header = parse(text, 8 + len(text) + data_bytes(entries))
    assert len(text) % 8 == 0
    assert header.metadata == metadata
    assert header.data_start == 8 + len(text)
    assert sorted(header.entries, key=lambda e: e.name) == sorted(entries, key=lambda e: e.name)
    assert [entry.start for entry in header.entries] == sorted(entry.start for entry in entries)
    assert header_length(prefix(text.decode())[:8], 10**9) == len(text)


MUTANTS: tuple[Any, ...] = (None, True, False, -1, 0, 1, 3, 2.0, 1e400, 2**63, 2**70, "F32", "", [], {}, [[]])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    found = [path]
    items = (
        value.items() if isinstance(value, dict) else (enumerate(value) if isinstance(value, list) else ())
    )
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@CALM
@given(TENSORS.filter(bool), st.data())
def test_a_mutated_header_parses_to_a_valid_one_or_is_refused(
    tensors: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject
) -> None:
    entries = layout(tensors)
    value = json.loads(encode(entries, {"format": "pt"}))
    path = data.draw(st.sampled_from(places(value)))
    mutant = data.draw(st.sampled_from(MUTANTS))
    if path:
        holder = copy.deepcopy(value)
        at = holder
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = mutant
    else:
        holder = mutant
    assert_valid_or_refused(json.dumps(holder).encode(), data_bytes(entries))


@CALM
@given(TENSORS.filter(bool), st.data())
def test_a_flipped_byte_parses_to_a_valid_header_or_is_refused(
    tensors: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject
) -> None:
    entries = layout(tensors)
    text = bytearray(encode(entries, {}).encode())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    assert_valid_or_refused(bytes(text), data_bytes(entries))


@CALM
@given(st.binary(max_size=60), st.integers(0, 100))
def test_garbage_is_refused_with_a_header_error(text: bytes, size: int) -> None:
    assert_valid_or_refused(text, size)


def assert_valid_or_refused(text: bytes, size: int) -> None:
    try:
        header = parse(text, 8 + len(text) + size)
    except HeaderError as error:
        assert len(str(error)) < 2_000
        return
    position = 0
    for entry in header.entries:
        assert entry.start == position
        assert entry.nbytes == math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        assert all(type(size) is int for size in (*entry.shape, entry.start, entry.end))
        entry.name.encode()
        position = entry.end
    assert position == size


@pytest.mark.parametrize(
    ("value", "size", "says"),
    [
        (document(a=tensor(offsets=(4, 12))), 12, "leaves a gap before it"),
        (document(a=tensor(), b=tensor(offsets=(4, 12))), 12, "overlaps the tensor before it"),
        (document(a=tensor(), b=tensor()), 8, "overlaps the tensor before it"),
        (document(a=tensor(offsets=(0, 9))), 9, "takes 8 bytes"),
        (document(a=tensor(shape=(3,))), 8, "takes 12 bytes"),
        (document(a=tensor(dtype="F16")), 8, "takes 4 bytes"),
        (document(a=tensor()), 7, "truncated"),
        (document(a=tensor()), 9, "bytes that no tensor owns"),
        (document(), 1, "bytes that no tensor owns"),
        (document(a=tensor(offsets=(8, 0))), 8, "ends before it begins"),
        (document(a=tensor(offsets=(-8, 0))), 8, "not two positions"),
        (document(a=tensor(offsets=(0, True))), 1, "not two positions"),
        (document(a=tensor(offsets=(0, 8.0))), 8, "not two positions"),
        (document(a=tensor(offsets=(0, "8"))), 8, "not two positions"),
        (document(a=tensor(offsets=(0, 8, 8))), 8, "not two positions"),
        (document(a=tensor(offsets=8)), 8, "not two positions"),
        (document(a=tensor(shape=(True, 2))), 8, "not a list of sizes"),
        (document(a=tensor(shape=(2.0,))), 8, "not a list of sizes"),
        (document(a=tensor(shape=(-1, -2))), 8, "not a list of sizes"),
        (document(a=tensor(shape=2)), 8, "not a list of sizes"),
        (document(a=tensor(shape=(2**62, 2, 2))), 8, "overflows"),
        (document(a=tensor(shape=(2**62, 4, 0), offsets=(0, 0))), 0, "overflows"),
        (document(a=tensor(shape=(2**64,))), 8, "not a list of sizes"),
        (document(a=tensor(dtype="F31")), 8, "'F31'"),
        (document(a=tensor(dtype="F4")), 8, "'F4'"),
        (document(a=tensor(dtype=["F32"])), 8, "['F32']"),
        (document(a=tensor(dtype={})), 8, "{}"),
        (document(a=tensor(extra=1)), 8, "exactly dtype, shape and data_offsets"),
        (document(a={"dtype": "F32", "shape": [2]}), 8, "exactly dtype, shape and data_offsets"),
        (document(a=[1, 2]), 8, "exactly dtype, shape and data_offsets"),
        (document(__metadata__={"format": 1}), 0, "__metadata__"),
        (document(__metadata__=["pt"]), 0, "__metadata__"),
        ([], 0, "does not begin with"),
        (b"", 0, "does not begin with"),
        (b" {}", 0, "does not begin with"),
        (b"{\xff}", 0, "not valid JSON"),
        (b"\xef\xbb\xbf{}", 0, "does not begin with"),
        (b"{} trailing", 0, "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}', 1, "not valid JSON"),
        (b'{"a":1,"a":1}', 0, "'a' twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "'dtype' twice"),
        (b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "surrogate"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,' + b"9" * 5000 + b"]}}", 1, "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, 0, "not valid JSON"),
        (b'{"a":' * 100_000, 0, "not valid JSON"),
    ],
)
def test_what_is_wrong_is_said(value: Any, size: int, says: str) -> None:
    with pytest.raises(HeaderError) as caught:
        read(value, size)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 2_000


def test_the_tensor_is_named_but_a_name_of_a_megabyte_is_not_repeated() -> None:
    with pytest.raises(HeaderError, match=r"layers\.7\.weight"):
        read(document(**{"layers.7.weight": tensor(offsets=(0, 4))}))
    with pytest.raises(HeaderError) as caught:
        read(document(**{"x" * 1_000_000: tensor(offsets=(0, 4))}))
    assert len(str(caught.value)) < 1_000


def test_a_shape_of_a_million_huge_sizes_is_refused_at_once() -> None:
    text = json.dumps(document(a=tensor(shape=[2**62] * 300_000))).encode()
    started = time.monotonic()
    with pytest.raises(HeaderError, match="overflows"):
        read(text)
    assert time.monotonic() - started < 5


def test_empty_tensors_may_share_an_offset_and_keep_their_order() -> None:
    entries = layout([("b", "F32", (0,)), ("a", "F32", (3, 0)), ("c", "U8", (1,)), ("d", "F64", (0, 2**40))])
    text = encode(entries, {}).encode()
    assert parse(text, 8 + len(text) + 1).entries == entries


def test_a_header_may_hold_no_tensor() -> None:
    assert read(document(__metadata__={"a": "b"}), 0) == Header((), {"a": "b"}, 8 + 28)


@pytest.mark.parametrize(
    ("data", "size", "says"),
    [
        (b"", 0, "has 0 bytes"),
        (b"\0" * 7, 7, "has 7 bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), 1 << 40, "not a safetensors file"),
        (struct.pack("<Q", 2**64 - 1), 1 << 40, "not a safetensors file"),
        (struct.pack("<Q", 100), 107, "truncated or corrupt"),
        (b"PK\x03\x04\x14\0\0\0", 1 << 30, "not a safetensors file"),
    ],
)
def test_an_impossible_header_length_is_refused(data: bytes, size: int, says: str) -> None:
    with pytest.raises(HeaderError, match=says):
        header_length(data, size)


def test_the_longest_header_that_is_allowed_is() -> None:
    assert header_length(struct.pack("<Q", 100), 108) == 100
    assert header_length(struct.pack("<Q", MAX_HEADER_BYTES), 1 << 30) == 100_000_000


def bits(found: torch.Tensor) -> bytes:
    return bytes(found.contiguous().reshape(-1).view(torch.uint8).tolist()) if found.numel() else b""


def test_the_reference_library_opens_what_is_laid_out(tmp_path: Path) -> None:
    tensors = {
        "λ.weight — 重み \U0001f9ea": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        'quote " and \\ backslash\n': torch.tensor(True),
        "empty": torch.zeros(0, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(-2.5, dtype=torch.float64),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    kinds = dict(zip(tensors, ["F32", "BOOL", "BF16", "F64", "U8"], strict=True))
    entries = layout((name, kinds[name], tuple(found.shape)) for name, found in tensors.items())
    path = tmp_path / "ours.safetensors"
    path.write_bytes(
        prefix(encode(entries, {"format": "pt"})) + b"".join(bits(tensors[entry.name]) for entry in entries)
    )
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(tensors)
        for name, expected in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert bits(found) == bits(expected)


TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def test_what_the_reference_library_writes_is_parsed(tmp_path: Path) -> None:
    assert set(TORCH) == set(DTYPE_BYTES)
    tensors = {
        f"{name}.{shape}.é": torch.zeros(shape, dtype=dtype)
        for name, dtype in TORCH.items()
        for shape in [(), (0,), (3, 0), (1,), (3, 5)]
    }
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path, {"format": "pt", "née": "ü"})
    data = path.read_bytes()
    length = header_length(data[:8], len(data))
    header = parse(data[8 : 8 + length], len(data))
    assert header.metadata == {"format": "pt", "née": "ü"}
    assert header.data_start == 8 + length
    assert {entry.name for entry in header.entries} == set(tensors)
    for entry in header.entries:
        assert TORCH[entry.dtype] == tensors[entry.name].dtype
        assert entry.shape == tuple(tensors[entry.name].shape)
        assert entry.nbytes == tensors[entry.name].nbytes


def test_every_truncation_is_refused() -> None:
    data = save({"a": torch.arange(5.0), "b": torch.ones(2, 2)})
    for size in range(len(data)):
        with pytest.raises(HeaderError):
            parse(data[8 : 8 + header_length(data[:8], size)], size)


@CALM
@given(st.data())
def test_whatever_the_reference_library_refuses_is_refused(data: st.DataObject) -> None:
    """A header that we read and it does not would make an output that nobody can load."""
    tensors = data.draw(TENSORS.filter(bool))
    entries = layout(tensors)
    text = bytearray(encode(entries, {}).encode())
    for _ in range(data.draw(st.integers(1, 2))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(
            st.one_of(st.sampled_from(list(b'0123456789[]{},:"- .eE')), st.integers(0, 255))
        )
    size = data_bytes(entries)
    assume(b"-0" not in text)  # zero in Python, a float in Rust
    try:
        header = parse(bytes(text), 8 + len(text) + size)
    except HeaderError:
        return
    try:
        found = deserialize(struct.pack("<Q", len(text)) + bytes(text) + bytes(size))
    except SafetensorError as error:
        raise AssertionError(f"{bytes(text)!r} is refused by safetensors: {error}") from error
    assert {name for name, _ in found} == {entry.name for entry in header.entries}
