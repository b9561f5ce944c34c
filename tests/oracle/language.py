"""Random recipes in all of the language: slices, modules, gradients, filters, and parameters at every level.

Each is a function of its number. mergekit reads all of them; what it needs said, every recipe says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.recipe_names import with_names
from tests.checkpoints import Tensors, fine_tune, llama_config, llama_tensors, write_checkpoint

DEPTH = 6
LLAMA: dict[str, Any] = {
    "layers": DEPTH,
    "hidden": 32,
    "heads": 2,
    "vocab": 64,
    "key_value_heads": 1,
    "intermediate": 48,
}
GROUPS = {
    "llama": torch.float32,
    "llama-bfloat16": torch.bfloat16,
    "mistral": torch.float32,
    "gpt2": torch.float32,
}
"""Kinds of inputs, and their dtype."""

FILTERS = {
    "llama": (
        "self_attn",
        "mlp",
        "q_proj",
        "layernorm",
        "embed",
        "lm_head",
        "layers.1",
        "layers.4.mlp",
        "norm",
    ),
    "gpt2": ("attn", "mlp", "c_attn", "ln_", "wte", "bias", "h.1", "h.4.mlp", "ln_f"),
}
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "passthrough")
FEATURES = (
    "models", "slices", "modules", "gradient", "filter", "filter without default", "at the source", "at the slice",
    "at the module", "at the top", "base_model of a slice", "different layers", "repeated layers", "out_dtype",
)  # fmt: skip
"""What the report counts."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """One random recipe."""

    name: str
    """What it is called on disk."""
    recipe: dict[str, Any]
    """The recipe; models are called ``group/model``."""
    group: str
    """Its inputs."""
    features: frozenset[str]
    """Which of :data:`FEATURES` it has."""

    @property
    def method(self) -> str:
        """Its merge method."""
        return str(self.recipe["merge_method"])

    def placed(self, root: Path, **more: Any) -> dict[str, Any]:
        """The recipe with its models below ``root``."""
        return with_names(self.recipe, lambda _, name: str(root / name)) | more


def write_language_inputs(root: Path) -> None:
    """Write a base, three fine-tunes and an unrelated model of every group."""
    for number, (group, dtype) in enumerate(GROUPS.items()):
        make, config = gpt2_tensors, GPT2_CONFIG
        if group != "gpt2":
            make = partial(llama_tensors, dtype=dtype, **LLAMA)
            config = llama_config(dtype=dtype, **LLAMA)
        if group == "mistral":
            config |= {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": None,
            }
        base = make(100 + number)
        models = {"base": base, "far": make(200 + number)}
        models |= {name: fine_tune(base, 10 * number + i, (i + 1) * 2e-3) for i, name in enumerate("abc")}
        for place, (name, tensors) in enumerate(models.items()):
            write_checkpoint(root / group / name, tensors, config, (None, 30_000)[place % 2])


GPT2_CONFIG: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": DEPTH, "n_embd": 32, "n_head": 2,
    "n_positions": 48, "vocab_size": 64, "torch_dtype": "float32",
}  # fmt: skip


def gpt2_tensors(seed: int) -> Tensors:
    """A GPT-2, whose layers are called otherwise than a Llama's."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    tensors = {"transformer.wte.weight": weight(64, 32), "transformer.wpe.weight": weight(48, 32)}
    for layer in range(DEPTH):
        for name, shape in {
            "ln_1": (32,), "attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "ln_2": (32,), "mlp.c_fc": (32, 128),
            "mlp.c_proj": (128, 32),
        }.items():  # fmt: skip
            tensors[f"transformer.h.{layer}.{name}.weight"] = weight(*shape)
            tensors[f"transformer.h.{layer}.{name}.bias"] = weight(shape[-1])
    return tensors | {"transformer.ln_f.weight": weight(32), "transformer.ln_f.bias": weight(32)}


def spoken(number: int) -> Spoken:
    """The random recipe of this number."""
    return _Speaker(number).recipe()


@dataclass
class _Speaker:
    """Says one random recipe."""

    number: int
    features: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.dice = random.Random(f"recipe {self.number}")
        self.method = METHODS[self.number % len(METHODS)]
        self.group = self.dice.choice(list(GROUPS))

    def recipe(self) -> Spoken:
        shape = self.dice.choices(("models", "slices", "modules"), (4, 5, 4))[0]
        if self.method == "passthrough" and shape == "models":
            shape = "slices"
        self.features.add(shape)
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": "float32"}
        if self.method in ("task_arithmetic", "ties"):
            recipe["base_model"] = self._named("base")
        if self.method == "slerp":
            recipe["base_model"] = self._named(self.dice.choice(["a", "far"]))
        if self.dice.random() < 0.25:
            recipe["out_dtype"] = "bfloat16"
            self.features.add("out_dtype")
        inner = shape
        body: dict[str, Any] = recipe
        if shape == "modules":
            body = {}
            inner = self.dice.choice(["models", "slices"]) if self.method != "passthrough" else "slices"
            self.features.add(inner)
            recipe["modules"] = {"default": body}
        if inner == "models":
            body["models"] = [self._entry(name) for name in self._names()]
        else:
            body["slices"] = self._slices()
        if shape == "modules":
            self._level(body, "at the module", 0.6)
        self._level(recipe, "at the top", 1)
        return Spoken(f"language-{self.number:03}", recipe, self.group, frozenset(self.features))

    def _named(self, name: str) -> str:
        return f"{self.group}/{name}"

    def _names(self) -> list[str]:
        match self.method:
            case "passthrough":
                return [self.dice.choice("abc")]
            case "slerp":
                return self.dice.sample(["a", "far"], 2)
            case "linear":
                return self.dice.sample("abc", self.dice.randint(1, 3))
            case _:
                return self.dice.sample(["base", "a", "b", "c"], self.dice.randint(2, 4))

    def _entry(self, name: str, *, slices: bool = False) -> dict[str, Any]:
        entry: dict[str, Any] = {"model": self._named(name)}
        if self.method != "slerp" and name != "base":
            self._own(entry, "at the source", 0.6 if slices else 0.8, self._of_models())
        return entry

    def _slices(self) -> list[dict[str, Any]]:
        slices: list[dict[str, Any]] = []
        used: list[int] = []
        for _ in range(self.dice.randint(1, 4)):
            count = self.dice.randint(1, 4)
            names = self._names()
            if self.method in ("task_arithmetic", "ties"):  # of the last slice mergekit needs the base early
                names = [name for name in names if name != "base"]
                names.insert(self.dice.randint(0, 1), "base")
            together = self.dice.random() < 0.7
            start = self.dice.randint(0, DEPTH - count)
            sources = []
            for name in names:
                at = start if together else self.dice.randint(0, DEPTH - count)
                self.features |= {"different layers"} if at != start else set()
                sources.append(self._entry(name, slices=True) | {"layer_range": [at, at + count]})
            used += range(start, start + count)
            entry: dict[str, Any] = {"sources": sources}
            if self.method == "slerp" and self.dice.random() < 0.6:
                entry["base_model"] = self.dice.choice(sources[:2])["model"]
                self.features.add("base_model of a slice")
            if self.method in ("task_arithmetic", "ties") and self.dice.random() < 0.6:
                entry["base_model"] = self.dice.choice(sources[:2])["model"]
                self.features.add("base_model of a slice")
            self._level(entry, "at the slice", 0.4)
            slices.append(entry)
        if len(set(used)) < len(used):
            self.features.add("repeated layers")
        return slices

    def _of_models(self) -> dict[str, Callable[[], float]]:
        """What models have of their own, each with a value at random."""
        positive = lambda: round(self.dice.uniform(0.1, 1.4), 2)  # noqa: E731
        match self.method:
            case "linear":
                return {"weight": positive}
            case "task_arithmetic":
                return {"weight": lambda: round(self.dice.uniform(-0.8, 1.4), 2)}
            case "ties":
                return {"weight": positive, "density": lambda: round(self.dice.uniform(0.05, 1), 2)}
            case "passthrough":
                return {"scale": positive}
            case _:
                return {}

    def _of_merge(self) -> dict[str, Callable[[], Any]]:
        """What is set for all models together."""
        match self.method:
            case "slerp":
                return {"t": lambda: round(self.dice.random(), 2)}
            case "linear":
                return {"normalize": lambda: self.dice.random() < 0.5}
            case "passthrough":
                return {}
            case _:
                return {
                    "lambda": lambda: round(self.dice.uniform(0.3, 1.2), 2),
                    "normalize": lambda: self.dice.random() < 0.5,
                }

    def _level(self, body: dict[str, Any], where: str, chance: float) -> None:
        """Parameters for all models of a place; at the top, one for all that has to be said."""
        if where != "at the top":
            self._own(body, where, chance, self._of_models() | self._of_merge())
            return
        needed: dict[str, Callable[[], Any]] = {**self._of_models(), **self._of_merge()}
        said = {name: self._setting(make, default=True) for name, make in needed.items()}
        body["parameters"] = said
        if said:
            self.features.add(where)

    def _own(
        self, body: dict[str, Any], where: str, chance: float, makers: dict[str, Callable[[], Any]]
    ) -> None:
        said = {
            name: self._setting(make, default=self.dice.random() < 0.5)
            for name, make in makers.items()
            if self.dice.random() < chance
        }
        if said:
            body["parameters"] = said
            self.features.add(where)

    def _setting(self, make: Callable[[], Any], *, default: bool) -> Any:
        kind = self.dice.choices(("value", "gradient", "filters"), (3, 4, 4))[0]
        if kind == "value":
            return make()
        if kind == "gradient":
            return self._gradient(make)
        self.features.add("filter")
        filters = FILTERS["gpt2" if self.group == "gpt2" else "llama"]
        conditions: list[dict[str, Any]] = [
            {"filter": each, "value": make() if self.dice.random() < 0.6 else self._gradient(make)}
            for each in self.dice.sample(filters, self.dice.randint(1, 3))
        ]
        if default:
            conditions.append(
                {"value": make()} if self.dice.random() < 0.8 else {"filter": "*", "value": make()}
            )
            return conditions
        self.features.add("filter without default")
        return conditions[0] if len(conditions) == 1 and self.dice.random() < 0.5 else conditions

    def _gradient(self, make: Callable[[], Any]) -> list[Any]:
        self.features.add("gradient")
        return [make() for _ in range(self.dice.randint(2, 5))]
