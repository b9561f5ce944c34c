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

from service.checkpoint import MANIFEST_FILE
from service.depth import with_depths
from service.known_digests import written
from service.pairing import pair
from service.plan import Plan, Shard
from service.planning import Planned, is_hub_name
from service.recipe import DTYPES
from workers.methods import get_method
from workers.safetensors_format import parse, prefix
from workers.store.uris import name as file_name
from workers.task import PartResult, block_count, tensor_digest

CONFIG = "config.json"
CARD = "README.md"
MANIFEST = MANIFEST_FILE
TREE = "sha256-tree-1mib"
"""Name of the digest of shards: SHA-256 over the header's SHA-256 and the tensors' digests in file order."""

_DTYPE_KEYS = {"torch_dtype", "dtype"}


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
    slicings = pair(planned.recipe, planned.inputs).slicings
    config, _ = with_depths(planned.inputs.reference.config, slicings)
    if config is None:
        return None
    corrected = {key: value for key, value in config.items() if key != "_name_or_path"}
    dtype = _float_dtype(planned)
    if dtype is not None:
        corrected = _with_dtype(corrected, dtype)
        if not _DTYPE_KEYS & corrected.keys():
            corrected["torch_dtype"] = dtype
    return json.dumps(corrected, indent=2, ensure_ascii=False) + "\n"


def model_card(planned: Planned, version: str) -> str:
    """A Hugging Face model card: front matter, the method, the inputs, the recipe."""
    recipe = planned.recipe
    method = get_method(recipe.merge_method)
    names = recipe.names
    shown = _without_paths(recipe.places)
    config = planned.inputs.reference.config or {}
    front: dict[str, Any] = {"tags": ["mergemill", "merge"]}
    if config.get("architectures") or config.get("model_type"):
        front = {"library_name": "transformers", **front}
    hub = [name.partition("@")[0] for name in names if is_hub_name(name)]
    if hub:
        front["base_model"] = list(dict.fromkeys(hub))
    source = f" ({_paper_link(method.paper)})"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "# Merged model",
        "",
        f"Merged by [Mergemill](https://github.com/mergemill/mergemill) {version} with `{method.name}`{source}.",
        "",
        "## Models",
        "",
        *(f"- `{shown[name]}`{' (base)' if name == recipe.base_model else ''}" for name in names),
        *(f"- `{shown[name]}` (statistics)" for name in recipe.statistics),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml(shown).strip(),
        "```",
        "",
        f"`{MANIFEST}` beside this file names every input by ETag and every output tensor by digest.",
        "",
    ]
    return "\n".join(lines)


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
) -> dict[str, Any]:
    """``mergemill.json``: all that is needed to make the same bytes again, and to check them."""
    recipe = planned.recipe
    checkpoints = {c.uri: c for c in planned.inputs.checkpoints}
    return {
        "mergemill": version,
        "semantics_version": planned.plan.semantics_version,
        "plan_digest": planned.plan.digest,
        "recipe": recipe.to_json(),
        "seed": recipe.seed,
        "models": dict(planned.uris),
        "inputs": {uri: dict(checkpoint.pins) for uri, checkpoint in checkpoints.items()},
        "notices": list(planned.plan.notices),
        "nonfinite": dict(nonfinite),
        "files": [{"name": file.name, "size": file.size, "digest": file.digest} for file in files],
        "tensors": {name: tensor_digest(own) for name, own in blocks.items()},
        "blocks": written(blocks),
    }


def text_file(name: str, data: bytes) -> OutputFile:
    """The listing of a small file."""
    return OutputFile(name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype, and that of the models nested in it (``text_config``), is ``dtype``."""
    corrected: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS:
            corrected[key] = dtype
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            corrected[key] = _with_dtype(value, dtype)
        else:
            corrected[key] = value
    return corrected


def _paper_link(paper: str) -> str:
    """A paper as Markdown: ``arXiv:2306.01708`` becomes a link."""
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", paper)
    return paper if found is None else f"[{paper}](https://arxiv.org/abs/{found[1]})"


def _float_dtype(planned: Planned) -> str | None:
    """The recipe's name of the one dtype of all float tensors, or None when they are mixed."""
    names = {value: key for key, value in DTYPES.items()}
    headers = (parse(shard.header.encode(), shard.size) for shard in planned.plan.shards)
    found = {entry.dtype for header in headers for entry in header.entries if entry.dtype in names}
    return names[found.pop()] if len(found) == 1 else None
