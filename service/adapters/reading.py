"""The tensors of an adapter, told apart by their keys: factors of modules' deltas, and modules held whole. Pure.

Reference: the keys that PEFT writes, with and without the adapter's name in them, and ``base_model.model.`` before
the module's own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.adapters.config import AdapterConfig
from service.planning.checkpoint import StoredTensor
from workers.safetensors_format import clip
from workers.store.base import ObjectInfo

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.default)?(?P<leaf>\.weight|\.bias)?", re.DOTALL
)
_OTHER = re.compile(
    r".+\.(lora_[A-Za-z_]+|token_adapter|trainable_tokens_[a-z]+|hada_|oft_|vera_|ia3_).*", re.DOTALL
)
_INFIX = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


@dataclass(frozen=True, slots=True)
class Factors:
    """The two matrices of one module's delta, ``B·A``."""

    module: str
    """The module's name, as PEFT calls it."""
    a: StoredTensor
    """``[rank, in]``; of a convolution ``[rank, in, ...]``."""
    b: StoredTensor
    """``[out, rank]``; of a convolution with ones behind."""
    is_embedding: bool
    """Whether the module is an embedding, whose weight is the delta's transpose."""

    @property
    def rank(self) -> int:
        """How many columns of ``B`` meet rows of ``A``; 0 where they do not fit together."""
        rows = self.a.shape[0] if self.a.shape else 0
        return rows if len(self.b.shape) > 1 and self.b.shape[1] == rows else 0


@dataclass(frozen=True)
class Adapter:
    """An adapter, known by its header and its config."""

    uri: str
    """The directory or prefix that holds it."""
    config: AdapterConfig
    """What its config says."""
    factors: tuple[Factors, ...]
    """One for each module that it changes, in the order of the file."""
    replaced: Mapping[str, StoredTensor]
    """Tensors that stand in place of the model's own, by the name that the model has for them."""
    pins: Mapping[str, str]
    """ETags of its two files, by URI."""


def told_apart(
    uri: str, config: AdapterConfig, tensors: Mapping[str, StoredTensor], files: Iterable[ObjectInfo]
) -> tuple[Adapter, list[str]]:
    """An adapter with these tensors, and what is wrong with them."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    unknown, doubled = [], []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(name)
        if found is not None and found["leaf"] != ".bias":
            place, at = pairs.setdefault(found["module"], {}), found["kind"]
        elif found is None and not _OTHER.fullmatch(name):
            place, at = replaced, _INFIX.sub("", name)
        else:
            unknown.append(key)
            continue
        if at in place:
            doubled.append(key)
        place[at] = tensor
    problems = []
    if unknown:
        problems.append(
            f"{len(unknown)} tensor(s) that are no factors of a plain LoRA (DoRA, trained biases or tokens, another "
            f"kind of adapter), such as {clip(unknown[0])}"
        )
    if doubled:
        problems.append(
            f"{len(doubled)} tensor(s) whose place another one takes as well, such as {clip(doubled[0])}"
        )
    factors, lone = _paired(pairs)
    if lone:
        problems.append(f"{len(lone)} module(s) without exactly one A and one B, such as {clip(lone[0])}")
    if not pairs and not replaced:
        problems.append("it holds no tensors")
    if (excess := config.excess([each.module for each in factors])) is not None:
        problems.append(excess)
    pins = {info.uri: info.etag for info in files}
    return Adapter(uri, config, tuple(factors), replaced, pins), problems


def _paired(pairs: Mapping[str, Mapping[str, StoredTensor]]) -> tuple[list[Factors], list[str]]:
    """The factors of each module, and the modules that have others than one A and one B, told with what they have."""
    factors, lone = [], []
    for module, own in pairs.items():
        prefix = "lora_embedding_" if "lora_embedding_A" in own or "lora_embedding_B" in own else "lora_"
        if set(own) == {f"{prefix}A", f"{prefix}B"}:
            factors.append(Factors(module, own[f"{prefix}A"], own[f"{prefix}B"], prefix != "lora_"))
        else:
            lone.append(f"{module} ({', '.join(sorted(own))})")
    return factors, lone
