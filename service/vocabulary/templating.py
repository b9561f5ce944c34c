"""The chat template that a recipe asks for, read from its models where it is theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.planning.checkpoint import Checkpoint
from service.recipe import Recipe
from service.vocabulary.reading import SETTINGS_FILE, TEMPLATE_FILE, read_file, read_settings
from service.vocabulary.templates import AUTO, NAMED, commonest, is_template, template_of
from workers.errors import PlanError
from workers.store.base import ObjectStore

MAX_TEMPLATE_BYTES = 1 << 20
"""Longest chat template of a model that is read."""


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template of the output."""

    text: str
    """The template."""
    notice: str
    """Whose it is, in words."""

    @property
    def texts(self) -> dict[str, bytes]:
        """The file that it goes to."""
        return {TEMPLATE_FILE: self.text.encode()}


def chat_template(store: ObjectStore, recipe: Recipe, models: Mapping[str, Checkpoint]) -> Template | None:
    """The template that the recipe asks for; ``None`` when the models have none.

    :raises PlanError: it is no template's name, no model's and no template.
    :raises StoreError: the models' cannot be read.
    """
    wanted = recipe.chat_template or ""
    if wanted == AUTO:
        held = {name: _held(store, models[name]) for name in recipe.names}
        text = commonest(held)
        if text is None:
            return None
        whose = [name for name in recipe.names if held[name] == text]
        return Template(text, f"chat template: that of {', '.join(whose)}")
    if wanted in NAMED:
        return Template(NAMED[wanted], f"chat template: `{wanted}`")
    if wanted in models:
        text = _held(store, models[wanted])
        if text is None:
            raise PlanError(f"chat_template: {wanted} has no chat template")
        return Template(text, f"chat template: that of {wanted}")
    if is_template(wanted):
        return Template(wanted, "chat template: the recipe's")
    raise PlanError(
        f"chat_template: {wanted[:64]!r} is not `auto`, one of {', '.join(sorted(NAMED))}, one of the recipe's models "
        "or a Jinja template"
    )


def _held(store: ObjectStore, checkpoint: Checkpoint) -> str | None:
    info = checkpoint.files.get(TEMPLATE_FILE)
    file = None
    if info is not None:
        try:
            file = read_file(store, info, MAX_TEMPLATE_BYTES).decode()
        except ValueError as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{info.uri} is not UTF-8") from error
    return template_of(read_settings(store, checkpoint, SETTINGS_FILE), file)
