"""Small Hugging Face style checkpoints for tests: real names and shapes, a few hundred kilobytes.

Everything is a function of its seed. Files are written by the safetensors library, so nothing here
shares code with what it is used to test.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
"""Tensors by name, in the order in which they go into the file."""

INDEX = "model.safetensors.index.json"
"""File name of a sharded checkpoint's index."""

SINGLE = "model.safetensors"
"""File name of a checkpoint that is one file."""


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write ``tensors`` into ``directory`` and return it.

    :param config: what goes into ``config.json``; no file when ``None``.
    :param shard_bytes: largest shard, in bytes of tensors, and an index file; one ``model.safetensors``
        without an index when ``None``. A tensor that is bigger gets a shard of its own.
    :param extra_files: contents by file name: tokenizers, generation settings, licences.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if shard_bytes is None:
        _save(directory / SINGLE, tensors)
    else:
        groups = list(_groups(tensors, shard_bytes))
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        for name, group in zip(names, groups, strict=True):
            _save(directory / name, group)
        index = {
            "metadata": {"total_size": nbytes(tensors)},
            "weight_map": {key: name for name, group in zip(names, groups, strict=True) for key in group},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in (extra_files or {}).items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def read_checkpoint(directory: Path) -> Tensors:
    """All tensors of a checkpoint, by name; as ``transformers`` does, a single file goes before an index."""
    if (directory / SINGLE).exists():
        shards: Iterable[str] = [SINGLE]
    else:
        shards = dict.fromkeys(json.loads((directory / INDEX).read_text())["weight_map"].values())
    found: Tensors = {}
    for shard in shards:
        with safe_open(directory / shard, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    return found


def nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def llama_tensors(
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = 256,
    *,
    dtype: torch.dtype = torch.float32,
    key_value_heads: int | None = None,
    intermediate: int | None = None,
    tied: bool = False,
) -> Tensors:
    """A Llama of ``layers`` blocks of random weights (σ = 0.02, norms near 1), with the real one's names.

    :param key_value_heads: heads of keys and values; ``heads`` when ``None``.
    :param intermediate: width of the MLP; ``3 * hidden`` when ``None``.
    :param tied: leave ``lm_head.weight`` out of the file, as a model with tied embeddings does.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = intermediate or 3 * hidden
    keys = hidden // heads * (key_value_heads or heads)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + torch.randn(hidden, generator=generator) * 0.02).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": norm(),
            f"{at}.mlp.down_proj.weight": weight(hidden, wide),
            f"{at}.mlp.gate_proj.weight": weight(wide, hidden),
            f"{at}.mlp.up_proj.weight": weight(wide, hidden),
            f"{at}.post_attention_layernorm.weight": norm(),
            f"{at}.self_attn.k_proj.weight": weight(keys, hidden),
            f"{at}.self_attn.o_proj.weight": weight(hidden, hidden),
            f"{at}.self_attn.q_proj.weight": weight(hidden, hidden),
            f"{at}.self_attn.v_proj.weight": weight(keys, hidden),
        }
    tensors["model.norm.weight"] = norm()
    if not tied:
        tensors["lm_head.weight"] = weight(vocab, hidden)
    return tensors


def llama_config(
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = 256,
    *,
    dtype: torch.dtype = torch.float32,
    key_value_heads: int | None = None,
    intermediate: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """The ``config.json`` that goes with :func:`llama_tensors` of the same arguments."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate or 3 * hidden,
        "max_position_embeddings": 128,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": key_value_heads or heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }


def fine_tune(tensors: Mapping[str, torch.Tensor], seed: int, scale: float = 1e-3) -> Tensors:
    """``tensors`` plus normal noise of σ ``scale``, in their own dtypes; integers and booleans stay."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in tensors.items()
    }


def edge_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """The shapes that break naive code: 0-d, empty, one element, a vector off every power of two, a zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "edge.scalar": normal(),
        "edge.empty": normal(0),
        "edge.empty_matrix": normal(0, 7),
        "edge.one": normal(1),
        "edge.one_matrix": normal(1, 1),
        "edge.odd": normal(1031),
        "edge.zeros": torch.zeros(5, 3, dtype=dtype),
    }


def integer_buffers() -> Tensors:
    """Buffers that are not arithmetic: the same in every call, as they are in every fine-tune."""
    return {
        "buffer.position_ids": torch.arange(128).unsqueeze(0),
        "buffer.count": torch.tensor(3, dtype=torch.int32),
        "buffer.mask": torch.tensor([True, False, True]),
        "buffer.bytes": torch.arange(17, dtype=torch.uint8),
    }


def _groups(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> Iterator[Tensors]:
    """Consecutive runs of tensors of at most ``shard_bytes`` each; at least one run."""
    group: Tensors = {}
    for name, tensor in tensors.items():
        if group and nbytes(group) + tensor.nbytes > shard_bytes:
            yield group
            group = {}
        group[name] = tensor
    yield group


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # Clones: the library refuses tensors that share memory, and every test would have to remember it.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
