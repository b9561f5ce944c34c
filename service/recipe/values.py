"""What a parameter is worth for one tensor: one value, a gradient over layers, or values by filter. Pure.

Reference: mergekit's documented configuration format; its precedence was established by running it. A filter is
looked for in the tensor's name, and the first condition that fits wins; where none does, the setting says nothing
about this tensor. A gradient's values lie evenly over a slice's layers; numbers in between are interpolated,
while of switches and words each holds until the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Scalar = bool | int | float | str

MAX_GRADIENT = 1024
"""Most values of a gradient."""

MAX_CONDITIONS = 256
"""Most conditions of one parameter."""

CATCH_ALL = "*"
"""The filter that fits every name, as none does."""

_KEYS = frozenset({"filter", "value"})


def value_of(setting: Any, name: str, position: float, *, is_number: bool = True) -> Scalar | None:
    """What a setting says for the tensor called ``name``; ``None`` when it says nothing.

    :param setting: one without :func:`setting_problems`.
    :param position: where the tensor's layer lies among the slice's, from 0 to 1; 0 outside of them.
    :param is_number: whether a gradient's values are interpolated; switches and words hold until the next one.
    """
    conditions = _conditions(setting)
    if conditions is not None:
        fitting = (each for each in conditions if fits(each.get("filter"), name))
        first = next(fitting, None)
        return None if first is None else _value_at(first["value"], position, is_number)
    return _value_at(setting, position, is_number)


def fits(wanted: str | None, name: str) -> bool:
    """Whether a condition's filter takes the tensor called ``name``."""
    return wanted is None or wanted == CATCH_ALL or wanted in name


def interpolate(values: Sequence[float], position: float) -> float:
    """The gradient ``values`` at ``position`` from 0 to 1, in mergekit's very arithmetic: (1 - f) * a + f * b."""
    scaled = position * (len(values) - 1)
    index = min(int(scaled), len(values) - 1)
    fraction = scaled - index
    following = values[min(index + 1, len(values) - 1)]
    return (1 - fraction) * values[index] + fraction * following


def filters_of(setting: Any) -> list[str]:
    """The filters that a setting names."""
    named = (each.get("filter") for each in _conditions(setting) or () if isinstance(each, Mapping))
    return [wanted for wanted in named if isinstance(wanted, str) and wanted != CATCH_ALL]


def is_plain(setting: Any) -> bool:
    """Whether a setting is one value for all tensors."""
    return not isinstance(setting, Mapping | list | tuple)


def leaves(setting: Any) -> Iterator[Scalar]:
    """Every single value that is written in a setting without :func:`setting_problems`."""
    for value in [each["value"] for each in _conditions(setting) or ({"value": setting},)]:
        yield from value if isinstance(value, list | tuple) else (value,)


def setting_problems(setting: Any) -> list[str]:
    """What is wrong with the form of a setting, whatever its values are for."""
    conditions = _conditions(setting)
    if conditions is None:
        return _value_problems(setting)
    if len(conditions) > MAX_CONDITIONS:
        return [f"{len(conditions)} conditions, more than the {MAX_CONDITIONS} that are read"]
    problems = []
    for condition in conditions:
        if not isinstance(condition, Mapping):
            return ["a list holds either numbers (a gradient) or conditions (`filter` and `value`), not both"]
        if unknown := [key for key in condition if key not in _KEYS]:
            problems.append(f"a condition has `filter` and `value`, not {str(unknown[0])[:64]!r}")
        elif "value" not in condition:
            problems.append("a condition needs a `value`")
        elif not isinstance(condition.get("filter"), str | None):
            problems.append("a `filter` is text that the names of tensors are searched for")
        else:
            problems += _value_problems(condition["value"])
    return list(dict.fromkeys(problems))


def _conditions(setting: Any) -> Sequence[Any] | None:
    """The conditions that a setting consists of; ``None`` when it has none."""
    if isinstance(setting, Mapping):
        return [setting]
    if isinstance(setting, list | tuple) and any(isinstance(each, Mapping) for each in setting):
        return setting
    return None


def _value_problems(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        if not value:
            return ["an empty list says nothing"]
        if len(value) > MAX_GRADIENT:
            return [f"{len(value)} values in a gradient, more than the {MAX_GRADIENT} that are read"]
        return [] if all(isinstance(each, Scalar) for each in value) else ["a gradient is a list of values"]
    if isinstance(value, Mapping):
        return ["a condition's `value` is one value or a gradient, not another condition"]
    return ["has no value"] if value is None else []


def _value_at(value: Any, position: float, is_number: bool) -> Scalar:
    scalar: Scalar = value
    if isinstance(value, list | tuple):
        if is_number:
            return interpolate([float(each) for each in value], position)
        scalar = value[int(position * (len(value) - 1))]
    return scalar
