"""Numbers of tokens in config.json and generation_config.json, after the tokens have been numbered anew. Pure.

A number is followed by its text: what the reference's tokenizer calls 32000 keeps its name, and takes the number that
the output's vocabulary gives that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""What special tokens are for: ``<role>_token`` in tokenizer_config.json, ``<role>_token_id`` in config.json."""

_ONE = re.compile(r"(^|_)token(_id|_index)s?$|_token_ids?$")
_MANY = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_PAIRS = ("forced_decoder_ids",)
_DEEPEST = 4


class Renumbering:
    """Old numbers to new ones."""

    def __init__(self, old: Mapping[str, int], new: Mapping[str, int]) -> None:
        """
        :param old: the tokens of the model that the config is taken from.
        :param new: the output's.
        """
        self._new = {number: new.get(token) for token, number in old.items()}
        self.lost: list[str] = []

    def number(self, key: str, old: int) -> int | None:
        """The new number; ``None``, and a word in :attr:`lost`, where the output has no such token."""
        if old not in self._new:  # a row without a token: it stands for itself, as far as there are such rows
            return old
        found = self._new[old]
        if found is None:
            self.lost.append(f"{key}: {old}")
        return found

    def value(self, key: str, value: Any) -> Any:
        """A value of a key that holds numbers of tokens, however deep they lie in lists."""
        if isinstance(value, bool) or not isinstance(value, int | list):
            return value
        if isinstance(value, int):
            return value if value < 0 else self.number(key, value)
        renumbered = (self.value(key, inner) for inner in value)
        return [inner for inner in renumbered if inner is not None and inner != []]


def is_token_number(key: str) -> bool:
    """Whether a config's key holds numbers of tokens."""
    return _ONE.search(key) is not None or key in _MANY


def renumbered(
    config: Mapping[str, Any], renumbering: Renumbering, roles: Mapping[str, int], depth: int = 0
) -> dict[str, Any]:
    """A config with the output's numbers, in the models nested in it, too.

    :param roles: the number of the tokenizer's token for each role, which stands where a number's token is lost.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config") and depth < _DEEPEST:
            changed[key] = renumbered(value, renumbering, roles, depth + 1)
        elif key in _PAIRS and isinstance(value, list):
            changed[key] = _pairs(key, value, renumbering)
        elif is_token_number(key):
            found = renumbering.value(key, value)
            role = key.removesuffix("_token_id")
            is_gone = (found is None and value is not None) or (found == [] and value != [])
            changed[key] = roles.get(role) if is_gone else found
        else:
            changed[key] = value
    return changed


def _pairs(key: str, pairs: Sequence[Any], renumbering: Renumbering) -> list[Any]:
    """``[[position, token], ...]``: only the second of each is a token."""
    return [
        [pair[0], renumbering.value(key, pair[1])] if isinstance(pair, list) and len(pair) == 2 else pair
        for pair in pairs
    ]


def with_size(config: Mapping[str, Any], old: int | None, size: int, depth: int = 0) -> dict[str, Any]:
    """A config whose ``vocab_size`` is ``size`` wherever it was ``old``, and at its top in any case."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config") and depth < _DEEPEST:
            changed[key] = with_size(value, old, size, depth + 1)
        elif key == "vocab_size" and isinstance(value, int) and (value == old or depth == 0):
            changed[key] = size
        else:
            changed[key] = value
    return changed
