"""What a recipe says of the output's vocabulary: whose it is, where single tokens' rows come from, padding. Pure.

Reference for the language: mergekit's documented `tokenizer` and `tokenizer_source`; `embeddings` is Mergemill's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from service.recipe.entries import Frozen, ModelName

MAX_TOKEN_ENTRIES = 4096
"""Most tokens that a recipe says something about."""

MAX_PADDING = 1 << 16
"""Biggest number that the vocabulary's size may have to be a multiple of."""

MAX_TEMPLATE = 1 << 16
"""Longest chat template in a recipe, in characters."""

UNION = "union"
BASE = "base"
KEYWORDS = (UNION, BASE)
"""Vocabularies that are not named after a model."""

TokenText = Annotated[str, Field(min_length=1, max_length=1024)]
"""A token as the tokenizer's vocabulary has it."""

TensorName = Annotated[str, Field(min_length=1, max_length=1024)]


class ZeroRow(Frozen):
    """A token's row is zeros."""

    kind: Literal["zero"]


class ModelTokenRow(Frozen):
    """A token's row is that of some token of a model."""

    kind: Literal["model_token"]
    model: ModelName
    """The model."""
    token: TokenText | None = None
    """The token, as that model's tokenizer has it."""
    token_id: int | None = Field(default=None, ge=0, strict=True)
    """Or its number there."""

    @model_validator(mode="after")
    def _one_of(self) -> ModelTokenRow:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("a `model_token` has either `token` or `token_id`")
        return self


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "zero" if value.get("kind") == "zero" else "model_token"
    return (
        "zero"
        if isinstance(value, ZeroRow)
        else "model_token"
        if isinstance(value, ModelTokenRow)
        else "model"
    )


RowSource = Annotated[
    Annotated[ModelName, Tag("model")]
    | Annotated[ZeroRow, Tag("zero")]
    | Annotated[ModelTokenRow, Tag("model_token")],
    Discriminator(_kind),
]
"""Where a token's row comes from: a model's name, zeros, or some token of a model."""


class TokenEntry(Frozen):
    """What a recipe says about one token."""

    source: RowSource
    """Where the row comes from in models that lack the token."""
    force: bool = Field(default=False, strict=True)
    """Take it in models that have the token, too."""


class TokenizerEntry(Frozen):
    """The output's vocabulary."""

    source: Annotated[str, Field(min_length=1, max_length=2048)] = UNION
    """`union`, `base`, or one of the recipe's models."""
    tokens: dict[TokenText, TokenEntry] | None = Field(default=None, max_length=MAX_TOKEN_ENTRIES)
    """Where the rows of single tokens come from."""
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=MAX_PADDING, strict=True)
    """The embedding's rows are as many as the next multiple of it, the last ones zeros."""
    embeddings: tuple[TensorName, ...] | None = Field(default=None, min_length=1, max_length=64)
    """The tensors that have a row for each token; found by their names and shapes when it is not given."""

    @property
    def models(self) -> list[tuple[str, str]]:
        """The models that it names, each after the place where it does."""
        named = [] if self.source in KEYWORDS else [("source", self.source)]
        for token, entry in (self.tokens or {}).items():
            if isinstance(entry.source, str):
                named.append((f"tokens.{token}.source", entry.source))
            elif isinstance(entry.source, ModelTokenRow):
                named.append((f"tokens.{token}.source.model", entry.source.model))
        return named
