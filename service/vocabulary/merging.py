"""The vocabulary of a merge: found, checked, and put before planning as if every model had it.

With a `tokenizer` option each model's embeddings and heads are seen through the output's vocabulary: same rows, in the
same order, filled where a model lacks a token. From there on they are tensors like any others. Without one, models of
different vocabularies are refused, since their rows would be added up whatever they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.planning.checkpoint import TIED_NAMES, Checkpoint, StoredTensor, is_tokenizer_file
from service.planning.pairing import Inputs
from service.recipe import Recipe
from service.recipe.tokenizers import KEYWORDS, UNION, TokenizerEntry
from service.vocabulary.building import Added, missing_tokens, numbered, settings_json, tokenizer_json
from service.vocabulary.comparing import differing
from service.vocabulary.filling import Voice, fill
from service.vocabulary.ids import ROLES, Renumbering, renumbered, with_size
from service.vocabulary.reading import (
    GENERATION_FILE,
    SETTINGS_FILE,
    SPECIAL_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    Tokenizers,
    read_document,
    read_settings,
)
from service.vocabulary.rows import Vocabulary, seen_through
from service.vocabulary.templating import Template, chat_template
from service.vocabulary.tensors import embedding_of, rows_of, vocabulary_tensors
from workers.errors import PlanError
from workers.store.base import ObjectStore

_KEPT = {SPECIAL_FILE}
_SHOWN = 4


@dataclass(frozen=True)
class Vocabularies:
    """What came of a recipe's vocabularies."""

    inputs: Inputs
    """The models, seen through the output's vocabulary."""
    texts: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files of the output that are written anew, by name."""
    left_out: frozenset[str] = frozenset()
    """Files that would be copied, and say something else than these."""


def merge_vocabularies(store: ObjectStore, recipe: Recipe, inputs: Inputs) -> Vocabularies:
    """Put the output's vocabulary before every model, or find that theirs are the same.

    :raises PlanError: lists everything that keeps them from being merged.
    :raises StoreError: their files cannot be read.
    """
    tokenizers = Tokenizers(store, is_lenient=_may_be_plain(recipe.vocabulary, inputs))
    found = Vocabularies(inputs)
    new: tuple[Added, ...] = ()
    if recipe.vocabulary is not None:
        found, new = _merged(recipe, recipe.vocabulary, inputs, tokenizers)
    elif recipe.vocabularies == "error":
        problems = differing(recipe, inputs, tokenizers)
        if problems:
            raise PlanError(*problems)
    owner = inputs.models[owner_of(recipe)]
    template = None if recipe.chat_template is None else chat_template(store, recipe, inputs.models)
    return _with_files(store, found, owner, tokenizers, new, template)


def _may_be_plain(entry: TokenizerEntry | None, inputs: Inputs) -> bool:
    """Whether nothing is asked for that could not be done by copying files, as far as is known without reading them."""
    if entry is None:
        return True
    sizes = {rows_of(model) for model in inputs.models.values()}
    return entry.source != UNION and not entry.tokens and not entry.pad_to_multiple_of and len(sizes) == 1


def owner_of(recipe: Recipe) -> str:
    """The model whose tokens keep their numbers, and whose tokenizer's files go to the output."""
    source = UNION if recipe.vocabulary is None else recipe.vocabulary.source
    return recipe.reference if source in KEYWORDS else source


def _merged(
    recipe: Recipe, entry: TokenizerEntry, inputs: Inputs, tokenizers: Tokenizers
) -> tuple[Vocabularies, tuple[Added, ...]]:
    owner = owner_of(recipe)
    held = {name: tokenizers.of(inputs.models[name]) for name in recipe.names}
    if all(tokenizer is None for tokenizer in held.values()):
        if entry.source == UNION or entry.tokens or entry.pad_to_multiple_of:
            raise PlanError(
                f"{inputs.models[owner].uri}: has no tokenizer.json, which vocabularies are merged by"
            )
        return Vocabularies(inputs), ()
    first = held[owner] or next(tokenizer for tokenizer in held.values() if tokenizer is not None)
    notices = [
        f"{name}: has no tokenizer; taken to be that of {owner}" for name, own in held.items() if own is None
    ]
    called = _first_names(inputs)
    voices = {
        name: Voice(called[id(model)], tokenizer or first, _rows(model, tokenizer or first))
        for name, tokenizer in held.items()
        for model in [inputs.models[name]]
    }
    others = ((voice.tokenizer, voice.rows) for name, voice in voices.items() if name != owner)
    entries = entry.tokens or {}
    new = tuple(missing_tokens(first, others if entry.source == UNION else (), sorted(entries)))
    if _is_plain(entry, new, voices):
        return Vocabularies(replace(inputs, notices=(*inputs.notices, *notices))), ()
    named = vocabulary_tensors(
        inputs.reference,
        [model for model in inputs.models.values() if model is not inputs.reference],
        entry.embeddings,
    )
    tokens = numbered(first, new)
    vocabulary, problems = fill(
        tokens, entry.pad_to_multiple_of, voices, recipe.base_model, owner, entries, len(named.names)
    )
    unread = [*_without_arithmetic(inputs, named.names), *_not_renumbered(inputs, named.names)]
    wrong = [*problems, *named.problems, *unread]
    if wrong:
        raise PlanError(*wrong)
    notices.append(_told(recipe, entry, vocabulary, voices, new))
    old = voices[recipe.reference].tokenizer.tokens
    renumbering = Renumbering(old, tokens)
    seen = _seen(inputs, vocabulary, named.names)
    reference = replace(seen.reference, config=_config(inputs.reference, vocabulary, renumbering, first))
    models = {name: reference if model is seen.reference else model for name, model in seen.models.items()}
    notices += [
        f"config.json: {lost} is the number of a token that the output does not have"
        for lost in renumbering.lost
    ]
    seen = replace(seen, reference=reference, models=models, notices=(*inputs.notices, *notices))
    texts = _generation(tokenizers.store, inputs.reference, renumbering, first)
    return Vocabularies(seen, texts), new


def _is_plain(entry: TokenizerEntry, new: tuple[Added, ...], voices: Mapping[str, Voice]) -> bool:
    """Whether every model has the output's rows already."""
    one = next(iter(voices.values()))
    step = entry.pad_to_multiple_of or 1
    return (
        not new
        and not entry.tokens
        and one.rows % step == 0
        and (entry.pad_to_multiple_of is None or one.rows - one.tokenizer.size < step)
        and all(
            voice.rows == one.rows and voice.tokenizer.tokens == one.tokenizer.tokens
            for voice in voices.values()
        )
    )


def _rows(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int:
    return rows_of(checkpoint) or tokenizer.size


def _first_names(inputs: Inputs) -> dict[int, str]:
    """What each checkpoint is called first: it may have several names, and others at its URI with an adapter on top."""
    return {id(checkpoint): name for name, checkpoint in reversed([*inputs.models.items()])}


def _without_arithmetic(inputs: Inputs, names: Sequence[str]) -> Iterator[str]:
    """What has no rows that could be put into another order or averaged, in whichever model."""
    for model, checkpoint in inputs.models.items():
        for name in names:
            stored = _held(checkpoint, name)
            if stored is not None and not (stored.is_float and stored.shape):
                yield (
                    f"{model}: {name} is {stored.dtype} {list(stored.shape)}, and rows of tokens are floating-point: "
                    "dequantise the model first, or merge models of one vocabulary without a `tokenizer` option"
                )


def _not_renumbered(inputs: Inputs, names: Sequence[str]) -> Iterator[str]:
    """What has rows by the old numbers of the tokens, and is not read by the new ones."""
    for model, checkpoint in inputs.statistics.items():
        if held := next((name for name in names if name in checkpoint.tensors), None):
            yield (
                f"{model}: {held} has statistics by row, and the rows would be put into another order: leave it out "
                "of this checkpoint"
            )


def _seen(inputs: Inputs, vocabulary: Vocabulary, names: Sequence[str]) -> Inputs:
    """Every model with the rows of the output's vocabulary."""
    called = _first_names(inputs)
    checkpoints = {called[id(checkpoint)]: checkpoint for checkpoint in inputs.models.values()}
    known: dict[int, Checkpoint] = {}

    def seen(checkpoint: Checkpoint) -> Checkpoint:
        if id(checkpoint) not in known:
            tensors = dict(checkpoint.tensors)
            for name in names:
                if (own := _held(checkpoint, name)) is not None:
                    held = {model: _held(other, name) for model, other in checkpoints.items()}
                    givers = {model: tensor for model, tensor in held.items() if tensor is not None}
                    tensors[name] = replace(
                        seen_through(
                            vocabulary, called[id(checkpoint)], {**givers, called[id(checkpoint)]: own}
                        ),
                        name=name,
                    )
            known[id(checkpoint)] = replace(checkpoint, tensors=tensors)
        return known[id(checkpoint)]

    models = {name: seen(checkpoint) for name, checkpoint in inputs.models.items()}
    return replace(inputs, reference=seen(inputs.reference), models=models)


def _held(checkpoint: Checkpoint, name: str) -> StoredTensor | None:
    """A model's tensor, or for a head that is tied the embedding that stands for it."""
    stored = checkpoint.tensors.get(name)
    if stored is None and name in TIED_NAMES and checkpoint.may_be_tied:
        return embedding_of(checkpoint)
    return stored


def _config(
    reference: Checkpoint, vocabulary: Vocabulary, renumbering: Renumbering, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    if reference.config is None:
        return None
    changed = renumbered(reference.config, renumbering, _roles(tokenizer, vocabulary.tokens))
    return with_size(changed, rows_of(reference), vocabulary.size)


def _roles(tokenizer: Tokenizer, tokens: Mapping[str, int]) -> dict[str, int]:
    """The numbers of the special tokens that a tokenizer's settings name."""
    found = {}
    for role in ROLES:
        said = tokenizer.settings.get(f"{role}_token")
        token = said.get("content") if isinstance(said, Mapping) else said
        if isinstance(token, str) and token in tokens:
            found[role] = tokens[token]
    return found


def _generation(
    store: ObjectStore, reference: Checkpoint, renumbering: Renumbering, tokenizer: Tokenizer
) -> dict[str, bytes]:
    """generation_config.json, where the tokens in it have other numbers now."""
    settings = read_settings(store, reference, GENERATION_FILE)
    if settings is None:
        return {}
    changed = renumbered(settings, renumbering, _roles(tokenizer, tokenizer.tokens))
    return {} if changed == settings else {GENERATION_FILE: _json(changed)}


def _told(
    recipe: Recipe,
    entry: TokenizerEntry,
    vocabulary: Vocabulary,
    voices: Mapping[str, Voice],
    new: tuple[Added, ...],
) -> str:
    """What became of the vocabulary, in a sentence."""
    rows = voices[owner_of(recipe)].rows
    text = f"vocabulary: {len(vocabulary.tokens)} tokens, those of {owner_of(recipe)}"
    if new:
        shown = ", ".join(repr(one.token) for one in new[:_SHOWN])
        text += f" and {len(new)} more ({shown}{', …' if new[_SHOWN:] else ''})"
    if rows > vocabulary.size:
        text += f"; rows of padding are left out ({rows} → {vocabulary.size})"
    elif vocabulary.size > 1 + max(vocabulary.tokens.values(), default=-1):
        text += f"; {vocabulary.size} rows, the last of them zeros"
    return text


def _with_files(
    store: ObjectStore,
    found: Vocabularies,
    owner: Checkpoint,
    tokenizers: Tokenizers,
    new: tuple[Added, ...],
    template: Template | None,
) -> Vocabularies:
    """The tokenizer's files, as far as they are not the owner's own."""
    if not new and template is None:
        return found
    texts, left_out = dict(found.texts), set[str]()
    settings = read_settings(store, owner, SETTINGS_FILE)
    changed = settings
    if new:
        tokenizer = tokenizers.of(owner)
        if tokenizer is None:
            raise PlanError(f"{owner.uri}: has no tokenizer.json, to which tokens could be added")
        texts[TOKENIZER_FILE] = tokenizer_json(tokenizer, read_document(store, owner), new)
        changed = None if settings is None else settings_json(settings, tokenizer, new)
        left_out |= {
            name
            for name in owner.files
            if is_tokenizer_file(name) and name not in _KEPT and not name.startswith("chat_template")
        }
    if template is not None:
        texts |= template.texts
        left_out |= {name for name in owner.files if name.startswith("chat_template")}
        changed = None if changed is None else {**changed, "chat_template": template.text}
    if changed is not None and (new or changed != settings):
        texts[SETTINGS_FILE] = _json(changed)
    notices = found.inputs.notices if template is None else (*found.inputs.notices, template.notice)
    return Vocabularies(replace(found.inputs, notices=notices), texts, frozenset(left_out))


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
