"""A model's tokenizer, read from the files beside its weights: only as much as merging vocabularies needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.checkpoint import Checkpoint
from workers.errors import PlanError
from workers.json_text import load, most_values
from workers.safetensors_format import clip
from workers.store.base import ObjectInfo, ObjectStore

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"

MAX_TOKENIZER_BYTES = 64 << 20
"""Longest tokenizer.json that is read: the biggest of today have 35 MB."""
MAX_TOKENIZER_VALUES = 6_000_000
"""Most JSON values of a tokenizer.json."""
MAX_TOKEN_ID = 1 << 24
"""Highest number of a token."""
MAX_SETTINGS_BYTES = 8 << 20
"""Longest of the other files that are read."""
MAX_SETTINGS_VALUES = 1 << 19
"""Most JSON values of one of those."""


@dataclass(frozen=True)
class Tokenizer:
    """One model's tokenizer."""

    uri: str
    """Whose it is."""
    tokens: Mapping[str, int]
    """Number of every token, those that were added included."""
    added: Mapping[str, Mapping[str, Any]]
    """Those that were added, as tokenizer.json describes them, by their text."""
    kind: str
    """What it is: ``BPE``, ``WordPiece``, ``Unigram``, ``WordLevel``."""
    document: Mapping[str, Any] = field(repr=False)
    """All of tokenizer.json."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """tokenizer_config.json."""
    digest: str = ""
    """SHA-256 of tokenizer.json."""

    @property
    def size(self) -> int:
        """One more than the highest number of a token."""
        return 1 + max(self.tokens.values(), default=-1)


def read_tokenizer(store: ObjectStore, checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a model; ``None`` when it has no tokenizer.json.

    :raises PlanError: the file is not one, or is too big.
    :raises StoreError: it cannot be read.
    """
    info = checkpoint.files.get(TOKENIZER_FILE)
    if info is None:
        return None
    text = read_file(store, info, MAX_TOKENIZER_BYTES)
    document = _document(text, info)
    try:
        tokens, added = tokens_of(document)
    except ValueError as error:
        raise PlanError(f"{info.uri} is not a tokenizer: {clip(str(error))}") from error
    settings = read_settings(store, checkpoint, SETTINGS_FILE) or {}
    kind = str(document["model"].get("type"))
    return Tokenizer(
        checkpoint.uri, tokens, added, kind, document, settings, hashlib.sha256(text).hexdigest()
    )


def read_settings(store: ObjectStore, checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """A small JSON file beside the weights; ``None`` when there is none.

    :raises PlanError: it is not a JSON object, or is too big.
    :raises StoreError: it cannot be read.
    """
    info = checkpoint.files.get(name)
    if info is None:
        return None
    try:
        document = load(read_file(store, info, MAX_SETTINGS_BYTES), MAX_SETTINGS_VALUES)
    except ValueError as error:
        raise PlanError(f"{info.uri} is not valid JSON: {clip(str(error))}") from error
    if not isinstance(document, dict):
        raise PlanError(f"{info.uri} is not a JSON object")
    return document


def read_file(store: ObjectStore, info: ObjectInfo, limit: int) -> bytes:
    """The bytes of a file that has at most ``limit``.

    :raises PlanError: it has more.
    """
    if info.size > limit:
        raise PlanError(f"{info.uri} has {info.size} bytes, more than the {limit} that are read")
    buffer = bytearray(info.size)
    if buffer:
        store.read_into(info.uri, 0, memoryview(buffer), info.etag)
    return bytes(buffer)


def tokens_of(document: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]]:
    """Every token's number, and the tokens that were added, as they are described.

    An added token's number holds where the model has the same text, as in the `tokenizers` library.

    :raises ValueError: it is not a tokenizer's document.
    """
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        pairs = list(vocabulary.items())
    elif isinstance(vocabulary, list):  # Unigram: pieces and their scores, numbered by their place
        pairs = [(_piece(entry), number) for number, entry in enumerate(vocabulary)]
    else:
        raise ValueError("it has no vocabulary (`model.vocab`)")
    listed = document.get("added_tokens") or []
    if not isinstance(listed, list):
        raise ValueError("`added_tokens` is no list")
    added: dict[str, Mapping[str, Any]] = {}
    for entry in listed:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise ValueError("an entry of `added_tokens` has no `content`")
        added[entry["content"]] = entry
        pairs.append((entry["content"], entry.get("id")))
    for token, number in pairs:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_TOKEN_ID:
            raise ValueError(f"the token {token!r} has the number {number!r}")
    tokens = dict(pairs)
    for token in tokens:
        token.encode()  # half a surrogate pair is a ValueError, and can be written nowhere
    return tokens, added


def _piece(entry: Any) -> str:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        raise ValueError("an entry of `model.vocab` is not a piece with its score")
    return entry[0]


def _document(text: bytes, info: ObjectInfo) -> dict[str, Any]:
    if (count := most_values(text)) > MAX_TOKENIZER_VALUES:
        raise PlanError(
            f"{info.uri} holds up to {count} values, more than the {MAX_TOKENIZER_VALUES} that are read"
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{info.uri} is not valid JSON: {clip(str(error))}") from error
    if not isinstance(document, dict):
        raise PlanError(f"{info.uri} is not a JSON object")
    return document
