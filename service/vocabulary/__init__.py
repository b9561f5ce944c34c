"""Vocabularies: whose tokens the output has, which rows stand for them in every model, and the files that say so."""

from service.vocabulary.merging import Vocabularies, merge_vocabularies, owner_of

__all__ = ["Vocabularies", "merge_vocabularies", "owner_of"]
