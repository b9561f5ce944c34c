"""Recipes as mergekit's documentation has them, unchanged, on small checkpoints; each output worked out anew here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.plan import PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_yaml
from service.running.sidecars import config_json
from tests.checkpoints import Tensors, fine_tune, llama_config, llama_tensors, write_checkpoint
from tests.workers.execute import run
from tests.workers.merges import opened
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast

SHAPE: dict[str, Any] = {"layers": 5, "hidden": 16, "heads": 2, "vocab": 32, "key_value_heads": 1}
BASE = llama_tensors(1, **SHAPE)
MODELS: dict[str, Tensors] = {
    "base": BASE,
    **{name: fine_tune(BASE, n, 4e-3) for n, name in enumerate("ABC", 2)},
}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, as a Llama's and as a Mistral's directory."""
    at = tmp_path_factory.mktemp(request.param)
    config = llama_config(**SHAPE) | {"model_type": request.param}
    for name, tensors in MODELS.items():
        write_checkpoint(at / name, tensors, config)
    return at


def merged(root: Path, text: str, output: Path) -> tuple[Tensors, dict[str, object]]:
    """The recipe's outcome: its tensors and its config."""
    options = PlanOptions(worker_memory_bytes=1 << 40)
    planned = plan_recipe(parse_yaml(text), options, LocalStore(), {"org/": root.as_uri()}, baseline_bytes=0)
    done = run(planned, output)
    return opened(done), json.loads(config_json(planned) or "")


def close(found: Tensors, name: str, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Whether a merged tensor is what float64 makes of its inputs."""
    assert found[name].double().sub(expected).abs().max() <= tolerance, name


def test_linear(root: Path, tmp_path: Path) -> None:
    text = """
    models:
      - model: org/A
        parameters:
          weight: 1.0
      - model: org/B
        parameters:
          weight: 0.3
      - model: org/C
        parameters:
          weight: 0.5
    merge_method: linear
    dtype: float16
    """
    found, config = merged(root, text, tmp_path)
    assert config["torch_dtype"] == "float16"
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        parts = zip("ABC", (1.0, 0.3, 0.5), strict=True)
        expected = sum(weight * MODELS[model][name].double() for model, weight in parts) / 1.8
        close(found, name, torch.as_tensor(expected), 1e-3)


def test_slerp_with_gradients(root: Path, tmp_path: Path) -> None:
    text = """
    slices:
      - sources:
          - model: org/A
            layer_range: [0, 5]
          - model: org/B
            layer_range: [0, 5]
    merge_method: slerp
    base_model: org/A
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5 # fallback for rest of tensors
    dtype: float32
    """
    found, config = merged(root, text, tmp_path)
    assert config["num_hidden_layers"] == 5
    for name in BASE:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        kinds = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0]}
        t = next((values[layer] for kind, values in kinds.items() if kind in name), 0.5)
        close(found, name, slerp(t, MODELS["A"][name].double(), MODELS["B"][name].double()))


def slerp(t: float, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Spherical, or linear where the two are nearly parallel."""
    cosine = float((one * two).sum() / one.norm() / two.norm())
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)


def test_ties_with_gradients_and_filters(root: Path, tmp_path: Path) -> None:
    text = """
    models:
      - model: org/A
        parameters:
          density: [1, 0.7, 0.1] # density gradient
          weight: 1.0
      - model: org/B
        parameters:
          density: 0.5
          weight: [0, 0.3, 0.7, 1] # weight gradient
      - model: org/C
        parameters:
          density: 0.33
          weight:
            - filter: mlp
              value: 0.5
            - value: 0
    merge_method: ties
    base_model: org/base
    parameters:
      normalize: true
      int8_mask: true
    dtype: float32
    """
    found, _ = merged(root, text, tmp_path)
    for name, base in BASE.items():
        at = int(name.split(".")[2]) / 4 if ".layers." in name else 0.0
        densities = (1 - 0.6 * at if at < 0.5 else 1.3 - 1.2 * at, 0.5, 0.33)
        weights = (1.0, [0, 0.225, 0.5, 0.775, 1][int(4 * at)], 0.5 if "mlp" in name else 0.0)
        close(found, name, ties(base, [MODELS[model][name] for model in "ABC"], densities, weights))


def ties(
    base: torch.Tensor, models: list[torch.Tensor], densities: tuple[float, ...], weights: tuple[float, ...]
) -> torch.Tensor:
    """TIES in float64, of models without equal magnitudes."""
    total = torch.zeros_like(base, dtype=torch.float64)
    taus = []
    for model, density, weight in zip(models, densities, weights, strict=True):
        tau = (model - base).double()
        kept = max(1, int(density * tau.numel() + 1e-9))
        threshold = tau.abs().flatten().sort(descending=True).values[kept - 1]
        taus.append(torch.where(tau.abs() >= threshold, tau, 0))
        total += weight * taus[-1]
    sign = torch.where(total >= 0, 1.0, -1.0)
    above, below = torch.zeros_like(total), torch.zeros_like(total)
    for tau, weight in zip(taus, weights, strict=True):
        agrees = (torch.sign(weight * tau) == sign) & (weight * tau != 0)
        above += torch.where(agrees, weight * tau, 0)
        below += torch.where(agrees, abs(weight), 0.0)
    return base.double() + above / torch.where(below == 0, 1, below)


def test_passthrough_of_slices(root: Path, tmp_path: Path) -> None:
    text = """
    slices:
      - sources:
        - model: org/A
          layer_range: [0, 4]
      - sources:
        - model: org/B
          layer_range: [2, 5]
          parameters:
            scale:
              - filter: down_proj
                value: 0.5
              - value: 1.0
    merge_method: passthrough
    dtype: float32
    """
    found, config = merged(root, text, tmp_path)
    assert config["num_hidden_layers"] == 7
    origins = [("A", 0), ("A", 1), ("A", 2), ("A", 3), ("B", 2), ("B", 3), ("B", 4)]
    for name, tensor in found.items():
        parts = name.split(".")
        model, source = ("A" if "embed" in name else "B"), name
        if ".layers." in name:
            model, layer = origins[int(parts[2])]
            source = ".".join([*parts[:2], str(layer), *parts[3:]])
        scale = 0.5 if model == "B" and "down_proj" in name else 1
        assert torch.equal(tensor, MODELS[model][source] * scale), name
    assert len(found) == 7 * 9 + 3
