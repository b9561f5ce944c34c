"""A Hugging Face style checkpoint as planning sees it: names, shapes, byte ranges and small files. Pure."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.errors import HeaderError
from workers.json_text import most_values
from workers.safetensors_format import MAX_TENSORS, Header, clip, unique
from workers.sources import Change, Derived, Gathered, LowRank, Source
from workers.store.base import ObjectInfo
from workers.store.uris import join
from workers.task import MERGEABLE_DTYPES, TensorRef

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "mergemill.json"
PLAN_METADATA = "mergemill-plan"
"""User metadata of every file that a job writes, but for the index: the digest of the plan that made it."""

MAX_INDEX_BYTES = 100_000_000
"""Longest shard index that is read."""
MAX_CONFIG_BYTES = 16 << 20
"""Longest config.json that is read."""
MAX_CONFIG_VALUES = 1 << 18
"""Most JSON values of a config.json."""
MAX_COPIED_BYTES = 256 << 20
"""Longest file that is copied beside the merged weights: each is held in memory whole."""
MAX_FILES = 100_000
"""Most files of a checkpoint's directory that are looked at."""
MAX_HEADERS_BYTES = 256 << 20
"""Most bytes of headers of all of a checkpoint's weight files."""
_MAX_FILE_NAME = 255

TIED_NAMES = (
    "lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "cls.predictions.decoder.weight",
    "model.decoder.embed_tokens.weight",
    "model.encoder.embed_tokens.weight",
)
"""Tensors that transformers may tie to the input embedding, and then need not be in the file."""

HIDDEN = ".mergemill"
"""Everything at an output that is there only while a job runs is below it."""

_STAGED = re.compile(r"(\.mergemill/)?stage-[0-9a-f]{32}-model-\d{5}-of-\d{5}\.safetensors")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|adapter_model\.safetensors")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|pkl|pickle|npz)(\.index\.json)?$")
_SHARD_NAME = re.compile(r"[^/\\]+\.safetensors")
_INDEX_EXTRAS = 1000
_TOKENIZER = re.compile(
    r"^(tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken"
    r"|chat_template.*|spiece\..*)$"
)
_COPIED = re.compile(r"^[^/]+\.(json|txt|model|jinja|tiktoken|py|bpe|vocab)$")
_NEVER_COPIED = {CONFIG_FILE, MANIFEST_FILE, "README.md", "adapter_config.json"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    name: str
    """Its key."""
    shape: tuple[int, ...]
    """Sizes of its dimensions."""
    ref: TensorRef
    """Where its bytes are, or would be, were they stored anywhere."""
    made: Derived | None = None
    """How an earlier merge makes it that is stored nowhere."""
    changes: tuple[Change, ...] = ()
    """What an adapter adds to it."""
    gathered: Gathered | None = None
    """Its rows as another vocabulary orders and fills them; then :attr:`shape` is that of these."""

    @property
    def source(self) -> Source:
        """Its elements: stored, or computed as they are read."""
        if self.gathered is not None:
            return self.gathered
        found = self.made or self.ref
        if not self.changes:
            return found
        rows = self.shape[0]
        return LowRank("low_rank", found, self.changes, (rows, self.numel // rows), 0)

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return self.ref.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether arithmetic can be done on it."""
        return self.dtype in MERGEABLE_DTYPES


@dataclass(frozen=True, slots=True)
class Laid:
    """The adapter that lies on top of a checkpoint."""

    uri: str
    """The directory or prefix that holds it."""
    pins: Mapping[str, str]
    """ETags of its files, by URI."""


@dataclass(frozen=True)
class Checkpoint:
    """One input model, known by its headers."""

    uri: str
    """The directory or prefix that holds it."""
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of the files."""
    config: Mapping[str, Any] | None
    """Its config.json, or None."""
    files: Mapping[str, ObjectInfo]
    """Small files beside the weights that a merged model may need, by name."""
    pins: Mapping[str, str]
    """ETag of every weight file, by URI."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the integer and boolean tensors, where they had to be compared."""
    blocks: Mapping[TensorRef, bytes] = field(default_factory=dict, repr=False)
    """SHA-256 of each MiB of each tensor, one after the other, where they are known before it is read."""

    adapter: Laid | None = None
    """The adapter whose changes and replacements :attr:`tensors` has."""

    @property
    def is_tied(self) -> bool:
        """Whether its config ties the output head to the input embedding."""
        return bool((self.config or {}).get("tie_word_embeddings", False))

    @property
    def may_be_tied(self) -> bool:
        """As :attr:`is_tied`, or its config does not say: some architectures tie by default and then leave it out."""
        return self.config is not None and bool(self.config.get("tie_word_embeddings", True))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.ref.nbytes for tensor in self.tensors.values())


def parse_index(text: bytes, uri: str) -> dict[str, str]:
    """Read ``model.safetensors.index.json``: tensor name to shard file name.

    :raises HeaderError: it is malformed, or names a file outside its directory.
    """
    if most_values(text) > MAX_TENSORS + _INDEX_EXTRAS:
        raise HeaderError(f"{uri}: it names more than the {MAX_TENSORS} tensors that are read")
    try:
        document = json.loads(text, object_pairs_hook=unique)
        weight_map = document["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise HeaderError(
            f"{uri}: not a shard index with a weight_map ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{uri}: weight_map must map tensor names to files, and be non-empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file) or not is_plain(file):
            raise HeaderError(
                f"{uri}: tensor {clip(repr(name))} points to {clip(repr(file))}, which is not a .safetensors file "
                "beside it"
            )
    return weight_map


def tensors_of(uri: str, etag: str, header: Header) -> dict[str, StoredTensor]:
    """The tensors of one weight file."""
    return {
        entry.name: StoredTensor(
            entry.name,
            entry.shape,
            TensorRef(uri, etag, header.data_start + entry.start, header.data_start + entry.end, entry.dtype),
        )
        for entry in header.entries
    }


def gather(
    uri: str, weight_map: Mapping[str, str] | None, files: Mapping[str, dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint whose weight files hold ``files`` (by file name).

    :raises HeaderError: the index and the files do not agree; names the first tensors concerned.
    """
    found: dict[str, StoredTensor] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if len(found) == MAX_TENSORS:
                raise HeaderError(f"{uri}: it holds more than the {MAX_TENSORS} tensors that are read")
            if name in found:
                raise HeaderError(f"{uri}: tensor {name!r} is in two weight files, {file} and another")
            if weight_map is not None and weight_map.get(name) != file:
                raise HeaderError(
                    f"{uri}: tensor {name!r} is in {file}, the index says {weight_map.get(name)!r}"
                )
            found[name] = tensor
    if weight_map is not None and (lost := [name for name in weight_map if name not in found]):
        raise HeaderError(
            f"{uri}: the index lists {len(lost)} tensor(s) that no file holds, first {clip(repr(lost[0]))}"
        )
    return found


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights in any format (only safetensors is ever read)."""
    return _WEIGHTS.search(name) is not None


def is_shard(name: str) -> bool:
    """Whether a file is one that a checkpoint, or a LoRA adapter, keeps its weights in, by Hugging Face's naming."""
    return _SHARD.fullmatch(name) is not None


def is_staged(name: str) -> bool:
    """Whether a file holds an earlier merge of the job that makes the output, by its name or place in the output."""
    return _STAGED.fullmatch(name) is not None


def is_copied(name: str) -> bool:
    """Whether a file of the reference model goes to the merged checkpoint as it is."""
    return (
        _COPIED.fullmatch(name) is not None
        and is_plain(name)
        and name not in _NEVER_COPIED
        and not is_weight_file(name)
    )


def is_plain(name: str) -> bool:
    """Whether a name is one that every store and every JSON takes, and shows as it is: no hidden file either."""
    return name.isprintable() and len(name.encode()) <= _MAX_FILE_NAME and not name.startswith(".")


@dataclass(frozen=True, slots=True)
class WrittenFile(ObjectInfo):
    """A small file that an earlier merge of the same job would have written beside its weights: it is only here."""

    text: bytes = field(default=b"", repr=False)
    """What it holds."""


def written_file(merge: str, name: str, text: bytes) -> WrittenFile:
    """A file of an earlier merge, called after it in errors."""
    return WrittenFile(f"{merge}/{name}", len(text), hashlib.sha256(text).hexdigest(), text=text)


def copied_files(reference: Checkpoint, tokenizer: Checkpoint) -> dict[str, ObjectInfo]:
    """The files that go beside the merged weights: the reference's own, and the tokenizer's of its model."""
    own = {name: info for name, info in reference.files.items() if not is_tokenizer_file(name)}
    chosen = {name: info for name, info in tokenizer.files.items() if is_tokenizer_file(name)}
    return dict(sorted({**own, **chosen}.items()))


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to the tokenizer."""
    return _TOKENIZER.match(name) is not None


def shard_uri(checkpoint: str, name: str) -> str:
    """URI of a weight file of a checkpoint."""
    return join(checkpoint, name)
