"""What is wrong with a recipe before any model is looked at: its bases, counts, layers and parameters. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from service.recipe.regions import Section, Stretch
from service.recipe.values import filters_of, is_plain, leaves, setting_problems
from workers.errors import RecipeError
from workers.methods.base import Method
from workers.methods.resolve import MAX_PARAMETERS, resolve_parameters, section_problems

MAX_FILTERS = 1024
"""Most filters of a recipe, all places together."""

_REQUIRED = ": is required"


def stretch_problems(method: Method, profile: str | None, stretches: Sequence[Stretch]) -> list[str]:
    """Everything that is wrong with the stretches of a recipe, each thing once."""
    problems: list[str] = []
    for stretch in stretches:
        problems += [*_model_problems(method, stretch), *_statistic_problems(method, stretch)]
    sections = {section.path: (section, own) for stretch in stretches for section, own in stretch.sections}
    conditions = sum(
        len(filters_of(setting)) for section, _ in sections.values() for setting in section.values.values()
    )
    if conditions > MAX_FILTERS:  # each is looked for in the name of every tensor
        problems.append(f"parameters: {conditions} filters, more than the {MAX_FILTERS} that are read")
    wrong: list[str] = []
    for section, own in sections.values():
        wrong += _section_problems(method, profile, section, of_model=own)
    problems += wrong
    for stretch in stretches:
        problems += _together(method, profile, stretch, is_sound=not wrong)
    return list(dict.fromkeys(problems))


def _model_problems(method: Method, stretch: Stretch) -> list[str]:
    """What is wrong with a stretch's base, the number of its models and that of their layers."""
    problems = []
    listed = [source.model for source in stretch.sources]
    if method.base == "required" and stretch.base is None:
        problems.append(f"base_model: `{method.name}` works on task vectors and needs the base model")
    elif stretch.has_task_vectors and stretch.layers is not None and stretch.base not in listed:
        problems.append(
            f"{stretch.path}: the base model {stretch.base!r} is not one of them; list it, with the layers that "
            "the others are compared with"
        )
    if method.base == "first_model" and stretch.base is not None and stretch.base not in listed:
        problems.append(
            f"base_model: `{method.name}` goes from base_model to the other; list it in `{stretch.path}`"
        )
    count, most = len(stretch.merged), method.max_models
    if count < method.min_models or (most is not None and count > most):
        wanted = str(most) if most == method.min_models else f"{method.min_models} to {most or 'any'}"
        besides = " besides the base" if stretch.has_task_vectors else ""
        has = "the recipe has" if stretch.path == "models" else "there are"
        problems.append(f"{stretch.path}: `{method.name}` takes {wanted} model(s){besides}, {has} {count}")
    for source in stretch.sources:
        if source.layers is not None and source.layers[1] - source.layers[0] != stretch.layers:
            problems.append(
                f"{source.path}.layer_range: {list(source.layers)} is not as many layers as the slice's first "
                f"source has, {stretch.layers}"
            )
    return problems


def _statistic_problems(method: Method, stretch: Stretch) -> Iterator[str]:
    """What is wrong with the checkpoints that are named beside models."""
    wanted = None if method.statistic is None else method.statistic.name
    merged = stretch.merged
    for source in stretch.sources:
        is_merged = source in merged
        if is_merged and wanted is not None and wanted not in source.statistics:
            yield f"{source.path}.{wanted}: is required: `{method.name}` takes a checkpoint of each model's"
        for key in source.statistics:
            if key != wanted:
                yield f"{source.path}.{key}: `{method.name}` has no use for it"
            elif not is_merged:
                yield f"{source.path}.{key}: the base has no task vector that it could weigh; leave it out"


def _section_problems(method: Method, profile: str | None, section: Section, *, of_model: bool) -> list[str]:
    """What is wrong with what is written at one place."""
    if len(section.values) > MAX_PARAMETERS:
        return [
            f"{section.path}: {len(section.values)} parameters, more than the {MAX_PARAMETERS} that are read"
        ]
    problems, written = [], {}
    for name, setting in section.values.items():
        wrong = setting_problems(setting)
        problems += [f"{section.path}.{name[:64]}: {problem}" for problem in wrong]
        written[name] = [] if wrong else list(leaves(setting))
    return problems + section_problems(method, profile, section.path, written, of_model=of_model)


def _together(method: Method, profile: str | None, stretch: Stretch, *, is_sound: bool) -> list[str]:
    """What is wrong with all of a stretch's parameters together: what is missing, and what does not go together.

    Which values meet is only known here where each is the same for all tensors; planning sees the others.
    """
    shared: dict[str, Any] = {}
    for section in reversed(stretch.shared):
        shared |= section.values
    owns = [source.own.values for source in stretch.sources]
    settings = [setting for values in (shared, *owns) for setting in values.values()]
    sections = [source.own.path for source in stretch.sources]
    try:
        resolve_parameters(method, profile, _first(shared), [_first(own) for own in owns], sections)
    except RecipeError as error:
        if is_sound and all(is_plain(setting) for setting in settings):
            return list(error.problems)
        written = {name for values in (shared, *owns) for name in values}
        return [problem for problem in error.problems if _is_missing(problem, written)]
    return []


def _is_missing(problem: str, written: Container[str]) -> bool:
    """Whether a problem is that something is not there, and not that it is written wrongly."""
    name = problem.removesuffix(_REQUIRED).rpartition(".")[2]
    return problem.startswith("profile: ") or (problem.endswith(_REQUIRED) and name not in written)


def _first(values: Any) -> dict[str, Any]:
    """One value for each parameter that has any."""
    return {
        name: next(iter(leaves(setting)))
        for name, setting in list(values.items())[:MAX_PARAMETERS]
        if not setting_problems(setting)
    }
