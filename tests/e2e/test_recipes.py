"""Recipes as people have them for mergekit: posted as they are, by hub names, and the numbers that they are to give.

The service finds the models by ``model_roots``, in directories and in S3, so that not a character of a recipe changes.
What comes out is compared with the recipe's meaning worked out in float64, layer by layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.cluster.driver import Driver
from tests.checkpoints import (
    Tensors,
    fine_tune,
    llama_config,
    llama_tensors,
    read_checkpoint,
    write_checkpoint,
)
from tests.e2e.hub import merged_in_directories, merged_on_s3
from workers.store import StoreSettings

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

DEPTH = 8
STEPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-20}
"""Half the distance of two neighbours, relative; of float32 some more, for the sums."""

SOUP = """
# A soup of three fine-tunes
models:
  - model: acme/chat-v2
    parameters:
      weight: 1.0
  - model: acme/math
    parameters:
      weight: 0.4
  - model: acme/code@v0.1
    parameters:
      weight: 0.25
merge_method: linear
dtype: float16
"""

GRADIENT_SLERP = """
slices:
  - sources:
      - model: acme/chat-v2
        layer_range: [0, 8]
      - model: acme/math
        layer_range: [0, 8]
# or, the equivalent models: syntax:
# models:
#   - model: acme/chat-v2
#   - model: acme/math
merge_method: slerp
base_model: acme/chat-v2
parameters:
  t:
    - filter: self_attn
      value: [0, 0.4, 0.2, 0.8, 1]
    - filter: mlp
      value: [1, 0.6, 0.8, 0.2, 0]
    - value: 0.5 # fallback for the rest of the tensors
dtype: bfloat16
"""

TIES = """
models:
  - model: acme/base
    # no parameters: it is the base
  - model: acme/chat-v2
    parameters:
      density: [1, 0.6, 0.2] # density gradient
      weight: 1.0
  - model: acme/math
    parameters:
      density: 0.5
      weight: [0, 0.25, 0.75, 1] # weight gradient
  - model: acme/code@v0.1
    parameters:
      density: 0.3
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: acme/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

STACKED = """
slices:
  - sources:
    - model: acme/chat-v2
      layer_range: [0, 6]
  - sources:
    - model: acme/math
      layer_range: [2, 8]
merge_method: passthrough
dtype: bfloat16
"""

MODULES = """
merge_method: task_arithmetic
base_model: acme/vl-base
modules:
  text_decoder:
    slices:
      - sources:
          - {model: acme/vl-base, layer_range: [0, 2]}
          - {model: acme/vl-chat, layer_range: [0, 2], parameters: {weight: 0.5}}
      - sources:
          - {model: acme/vl-base, layer_range: [1, 3]}
          - {model: acme/vl-chat, layer_range: [1, 3], parameters: {weight: [1, 0]}}
  vision_tower:
    models:
      - model: acme/vl-chat
        parameters: {weight: 2}
dtype: float32
"""

STAGES = """
# As for mergekit-multi: the second uses the first by its name
name: first-merge
merge_method: linear
models:
  - model: acme/chat-v2
    parameters:
      weight: 0.6
  - model: acme/math
    parameters:
      weight: 0.4
dtype: float32
---
name: final-merge
merge_method: slerp
base_model: first-merge
models:
  - model: first-merge
  - model: acme/code@v0.1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its fine-tunes by their hub names, and two of a vision tower and a language model."""
    root = tmp_path_factory.mktemp("hub")
    shape: dict[str, Any] = {"layers": DEPTH, "hidden": 32, "heads": 2, "vocab": 96}
    base, config = llama_tensors(0, **shape), llama_config(**shape)
    tuned = {name: fine_tune(base, n, 0.01) for n, name in enumerate(("chat-v2", "math", "code@v0.1"), 1)}
    for name, tensors in {"base": base, **tuned}.items():
        shard_bytes = 60_000 if name == "math" else None
        write_checkpoint(root / "acme" / name, tensors, config, shard_bytes, {"tokenizer.json": '{"a": 1}'})
    seeing = _seeing(llama_tensors(3, **shape | {"layers": 3}), llama_tensors(4, **shape | {"layers": 2}))
    own = {
        "model_type": "llava",
        "text_config": {"num_hidden_layers": 3},
        "vision_config": {"num_hidden_layers": 2},
    }
    write_checkpoint(root / "acme" / "vl-base", seeing, own)
    write_checkpoint(root / "acme" / "vl-chat", fine_tune(seeing, 5, 0.01), own)
    return root


def _seeing(text: Tensors, vision: Tensors) -> Tensors:
    """A language model, and another one's layers as a vision tower."""
    tower = {name.replace("model.", "encoder."): each for name, each in vision.items() if ".layers." in name}
    return {f"language_model.{name}": each for name, each in text.items()} | {
        f"vision_tower.{name}": each for name, each in tower.items()
    }


def test_recipes_run_unchanged_on_directories(
    driver: Driver, valkey_url: str, models: Path, tmp_path: Path
) -> None:
    outs = merged_in_directories(driver, valkey_url, models, POSTED, tmp_path)
    for name, out in outs.items():
        _check(name, models, read_checkpoint(out), json.loads((out / "config.json").read_text()))
        assert (out / "tokenizer.json").exists() == (name != "modules")


@pytest.mark.rgw
def test_recipes_run_unchanged_on_s3(
    driver: Driver,
    valkey_url: str,
    models: Path,
    tmp_path: Path,
    rgw_settings: StoreSettings,
    rgw_bucket: str,
) -> None:
    outs = merged_on_s3(driver, valkey_url, models, POSTED, tmp_path, rgw_settings, rgw_bucket)
    for name, out in outs.items():
        _check(name, models, read_checkpoint(out), json.loads((out / "config.json").read_text()))


def _check(name: str, models: Path, merged: State, config: dict[str, Any]) -> None:
    """Every tensor is what the recipe means, in its dtype, and the config says as many layers."""
    text, expected, depth = RECIPES[name]
    dtype = text.rpartition("dtype: ")[2].split()[0]
    wanted = expected(
        lambda model: {
            key: each.double().numpy() for key, each in read_checkpoint(models / "acme" / model).items()
        }
    )
    assert sorted(merged) == sorted(wanted)
    for key, values in wanted.items():
        assert str(merged[key].dtype) == f"torch.{dtype}", key
        assert merged[key].shape == values.shape, key
        bound = np.maximum(np.abs(values) * STEPS[dtype] * 1.02, 2.0**-25)
        assert (np.abs(merged[key].double().numpy() - values) <= bound).all(), (name, key)
    assert config.get("text_config", config)["num_hidden_layers"] == depth
    assert config.get("vision_config", {"num_hidden_layers": 2})["num_hidden_layers"] == 2


Arrays = dict[str, Any]
Models = Callable[[str], Arrays]


def _layer(name: str) -> int | None:
    """The number of the layer that a tensor lies in."""
    return int(name.partition(".layers.")[2].partition(".")[0]) if ".layers." in name else None


def _gradient(values: list[float], name: str, depth: int = DEPTH) -> float:
    """A gradient at a tensor; its first value outside of the layers."""
    at = (_layer(name) or 0) / (depth - 1)
    return float(np.interp(at * (len(values) - 1), range(len(values)), values))


def _soup(models: Models) -> Arrays:
    weights = {"chat-v2": 1.0, "math": 0.4, "code@v0.1": 0.25}
    read = {model: models(model) for model in weights}
    total = sum(weights.values())
    return {key: sum(w * read[model][key] for model, w in weights.items()) / total for key in read["math"]}


def _gradient_slerp(models: Models) -> Arrays:
    attention, mlp = [0, 0.4, 0.2, 0.8, 1], [1, 0.6, 0.8, 0.2, 0]
    return _slerp(models("chat-v2"), models("math"), attention, mlp)


def _stages(models: Models) -> Arrays:
    first, other = models("chat-v2"), models("math")
    mean = {name: 0.6 * first[name] + 0.4 * other[name] for name in first}
    return _slerp(mean, models("code@v0.1"), [0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0])


def _slerp(one: Arrays, two: Arrays, attention: list[float], mlp: list[float]) -> Arrays:
    def merged(name: str) -> Any:
        t = 0.5
        if "self_attn" in name:
            t = _gradient(attention, name)
        elif "mlp" in name:
            t = _gradient(mlp, name)
        a, b = one[name].ravel(), two[name].ravel()
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        if abs(cosine) > 0.9995:  # as good as parallel: in a straight line
            found = (1 - t) * a + t * b
        else:
            angle = math.acos(cosine)
            found = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        return found.reshape(one[name].shape)

    return {name: merged(name) for name in one}


def _ties(models: Models) -> Arrays:
    base, tuned = models("base"), [models(model) for model in ("chat-v2", "math", "code@v0.1")]

    def merged(name: str) -> Any:
        densities = (_gradient([1, 0.6, 0.2], name), 0.5, 0.3)
        weights = (1.0, _gradient([0, 0.25, 0.75, 1], name), 0.5 if "mlp" in name else 0.0)
        origin = base[name].astype(np.float32)
        kept = []
        for model, density, weight in zip(tuned, densities, weights, strict=True):
            tau = (model[name].astype(np.float32) - origin).astype(np.float64)
            count = max(1, math.floor(Fraction(str(density)) * tau.size))
            threshold = np.sort(np.abs(tau), axis=None)[-count]
            kept.append(np.where(np.abs(tau) >= threshold, tau, 0.0) * weight)
        elected = np.where(sum(kept) < 0, -1.0, 1.0)
        agree = [np.sign(each) == elected for each in kept]
        divisor = sum(np.where(yes, weight, 0.0) for yes, weight in zip(agree, weights, strict=True))
        summed = sum(np.where(yes, each, 0.0) for yes, each in zip(agree, kept, strict=True))
        return base[name] + summed / np.where(divisor == 0, 1.0, divisor)

    return {name: merged(name) for name in base}


def _stacked(models: Models) -> Arrays:
    first, last = models("chat-v2"), models("math")
    merged = {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    merged |= {name: last[name] for name in ("model.norm.weight", "lm_head.weight")}
    for layer in range(12):
        source, origin = (first, layer) if layer < 6 else (last, layer - 4)
        for name in source:
            if _layer(name) == origin:
                merged[name.replace(f".{origin}.", f".{layer}.")] = source[name]
    return merged


def _modules(models: Models) -> Arrays:
    base, tuned = models("vl-base"), models("vl-chat")

    def merged(name: str, weight: float) -> Any:
        return base[name] + weight * (tuned[name] - base[name])

    found = {name: merged(name, 2.0) for name in base if name.startswith("vision_tower.")}
    found |= {f"language_model.{name}.weight": merged(f"language_model.{name}.weight", weight)
              for name, weight in (("model.embed_tokens", 0.5), ("model.norm", 1.0), ("lm_head", 1.0))}  # fmt: skip
    for layer, (origin, weight) in enumerate(((0, 0.5), (1, 0.5), (1, 1.0), (2, 0.0))):
        for name in base:
            if name.startswith(f"language_model.model.layers.{origin}."):
                found[name.replace(f"layers.{origin}.", f"layers.{layer}.")] = merged(name, weight)
    return found


RECIPES: dict[str, tuple[str, Callable[[Models], Arrays], int]] = {
    "soup": (SOUP, _soup, DEPTH),
    "gradient-slerp": (GRADIENT_SLERP, _gradient_slerp, DEPTH),
    "ties": (TIES, _ties, DEPTH),
    "stacked": (STACKED, _stacked, 12),
    "modules": (MODULES, _modules, 4),
    "stages": (STAGES, _stages, DEPTH),
}
"""Each recipe, what it has to give, and how many layers."""
POSTED = {name: text for name, (text, *_) in RECIPES.items()}
