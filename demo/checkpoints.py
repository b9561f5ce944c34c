"""Hugging Face style checkpoints on disk: one shard a layer, an index, a ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def write_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write ``tensors`` into a new ``directory``, each layer (the name before the dot) into its own shard."""
    directory.mkdir(parents=True)
    layers = list(dict.fromkeys(name.split(".")[0] for name in tensors))
    shards = {layer: f"model-{i:05}-of-{len(layers):05}.safetensors" for i, layer in enumerate(layers, 1)}
    weight_map = {name: shards[name.split(".")[0]] for name in tensors}
    for shard in shards.values():
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(held, directory / shard, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a sharded checkpoint, by name."""
    weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    shards = {shard: load_file(directory / shard) for shard in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items()}
