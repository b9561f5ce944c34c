"""LoRA adapters: PEFT makes them and merges them, mergekit merges recipes with them, and ours are compared."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import read_checkpoint
from tests.oracle.ours import merge_in_process

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ["up_proj", "down_proj"], "use_rslora": True, "r": 8}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.\d+\.mlp.*": 8, "mlp.up_proj": 3},
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.(q|k)_proj": 11, "down_proj": 1},
        },
    ),
    "rslora-patterns": (
        "llama",
        {"target_modules": ["o_proj", "k_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 7}},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "whole-modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2-embeddings": ("gpt2", {"target_modules": ["c_proj", "wte"], "use_rslora": True}),
    "tied-embeddings": ("tied", {"target_modules": ["embed_tokens", "o_proj"]}),
}
"""By name: the model, and what PEFT's LoraConfig says beside :data:`LORA`."""

DTYPES = ("float32", "bfloat16")

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "attention/base+attention/adapter", "parameters": {"weight": 0.3}},
            {"model": "patterns/base+patterns/adapter", "parameters": {"weight": 0.7}},
            {"model": "attention/base", "parameters": {"weight": 0.2}},
        ],
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "all-linear/base",
        "models": [
            {"model": "all-linear/base+all-linear/adapter", "parameters": {"weight": 1, "density": 0.5}},
            {"model": "all-linear/base+patterns/adapter", "parameters": {"weight": 0.5, "density": 0.3}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "rslora/base+rslora/adapter",
        "models": [{"model": "rslora/base+rslora/adapter"}, {"model": "rslora/base+all-linear/adapter"}],
        "parameters": {"t": [0, 0.5, 1]},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "all-linear/base+attention/adapter",
        "models": [{"model": "all-linear/base+rslora/adapter", "parameters": {"weight": 0.8}}],
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "all-linear/base+all-linear/adapter", "layer_range": [0, 2]}]},
            {"sources": [{"model": "all-linear/base+attention/adapter", "layer_range": [1, 2]}]},
        ],
    },
}
"""What mergekit merges, too, in float32; models are named by their directories."""


def _random(number: int) -> dict[str, Any]:
    """A random recipe over one base with different adapters, by its number."""
    dice = random.Random(f"adapters {number}")
    ours = ("attention", "all-linear", "rslora", "patterns", "rslora-patterns", "head")
    names = [f"all-linear/base+{adapter}/adapter" for adapter in dice.sample(ours, 3)]
    weight = lambda: round(dice.uniform(-0.5, 1.2), 2)  # noqa: E731
    method = ("task_arithmetic", "ties", "linear", "slerp", "breadcrumbs")[number % 5]
    if method == "slerp":
        entries: list[dict[str, Any]] = [{"model": name} for name in names[:2]]
        return {
            "merge_method": method,
            "base_model": names[0],
            "models": entries,
            "parameters": {"t": [round(dice.random(), 2), round(dice.random(), 2)]},
        }
    own: dict[str, Any] = {"density": 1.0} if method == "breadcrumbs" else {}
    entries = [{"model": name, "parameters": {"weight": weight(), **own}} for name in names]
    if method == "ties":
        for entry in entries:
            entry["parameters"] |= {"density": round(dice.uniform(0.1, 1), 2)}
    if method == "linear":
        for entry in entries:
            entry["parameters"]["weight"] = abs(entry["parameters"]["weight"]) + 0.1
        return {"merge_method": method, "models": entries}
    base = dice.choice(["all-linear/base", "all-linear/base", f"all-linear/base+{ours[0]}/adapter"])
    return {"merge_method": method, "base_model": base, "models": entries}


RECIPES |= {f"random-{number:02}": _random(number) for number in range(20)}


OUTPUTS: dict[str, dict[str, Any]] = {
    "two adapters as one": {
        "merge_method": "task_arithmetic",
        "base_model": "all-linear/base",
        "models": [
            {"model": "all-linear/base+attention/adapter", "parameters": {"weight": 0.7}},
            {"model": "all-linear/base+patterns/adapter", "parameters": {"weight": -0.4}},
        ],
    },
    "two of GPT-2 as one": {
        "merge_method": "linear",
        "base_model": "gpt2/base",
        "models": [{"model": "gpt2/base+gpt2/adapter"}, {"model": "gpt2/base+gpt2-embeddings/adapter"}],
    },
    "taken from a fine-tune": {
        "merge_method": "task_arithmetic",
        "base_model": "all-linear/base",
        "models": [{"model": "all-linear/merged"}],
        "rank": 32,
    },
    "taken from GPT-2": {
        "merge_method": "task_arithmetic",
        "base_model": "gpt2/base",
        "models": [{"model": "gpt2/merged"}],
        "rank": 32,
    },
}
"""What we make adapters of, of ranks that leave nothing out: PEFT merges each into its base, as we do."""


@dataclass(frozen=True, slots=True)
class Merged:
    """How far one checkpoint of ours is from the other tool's."""

    name: str
    """The case, and the dtype or method."""
    tool: str
    """Whose it is compared with."""
    elements: int
    """Elements compared."""
    differing: int
    """Those whose bits differ."""
    over: int
    """Those beyond the bound."""
    worst: float
    """Largest error, in units of the bound."""


def compare_adapters(root: Path) -> tuple[list[Merged], list[str]]:
    """Have PEFT make and merge, mergekit merge, and do the same; everything that is not as it has to be."""
    root.mkdir(parents=True)
    recipes = {name: placed(recipe, root / "float32") for name, recipe in RECIPES.items()}
    _ask(root, {"lora": LORA, "cases": CASES, "dtypes": DTYPES, "recipes": recipes, "loads": []})
    jobs = {
        root / dtype / case / "ours": {
            "merge_method": "passthrough",
            "models": [
                {"model": str(root / dtype / case / "base"), "adapter": str(root / dtype / case / "adapter")}
            ],
        }
        for dtype in DTYPES
        for case in CASES
    }
    jobs |= {root / "ours" / name: recipe | {"profile": "mergekit"} for name, recipe in recipes.items()}
    outputs = {name: placed(recipe, root / "float32") for name, recipe in OUTPUTS.items()}
    jobs |= {root / "full" / name: {**recipe, "rank": None} for name, recipe in outputs.items()}
    merge_in_process(jobs)
    made = {root / "made" / name: {**recipe, "output_kind": "adapter"} for name, recipe in outputs.items()}
    merge_in_process(made)
    loads = [
        [outputs[place.name]["base_model"], str(place), str(root / "loaded" / place.name)] for place in made
    ]
    _ask(root, {"cases": {}, "dtypes": [], "recipes": {}, "loads": loads})
    found = [
        _compared(
            f"{case}, {dtype}",
            "PEFT",
            root / dtype / case / "merged",
            root / dtype / case / "ours",
            root / dtype / case / "base",
        )
        for dtype in DTYPES
        for case in CASES
    ]
    found += [_compared(name, "mergekit", root / "theirs" / name, root / "ours" / name) for name in RECIPES]
    found += [_compared(name, "PEFT", root / "loaded" / name, root / "full" / name) for name in OUTPUTS]
    return found, list(_problems(found))


def _ask(root: Path, wanted: dict[str, Any]) -> None:
    """Have the other tools do something, in their environment."""
    request = root / "request.json"
    request.write_text(json.dumps({"root": str(root), **wanted}))
    python = os.environ.get("MERGEMILL_ORACLE_PYTHON", ".venv-oracle/bin/python")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(root / "hub")}
    command = [python, str(Path(__file__).with_name("foreign_adapters.py")), str(request)]
    ran = subprocess.run(command, check=False, env=os.environ | offline, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{ran.stderr[-4000:]}")


def placed(recipe: dict[str, Any], root: Path) -> dict[str, Any]:
    """A recipe whose models are named by absolute path, written in float32."""

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {own: walk(inner, own) for own, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return (
            "+".join(str(root / part) for part in value.split("+"))
            if key in ("model", "base_model")
            else value
        )

    found: dict[str, Any] = walk(recipe) | {"dtype": "float32"}
    return found


def adapter_table(found: Sequence[Merged]) -> str:
    """The rows of the report."""
    return "\n".join(
        f"| {each.name} | {each.tool} | {each.elements:,} | {1 - each.differing / each.elements:.2%} | {each.over} "
        f"| {each.worst:.2f} |"
        for each in found
    )


ROUNDED_TWICE = "embeddings"
"""In the names of cases where PEFT rounds what it adds to the dtype before it adds it: embeddings only."""


def _problems(found: list[Merged]) -> Iterator[str]:
    for each in found:
        if each.over:
            yield f"{each.name} ({each.tool}): {each.over} of {each.elements} elements beyond the bound"
        if (
            "bfloat16" in each.name
            and ROUNDED_TWICE not in each.name
            and each.differing > each.elements // 1000
        ):
            yield f"{each.name} ({each.tool}): {each.differing} of {each.elements} elements differ"


def _compared(name: str, tool: str, theirs: Path, ours: Path, base: Path | None = None) -> Merged:
    """Every tensor of two checkpoints; of a tied model one of them may lack the head."""
    two, one = read_checkpoint(theirs), read_checkpoint(ours)
    if (one.keys() ^ two.keys()) - {"lm_head.weight"}:
        raise RuntimeError(f"{name}: not the same tensors: {sorted(one.keys() ^ two.keys())}")
    before = {} if base is None else read_checkpoint(base)
    elements = differing = over = 0
    worst = 0.0
    for key in one.keys() & two.keys():
        elements += one[key].numel()
        differing += int((one[key] != two[key]).sum())
        units = _units(one[key], two[key], before.get(key, one[key]))
        over += int((units > 1).sum())
        worst = max(worst, float(units.max()))
    return Merged(name, tool, elements, differing, over, worst)


def _units(one: torch.Tensor, two: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Errors in units of 1e-6 of the tensor's largest element, or in bfloat16 of its step at the largest of what is
    added and what comes out."""
    x, y, start = one.double(), two.double(), base.double()
    if one.dtype != torch.bfloat16:
        return (x - y).abs() / (1e-6 * x.abs().max())
    largest = torch.stack([x.abs(), y.abs(), start.abs(), (x - start).abs()]).amax(0).clamp(min=1e-30)
    return (x - y).abs() / (torch.exp2(torch.floor(torch.log2(largest))) * 2.0**-7)
