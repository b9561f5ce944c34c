"""Small tokenizers for tests: byte-level BPE, WordPiece and Unigram, made by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = ("<unk>", "<s>", "</s>")
"""Special tokens that every one of them begins with."""


def bpe(
    words: Iterable[str],
    merges: Iterable[tuple[str, str]] = (),
    special: Iterable[str] = (),
    added: Iterable[str] = (),
) -> Tokenizer:
    """A byte-level BPE of these words after the control tokens, in their order."""
    vocab = {word: number for number, word in enumerate((*CONTROL, *words))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _finished(made, special, added)


def wordpiece(words: Iterable[str], special: Iterable[str] = (), added: Iterable[str] = ()) -> Tokenizer:
    """A WordPiece of these words after the control tokens."""
    vocab = {word: number for number, word in enumerate((*CONTROL, *words))}
    made = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finished(made, special, added)


def unigram(words: Iterable[str], special: Iterable[str] = (), added: Iterable[str] = ()) -> Tokenizer:
    """A Unigram of these pieces after the control tokens, each less likely than the one before it."""
    pieces = [(word, -float(number)) for number, word in enumerate((*CONTROL, *words))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return _finished(made, special, added)


def files(
    tokenizer: Tokenizer, settings: Mapping[str, Any] | None = None, template: str | None = None
) -> dict[str, str]:
    """The tokenizer's files, for :func:`tests.checkpoints.write_checkpoint`."""
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
        **(settings or {}),
    }
    found = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(said)}
    return found if template is None else {**found, "chat_template.jinja": template}


def _finished(made: Tokenizer, special: Iterable[str], added: Iterable[str]) -> Tokenizer:
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*CONTROL, *special)]
    )
    made.add_tokens([AddedToken(token) for token in added])
    return made
