"""The output's tokenizer: whose tokens it has, in which order, and the text of its tokenizer.json. Pure.

The order of a union is mergekit's in kind: the base's tokens keep their numbers, then come the others' own tokens, then
those that were added to them. Within these mergekit's order changes from run to run; here it is that of the recipe's
models, and of their numbers. New tokens are appended as added tokens: the base's merges or scores know nothing of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from service.vocabulary.reading import Tokenizer
from workers.errors import PlanError
from workers.safetensors_format import clip

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""How a token is found in a text that no tokenizer says it of."""


@dataclass(frozen=True)
class Added:
    """A token that the base's tokenizer lacks."""

    token: str
    """Its text."""
    entry: Mapping[str, Any]
    """How it is found in a text, as tokenizer.json says it."""


def missing_tokens(
    base: Tokenizer, others: Iterable[tuple[Tokenizer, int | None]], wanted: Iterable[str]
) -> list[Added]:
    """The tokens that others have and ``base`` lacks, in the order in which they are appended.

    :param others: tokenizers, in the recipe's order, and how many rows their models have: tokens beyond these are none.
    :param wanted: tokens that the recipe names, whoever has them.
    """
    plain: dict[str, Added] = {}
    added: dict[str, Added] = {}
    for tokenizer, rows in others:
        for token, number in sorted(tokenizer.tokens.items(), key=lambda item: item[1]):
            if token in base.tokens or (rows is not None and number >= rows):
                continue
            entry = tokenizer.added.get(token)
            if entry is None:
                plain.setdefault(token, Added(token, _PLAIN))
            else:
                added.setdefault(token, Added(token, {key: entry.get(key, _PLAIN[key]) for key in _PLAIN}))
    found = {**{token: one for token, one in plain.items() if token not in added}, **added}
    for token in wanted:
        if token not in base.tokens:
            found.setdefault(token, Added(token, _PLAIN))
    return list(found.values())


def numbered(base: Tokenizer, new: Sequence[Added]) -> dict[str, int]:
    """Every token's number: the base's, and the new ones after them."""
    first = base.size
    return dict(base.tokens) | {one.token: first + place for place, one in enumerate(new)}


def tokenizer_json(base: Tokenizer, document: Mapping[str, Any], new: Sequence[Added]) -> bytes:
    """The base's tokenizer.json, which is ``document``, with new tokens.

    :raises PlanError: the `tokenizers` library cannot read it, or numbers the tokens otherwise.
    """
    first = base.size
    entries = [{"id": first + place, "content": one.token, **one.entry} for place, one in enumerate(new)]
    extended = {**document, "added_tokens": [*(document.get("added_tokens") or []), *entries]}
    try:
        opened = tokenizers.Tokenizer.from_str(json.dumps(extended, ensure_ascii=False))
    except BaseException as error:  # the library raises nothing narrower, and panics of Rust are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PlanError(f"{base.uri}: its tokenizer.json cannot be extended: {clip(str(error))}") from error
    wanted = numbered(base, new)
    held = opened.get_vocab(with_added_tokens=True)
    if held != wanted:
        odd = next(token for token in {**wanted, **held} if held.get(token) != wanted.get(token))
        raise PlanError(
            f"{base.uri}: its tokenizer.json cannot be extended: the library gives the token {clip(repr(odd))} the "
            f"number {held.get(odd)}, not {wanted.get(odd)} (are there gaps between its numbers?)"
        )
    return opened.to_str(pretty=True).encode()


def settings_json(settings: Mapping[str, Any], base: Tokenizer, new: Sequence[Added]) -> dict[str, Any]:
    """tokenizer_config.json with the new tokens, where it lists any."""
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, Mapping) or not new:
        return dict(settings)
    more = {str(base.size + place): {"content": one.token, **one.entry} for place, one in enumerate(new)}
    return {**settings, "added_tokens_decoder": {**listed, **more}}
