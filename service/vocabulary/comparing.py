"""Whether models that are merged row by row mean the same by their rows."""

from __future__ import annotations

from collections.abc import Mapping

from service.planning.pairing import Inputs
from service.recipe import Recipe
from service.vocabulary.reading import TOKENIZER_FILE, Tokenizer, Tokenizers
from service.vocabulary.tensors import rows_of

_REMEDY = (
    "set `tokenizer_source: union` (or `base`, or a model) to merge the rows by their tokens, or "
    "`vocabularies: ignore` to merge them as they are"
)


def differing(recipe: Recipe, inputs: Inputs, tokenizers: Tokenizers) -> list[str]:
    """One sentence for each model whose vocabulary is not the reference's; models without a readable one are let be."""
    files = [model.files.get(TOKENIZER_FILE) for model in inputs.models.values()]
    if len({(info.etag, info.size) for info in files if info is not None}) < 2:
        return []  # they need not be read to know that they are the same
    reference = inputs.compared_with or recipe.reference
    one = tokenizers.of(inputs.models[reference])
    if one is None:
        return []
    problems = []
    for name in recipe.names:
        other = None if name in inputs.stand_ins or name == reference else tokenizers.of(inputs.models[name])
        if other is None or other.tokens is one.tokens:
            continue
        rows, own = rows_of(inputs.models[reference]), rows_of(inputs.models[name])
        if rows != own and recipe.mismatched_tensors == "base":
            continue  # the reference's embeddings are kept, unmerged
        told = difference(one, other, rows, own)
        if told is not None:
            problems.append(f"{name}: its vocabulary is not that of {reference}: {told}; {_REMEDY}")
    return problems


def difference(
    one: Tokenizer, two: Tokenizer, one_rows: int | None = None, two_rows: int | None = None
) -> str | None:
    """How two vocabularies differ, in words; ``None`` when the same rows stand for the same tokens."""
    first, second = _by_row(one.tokens, one_rows), _by_row(two.tokens, two_rows)
    if first == second:
        return None
    odd = sorted(row for row in first.keys() | second.keys() if first.get(row) != second.get(row))
    shown = f"row {odd[0]} is {_shown(second.get(odd[0]))}, not {_shown(first.get(odd[0]))}"
    return shown if len(odd) == 1 else f"{len(odd)} rows differ, {shown}"


def _by_row(tokens: Mapping[str, int], rows: int | None) -> dict[int, str]:
    return {row: token for token, row in tokens.items() if rows is None or row < rows}


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token[:64])
