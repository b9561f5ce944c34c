"""A model's tokenizer, read from the files beside its weights: only as much as merging vocabularies needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from service.planning.checkpoint import Checkpoint, WrittenFile
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


SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt",
              "tekken.json")  # fmt: skip
"""Files of tokenizers of other kinds, which are copied and compared and not read."""


@dataclass(frozen=True)
class Tokenizer:
    """One model's tokenizer."""

    uri: str
    """Whose it is."""
    tokens: Mapping[str, int] = field(repr=False)
    """Number of every token, those that were added included."""
    added: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """Those that were added, as tokenizer.json describes them, by their text."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """tokenizer_config.json."""

    @property
    def size(self) -> int:
        """One more than the highest number of a token."""
        return 1 + max(self.tokens.values(), default=-1)


class Tokenizers:
    """The tokenizers of a recipe's models, each read once, and no text that is the same parsed twice.

    :param is_lenient: a file that is no tokenizer is as good as none.
    """

    def __init__(self, store: ObjectStore, is_lenient: bool = False) -> None:
        self.store = store
        self._is_lenient = is_lenient
        self._known: dict[str, Tokenizer | None] = {}
        self._parsed: dict[str, Tokenizer] = {}

    def of(self, checkpoint: Checkpoint) -> Tokenizer | None:
        """A model's tokenizer; ``None`` when it has none.

        :raises PlanError: it is one that cannot be read, or is too big.
        :raises StoreError: it cannot be read.
        """
        if checkpoint.uri not in self._known:
            self._known[checkpoint.uri] = self._read(checkpoint)
        return self._known[checkpoint.uri]

    def _read(self, checkpoint: Checkpoint) -> Tokenizer | None:
        info = checkpoint.files.get(TOKENIZER_FILE)
        if info is None:
            return self._other(checkpoint)
        try:
            text = read_file(self.store, info, MAX_TOKENIZER_BYTES)
            settings = read_settings(self.store, checkpoint, SETTINGS_FILE) or {}
            same = hashlib.sha256(text).hexdigest()
            if same not in self._parsed:
                self._parsed[same] = _parsed(info, text)
        except PlanError:
            if self._is_lenient:
                return None
            raise
        return replace(self._parsed[same], uri=checkpoint.uri, settings=settings)

    def _other(self, checkpoint: Checkpoint) -> Tokenizer | None:
        """``None`` for a model without any tokenizer; one of another kind is refused."""
        there = [name for name in SLOW_FILES if name in checkpoint.files]
        if not there or self._is_lenient:
            return None
        raise PlanError(
            f"{checkpoint.uri}: of its tokenizer there is only {there[0]}, and vocabularies are merged by "
            "tokenizer.json: have transformers write one, with "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )


def _parsed(info: ObjectInfo, text: bytes) -> Tokenizer:
    document = _document(text, info)
    try:
        tokens, added = tokens_of(document)
    except ValueError as error:
        raise PlanError(f"{info.uri} is not a tokenizer: {clip(str(error))}") from error
    return Tokenizer("", tokens, added)


def read_document(store: ObjectStore, checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a model's tokenizer.json.

    :raises PlanError: it is no JSON object, or is too big.
    :raises StoreError: it cannot be read.
    """
    info = checkpoint.files[TOKENIZER_FILE]
    return _document(read_file(store, info, MAX_TOKENIZER_BYTES), info)


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
    if isinstance(info, WrittenFile):
        return info.text
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
