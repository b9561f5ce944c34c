"""The checkpoints that are merged: Llama shapes of several sizes, random and the same on every machine.

A base and its fine-tunes, bfloat16, in Hugging Face shards. Weights are σ = 0.02, fine-tunes lie σ = 0.001
beside them, which is what a fine-tune changes: a few units in bfloat16's last place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

BASE = "base"
TUNES = ("tune-1", "tune-2", "tune-3")

SIGMA = 0.02
TUNE_SIGMA = 0.001
POOL = (1 << 24) + 43
"""Random numbers to draw from; every tensor of every model begins at a place of its own."""

FORMAT = 1
"""Raised when the same names would hold other bytes."""

STAMP = "made.json"
INDEX = "model.safetensors.index.json"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model, and how many there are."""

    name: str
    """What it is called."""
    hidden: int
    """Width of the residual stream."""
    layers: int
    """Blocks."""
    heads: int
    """Heads of the queries."""
    key_value_heads: int
    """Heads of keys and values."""
    intermediate: int
    """Width of the MLP."""
    vocab: int
    """Tokens."""
    shard_bytes: int
    """Most tensor bytes of one file."""
    tunes: int = 3
    """Fine-tunes of the base."""
    linked: bool = False
    """Whether a fine-tune has only its share of the shards and the base's, by hard links, for the rest."""

    @property
    def cold(self) -> bool:
        """Whether the inputs do not fit into a page cache, and are read from the disk every time."""
        return self.linked

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models, the base first."""
        return (BASE, *TUNES[: self.tunes])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, as a Llama of transformers with untied embeddings has them."""
        keys = self.hidden // self.heads * self.key_value_heads
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            found |= {
                f"{at}.input_layernorm.weight": (self.hidden,),
                f"{at}.mlp.down_proj.weight": wide[::-1],
                f"{at}.mlp.gate_proj.weight": wide,
                f"{at}.mlp.up_proj.weight": wide,
                f"{at}.post_attention_layernorm.weight": (self.hidden,),
                f"{at}.self_attn.k_proj.weight": (keys, self.hidden),
                f"{at}.self_attn.o_proj.weight": square,
                f"{at}.self_attn.q_proj.weight": square,
                f"{at}.self_attn.v_proj.weight": (keys, self.hidden),
            }
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    @property
    def parameters(self) -> int:
        """Elements of one model."""
        return sum(map(prod, self.shapes().values()))

    def shards(self) -> list[list[str]]:
        """The tensors of each file, in order."""
        groups: list[list[str]] = [[]]
        held = 0
        for name, shape in self.shapes().items():
            nbytes = 2 * prod(shape)
            if groups[-1] and held + nbytes > self.shard_bytes:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += nbytes
        return groups

    def is_own(self, model: int, shard: int) -> bool:
        """Whether model number ``model`` (0 is the base) has a shard of its own, or the base's."""
        return not self.linked or model == 0 or shard % self.tunes == model - 1

    def config(self) -> dict[str, object]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
        }


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 256, 4, 4, 2, 704, 2048, 4_000_000),
        Size("100m", 768, 12, 12, 12, 2048, 32000, 100_000_000),
        Size("1b", 2048, 16, 32, 8, 5632, 32000, 500_000_000),
        Size("7b", 4096, 32, 32, 32, 11008, 32000, 1_000_000_000, tunes=2, linked=True),
    )
}
"""``1b`` has 852 M parameters, ``100m`` 134 M, ``7b`` the 6.7 B of Llama 2."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Checkpoints on this machine's disk."""

    size: Size
    """Their shape."""
    root: Path
    """The directory above them."""

    def directory(self, model: str) -> Path:
        """Where a model is."""
        return self.root / model

    def files(self, model: str) -> list[Path]:
        """A model's shards, in order."""
        return sorted(self.directory(model).glob("*.safetensors"))

    def nbytes(self, models: tuple[str, ...]) -> int:
        """Bytes of the shards of some models, headers included."""
        return sum(path.stat().st_size for model in models for path in self.files(model))

    def warm(self, models: tuple[str, ...]) -> None:
        """Have all bytes of some models in the page cache, or, of inputs that are to be cold, none."""
        paths = [path for model in models for path in self.files(model)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_drop if self.size.cold else _read, paths))


def make_inputs(size: Size, root: Path) -> Inputs:
    """The inputs of a size below ``root``: those that are there already, or new ones."""
    inputs = Inputs(size, root / size.name)
    stamp = inputs.root / STAMP
    wanted = json.dumps({"format": FORMAT, "torch": _series(), **asdict(size)})
    if stamp.is_file() and stamp.read_text() == wanted:
        return inputs
    shutil.rmtree(inputs.root, ignore_errors=True)
    shards = size.shards()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    shapes = size.shapes()
    index = {
        "metadata": {"total_size": 2 * size.parameters},
        "weight_map": {tensor: name for name, group in zip(names, shards, strict=True) for tensor in group},
    }
    for model in size.models:
        inputs.directory(model).mkdir(parents=True)
        (inputs.directory(model) / INDEX).write_text(json.dumps(index, indent=2))
        (inputs.directory(model) / "config.json").write_text(json.dumps(size.config(), indent=2))
    pool_of_numbers()
    # One file at a time: a few gigabytes of tensors are memory enough, and drawing them is parallel within
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, (name, group) in enumerate(zip(names, shards, strict=True)):
            base = dict(zip(group, threads.map(lambda key: _weights(key, shapes[key]), group), strict=True))
            save_file(base, inputs.directory(BASE) / name, {"format": "pt"})
            for position, model in enumerate(size.models[1:], start=1):
                path = inputs.directory(model) / name
                if size.is_own(position, number):
                    tuned = list(threads.map(lambda key, m=model, b=base: _tuned(key, m, b[key]), group))
                    save_file(dict(zip(group, tuned, strict=True)), path, {"format": "pt"})
                else:
                    path.hardlink_to(inputs.directory(BASE) / name)
    pool_of_numbers.cache_clear()
    stamp.write_text(wanted)
    return inputs


@cache
def pool_of_numbers() -> torch.Tensor:
    """Standard normal float32 numbers; drawing each element's own would take longer than writing it."""
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0))


def _weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    mean = 1.0 if len(shape) == 1 else 0.0
    return torch.cat([run * SIGMA + mean for run in _drawn(BASE, name, prod(shape))]).bfloat16().view(shape)


def _tuned(name: str, model: str, base: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(base).flatten()
    start = 0
    for run in _drawn(model, name, base.numel()):
        stop = start + run.numel()
        found[start:stop] = base.flatten()[start:stop].float() + run * TUNE_SIGMA
        start = stop
    return found.view(base.shape)


def _drawn(model: str, name: str, count: int) -> Iterator[torch.Tensor]:
    """``count`` numbers, in runs: the pool from a place that model and tensor decide, around and around."""
    pool = pool_of_numbers()
    at = int.from_bytes(hashlib.sha256(f"{model} {name}".encode()).digest()[:8], "big") % POOL
    while count:
        run = pool[at : at + count]
        yield run
        count -= run.numel()
        at = 0


def _series() -> str:
    """torch promises the same random numbers within a release series."""
    return ".".join(torch.__version__.split(".")[:2])


def _read(path: Path) -> None:
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
