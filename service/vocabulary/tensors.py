"""Which tensors have a row for each token: embeddings, output heads and their biases. Pure.

No architecture is known here. A tensor has a row for each token where its first size (after leading ones) is the number
of the embedding's rows, and its name is that of an embedding or a head; or where that size differs between models
as their embeddings' do. What these do not decide is an error that names the option that does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from service.planning.checkpoint import Checkpoint, StoredTensor
from service.planning.layers import stacks_of
from service.planning.matching import EMBEDDING_NAMES

_SURE = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|wte|word_embeddings|embed_in|shared|tok_embeddings|lm_head|embed_out"
    r"|token_embedding)\.(weight|bias)$"
)
_LIKELY = re.compile(
    r"(head|embed_out|predictions|logits|vocab|proj_out|output|decoder\.(weight|bias)$|embed)"
)
_NEVER = re.compile(
    r"(position|wpe|token_type|norm|(^|\.)ln|segment|pooler|classifier|score|vision|visual|audio)",
    re.IGNORECASE,
)

_SHOWN = 4


@dataclass
class Found:
    """The tensors with a row for each token."""

    names: list[str] = field(default_factory=list)
    """What they are called."""
    problems: list[str] = field(default_factory=list)
    """What could not be decided."""


def row_shape(shape: Sequence[int]) -> tuple[int, int]:
    """How many rows a tensor has, and the elements of each: its first size that is not a leading one, and the rest."""
    at = next((place for place, size in enumerate(shape[:-1]) if size != 1), max(0, len(shape) - 1))
    return (shape[at], math.prod(shape[at + 1 :])) if shape else (1, 1)


def with_rows(shape: Sequence[int], rows: int) -> tuple[int, ...]:
    """The shape with another number of rows."""
    at = next((place for place, size in enumerate(shape[:-1]) if size != 1), max(0, len(shape) - 1))
    return (*shape[:at], rows, *shape[at + 1 :])


def embedding_of(checkpoint: Checkpoint) -> StoredTensor | None:
    """The input embedding of a checkpoint, by its name."""
    sure = (name for name in checkpoint.tensors if _SURE.search(name))
    named = (checkpoint.tensors.get(name) for name in (*EMBEDDING_NAMES, *sure))
    return next((tensor for tensor in named if tensor is not None and len(tensor.shape) == 2), None)


def rows_of(checkpoint: Checkpoint) -> int | None:
    """How many rows its embedding has; by its config.json where no tensor is called one."""
    embedding = embedding_of(checkpoint)
    if embedding is not None:
        return embedding.shape[0]
    config = checkpoint.config or {}
    sections = [config, *(value for key, value in config.items() if key.endswith("_config"))]
    sizes = [section.get("vocab_size") for section in sections if isinstance(section, Mapping)]
    return next((size for size in sizes if isinstance(size, int) and not isinstance(size, bool)), None)


def vocabulary_tensors(
    reference: Checkpoint, others: Sequence[Checkpoint], wanted: Sequence[str] | None = None
) -> Found:
    """The tensors of ``reference`` that have a row for each token; ``wanted`` decides where it is given."""
    found = Found()
    if wanted is not None:
        found.problems += [
            f"tokenizer.embeddings: {reference.uri} has no tensor {name!r}"
            for name in wanted
            if name not in reference.tensors
        ]
        found.names = [name for name in wanted if name in reference.tensors]
        return found
    size = rows_of(reference)
    if size is None:
        found.problems.append(
            f"{reference.uri}: no tensor is called like an embedding, and config.json has no `vocab_size`: name the "
            "tensors that have a row for each token under `tokenizer: {embeddings: [...]}`"
        )
        return found
    unclear = []
    for name, tensor in _outside_layers(reference):
        is_row_wise = _decide(name, tensor, size, others)
        if is_row_wise:
            found.names.append(name)
        elif is_row_wise is None:
            unclear.append(f"{name} {list(tensor.shape)}")
    if unclear:
        listed = ", ".join(unclear[:_SHOWN]) + (
            f" and {len(unclear) - _SHOWN} more" if unclear[_SHOWN:] else ""
        )
        found.problems.append(
            f"{reference.uri}: {listed}: {size} may be the number of tokens or a size of another kind: name the "
            "tensors that have a row for each token under `tokenizer: {embeddings: [...]}`"
        )
    if not found.names and not unclear:
        found.problems.append(
            f"{reference.uri}: no tensor has {size} rows, as many as its embedding or `vocab_size`: name those that "
            "have a row for each token under `tokenizer: {embeddings: [...]}`"
        )
    return found


def _outside_layers(reference: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    stacks = stacks_of(reference.tensors)
    for name, tensor in reference.tensors.items():
        if tensor.shape and (stacks.place(name) is None or _SURE.search(name)):
            yield name, tensor


def _decide(name: str, tensor: StoredTensor, size: int, others: Sequence[Checkpoint]) -> bool | None:
    """Whether a tensor has a row for each token; ``None`` when there is no telling."""
    if not tensor.is_float or row_shape(tensor.shape)[0] != size:
        return False
    if _SURE.search(name):
        return True
    for other in others:
        theirs, rows = other.tensors.get(name), rows_of(other)
        if theirs is not None and rows is not None and rows != size and theirs.shape:
            return row_shape(theirs.shape)[0] == rows
    if _NEVER.search(name):
        return False
    return True if _LIKELY.search(name) else None
