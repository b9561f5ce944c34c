"""Open a checkpoint by its headers, index and config.json, and digest those few tensors that have to be equal."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from service.adapters.config import MAX_CONFIG_BYTES as MAX_ADAPTER_CONFIG_BYTES
from service.adapters.config import MAX_CONFIG_VALUES as MAX_ADAPTER_CONFIG_VALUES
from service.adapters.config import read_config
from service.adapters.reading import CONFIG, WEIGHTS, Adapter, told_apart
from service.planning.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_CONFIG_BYTES,
    MAX_CONFIG_VALUES,
    MAX_FILES,
    MAX_HEADERS_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
    gather,
    is_copied,
    is_weight_file,
    parse_index,
    shard_uri,
    tensors_of,
)
from service.planning.known_digests import blocks_of
from workers.errors import (
    AccessDeniedError,
    HeaderError,
    ObjectNotFoundError,
    PlanError,
    StoreError,
    StoreUnavailableError,
)
from workers.json_text import load
from workers.safetensors_format import LENGTH_BYTES, clip, header_length, parse, unique
from workers.store.base import ObjectInfo, ObjectStore
from workers.store.uris import join, scheme, to_path
from workers.store.uris import name as base_name
from workers.task import TensorRef

OPEN_THREADS = 16
"""Headers read at once."""

WELL_KNOWN_FILES = (
    SINGLE_FILE, INDEX_FILE, CONFIG_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip
"""What a checkpoint may hold besides shards: looked for one by one where listing is not permitted."""

_PARSING = threading.Lock()
"""Headers are parsed one at a time: it takes the interpreter alone, and many times their size in memory."""

_DIGEST_STEP = 8 << 20

T = TypeVar("T")
R = TypeVar("R")


def open_checkpoint(store: ObjectStore, uri: str) -> Checkpoint:
    """Read a checkpoint's headers, index and config.

    :raises PlanError: it is missing, unreadable or malformed; lists what was wrong.
    :raises StoreUnavailableError: the store is out of reach.
    """
    problems: list[str] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except HeaderError as error:
            problems.append(str(error))
        except StoreUnavailableError:
            raise  # says nothing about the model: a job that is half done must not fail for it
        except StoreError as error:
            problems.append(f"{uri}: {error}")
        return None

    files = attempt(lambda: _files(store, uri)) or {}
    weight_map = None if problems else attempt(lambda: _weight_map(store, uri, files))
    if problems:
        raise PlanError(*problems)
    config = attempt(lambda: _read_json(store, uri, CONFIG_FILE))
    shards = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    infos = parallel(lambda name: attempt(lambda: store.head(shard_uri(uri, name))), shards)
    lengths = parallel(
        lambda info: None if info is None else attempt(lambda: _header_length(store, info)), infos
    )
    if (total := sum(length or 0 for length in lengths)) > MAX_HEADERS_BYTES:
        raise PlanError(
            f"{uri}: the headers have {total} bytes, more than the {MAX_HEADERS_BYTES} that are read"
        )

    def read(at: tuple[ObjectInfo | None, int | None]) -> dict[str, StoredTensor] | None:
        info, length = at
        return None if info is None or length is None else attempt(lambda: _read_header(store, info, length))

    tensors = parallel(read, list(zip(infos, lengths, strict=True)))
    known = {name: own for name, own in zip(shards, tensors, strict=True) if own is not None}
    found = attempt(lambda: gather(uri, weight_map, known)) if len(known) == len(shards) else None
    if found is None or problems:
        raise PlanError(*sorted(problems))
    small = {name: info for name, info in files.items() if is_copied(name)}
    weights = [info for info in infos if info is not None]
    blocks = blocks_of(store, files.get(MANIFEST_FILE), weights, found)
    return Checkpoint(uri, found, config, small, {info.uri: info.etag for info in weights}, blocks=blocks)


def open_adapter(store: ObjectStore, uri: str) -> Adapter:
    """Read an adapter's config and header.

    :raises PlanError: it is missing, malformed, or no plain LoRA; lists what was wrong.
    :raises StoreUnavailableError: the store is out of reach.
    """
    where = join(uri, WEIGHTS)
    try:
        settings = store.head(join(uri, CONFIG))
        text = _read(store, settings, MAX_ADAPTER_CONFIG_BYTES)
        config, problems = read_config(_object(settings.uri, text, MAX_ADAPTER_CONFIG_VALUES, unique))
        try:
            info = store.head(where)
        except ObjectNotFoundError as error:
            raise HeaderError(
                f"{where} does not exist: only safetensors is read (pickles never are); convert the adapter first"
            ) from error
        if (length := _header_length(store, info)) > MAX_HEADERS_BYTES:
            raise HeaderError(
                f"{where}: its header has {length} bytes, more than the {MAX_HEADERS_BYTES} that are read"
            )
        tensors = _read_header(store, info, length)
    except StoreUnavailableError:
        raise
    except ObjectNotFoundError as error:
        raise PlanError(f"{uri}: no adapter here: {CONFIG} does not exist") from error
    except HeaderError as error:
        raise PlanError(str(error)) from error
    except StoreError as error:
        raise PlanError(f"{uri}: {error}") from error
    if config is None:
        raise PlanError(*(f"{settings.uri}: {problem}" for problem in problems))
    adapter, problems = told_apart(uri, config, tensors, (settings, info))
    if problems:
        raise PlanError(*(f"{where}: {problem}" for problem in problems))
    return adapter


def _files(store: ObjectStore, uri: str) -> dict[str, ObjectInfo]:
    """The files of a checkpoint, by name; those of well-known names where listing is not permitted."""
    try:
        found = {
            base_name(info.uri): info for info in islice(store.list(uri + "/", beside=True), MAX_FILES + 1)
        }
        if len(found) > MAX_FILES:
            raise HeaderError(f"{uri} holds more than {MAX_FILES} files: is it a model?")
        return found
    except AccessDeniedError:
        pass

    def look(name: str) -> ObjectInfo | None:
        try:
            return store.head(join(uri, name))
        except (ObjectNotFoundError, AccessDeniedError):  # without the permission S3 says 403 for either
            return None

    looked = zip(WELL_KNOWN_FILES, parallel(look, WELL_KNOWN_FILES), strict=True)
    return {name: info for name, info in looked if info is not None}


def _weight_map(store: ObjectStore, uri: str, files: Mapping[str, ObjectInfo]) -> dict[str, str] | None:
    """The shard index, or None for a single file; the single file wins where both are, as in transformers."""
    single, index = join(uri, SINGLE_FILE), join(uri, INDEX_FILE)
    if _exists(store, single, files, SINGLE_FILE):
        return None
    try:
        return parse_index(_read(store, store.head(index), MAX_INDEX_BYTES), index)
    except ObjectNotFoundError:
        other = sorted(name for name in files if is_weight_file(name))
        if any(name.endswith(".safetensors") for name in other):
            raise HeaderError(f"{uri} holds {other[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}") from None
        if other:
            raise HeaderError(
                f"{uri} holds {other[0]} and no {SINGLE_FILE}: only safetensors is read (pickles never are); "
                "convert it first"
            ) from None
        raise ObjectNotFoundError(f"no model here: {_lack(uri)}") from None


def _lack(uri: str) -> str:
    if scheme(uri) == "file" and not Path(path := to_path(uri)).is_dir():
        return f"there is no directory {path}"
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} exists"


def _exists(store: ObjectStore, uri: str, files: Mapping[str, ObjectInfo], name: str) -> bool:
    if files:
        return name in files
    try:
        store.head(uri)
    except ObjectNotFoundError:
        return False
    return True


def _header_length(store: ObjectStore, info: ObjectInfo) -> int:
    try:
        return header_length(_read_range(store, info, 0, min(LENGTH_BYTES, info.size)), info.size)
    except HeaderError as error:
        raise HeaderError(f"{info.uri}: {error}") from error


def _read_header(store: ObjectStore, info: ObjectInfo, length: int) -> dict[str, StoredTensor]:
    text = _read_range(store, info, LENGTH_BYTES, LENGTH_BYTES + length)
    try:
        with _PARSING:
            header = parse(text, info.size)
    except HeaderError as error:
        raise HeaderError(f"{info.uri}: {error}") from error
    return tensors_of(info.uri, info.etag, header)


def _read_json(store: ObjectStore, uri: str, name: str) -> dict[str, Any] | None:
    try:
        info = store.head(join(uri, name))
    except ObjectNotFoundError:
        return None
    return _object(info.uri, _read(store, info, MAX_CONFIG_BYTES), MAX_CONFIG_VALUES)


def _object(
    uri: str, text: bytes, limit: int, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    try:
        document = load(text, limit, object_of)
    except ValueError as error:  # a HeaderError, too, when a key is there twice
        raise HeaderError(f"{uri} is not valid JSON: {clip(str(error))}") from error
    if not isinstance(document, dict):
        raise HeaderError(f"{uri} is not a JSON object")
    return document


def _read(store: ObjectStore, info: ObjectInfo, limit: int) -> bytes:
    if info.size > limit:
        raise HeaderError(f"{info.uri} has {info.size} bytes, more than the {limit} that are read")
    return _read_range(store, info, 0, info.size)


def _read_range(store: ObjectStore, info: ObjectInfo, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    if buffer:
        store.read_into(info.uri, start, memoryview(buffer), info.etag)
    return bytes(buffer)


def content_digest(store: ObjectStore, ref: TensorRef) -> str:
    """Hex SHA-256 of a tensor's bytes, read a step at a time.

    :raises StoreError: they cannot be read, or the object has changed.
    """
    sha = hashlib.sha256()
    for start in range(ref.start, ref.end, _DIGEST_STEP):
        buffer = bytearray(min(_DIGEST_STEP, ref.end - start))
        store.read_into(ref.uri, start, memoryview(buffer), ref.etag)
        sha.update(buffer)
    return sha.hexdigest()


def parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` of each item, in order, several at once; the first to raise ends it."""
    if len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(OPEN_THREADS, len(items))) as pool:
        return list(pool.map(work, items))
