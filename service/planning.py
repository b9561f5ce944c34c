"""Open a recipe's models by their headers and plan the merge: the only I/O that planning does.

Headers, indexes and config.json are read, and those few tensors that no arithmetic is done on are compared
byte for byte. Everything that can be wrong is looked for before anything is reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar
from urllib.parse import quote

from service.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
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
from service.matching import Inputs, needs_digest
from service.plan import Plan, PlanOptions, make_plan
from service.price import BASELINE_BYTES
from service.recipe import Recipe
from workers.errors import (
    AccessDeniedError,
    HeaderError,
    ObjectNotFoundError,
    PlanError,
    StoreError,
    StoreUnavailableError,
)
from workers.safetensors_format import LENGTH_BYTES, header_length, parse
from workers.store.base import ObjectInfo, ObjectStore
from workers.store.uris import from_path, join, normalise, to_path
from workers.store.uris import name as base_name
from workers.task import TensorRef

OPEN_THREADS = 16
"""Headers read at once."""

COMPARED_BYTES = 1 << 30
"""Most bytes per model of tensors without arithmetic that planning reads to compare them."""

WELL_KNOWN_FILES = (
    SINGLE_FILE, INDEX_FILE, CONFIG_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip
"""What a checkpoint may hold besides shards: looked for one by one where listing is not permitted."""

_DIGEST_STEP = 8 << 20
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from."""

    recipe: Recipe
    """The recipe."""
    inputs: Inputs
    """The opened checkpoints."""
    plan: Plan
    """The plan."""
    uris: Mapping[str, str]
    """Where each model named in the recipe is."""
    tokenizer: Checkpoint
    """Whose tokenizer files go to the output."""


def resolve_model(name: str, model_roots: Mapping[str, str]) -> str:
    """Where a model named in a recipe is: a normalised URI.

    ``model_roots`` maps a hub name, or a prefix of hub names ending in ``/`` (``""`` for all), to a URI prefix;
    the longest match wins. A revision is appended as ``@revision``.

    :raises PlanError: a relative path, or a hub name that nothing maps.
    """
    if name.startswith(("s3://", "file://", "/")):
        try:
            return normalise(name)
        except StoreError as error:
            raise PlanError(f"{name}: {error}") from error
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or ".." in re.split("[/@]", name):
        raise PlanError(
            f"{name!r} is neither s3://bucket/prefix, file:///directory, an absolute path nor a hub name "
            "(a relative path would mean the server's disk)"
        )
    bare, _, revision = name.partition("@")
    prefixes = [root for root in model_roots if (root.endswith("/") or not root) and bare.startswith(root)]
    key = next((key for key in (name, bare) if key in model_roots), max(prefixes, key=len, default=None))
    if key is None:
        raise PlanError(
            f"{name!r} is a hub name that this service does not know: map it to where its files are with the setting "
            f'model_roots, for example MERGEMILL_MODEL_ROOTS=\'{{"{bare}": "s3://bucket/{bare}"}}\''
        )
    try:
        root = normalise(model_roots[key])
        if key == name:
            return root
        if key == bare:
            return f"{root}@{quote(revision) if root.startswith('file:') else revision}"
        return join(root, *name[len(key) :].split("/"))
    except StoreError as error:
        raise PlanError(f"{name}: the setting model_roots maps {key!r} to no place: {error}") from error


def overlap(output: str, inputs: Iterable[str]) -> list[str]:
    """What is wrong with an output that equals, lies inside or contains an input."""
    problems = []
    ours = _real(output)
    for uri in dict.fromkeys(inputs):
        theirs = _real(uri)
        if theirs == ours or ours.startswith(theirs + "/") or theirs.startswith(ours + "/"):
            problems.append(f"output {output} overlaps the input {uri}: choose another place")
    return problems


def _real(uri: str) -> str:
    """The place itself, without the symbolic links that may lead to it."""
    return from_path(os.path.realpath(to_path(uri))) if uri.startswith("file:") else uri


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
    infos = _parallel(lambda name: attempt(lambda: store.head(shard_uri(uri, name))), shards)
    tensors = _parallel(
        lambda info: None if info is None else attempt(lambda: _read_header(store, info)), infos
    )
    read = {name: own for name, own in zip(shards, tensors, strict=True) if own is not None}
    found = attempt(lambda: gather(uri, weight_map, read)) if len(read) == len(shards) else None
    if found is None or problems:
        raise PlanError(*sorted(problems))
    small = {name: info for name, info in files.items() if is_copied(name)}
    return Checkpoint(uri, found, config, small, {info.uri: info.etag for info in infos if info is not None})


def _files(store: ObjectStore, uri: str) -> dict[str, ObjectInfo]:
    """The files of a checkpoint, by name; those of well-known names where listing is not permitted."""
    try:
        return {base_name(info.uri): info for info in store.list(uri + "/", beside=True)}
    except AccessDeniedError:
        pass

    def look(name: str) -> ObjectInfo | None:
        try:
            return store.head(join(uri, name))
        except (ObjectNotFoundError, AccessDeniedError):  # without the permission S3 says 403 for either
            return None

    found = zip(WELL_KNOWN_FILES, _parallel(look, WELL_KNOWN_FILES), strict=True)
    return {name: info for name, info in found if info is not None}


def plan_recipe(
    recipe: Recipe,
    options: PlanOptions,
    store: ObjectStore,
    model_roots: Mapping[str, str],
    baseline_bytes: int = BASELINE_BYTES,
    output: str | None = None,
) -> Planned:
    """Open every model of the recipe and plan the merge; ``output``, when given, must not overlap an input.

    :raises PlanError: lists every problem of every model.
    :raises StoreUnavailableError: the store is out of reach.
    """
    problems: list[str] = []
    away: list[str] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except PlanError as error:
            problems.extend(error.problems)
        except StoreUnavailableError as error:
            away.append(str(error))
        return None

    def refuse() -> NoReturn:
        if away:
            raise StoreUnavailableError("; ".join(sorted({*away, *problems})))
        raise PlanError(*sorted(set(problems)))

    names = recipe.names
    resolved = {name: attempt(lambda name=name: resolve_model(name, model_roots)) for name in names}  # type: ignore[misc]
    uris = {name: uri for name, uri in resolved.items() if uri is not None}
    if output is not None:
        problems.extend(overlap(output, uris.values()))
    distinct = list(dict.fromkeys(uris.values()))
    opened = dict(
        zip(
            distinct,
            _parallel(lambda uri: attempt(lambda: open_checkpoint(store, uri)), distinct),
            strict=True,
        )
    )
    checkpoints = {name: found for name, uri in uris.items() if (found := opened[uri]) is not None}
    if len(checkpoints) < len(names):
        refuse()
    inputs = Inputs(checkpoints[recipe.reference], tuple(checkpoints[e.model] for _, e in recipe.task_models))
    inputs = attempt(lambda: _with_digests(store, recipe, inputs)) or inputs
    plan = None if away else attempt(lambda: make_plan(recipe, inputs, options, baseline_bytes))
    if plan is None or problems:
        refuse()
    source = recipe.tokenizer_source
    tokenizer = checkpoints[recipe.reference if source in {None, "base"} else str(source)]
    return Planned(recipe, inputs, plan, uris, tokenizer)


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
        raise ObjectNotFoundError(f"no model here: neither {SINGLE_FILE} nor {INDEX_FILE} exists") from None


def _exists(store: ObjectStore, uri: str, files: Mapping[str, ObjectInfo], name: str) -> bool:
    if files:
        return name in files
    try:
        store.head(uri)
    except ObjectNotFoundError:
        return False
    return True


def _read_header(store: ObjectStore, info: ObjectInfo) -> dict[str, StoredTensor]:
    try:
        length = header_length(_read_range(store, info, 0, min(LENGTH_BYTES, info.size)), info.size)
        header = parse(_read_range(store, info, LENGTH_BYTES, LENGTH_BYTES + length), info.size)
    except HeaderError as error:
        raise HeaderError(f"{info.uri}: {error}") from error
    return tensors_of(info.uri, info.etag, header)


def _read_json(store: ObjectStore, uri: str, name: str) -> dict[str, object] | None:
    try:
        info = store.head(join(uri, name))
    except ObjectNotFoundError:
        return None
    try:
        document = json.loads(_read(store, info, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{info.uri} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise HeaderError(f"{info.uri} is not a JSON object")
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


def _with_digests(store: ObjectStore, recipe: Recipe, inputs: Inputs) -> Inputs:
    """Digest the tensors that have to be equal, unless they are the same bytes of the same object."""
    names = needs_digest(recipe, inputs)
    if not names:
        return inputs
    known: dict[int, Checkpoint] = {}

    def digested(checkpoint: Checkpoint) -> Checkpoint:
        if id(checkpoint) not in known:
            tensors = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
            size = sum(tensor.ref.nbytes for tensor in tensors)
            if size > COMPARED_BYTES:
                raise PlanError(
                    f"{checkpoint.uri}: {size} bytes of {tensors[0].dtype} tensors such as {tensors[0].name} take no "
                    "arithmetic (a quantised checkpoint?): dequantise it first, or set `buffers:` to the model "
                    "whose values win"
                )
            found = _parallel(lambda tensor: _digest(store, tensor.ref), tensors)
            digests = {tensor.name: value for tensor, value in zip(tensors, found, strict=True)}
            known[id(checkpoint)] = replace(checkpoint, digests=digests)
        return known[id(checkpoint)]

    try:
        return Inputs(digested(inputs.reference), tuple(digested(model) for model in inputs.models))
    except StoreUnavailableError:
        raise
    except StoreError as error:
        raise PlanError(str(error)) from error


def _digest(store: ObjectStore, ref: TensorRef) -> str:
    sha = hashlib.sha256()
    for start in range(ref.start, ref.end, _DIGEST_STEP):
        buffer = bytearray(min(_DIGEST_STEP, ref.end - start))
        store.read_into(ref.uri, start, memoryview(buffer), ref.etag)
        sha.update(buffer)
    return sha.hexdigest()


def _parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    if len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(OPEN_THREADS, len(items))) as pool:
        return list(pool.map(work, items))
