"""Where the answer to a recipe depends on whose reading of a paper is followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from workers.methods.base import Method
from workers.task import JSONValue

Values = Mapping[str, JSONValue]


def differences(method: Method, used: Iterable[Values]) -> str | None:
    """One sentence on the switches that another profile would set otherwise than this merge does; ``None`` where
    there is none.

    :param used: all parameters that some tensor of some model is merged with, global ones and the model's together;
        each combination once is enough.
    """
    defaults, together = _defaults(method), list(used)
    others = []
    for profile, values in method.profiles.items():
        switches = {**defaults, **values}
        apart = [
            f"`{name}: {_text(value)}`"
            for name, value in switches.items()
            if any(name in now and now[name] != value and _matters(name, now, switches) for now in together)
        ]
        if apart:
            others.append(f"{profile} sets {', '.join(apart)}")
    if not others:
        return None
    remedy = "Set `profile:`, or the switches by themselves"
    return f"`{method.name}` is not the same everywhere: {'; '.join(others)}. {remedy}"


def _defaults(method: Method) -> Values:
    """The defaults of the parameters that some profile sets."""
    switches = {name for values in method.profiles.values() for name in values}
    fields = {**method.model_parameters.model_fields, **method.parameters.model_fields}
    named = {field.alias or name: field.default for name, field in fields.items()}
    return {name: default for name, default in named.items() if name in switches}


def _matters(name: str, now: Values, then: Values) -> bool:
    """Whether a switch has a say: not what divides where nothing is divided, or trims where nothing is trimmed."""
    if name == "divisor":
        return bool(now.get("normalize", True)) or bool(then.get("normalize", now.get("normalize", True)))
    if name in ("rescale", "keep_count", "equal_magnitudes", "band_count", "chances", "trim_scope"):
        return bool(now.get("density", 0.0) != 1.0)
    return True


def _text(value: JSONValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
