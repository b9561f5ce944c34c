"""Which module of a recipe takes which tensor, by the tensor's name alone. Pure.

A module takes the tensors whose names begin with its own, or where none does, those that have it between two dots;
of several modules in a name the outermost. ``default`` takes what no other one does, and so does ``text_decoder``
(mergekit's name for the language model of a multimodal one) where no tensor is called that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from service.recipe.regions import DEFAULT_MODULES, Region


@dataclass(frozen=True, slots=True)
class Modules:
    """The regions of a recipe, told apart by names."""

    count: int
    """How many regions there are."""
    prefixes: tuple[tuple[str, int], ...]
    """What names begin with, and the region that takes them."""
    parts: tuple[tuple[str, int], ...]
    """What names have between dots, and the region that takes them."""
    rest: int | None
    """The region that takes all others."""

    def region(self, name: str) -> int | None:
        """The region that takes a tensor; ``None`` when none does."""
        if not self.prefixes and not self.parts:
            return self.rest
        found = [(0, -len(prefix), region) for prefix, region in self.prefixes if name.startswith(prefix)]
        found += [(at, -len(part), region) for part, region in self.parts if (at := name.find(part)) >= 0]
        return min(found)[2] if found else self.rest

    def of(self, region: int, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that a region takes, in their order."""
        return [name for name in names if self.region(name) == region]


def modules_of(regions: Sequence[Region], names: Collection[str]) -> tuple[Modules, list[str]]:
    """How ``regions`` share the tensors of a model with these names, and what is wrong with that."""
    prefixes, parts, problems = [], [], []
    rest = None
    for number, region in enumerate(regions):
        called = region.name
        if called is None:
            rest = number
        elif any(name.startswith(f"{called}.") for name in names):
            prefixes.append((f"{called}.", number))
        elif any(f".{called}." in name for name in names):
            parts.append((f".{called}.", number))
        elif called not in DEFAULT_MODULES:
            problems.append(
                f"modules.{called}: no tensor's name begins with `{called}.` or has `.{called}.` in it, such as "
                f"{next(iter(names), 'none')!r}"
            )
        elif rest is not None:
            problems.append(f"modules.{called}: another module takes all that is left already")
        else:
            rest = number
    modules = Modules(len(regions), tuple(prefixes), tuple(parts), rest)
    if rest is None and not problems:
        left = [name for name in names if modules.region(name) is None]
        if left:
            problems.append(
                f"modules: none takes {len(left)} tensor(s), such as {left[0]}; add the module `default` for them"
            )
    return modules, problems
