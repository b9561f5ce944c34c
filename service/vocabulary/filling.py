"""Which rows stand for a token that a model lacks, and for those that the recipe says something about. Pure.

As in mergekit 0.1.5: the base's row, where the recipe names a base that has the token; else the mean of the rows of
all models that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.recipe.tokenizers import ModelTokenRow, TokenEntry, ZeroRow
from service.vocabulary.reading import Tokenizer
from service.vocabulary.rows import Takes, Vocabulary


@dataclass(frozen=True)
class Voice:
    """A model that has a say in the vocabulary."""

    uri: str
    """Where it is."""
    tokenizer: Tokenizer
    """Its tokens."""
    rows: int
    """How many rows its embedding has: a token beyond them is none of its own."""

    def row(self, token: str) -> int | None:
        """Its row of a token."""
        number = self.tokenizer.tokens.get(token)
        return number if number is not None and number < self.rows else None


def fill(
    tokens: Mapping[str, int],
    padding: int | None,
    voices: Mapping[str, Voice],
    base: str | None,
    owner: str,
    entries: Mapping[str, TokenEntry],
) -> tuple[Vocabulary, list[str]]:
    """The output's vocabulary, and what is wrong with what the recipe says of single tokens.

    :param tokens: the output's.
    :param voices: every model, by its name in the recipe, in its order.
    :param base: the recipe's base model, whose rows go before others.
    :param owner: the model whose numbers the output's begin with; its rows without a token stay where they are.
    """
    count = 1 + max(tokens.values(), default=-1)
    size = count if padding is None else -(-count // padding) * padding
    by_uri = {voice.uri: voice for voice in voices.values()}
    own = {uri: _own(voice, tokens, size) for uri, voice in by_uri.items()}
    first = voices[owner]
    unnamed = np.setdiff1d(np.arange(min(count, first.rows)), np.fromiter(tokens.values(), np.int64))
    own[first.uri][unnamed] = unnamed
    fills = _fills(own, None if base is None else voices[base].uri)
    problems: list[str] = []
    forced = set()
    for token, entry in entries.items():
        takes = _said(token, entry, voices, problems)
        if takes is not None:
            fills[tokens[token]] = takes
            if entry.force:
                forced.add(tokens[token])
    return Vocabulary(tokens, size, own, fills, frozenset(forced)), problems


def _own(voice: Voice, tokens: Mapping[str, int], size: int) -> NDArray[np.int64]:
    own = np.full(size, -1, np.int64)
    for token, number in tokens.items():
        row = voice.tokenizer.tokens.get(token, voice.rows)
        if row < voice.rows:
            own[number] = row
    return own


def _fills(own: Mapping[str, NDArray[np.int64]], base: str | None) -> dict[int, Takes]:
    """What stands for the rows that some model lacks."""
    lacking = np.flatnonzero(np.any([rows < 0 for rows in own.values()], axis=0))
    fills: dict[int, Takes] = {}
    for row in map(int, lacking):
        if base is not None and own[base][row] >= 0:
            fills[row] = ((base, int(own[base][row])),)
        elif takes := tuple((uri, int(rows[row])) for uri, rows in own.items() if rows[row] >= 0):
            fills[row] = takes
    return fills


def _said(token: str, entry: TokenEntry, voices: Mapping[str, Voice], problems: list[str]) -> Takes | None:
    """What the recipe says of a token, as rows; ``None``, and a problem, where it says nothing that is there."""
    source, at = entry.source, f"tokenizer.tokens.{token}.source"
    if isinstance(source, ZeroRow):
        return ()
    if isinstance(source, ModelTokenRow):
        voice = voices[source.model]
        if source.token_id is not None:
            if source.token_id < voice.rows:
                return ((voice.uri, source.token_id),)
            problems.append(
                f"{at}.token_id: {source.token_id} is beyond the {voice.rows} rows of {source.model}"
            )
            return None
        wanted, named = str(source.token), source.model
    else:
        voice, wanted, named = voices[source], token, source
    row = voice.row(wanted)
    if row is None:
        problems.append(f"{at}: {named} has no token {wanted!r}")
        return None
    return ((voice.uri, row),)
