"""What goes beside the shards: config, card, manifest, and digests that do not depend on how the work was cut."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from service.planning.plan import PlanOptions
from service.recipe import parse_documents, parse_yaml
from service.running.sidecars import (
    CONFIG,
    OutputFile,
    config_json,
    manifest,
    model_card,
    shard_digest,
    shard_tensors,
    tensor_digests,
    text_file,
)
from tests.checkpoints import edge_tensors, integer_buffers, write_checkpoint
from tests.workers.execute import MIB, Done, dyadic, plan, run, write_models
from workers.safetensors_format import parse

pytestmark = pytest.mark.fast

LARGE = PlanOptions(worker_memory_bytes=1 << 40)


def planned_with(tmp_path: Path, config: dict[str, Any] | None, tensors: Any = None, **more: Any) -> Any:
    write_checkpoint(tmp_path / "m", tensors or {"w": torch.ones(3, dtype=torch.bfloat16)}, config)
    return plan(tmp_path, "linear", ["m"], {}, LARGE, **more)


@pytest.mark.parametrize(
    ("config", "out_dtype", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "float32", {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, "float16", {"dtype": "float16"}),
        ({"dtype": "x", "torch_dtype": "y"}, "float16", {"dtype": "float16", "torch_dtype": "float16"}),
        ({"a": 1}, "float16", {"a": 1, "torch_dtype": "float16"}),
        ({"torch_dtype": "float32"}, None, {"torch_dtype": "bfloat16"}),
        ({"_name_or_path": "/home/me", "dtype": "x"}, None, {"dtype": "bfloat16"}),
        (
            {"dtype": "x", "text_config": {"dtype": "x", "n": 1}, "quantization_config": {"dtype": "int8"}},
            "float32",
            {"dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "quantization_config": {"dtype": "int8"}},
        ),
        ({"v_config": {"dtype": "x"}}, None, {"v_config": {"dtype": "bfloat16"}, "torch_dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_the_config_says_the_dtype_that_was_written(
    config: dict[str, Any], out_dtype: str | None, expected: dict[str, Any], tmp_path: Path
) -> None:
    text = config_json(planned_with(tmp_path, config, out_dtype=out_dtype))
    assert text is not None
    assert text.endswith("}\n")
    assert json.loads(text) == expected


def test_mixed_dtypes_keep_what_the_config_says_and_buffers_do_not_mix(tmp_path: Path) -> None:
    mixed = {"w": torch.ones(3, dtype=torch.bfloat16), "v": torch.ones(3)}
    text = config_json(planned_with(tmp_path, {"torch_dtype": "bfloat16"}, mixed))
    assert json.loads(text or "") == {"torch_dtype": "bfloat16"}
    with_buffers = {"w": torch.ones(3, dtype=torch.float16)} | integer_buffers()
    text = config_json(planned_with(tmp_path, {"torch_dtype": "bfloat16"}, with_buffers))
    assert json.loads(text or "") == {"torch_dtype": "float16"}


def test_no_config_stays_no_config(tmp_path: Path) -> None:
    assert config_json(planned_with(tmp_path, None)) is None


def test_the_cards_front_matter_is_yaml_and_its_recipe_is_the_recipe(tmp_path: Path) -> None:
    planned = planned_with(tmp_path, {"model_type": "llama"})
    recipe = parse_documents(
        {
            "merge_method": "ties",
            "base_model": "org/base",
            "models": [{"model": "org/one@v1"}, {"model": "s3://b/# ü: {"}],
            "parameters": {"density": 0.5},
        }
    )
    card = model_card(replace(planned, graph=recipe), "0.1.0")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["mergemill", "merge"],
        "base_model": ["org/base", "org/one"],
    }
    assert parse_yaml(body.split("```yaml\n")[1].split("```")[0]) == recipe.output
    assert "https://arxiv.org/abs/2306.01708" in body
    assert "(base)" in body


def test_a_card_shows_no_directory_of_the_server(tmp_path: Path) -> None:
    planned = planned_with(tmp_path, {"torch_dtype": "bfloat16"})
    value = {
        "merge_method": "ties",
        "base_model": "file:///srv/secret/base",
        "models": [{"model": "/srv/a/tuned"}, {"model": "/srv/b/tuned"}, {"model": "file:///"}],
        "tokenizer_source": "/srv/b/tuned",
    }
    card = model_card(replace(planned, graph=parse_documents(value)), "0.1.0")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "tags": ["mergemill", "merge"]
    }  # no hub name, and no word of transformers
    assert "/srv" not in card and "file:" not in card
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["base_model"] == "base"
    assert [entry["model"] for entry in shown["models"]] == ["tuned", "tuned-2", "model"]
    assert shown["tokenizer_source"] == "tuned-2"
    assert "- `base` (base)\n- `tuned`\n- `tuned-2`\n- `model`\n" in body


def test_a_card_names_adapters_by_themselves(tmp_path: Path) -> None:
    planned = planned_with(tmp_path, None)
    value = {
        "merge_method": "ties",
        "base_model": "org/base@v1+/srv/lora",
        "models": [{"model": "org/base+org/lora"}, {"model": "file:///srv/a", "adapter": "org/lora"}],
    }
    card = model_card(replace(planned, graph=parse_documents(value)), "0.1.0")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["org/base"]
    assert "- `org/base@v1+lora` (base)\n- `org/base+org/lora`\n- `a+org/lora`\n" in body
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["models"][1] == {"model": "a", "adapter": "org/lora"}
    assert "/srv" not in card


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {}), ("passthrough", {}), ("slerp", {"t": 0.5}), ("dare_ties", {}), ("ties", {})],
)
def test_every_methods_source_is_a_link_or_nothing(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    planned = planned_with(tmp_path, None)
    value = {
        "merge_method": method,
        "models": [{"model": f"/m{i}"} for i in range(2 if method == "slerp" else 1)],
    }
    if "ties" in method:
        value["base_model"] = "/base"
    card = model_card(replace(planned, graph=parse_documents(value | {"parameters": parameters})), "0.1.0")
    assert ("](https://arxiv.org/abs/" in card) is (method != "slerp")
    assert "arXiv:arXiv" not in card
    assert "base_model:" not in card.split("---\n")[1]  # no hub names


def merged(tmp_path: Path, name: str, options: PlanOptions, order: int) -> Done:
    return run(plan(tmp_path, "ties", ["a", "b"], {"density": 0.3}, options), tmp_path / name, order=order)


def test_digests_depend_on_the_bytes_and_not_on_how_they_were_cut(tmp_path: Path) -> None:
    extra = edge_tensors() | integer_buffers()
    made = {
        name: {"w": dyadic(seed, 3_000_001), "v": dyadic(seed + 9, 2_000_003)} | extra
        for seed, name in enumerate(["base", "a", "b"])
    }
    write_models(tmp_path, made)
    small = PlanOptions(part_bytes=5 * MIB, whole_tensor_bytes=5 * MIB, worker_memory_bytes=1 << 40)
    one, two = merged(tmp_path, "one", LARGE, 0), merged(tmp_path, "two", small, 1)
    assert len(two.results) > len(one.results)
    digests = tensor_digests(one.planned.plan, one.results)
    assert digests == tensor_digests(two.planned.plan, reversed(two.results))
    assert set(digests) == set(made["base"])
    (shard,), (data,) = one.planned.plan.shards, one.shards()
    (length,) = struct.unpack("<Q", data[:8])
    tree = hashlib.sha256(hashlib.sha256(data[: 8 + length]).digest())
    for entry in parse(data[8 : 8 + length], len(data)).entries:
        body = data[8 + length + entry.start : 8 + length + entry.end]
        blocks = [hashlib.sha256(body[at : at + MIB]).digest() for at in range(0, len(body), MIB)]
        assert digests[entry.name] == hashlib.sha256(b"".join(blocks)).hexdigest()
        tree.update(hashlib.sha256(b"".join(blocks)).digest())
    assert shard_digest(shard, digests) == f"sha256-tree-1mib:{tree.hexdigest()}"
    assert shard_digest(two.planned.plan.shards[0], digests) == shard_digest(shard, digests)
    assert sum(size for _, size in shard_tensors(shard)) == one.planned.plan.total_size

    lost = [replace(result, digests=result.digests[:-1]) for result in one.results]
    with pytest.raises(ValueError, match="has digests of 0 blocks"):
        tensor_digests(one.planned.plan, lost)
    other = [replace(result, digests=tuple(replace(d, blocks=("00" * 32,) * len(d.blocks)) for d in result.digests))
             for result in one.results]  # fmt: skip
    with pytest.raises(ValueError, match="two different digests for block 0 of"):
        tensor_digests(one.planned.plan, [*one.results, *other])
    wrong = tensor_digests(one.planned.plan, other)
    assert shard_digest(shard, wrong) != shard_digest(shard, digests)


def test_the_manifest_is_all_that_is_needed_to_make_the_same_again(tmp_path: Path) -> None:
    planned = planned_with(tmp_path, {"a": 1}, seed=3)
    files = [text_file(CONFIG, b"{}"), OutputFile("s", 5, "sha256-tree-1mib:00")]
    found = manifest(planned, {"w": ["ab" * 32]}, files, {"w: m": 2}, "0.1.0")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert parse_documents(found["recipe"]) == planned.graph
    assert found["seed"] == 3
    assert found["plan_digest"] == planned.plan.digest
    assert found["semantics_version"] == planned.plan.semantics_version
    assert found["models"] == {str(tmp_path / "m"): f"file://{tmp_path}/m"}
    ((uri, pins),) = found["inputs"].items()
    assert uri == f"file://{tmp_path}/m"
    assert list(pins) == [f"{uri}/model.safetensors"]
    assert set(pins.values()) == set(planned.inputs.reference.pins.values())
    assert found["nonfinite"] == {"w: m": 2}
    assert found["files"][0] == {
        "name": "config.json", "size": 2,
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }  # fmt: skip
