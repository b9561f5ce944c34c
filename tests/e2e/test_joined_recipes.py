"""Adapters, vocabularies, statistics and several documents, together: posted by hub names, merged by Ray, from S3.

Each by itself is compared elsewhere with what others make of it. Here they meet, on their whole way, and what comes out
is compared with the recipe's meaning worked out in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from service.cluster.driver import Driver
from tests.adapters import PREFIX, factors, write_adapter
from tests.checkpoints import (
    Tensors,
    fine_tune,
    llama_config,
    llama_tensors,
    read_checkpoint,
    write_checkpoint,
)
from tests.e2e.hub import merge_all, merged_in_directories, merged_on_s3
from tests.servers.service import running_service
from tests.tokenizers import bpe, files
from workers.store import StoreSettings, open_stores

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

SHAPE: dict[str, Any] = {"layers": 3, "hidden": 16, "heads": 2}
VOCAB = 24
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj")
SCALE = 2.0
"""``lora_alpha`` / r of the adapters."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ONE = bpe(["a", "b", "c", "ab"], [("a", "b")], added=["<x>"])
TWO = bpe(["c", "b", "a", "d"], added=["<y>"])

ADAPTERS = """
merge_method: task_arithmetic
base_model: acme/base
models:
  - model: acme/base+acme/lora
    parameters: {weight: 0.5}
  - model: acme/chat
    adapter: acme/other-lora
    parameters: {weight: [0, 1]}
dtype: float32
"""

STAGED = """
name: voted
merge_method: ties
base_model: acme/base
models:
  - {model: acme/chat+acme/lora, parameters: {weight: 1}}
dtype: float32
---
name: mean
merge_method: linear
models:
  - {model: acme/math, parameters: {weight: 3}}
  - {model: acme/base+acme/other-lora, parameters: {weight: 1}}
dtype: float32
---
slices:
  - sources:
      - {model: voted, layer_range: [0, 2]}
      - {model: mean, layer_range: [1, 3]}
  - sources:
      - {model: voted, layer_range: [1, 3]}
      - {model: mean, layer_range: [0, 2]}
merge_method: slerp
base_model: voted
parameters:
  t: 0.25
dtype: float32
"""

WORDS = """
name: half
merge_method: linear
models:
  - model: acme/words-one
  - model: acme/words-two
tokenizer_source: union
dtype: float32
---
merge_method: linear
models:
  - {model: half, parameters: {weight: 1}}
  - {model: acme/words-two, parameters: {weight: 3}}
base_model: half
tokenizer:
  source: base
  pad_to_multiple_of: 16
dtype: float32
"""

WEIGHED = """
name: weighed
merge_method: fisher
models:
  - {model: acme/chat, fisher: acme/chat-fisher, parameters: {weight: 0.4}}
  - {model: acme/math, fisher: acme/math-fisher}
dtype: float32
---
merge_method: passthrough
models:
  - model: weighed
    adapter: acme/lora
    parameters: {scale: 2}
dtype: float32
"""

ADAPTER = """
merge_method: task_arithmetic
base_model: acme/base
models:
  - model: acme/base+acme/lora
    parameters: {weight: 0.5}
  - model: acme/base+acme/other-lora
    parameters: {weight: -2}
output_kind: adapter
"""

Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with fine-tunes, adapters and Fishers, and two models of different words."""
    root = tmp_path_factory.mktemp("hub")
    hub = root / "acme"
    base, config = llama_tensors(0, vocab=VOCAB, **SHAPE), llama_config(vocab=VOCAB, **SHAPE)
    for number, name in enumerate(("base", "chat", "math")):
        write_checkpoint(hub / name, fine_tune(base, number, 0.01) if number else base, config, 20_000)
        squares = {
            key: each.abs() * 10 + 0.1
            for key, each in llama_tensors(9 + number, vocab=VOCAB, **SHAPE).items()
        }
        write_checkpoint(hub / f"{name}-fisher", squares)
    for number, name in enumerate(("lora", "other-lora")):
        write_adapter(hub / name, factors(number, base, dict.fromkeys(ADAPTED[number:], 4)))
    for number, (name, words) in enumerate((("words-one", ONE), ("words-two", TWO))):
        count = words.get_vocab_size(with_added_tokens=True)
        own = llama_tensors(20 + number, vocab=count, **SHAPE)
        write_checkpoint(hub / name, own, llama_config(vocab=count, **SHAPE), extra_files=files(words))
    return root


def test_on_directories(driver: Driver, valkey_url: str, models: Path, tmp_path: Path) -> None:
    outs = merged_in_directories(driver, valkey_url, models, POSTED, tmp_path)
    for name, out in outs.items():
        RECIPES[name][1](Hub(models / "acme"), out)
        assert not list(out.rglob("stage-*"))


def test_a_model_and_an_adapter_take_each_others_place(
    driver: Driver, valkey_url: str, models: Path, tmp_path: Path
) -> None:
    """What is left of the other would be loaded with it: transformers looks for an adapter beside a model."""
    out = tmp_path / "out"
    ours = {
        "adapter": {"adapter_config.json", "adapter_model.safetensors"},
        "adapters": {"model-00001-of-00001.safetensors"},
    }
    with running_service(valkey_url, driver, model_roots={"": models.as_uri()}) as service:
        for name in ("adapter", "adapters", "adapter"):
            merge_all(service, POSTED, {name: str(out)}, overwrite=True)
            RECIPES[name][1](Hub(models / "acme"), out)
            assert {path.name for path in out.iterdir()} & set().union(*ours.values()) == ours[name]


@pytest.mark.rgw
def test_on_s3(
    driver: Driver,
    valkey_url: str,
    models: Path,
    tmp_path: Path,
    rgw_settings: StoreSettings,
    rgw_bucket: str,
) -> None:
    outs = merged_on_s3(driver, valkey_url, models, POSTED, tmp_path, rgw_settings, rgw_bucket)
    for name, out in outs.items():
        RECIPES[name][1](Hub(models / "acme"), out)
    left = open_stores(rgw_settings).list(f"{rgw_bucket}/out/")
    assert not any("/stage-" in info.uri for info in left)


class Hub:
    """The models of the recipes in float64."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)

    def _model(self, name: str) -> Arrays:
        """A model, or ``model+adapter``."""
        name, _, adapter = name.partition("+")
        found = _float64(read_checkpoint(self.root / name))
        return self.adapted(found, adapter) if adapter else found

    def adapted(self, tensors: Arrays, adapter: str) -> Arrays:
        """Tensors with an adapter on top; the service rounds them to what the model is stored in."""
        return tensors | {
            f"{key}.weight": tensors[f"{key}.weight"] + each for key, each in self.deltas(adapter).items()
        }

    def deltas(self, adapter: str) -> Arrays:
        """What an adapter adds, by module."""
        return _deltas(self.root / adapter, SCALE)


def _float64(tensors: Tensors) -> Arrays:
    return {key: each.double().numpy() for key, each in tensors.items()}


def _deltas(adapter: Path, scale: float) -> Arrays:
    held = _float64(load_file(adapter / "adapter_model.safetensors"))
    modules = [key.removesuffix(".lora_A.weight") for key in held if key.endswith(".lora_A.weight")]
    return {
        key.removeprefix(PREFIX): scale * held[f"{key}.lora_B.weight"] @ held[f"{key}.lora_A.weight"]
        for key in modules
    }


def _close(merged: Tensors, wanted: Arrays) -> None:
    """Within a few float32 steps of the largest value: each operand was rounded once, and the sums once more."""
    assert sorted(merged) == sorted(wanted)
    for key, values in wanted.items():
        assert merged[key].dtype == torch.float32
        assert merged[key].shape == values.shape, key
        bound = 4e-7 * max(1.0, float(np.abs(values).max(initial=0)))
        assert np.abs(merged[key].double().numpy() - values).max(initial=0) <= bound, key


def _adapters(hub: Hub, out: Path) -> None:
    base, one, two = (hub.model(name) for name in ("base", "base+lora", "chat+other-lora"))

    def gradient(key: str) -> float:
        return int(key.split(".")[2]) / 2 if ".layers." in key else 0.0

    _close(
        read_checkpoint(out),
        {key: b + 0.5 * (one[key] - b) + gradient(key) * (two[key] - b) for key, b in base.items()},
    )


def _staged(hub: Hub, out: Path) -> None:
    voted = hub.model("chat+lora")  # TIES of one model, all of it kept, is that model
    one, two = hub.model("math"), hub.model("base+other-lora")
    mean = {key: (3 * one[key] + two[key]) / 4 for key in one}
    wanted = {key: _slerp(voted[key], mean[key], 0.25) for key in voted if ".layers." not in key}
    for layer, (left, right) in enumerate([(0, 1), (1, 2), (1, 0), (2, 1)]):
        for key in voted:
            if f".layers.{left}." in key:
                other = mean[key.replace(f".layers.{left}.", f".layers.{right}.")]
                wanted[key.replace(f".layers.{left}.", f".layers.{layer}.")] = _slerp(voted[key], other, 0.25)
    _close(read_checkpoint(out), wanted)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4


def _slerp(a: Any, b: Any, t: float) -> Any:
    cosine = float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def _words(hub: Hub, out: Path) -> None:
    one, two = hub.model("words-one"), hub.model("words-two")
    own = ((one, ONE.get_vocab()), (two, TWO.get_vocab()))
    held = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    assert set(held) == {*ONE.get_vocab(), *TWO.get_vocab()}
    wanted = {
        key: ((one[key] + two[key]) / 2 + 3 * two[key]) / 4 for key in one if key not in (EMBEDDING, HEAD)
    }
    for name in (EMBEDDING, HEAD):
        wanted[name] = np.zeros((16, SHAPE["hidden"]))
        for token, number in held.items():
            rows = [model[name][vocabulary[token]] for model, vocabulary in own if token in vocabulary]
            half = np.mean(rows, axis=0)  # the base's, which stands for what the second model lacks, too
            wanted[name][number] = (half + 3 * (rows[-1] if token in TWO.get_vocab() else half)) / 4
    _close(read_checkpoint(out), wanted)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 16


def _weighed(hub: Hub, out: Path) -> None:
    pairs = [
        (weight, hub.model(f"{name}-fisher"), hub.model(name))
        for name, weight in (("chat", 0.4), ("math", 1.0))
    ]
    mean = {
        key: sum(w * f[key] * m[key] for w, f, m in pairs) / sum(w * f[key] for w, f, _ in pairs)
        for key in hub.model("base")
    }
    _close(read_checkpoint(out), {key: 2 * each for key, each in hub.adapted(mean, "lora").items()})


def _adapter(hub: Hub, out: Path) -> None:
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    ranks = {key: config["rank_pattern"].get(key, config["r"]) for key in ADAPTED}
    one, two = hub.deltas("lora"), hub.deltas("other-lora")
    made = _deltas(out, 1.0)
    assert set(made) == set(ADAPTED)
    for key, delta in made.items():
        scale = config["alpha_pattern"].get(key, config["lora_alpha"]) / ranks[key]
        assert np.abs(scale * delta - (0.5 * one[key] - 2 * two.get(key, 0))).max() < 1e-6


RECIPES: dict[str, tuple[str, Callable[[Hub, Path], None]]] = {
    "adapters": (ADAPTERS, _adapters),
    "staged": (STAGED, _staged),
    "words": (WORDS, _words),
    "weighed": (WEIGHED, _weighed),
    "adapter": (ADAPTER, _adapter),
}
"""Each recipe, and what looks at what it gives."""
POSTED = {name: text for name, (text, _) in RECIPES.items()}
