"""config.json of a model whose layers were taken from others: its depth, and what there is one of for each layer. Pure.

No architecture is known here. The depth is whatever number of layers the config says that equals the number found in
the tensors' names; a list is a layer's where it is as long as there were layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.planning.layers import DEPTH_KEYS
from service.planning.pairing import Slicing

_ENCODER_KEYS = ("encoder_layers", "num_encoder_layers", "encoder_num_layers")
_DECODER_KEYS = ("decoder_layers", "num_decoder_layers", "decoder_num_layers")
_DEPTH_KEYS = (*DEPTH_KEYS, "depth", "num_blocks", "num_block", *_ENCODER_KEYS, *_DECODER_KEYS)

_LEADING_KEYS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""How many of the first layers are of a kind."""

_NUMBERS_KEYS = (
    "mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices", "moe_layers",
    "moe_layer_indices", "global_attn_layers", "deepstack_visual_indexes", "fullatt_block_indexes",
)  # fmt: skip
"""The numbers of the layers of a kind."""

_PERIOD_KEYS = ("sliding_window_pattern", "decoder_sparse_step", "interleave_moe_layer_step", "attn_layer_period",
                "expert_layer_period", "full_attention_interval", "_sliding_window_pattern")  # fmt: skip
"""Every how many layers there is one of a kind: layers that have moved may be of another."""

_NOT_PER_LAYER = re.compile(r"(^architectures$|_ids?$|token|modules|sizes?$|_config$|^auto_map$|labels?$)")
_KINDS = ("vision", "audio")
_KIND_WORDS = {"vision": re.compile(r"vision|visual|image|\bvit\b"), "audio": re.compile("audio|speech")}
_DEEPEST = 4


@dataclass(frozen=True, slots=True)
class _Holder:
    """The part of a config that describes the layers."""

    path: tuple[str, ...]
    """Where it is."""
    keys: tuple[str, ...]
    """What it calls their number."""


def with_depths(
    config: Mapping[str, Any] | None, slicings: Sequence[Slicing]
) -> tuple[dict[str, Any] | None, list[str]]:
    """A config with what depends on the layers' number and order corrected, and what the user should know of it."""
    if config is None:
        return None, []
    corrected, notices = dict(config), []
    for slicing in slicings:
        corrected, told = _with_depth(corrected, slicing)
        notices += told
    return corrected, notices


def _with_depth(config: dict[str, Any], slicing: Slicing) -> tuple[dict[str, Any], list[str]]:
    old, new = slicing.depth, len(slicing.origins)
    in_place = [layer for _, layer in slicing.origins] == list(range(old))
    holders = _holders(config, slicing)
    if not holders:
        if in_place:
            return config, []
        return config, [
            f"config.json: nothing in it says that `{slicing.stack}` has {old} layers, so nothing was changed to {new}"
        ]
    notices = []
    for holder in holders:
        section = _at(config, holder.path)
        changed = {**section, **dict.fromkeys(holder.keys, new)}
        if not in_place:
            changed |= _of_layers(section, holder, slicing)
            periods = [key for key in _PERIOD_KEYS if isinstance(section.get(key), int) and section[key] > 1]
            if periods and "layer_types" not in section:
                notices.append(
                    f"config.json: `{periods[0]}` tells layers apart by their number, which slices change: see that "
                    "the output's layers are still of the kinds that they were"
                )
        changes = [f"{key} {_shown(section.get(key))} → {_shown(changed[key])}" for key in changed
                   if changed[key] != section.get(key)]  # fmt: skip
        if changes:
            notices.append(f"config.json: {', '.join(changes)}")
        config = _put(config, holder.path, changed)
    return config, notices


def _of_layers(section: Mapping[str, Any], holder: _Holder, slicing: Slicing) -> dict[str, Any]:
    """What a section says of its layers, for the layers of the output."""
    changed: dict[str, Any] = {}
    for key, value in section.items():
        if key in _NUMBERS_KEYS and isinstance(value, list):
            changed[key] = [
                number
                for number, (said, layer) in enumerate(_origins(holder, slicing))
                if layer in _list(said, key, value)
            ]
        elif key in _LEADING_KEYS and isinstance(value, int) and not isinstance(value, bool):
            changed[key] = sum(layer < _number(said, key, value) for said, layer in _origins(holder, slicing))
        elif isinstance(value, list) and len(value) == slicing.depth and not _NOT_PER_LAYER.search(key):
            entries = [(_list(said, key, value), layer) for said, layer in _origins(holder, slicing)]
            if all(layer < len(own) for own, layer in entries):
                changed[key] = [own[layer] for own, layer in entries]
    return changed


def _origins(holder: _Holder, slicing: Slicing) -> Iterator[tuple[Mapping[str, Any], int]]:
    """For each layer of the output what its own model's config says where ``holder`` is, and its number there."""
    for checkpoint, layer in slicing.origins:
        yield _at(checkpoint.config or {}, holder.path), layer


def _list(section: Mapping[str, Any], key: str, otherwise: list[Any]) -> list[Any]:
    value = section.get(key)
    return value if isinstance(value, list) else otherwise


def _number(section: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = section.get(key)
    return value if isinstance(value, int) else otherwise


def _holders(config: Mapping[str, Any], slicing: Slicing) -> list[_Holder]:
    """Where a config says the number of a stack's layers."""
    wrong = (
        _DECODER_KEYS if "encoder" in slicing.stack else _ENCODER_KEYS if "decoder" in slicing.stack else ()
    )
    found = []
    for path, section in _sections(config, ()):
        keys = [key for key in _DEPTH_KEYS if key not in wrong and _says(section.get(key), slicing.depth)]
        if keys and "decoder" in slicing.stack and section.get("is_encoder_decoder"):
            # T5 says it only where it is not the encoder's.
            keys = [key for key in keys if key in _DECODER_KEYS] or ["num_decoder_layers"]
        if keys:
            found.append(_Holder(path, tuple(keys)))
    kind = _kind(slicing.stack)
    return [holder for holder in found if _kind(".".join(holder.path)) == kind] or found


def _says(value: Any, depth: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == depth


def _sections(
    config: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    yield path, config
    for key, value in config.items():
        if (
            key.endswith(("_config", "encoder", "decoder"))
            and isinstance(value, Mapping)
            and len(path) < _DEEPEST
        ):
            yield from _sections(value, (*path, key))


def _kind(text: str) -> str:
    return next((kind for kind in _KINDS if _KIND_WORDS[kind].search(text)), "text")


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _put(config: Mapping[str, Any], path: tuple[str, ...], section: Mapping[str, Any]) -> dict[str, Any]:
    if not path:
        return dict(section)
    return {**config, path[0]: _put(_at(config, path[:1]), path[1:], section)}


def _shown(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else str(value)
