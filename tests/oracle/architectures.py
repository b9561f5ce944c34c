"""Merges of many architectures, opened by transformers: the keys, the config and the logits have to be right.

The models are small ones that transformers builds from its config classes, and one real checkpoint. The mean of two
fine-tunes, and layers of both one after the other, are merged by Mergemill; transformers says what they have to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.oracle.cases import Recipe

RANGES = (("one", 0, 2), ("two", 1, 3))
"""The layers of a sliced merge: whose, the first, and one past the last."""

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "llama": (),
    "qwen2": (),
    "mistral": (),
    "gemma": (),
    "gpt2": (),
    "t5": ("encoder", "decoder"),
    "mixtral": (),
    "llava": (),
    "minilm": (),
}
"""The modules that have layers, where a model has several stacks of them."""

NOTES = {
    "qwen2": "sliding windows from the second layer on",
    "gemma": "tied embeddings",
    "gpt2": "tied embeddings",
    "t5": "encoder and decoder, tied embeddings",
    "mixtral": "experts",
    "llava": "CLIP's vision tower, a projector and a Llama",
    "minilm": "all-MiniLM-L6-v2, as people use it",
}


@dataclass(frozen=True, slots=True)
class Opened:
    """A merge of one architecture, as transformers opens it."""

    architecture: str
    """A key of :data:`ARCHITECTURES`."""
    kind: str
    """How it was merged: ``mean`` or ``slices``."""
    found: Mapping[str, Any]
    """What ``foreign_models.py`` says of it."""

    @property
    def problem(self) -> str | None:
        """What is wrong with it."""
        wrong = self.found["problem"]
        return f"{self.architecture}, {self.kind}: {wrong}" if wrong else None


def recipes(root: Path) -> Iterator[tuple[str, str, Recipe]]:
    """Every recipe with its architecture and kind; the models are below ``root``."""
    for name, modules in ARCHITECTURES.items():
        whole = [{"model": str(root / name / which)} for which in ("one", "two")]
        yield name, "mean", {"merge_method": "linear", "models": whole, "parameters": {"weight": 1}}
        slices = [
            {"sources": [{"model": str(root / name / which), "layer_range": [first, last]}]}
            for which, first, last in RANGES
        ]
        merged: Recipe = {"slices": slices}
        if modules:
            merged = {"modules": dict.fromkeys(modules, merged) | {"default": {"models": whole[:1]}}}
        yield name, "slices", {"merge_method": "passthrough"} | merged


def outputs(root: Path, ours: Path) -> dict[Path, Recipe]:
    """Every recipe by where it goes."""
    return {ours / f"{name}-{kind}": recipe for name, kind, recipe in recipes(root)}


def write_request(root: Path, ours: Path, file: Path) -> None:
    """Ask ``foreign_models.py`` to open them all."""
    origins = [(which, layer) for which, first, last in RANGES for layer in range(first, last)]
    file.write_text(
        json.dumps(
            [
                {
                    "architecture": name,
                    "root": str(root / name),
                    "output": str(ours / f"{name}-{kind}"),
                    "origins": origins if kind == "slices" else None,
                }
                for name, kind, _ in recipes(root)
            ]
        )
    )


def read_reply(root: Path, file: Path) -> list[Opened]:
    """What it found."""
    found = json.loads(file.read_text())
    return [Opened(name, kind, each) for (name, kind, _), each in zip(recipes(root), found, strict=True)]


def architecture_table(opened: Sequence[Opened]) -> str:
    """One row for each architecture."""
    rows = []
    for name in ARCHITECTURES:
        own = {each.kind: each for each in opened if each.architecture == name}
        if not own:
            continue
        mean = own["mean"].found
        cells = (
            f"`{mean['class']}`",
            NOTES.get(name, ""),
            f"{mean['parameters']:,}",
            *("same" if own[kind].problem is None else "**differ**" for kind in ("mean", "slices")),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
