"""Where the answer to a recipe depends on whose reading of a paper is followed."""

from __future__ import annotations

from collections.abc import Mapping

from workers.methods.base import Method, Parameters
from workers.task import JSONValue


def differences(method: Method, used: Parameters, models: tuple[Parameters, ...]) -> str | None:
    """One sentence on the switches that another profile would set otherwise than this merge does; ``None`` where
    there is none.

    :param used: the global parameters that the merge uses.
    :param models: those of its models.
    """
    now = {**_values(used), **(_values(models[0]) if models else {})}
    others = []
    for profile, values in method.profiles.items():
        switches = {**_defaults(method), **values}
        apart = [
            f"`{name}: {_text(value)}`"
            for name, value in switches.items()
            if name in _switches(method)
            and name in now
            and now[name] != value
            and _matters(name, now, switches)
        ]
        if apart:
            others.append(f"{profile} sets {', '.join(apart)}")
    if not others:
        return None
    remedy = "Set `profile:`, or the switches by themselves"
    return f"`{method.name}` is not the same everywhere: {'; '.join(others)}. {remedy}"


def _switches(method: Method) -> set[str]:
    """The parameters that some profile sets."""
    return {name for values in method.profiles.values() for name in values}


def _defaults(method: Method) -> dict[str, JSONValue]:
    fields = {**method.model_parameters.model_fields, **method.parameters.model_fields}
    return {
        field.alias or name: field.default
        for name, field in fields.items()
        if (field.alias or name) in _switches(method)
    }


def _values(parameters: Parameters) -> Mapping[str, JSONValue]:
    return parameters.model_dump(mode="json", by_alias=True)


def _matters(name: str, now: Mapping[str, JSONValue], then: Mapping[str, JSONValue]) -> bool:
    """Whether a switch has a say: not what divides where nothing is divided, or trims where nothing is trimmed."""
    if name == "divisor":
        return bool(now.get("normalize", True)) or bool(then.get("normalize", now.get("normalize", True)))
    if name in ("rescale", "keep_count", "equal_magnitudes", "band_count", "chances", "trim_scope"):
        return bool(now.get("density", 0.0) != 1.0)
    return True


def _text(value: JSONValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
