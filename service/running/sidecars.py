"""What goes beside the shards: config, model card, manifest and the digests of the files. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import yaml

from service.adapters.output import adapter_config
from service.planning.checkpoint import MANIFEST_FILE
from service.planning.config import merged_config
from service.planning.known_digests import written
from service.planning.places import is_hub_name
from service.planning.plan import Plan, Shard
from service.planning.planner import Planned
from service.recipe import Graph
from workers.methods import get_method
from workers.safetensors_format import parse, prefix
from workers.store.uris import name as file_name
from workers.task import PartResult, block_count, tensor_digest

CONFIG = "config.json"
CARD = "README.md"
MANIFEST = MANIFEST_FILE
TREE = "sha256-tree-1mib"
"""Name of the digest of shards: SHA-256 over the header's SHA-256 and the tensors' digests in file order."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the merged checkpoint."""

    name: str
    """File name."""
    size: int
    """Length in bytes."""
    digest: str
    """``sha256:`` of the bytes, or ``sha256-tree-1mib:`` for shards."""


def config_json(planned: Planned) -> str | None:
    """The reference's config.json with the dtype and the layers that were written; None when it has none."""
    headers = (parse(shard.header.encode(), shard.size) for shard in planned.plan.shards)
    dtypes = {entry.dtype for header in headers for entry in header.entries}
    config = merged_config(planned.recipe, planned.inputs, dtypes)
    return None if config is None else json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def adapter_config_json(planned: Planned) -> str:
    """The adapter_config.json of an adapter; its base model is called what the card calls it."""
    recipe, base = planned.recipe, planned.inputs.reference
    shown = _shown(planned.graph)
    return adapter_config(recipe, base, shown[recipe.reference], planned.plan.parts)


def model_card(planned: Planned, version: str) -> str:
    """A Hugging Face model card: front matter, the method, the inputs, the recipe."""
    recipe, graph = planned.recipe, planned.graph
    methods = {graph.recipes[place].merge_method: None for place in sorted(graph.order)}
    names = graph.names
    shown = _shown(graph)
    shown |= {
        name: "+".join(shown.get(place, place) for place in both if place)
        for name, both in graph.adapted.items()
    }
    config = planned.inputs.reference.config or {}
    front: dict[str, Any] = {"tags": ["mergemill", "merge"]}
    if config.get("architectures") or config.get("model_type"):
        front = {"library_name": "transformers", **front}
    if recipe.output_kind == "adapter":
        front = {**front, "library_name": "peft", "tags": [*front["tags"], "lora"]}
    hub = [model.partition("@")[0] for model, _ in graph.adapted.values() if is_hub_name(model)]
    if hub:
        front["base_model"] = list(dict.fromkeys(hub))
    told = [f"`{each.name}` ({_paper_link(each.paper)})" for each in map(get_method, methods)]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "# Merged adapter" if recipe.output_kind == "adapter" else "# Merged model",
        "",
        f"Merged by [Mergemill](https://github.com/mergemill/mergemill) {version} with {' and '.join(told)}.",
        "",
        "## Models",
        "",
        *(f"- `{shown[name]}`{' (base)' if name == recipe.base_model else ''}" for name in names),
        *(f"- `{shown[name]}` (statistics)" for name in graph.statistics),
        "",
        "## Recipe",
        "",
        "```yaml",
        graph.to_yaml(shown).strip(),
        "```",
        "",
        f"`{MANIFEST}` beside this file names every input by ETag and every output tensor by digest.",
        "",
    ]
    return "\n".join(lines)


def _shown(graph: Graph) -> dict[str, str]:
    """What is told of each place instead of its name; documents that are not run are told of in the recipe."""
    others = (place for recipe in graph.recipes for place in recipe.places)
    return _without_paths(dict.fromkeys([*graph.stages, *graph.places, *others]))


def _without_paths(names: Iterable[str]) -> dict[str, str]:
    """What a card calls each model: a directory of the service's machine by its last component alone."""
    shown: dict[str, str] = {}
    for name in names:
        called = name
        if name.startswith(("file://", "/")):
            last = file_name(name) or "model"
            called = next(
                c for n in count(1) if (c := last if n == 1 else f"{last}-{n}") not in shown.values()
            )
        shown[name] = called
    return shown


def tensor_digests(plan: Plan, results: Iterable[PartResult]) -> dict[str, str]:
    """The digest of every output tensor, from the block digests of its parts; raises as :func:`tensor_blocks`."""
    return {name: tensor_digest(own) for name, own in tensor_blocks(plan, results).items()}


def tensor_blocks(plan: Plan, results: Iterable[PartResult]) -> dict[str, list[str]]:
    """The digests of every output tensor's blocks, in order.

    :raises ValueError: a block is missing or is there twice.
    """
    blocks: dict[str, dict[int, str]] = {}
    for result in results:
        for found in result.digests:
            own = blocks.setdefault(found.name, {})
            for offset, block in enumerate(found.blocks):
                if own.setdefault(found.first_block + offset, block) != block:
                    raise ValueError(
                        f"two different digests for block {found.first_block + offset} of {found.name}"
                    )
    whole = {}
    for shard in plan.shards:
        for name, nbytes in shard_tensors(shard):
            own = blocks.get(name, {})
            if sorted(own) != list(range(block_count(nbytes))):
                raise ValueError(f"{name} has digests of {len(own)} blocks, not of {block_count(nbytes)}")
            whole[name] = [own[number] for number in range(len(own))]
    return whole


def shard_tensors(shard: Shard) -> list[tuple[str, int]]:
    """``(name, bytes)`` of a shard's tensors, in the order of the file."""
    header = parse(shard.header.encode(), shard.size)
    return [(entry.name, entry.nbytes) for entry in header.entries]


def shard_digest(shard: Shard, digests: Mapping[str, str]) -> str:
    """The digest of a whole shard, composed from those of its header and tensors."""
    tree = hashlib.sha256(hashlib.sha256(prefix(shard.header)).digest())
    for name, _ in shard_tensors(shard):
        tree.update(bytes.fromhex(digests[name]))
    return f"{TREE}:{tree.hexdigest()}"


def manifest(
    planned: Planned,
    blocks: Mapping[str, Sequence[str]],
    files: Iterable[OutputFile],
    nonfinite: Mapping[str, int],
    version: str,
    adapter: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``mergemill.json``: all that is needed to make the same bytes again, and to check them.

    :param adapter: how far an adapter is from what it stands for, where the output is one.
    """
    told = {} if adapter is None else {"adapter": dict(adapter)}
    return {
        "mergemill": version,
        "semantics_version": planned.plan.semantics_version,
        "plan_digest": planned.plan.digest,
        "recipe": planned.graph.to_json(),
        "seed": planned.recipe.seed,
        "models": dict(planned.uris),
        "inputs": {uri: dict(pins) for uri, pins in planned.pins.items()},
        "notices": list(planned.plan.notices),
        "nonfinite": dict(nonfinite),
        "files": [{"name": file.name, "size": file.size, "digest": file.digest} for file in files],
        "tensors": {name: tensor_digest(own) for name, own in blocks.items()},
        "blocks": written(blocks),
    } | told


def text_file(name: str, data: bytes) -> OutputFile:
    """The listing of a small file."""
    return OutputFile(name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def _paper_link(paper: str) -> str:
    """A paper as Markdown: ``arXiv:2306.01708`` becomes a link."""
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", paper)
    return paper if found is None else f"[{paper}](https://arxiv.org/abs/{found[1]})"
