"""What does not fit together, in few sentences: of many tensors with one trouble a few are named. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

SHOWN: Final = 8
"""How many tensor names a sentence lists before it counts the rest."""


@dataclass
class Misfits:
    """Tensors that do not fit, by what is wrong with them."""

    tensors: set[str] = field(default_factory=set)
    """Names of all of them."""
    _found: dict[tuple[str, str, str], dict[str, None]] = field(default_factory=dict)

    def add(self, what: str, model: str, remedy: str, tensor: str, how: str = "") -> None:
        """Note a tensor of a model.

        :param remedy: what to do about it; may be empty.
        :param how: what follows the tensor's name, such as its shape.
        """
        self._found.setdefault((what, model, remedy), {})[tensor + how] = None
        self.tensors.add(tensor)

    def sentences(self) -> list[str]:
        """A sentence for each trouble of each model."""
        return [
            f"{model}: {what}: {listed(list(tensors))}{'; ' + remedy if remedy else ''}"
            for (what, model, remedy), tensors in self._found.items()
        ]


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
