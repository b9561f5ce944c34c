"""Checkpoints that are nothing but headers: names, dtypes and shapes of any size, and no bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from service.planning.checkpoint import Checkpoint, StoredTensor
from service.planning.pairing import Inputs
from service.recipe import Recipe, parse_recipe
from workers.task import DTYPE_BYTES, TensorRef

Spec = Mapping[str, tuple[str, tuple[int, ...]]]
"""Safetensors dtype and shape of each tensor."""


def checkpoint(
    uri: str,
    tensors: Spec,
    *,
    etag: str = "e",
    config: Mapping[str, Any] | None = None,
    digests: Mapping[str, str] | None = None,
    data_start: int = 808,
) -> Checkpoint:
    """A checkpoint of one file whose data begins at ``data_start``; ``digests`` are those of buffers."""
    file = f"{uri}/model.safetensors"
    found = {}
    at = data_start
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * DTYPE_BYTES[dtype]
        found[name] = StoredTensor(name, shape, TensorRef(file, etag, at, end, dtype))
        at = end
    return Checkpoint(uri, found, config, {}, {file: etag}, digests or {})


def recipe_of(method: str, count: int, parameters: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
    """A recipe of ``count`` models ``/m0``, ``/m1`` … with the base ``/base`` where the method has one."""
    value: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"/m{index}"} for index in range(count)],
        "parameters": dict(parameters or {}),
    }
    if method not in ("linear", "slerp", "passthrough"):
        value["base_model"] = "/base"
    return parse_recipe(value | more)


def inputs_of(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Inputs:
    """The inputs of a recipe whose models are in ``checkpoints`` by their names."""
    return Inputs(checkpoints[recipe.reference], {name: checkpoints[name] for name in recipe.names})


def alike(recipe: Recipe, tensors: Spec, etags: Mapping[str, str] | None = None) -> Inputs:
    """Inputs that all have the same tensors."""
    made = {
        name: checkpoint(
            f"file://{name}",
            tensors,
            etag=(etags or {}).get(name, "e"),
            digests={key: "d" for key, (dtype, _) in tensors.items() if dtype not in ("F32", "F16", "BF16")},
        )
        for name in recipe.names
    }
    return inputs_of(recipe, made)


def llama(layers: int, hidden: int, wide: int, keys: int, vocab: int, dtype: str = "BF16") -> Spec:
    """Names and shapes of a Llama."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": (dtype, (vocab, hidden))}
    for layer in range(layers):
        shapes: Iterable[tuple[str, tuple[int, ...]]] = (
            ("input_layernorm", (hidden,)),
            ("mlp.down_proj", (hidden, wide)),
            ("mlp.gate_proj", (wide, hidden)),
            ("mlp.up_proj", (wide, hidden)),
            ("post_attention_layernorm", (hidden,)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
        )
        tensors |= {f"model.layers.{layer}.{name}.weight": (dtype, shape) for name, shape in shapes}
    return tensors | {"model.norm.weight": (dtype, (hidden,)), "lm_head.weight": (dtype, (vocab, hidden))}
