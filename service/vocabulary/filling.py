"""Which rows stand for a token that a model lacks, and for those that the recipe says something about. Pure.

As in mergekit 0.1.5: the base's row, where the recipe names a base that has the token; else the mean of the rows of
all models that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.recipe.tokenizers import MAX_PADDING, ModelTokenRow, TokenEntry, ZeroRow
from service.vocabulary.reading import Tokenizer
from service.vocabulary.rows import Takes, Vocabulary
from workers.errors import PlanError

MAX_ROWS = 1 << 21
"""Most rows of the output's embeddings: the biggest vocabularies of today have 260 thousand."""
MAX_MODEL_ROWS = 1 << 25
"""Most rows in all models together, of all tensors that have one for each token."""
MAX_ROW_RANGES = 1 << 22
"""Most ranges of rows that all tensors with a row for each token are put together from."""


@dataclass(frozen=True)
class Voice:
    """A model that has a say in the vocabulary."""

    model: str
    """What the recipe calls it; the first of its names, where it has several."""
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
    tensors: int = 1,
) -> tuple[Vocabulary, list[str]]:
    """The output's vocabulary, and what is wrong with what the recipe says of single tokens.

    :param tokens: the output's.
    :param voices: every model, by its name in the recipe, in its order.
    :param base: the recipe's base model, whose rows go before others.
    :param owner: the model whose numbers the output's begin with; its rows without a token stay where they are.
    :param tensors: how many have a row for each token.
    :raises PlanError: there would be more rows, or ranges of rows, than are merged.
    """
    count = 1 + max(tokens.values(), default=-1)
    size = count if padding is None else -(-count // padding) * padding
    first = voices[owner]
    distinct = {voice.model: voice for voice in voices.values()}
    if told := _excess(first, size, len(distinct), tensors):
        raise PlanError(f"{owner}: {told}")
    own = {model: _own(voice, tokens, size) for model, voice in distinct.items()}
    unnamed = np.setdiff1d(np.arange(min(count, first.rows)), np.fromiter(tokens.values(), np.int64))
    own[first.model][unnamed] = unnamed
    given = None if base is None else voices[base].model
    if (ranges := tensors * _ranges(own, given)) > MAX_ROW_RANGES:
        raise PlanError(
            f"{owner}: the vocabularies differ in so much that the output would be put together from {ranges} ranges "
            f"of rows, more than the {MAX_ROW_RANGES} that are planned"
        )
    fills = _fills(own, given)
    problems: list[str] = []
    forced = set()
    for token, entry in entries.items():
        takes = _said(token, entry, voices, problems)
        if takes is not None:
            fills[tokens[token]] = takes
            if entry.force:
                forced.add(tokens[token])
    return Vocabulary(tokens, size, own, fills, frozenset(forced)), problems


def _excess(owner: Voice, size: int, models: int, tensors: int) -> str | None:
    """Why there are too many rows; ``None`` when there are not. ``owner`` is whose numbers the output's begin with."""
    if size > MAX_ROWS:
        return f"the output's vocabulary would have {size} rows, more than the {MAX_ROWS} that are merged"
    if tensors * models * size > MAX_MODEL_ROWS:
        return (
            f"the output's vocabulary would have {size} rows in each of {tensors} tensors of {models} models, more "
            f"than the {MAX_MODEL_ROWS} that are merged"
        )
    held = owner.tokenizer
    if held.size > max(owner.rows, len(held.tokens)) + MAX_PADDING:
        return (
            f"its tokenizer numbers tokens up to {held.size - 1}, far beyond its {len(held.tokens)} tokens and the "
            f"{owner.rows} rows of its embedding"
        )
    return None


def _ranges(own: Mapping[str, NDArray[np.int64]], base: str | None) -> int:
    """At most how many ranges of rows all models are put together from: runs of their own, and what fills the rest."""
    given = np.sum([rows >= 0 for rows in own.values()], axis=0)
    lacking = len(own) - given
    if base is not None:
        given[own[base] >= 0] = 1
    return int(sum(map(_runs, own.values())) + lacking @ np.maximum(given, 1))


def _runs(rows: NDArray[np.int64]) -> int:
    """How many runs of consecutive rows there are."""
    before = np.concatenate([[-1], rows[:-1]])
    return int(np.count_nonzero((rows >= 0) & ((before < 0) | (rows - before != 1))))


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
        elif takes := tuple((model, int(rows[row])) for model, rows in own.items() if rows[row] >= 0):
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
                return ((voice.model, source.token_id),)
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
    return ((voice.model, row),)
