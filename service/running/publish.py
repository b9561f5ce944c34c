"""The last step of a commit: the small files beside the shards, and then the index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version

from service.adapters.output import errors
from service.adapters.reading import CONFIG as ADAPTER_CONFIG
from service.planning.checkpoint import INDEX_FILE
from service.planning.planner import Planned
from service.running.commit import Output
from service.running.sidecars import (
    CARD,
    CONFIG,
    MANIFEST,
    OutputFile,
    adapter_config_json,
    config_json,
    manifest,
    model_card,
    shard_digest,
    tensor_blocks,
    text_file,
)
from workers.errors import ObjectNotFoundError
from workers.store.uris import join
from workers.task import PartResult, tensor_digest


def publish(
    planned: Planned, results: Mapping[str, PartResult], output: Output, overwrite: bool
) -> list[OutputFile]:
    """Write config, card, tokenizer and manifest, delete what an overwrite leaves stale, and commit.

    :returns: every file of the checkpoint, the index last.
    """
    plan = planned.plan
    blocks = tensor_blocks(plan, [results[part] for part in plan.part_ids if part in results])
    digests = {name: tensor_digest(own) for name, own in blocks.items()}
    files = [OutputFile(shard.name, shard.size, shard_digest(shard, digests)) for shard in plan.shards]
    for name, data in _small_files(planned, output):
        output.put(name, data, plan.digest)
        files.append(text_file(name, data))
    nonfinite: dict[str, int] = {}
    for result in results.values():
        for where, count in result.nonfinite.items():
            nonfinite[where] = nonfinite.get(where, 0) + count
    index = text_file(INDEX_FILE, plan.index.encode())
    adapter = errors(results.values()) if planned.recipe.output_kind == "adapter" else None
    document = manifest(planned, blocks, [*files, index], nonfinite, version("mergemill"), adapter)
    data = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    output.put(MANIFEST, data, plan.digest)
    files.append(text_file(MANIFEST, data))
    if overwrite:
        output.delete_stale({file.name for file in files})
    output.put_index(plan)
    return [*files, index]


def published(output: Output, plan_digest: str) -> list[OutputFile] | None:
    """What :func:`publish` returned when it committed this plan; None when there is no such checkpoint."""
    try:
        index = text_file(INDEX_FILE, output.read(join(output.uri, INDEX_FILE)))
        data = output.read(join(output.uri, MANIFEST))
    except ObjectNotFoundError:
        return None
    try:
        document = json.loads(data)
        files = [OutputFile(file["name"], file["size"], file["digest"]) for file in document["files"]]
        if document["plan_digest"] != plan_digest or index not in files:
            return None
    except (ValueError, TypeError, KeyError):  # somebody else's file of that name
        return None
    files.remove(index)
    return [*files, text_file(MANIFEST, data), index]


def _small_files(planned: Planned, output: Output) -> Iterator[tuple[str, bytes]]:
    """Card, config, what is written anew, and the other files of the reference and its tokenizer, one at a time."""
    yield CARD, model_card(planned, version("mergemill")).encode()
    if planned.recipe.output_kind == "adapter":  # its config makes it loadable, and comes last
        yield ADAPTER_CONFIG, adapter_config_json(planned).encode()
        return
    if (config := config_json(planned)) is not None:
        yield CONFIG, config.encode()
    yield from planned.texts.items()
    for name, info in planned.copied.items():
        yield name, output.read(info.uri, info.etag)
