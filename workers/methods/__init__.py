"""The merge methods, by the name that a recipe calls them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from workers.errors import RecipeError
from workers.methods.base import Method
from workers.methods.dare_linear import DARE_LINEAR
from workers.methods.dare_ties import DARE_TIES
from workers.methods.linear import LINEAR
from workers.methods.passthrough import PASSTHROUGH
from workers.methods.slerp import SLERP
from workers.methods.task_arithmetic import TASK_ARITHMETIC
from workers.methods.ties import TIES

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (LINEAR, SLERP, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES, PASSTHROUGH)
    }
)
"""Every merge method there is."""


def get_method(name: str) -> Method:
    """The method called ``name``; :class:`RecipeError` with the known names when there is none."""
    if name in METHODS:
        return METHODS[name]
    nearest = get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise RecipeError(
        f"merge_method: {name!r} is not a method that Mergemill knows ({', '.join(METHODS)}){hint}"
    )
