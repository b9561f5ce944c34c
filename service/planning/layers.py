"""Layers, found by their numbered names: no architecture is known here. Pure.

``model.layers.3.mlp.up_proj.weight`` lies in layer 3 of the stack ``model.layers.``. A stack's layers are numbered
from 0 without gaps; of several numbers in a name (``encoder.block.2.layer.0...``, experts) the outermost counts that
has at least two layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What config.json may call the number of layers."""

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_NUMBER = re.compile(r"(?:^|\.)(0|[1-9]\d{0,4})(?=\.)")
_MOST_NUMBERS = 3


_BEFORE = re.compile(
    "embed|vision|visual|audio|image|projector|^(wte|wpe|shared|conv[0-9]|patch.*|connector|ln_pre)$"
)
_AFTER = re.compile("head$|^(embed_out|cls|pooler|score|classifier)$")


class Place(NamedTuple):
    """Where a tensor lies in a stack."""

    stack: str
    """What the names of the stack's tensors begin with, up to the number."""
    layer: int
    """The number."""
    rest: str
    """What follows it and its dot."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """The stacks of layers of one checkpoint."""

    depths: Mapping[str, int] = field(default_factory=dict)
    """How many layers each has, by what its tensors' names begin with."""

    def place(self, name: str) -> Place | None:
        """Where a tensor lies; ``None`` when that is in no stack."""
        found = [place for place in _places(name) if place.stack in self.depths]
        return next((place for place in found if self.depths[place.stack] > 1), found[0] if found else None)

    def position(self, name: str) -> float:
        """Where a tensor's layer lies in its stack, from 0 to 1; 0 outside of stacks."""
        place = self.place(name)
        return 0.0 if place is None else position(place.layer, self.depths[place.stack])


def stacks_of(names: Iterable[str]) -> Stacks:
    """The stacks of a checkpoint with tensors of these names."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        for place in _places(name):
            numbers.setdefault(place.stack, set()).add(place.layer)
    return Stacks({stack: len(found) for stack, found in numbers.items() if max(found) == len(found) - 1})


def position(layer: int, depth: int) -> float:
    """Where a layer lies among ``depth``, from 0 to 1, as mergekit places it: a layer by itself at 1."""
    return layer / (depth - 1) if depth > 1 else 1.0


def main_stacks(
    stacks: Iterable[str], depths: Mapping[str, int], config: Mapping[str, Any] | None
) -> list[str]:
    """The stacks that a range of layers may mean: the only one, or those as deep as config.json says."""
    found = list(dict.fromkeys(stacks))
    if len(found) == 1 or config is None:
        return found
    sections = [config, *(config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), Mapping))]
    said = {section[key] for section in sections for key in DEPTH_KEYS if isinstance(section.get(key), int)}
    return [stack for stack in found if depths[stack] in said] or found


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers feeds the first of them: embeddings, and other towers with their projectors.

    The others come after the last: norms, heads.
    """
    parts = name.split(".")
    return any(map(_BEFORE.search, parts)) and not any(map(_AFTER.search, parts))


def _places(name: str) -> Iterator[Place]:
    for count, found in enumerate(_NUMBER.finditer(name)):
        if count == _MOST_NUMBERS:
            return
        yield Place(name[: found.start(1)], int(found[1]), name[found.end() + 1 :])
