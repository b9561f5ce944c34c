"""What the user wants: the recipe, read from mergekit's YAML or the same as JSON, and checked."""

from service.recipe.entries import MAX_MODELS, ModelEntry, ModuleEntry, SliceEntry, SourceEntry
from service.recipe.graph import (
    MAX_DOCUMENTS,
    MAX_PLACES,
    Graph,
    graph_of,
    parse_documents,
    parse_documents_yaml,
)
from service.recipe.language import DTYPES, Profile, Recipe
from service.recipe.parsing import (
    MAX_RECIPE_CHARACTERS,
    key_hint,
    load_yaml,
    parse_recipe,
    parse_yaml,
    validation_problems,
)
from service.recipe.regions import Region, Section, Source, Stretch

__all__ = [
    "DTYPES",
    "MAX_DOCUMENTS",
    "MAX_MODELS",
    "MAX_PLACES",
    "MAX_RECIPE_CHARACTERS",
    "Graph",
    "ModelEntry",
    "ModuleEntry",
    "Profile",
    "Recipe",
    "Region",
    "Section",
    "SliceEntry",
    "Source",
    "SourceEntry",
    "Stretch",
    "graph_of",
    "key_hint",
    "load_yaml",
    "parse_documents",
    "parse_documents_yaml",
    "parse_recipe",
    "parse_yaml",
    "validation_problems",
]
