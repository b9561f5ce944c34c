"""From what a recipe says about parameters to what a method is given: names, profiles, defaults, ranges."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from workers.errors import RecipeError
from workers.methods.base import Method, Parameters
from workers.task import JSONValue

MAX_PARAMETERS = 64
"""Most parameters of one section of a recipe: more than any method has, and few enough to speak of each."""

_MOST_HINTS = 50
_SHOWN_CHARACTERS = 64
_MOVE = "is set for the whole merge: move it to the recipe's own parameters"

Values = Mapping[str, JSONValue]


def resolve_parameters(
    method: Method,
    profile: str | None,
    global_values: Values,
    per_model_values: Sequence[Values],
    sections: Sequence[str] | None = None,
) -> tuple[Parameters, tuple[Parameters, ...]]:
    """The method's global parameters, and each model's.

    What a model says wins over what the recipe says globally, and that over the profile and the defaults; a
    global value whose name is a model parameter's is the default of all models. ``sections`` name the models'
    sections in messages; they are ``models[i].parameters`` otherwise. Raises :class:`RecipeError` with every
    problem found.
    """
    sections = sections or [f"models[{index}].parameters" for index in range(len(per_model_values))]
    problems: list[str] = []
    defaults = _profile(method, profile, problems)
    ours, theirs = _names(method.parameters), _names(method.model_parameters)

    # `true` says yes to a switch, and which way it then goes is the profile's to say.
    given = {
        name: defaults[name] if value is True and isinstance(defaults.get(name), str) else value
        for name, value in _scalars("parameters", global_values, problems).items()
    }
    for name in given.keys() - ours - theirs:
        problems.append(f"parameters.{_short(name)}: {_unknown(name, method, ours | theirs, problems)}")
    shared = {**defaults, **given}
    refused = global_values.keys() - given.keys()  # and that is said: they are not missing
    parameters = _validate(method.parameters, "parameters", _only(shared, ours), problems, refused)

    model_defaults = _only(shared, theirs)
    if bad := _complaints(method.model_parameters, "parameters", model_defaults):
        problems += bad
        model_defaults = {}
    models = []
    for section, values in zip(sections, per_model_values, strict=True):
        own = _scalars(section, values, problems)
        for name in own.keys() - theirs:
            hint = _MOVE if name in ours else _unknown(name, method, theirs, problems)
            problems.append(f"{section}.{_short(name)}: {hint}")
        models.append(
            _validate(method.model_parameters, section, model_defaults | _only(own, theirs), problems)
        )
    if problems or parameters is None:
        raise RecipeError(*sorted(problems))
    return parameters, tuple(model for model in models if model is not None)


def section_problems(
    method: Method,
    profile: str | None,
    section: str,
    values: Mapping[str, Sequence[JSONValue]],
    *,
    of_model: bool,
) -> list[str]:
    """What is wrong with a section of a recipe, whichever tensor it is read for: its names, and each value alone.

    ``values`` are all those that a parameter takes for some tensor; ``of_model`` says that the section is one
    model's own, where what is set for the whole merge has no place.
    """
    problems: list[str] = []
    ours, theirs = _names(method.parameters), _names(method.model_parameters)
    defaults = _profile(method, profile, [])
    for name, found in values.items():
        if name not in ours | theirs:
            known = theirs if of_model else ours | theirs
            problems.append(f"{section}.{_short(name)}: {_unknown(name, method, known, problems)}")
            continue
        if of_model and name not in theirs:
            problems.append(f"{section}.{_short(name)}: {_MOVE}")
            continue
        model = method.model_parameters if name in theirs else method.parameters
        given = (
            defaults[name] if one is True and isinstance(defaults.get(name), str) else one for one in found
        )
        complaints = (_complaints(model, section, {name: one}, fields_only=True) for one in given)
        problems += next(filter(None, complaints), [])
    return sorted(problems)


def model_names(method: Method) -> frozenset[str]:
    """The parameters that each model has of its own."""
    return frozenset(_names(method.model_parameters))


def number_names(method: Method) -> frozenset[str]:
    """The parameters that are numbers, so that there are values in between."""
    numbers = set()
    for model in (method.parameters, method.model_parameters):
        for name, schema in model.model_json_schema().get("properties", {}).items():
            if schema.get("type") in ("number", "integer"):
                numbers.add(name)
    return frozenset(numbers)


def _profile(method: Method, profile: str | None, problems: list[str]) -> Values:
    if profile is None:
        return {}
    if profile not in method.profiles:
        known = ", ".join(method.profiles) or "none"
        problems.append(f"profile: {profile!r} is not a profile of {method.name} (it has: {known})")
    return method.profiles.get(profile, {})


def _names(model: type[Parameters]) -> set[str]:
    """The names that a recipe may use."""
    return {field.alias or name for name, field in model.model_fields.items()}


def _only(values: Values, names: set[str]) -> dict[str, JSONValue]:
    return {name: value for name, value in values.items() if name in names}


def _unknown(name: str, method: Method, known: set[str], problems: Sequence[str]) -> str:
    if len(problems) >= _MOST_HINTS:  # looking for near names takes time that a stranger could spend
        return f"is not a parameter of {method.name}"
    nearest = get_close_matches(_short(name), sorted(known), n=1)
    if nearest:
        return f"is not a parameter of {method.name}; did you mean {nearest[0]!r}?"
    return f"is not a parameter of {method.name} (known here: {', '.join(sorted(known)) or 'none'})"


def _scalars(section: str, values: Values, problems: list[str]) -> dict[str, JSONValue]:
    """The values that are single ones; the others are reported."""
    if len(values) > MAX_PARAMETERS:
        problems.append(f"{section}: {len(values)} parameters, more than the {MAX_PARAMETERS} that are read")
        return {}
    scalars = {}
    for name, value in values.items():
        if isinstance(value, Mapping | list | tuple):
            problems.append(f"{section}.{_short(name)}: give one value")
        else:
            scalars[name] = value
    return scalars


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _complaints(
    model: type[Parameters], section: str, values: Values, *, fields_only: bool = False
) -> list[str]:
    """What is wrong with ``values`` as a ``model``, or with each field alone; not that some are missing."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        return [
            _sentence(section, detail)
            for detail in details
            if detail["type"] != "missing" and (detail["loc"] or not fields_only)
        ]
    return []


def _validate(
    model: type[Parameters],
    section: str,
    values: Values,
    problems: list[str],
    refused: Container[str | int] = (),
) -> Parameters | None:
    """``values`` as a ``model``; or ``None``, and the problems with them, but that what was refused is missing."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems += [
            _sentence(section, detail)
            for detail in error.errors(include_url=False)
            if detail["type"] != "missing" or detail["loc"][0] not in refused
        ]
        return None


def _sentence(section: str, detail: ErrorDetails) -> str:
    field = ".".join([section, *map(str, detail["loc"])])
    match detail["type"]:
        case "missing":
            return f"{field}: is required"
        case "value_error":
            return f"{field}: {detail['ctx']['error']}"
        case _:
            message = detail["msg"]
            return f"{field}: {message[0].lower()}{message[1:]} (got {_shown(detail['input'])})"


def _shown(value: object) -> str:
    try:
        return _short(repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return "an endless number"
