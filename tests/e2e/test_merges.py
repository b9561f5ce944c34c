"""Merges that succeed: every method, both stores, any way to cut the work, and what lies at the output then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from service.cluster.driver import Driver
from service.cluster.fleet_process import FleetSettings
from tests.checkpoints import (
    edge_tensors,
    fine_tune,
    integer_buffers,
    llama_config,
    llama_tensors,
    read_checkpoint,
    write_checkpoint,
)
from tests.servers.service import RunningService, running_service
from tests.servers.witness import Witness
from workers.store import StoreSettings, join, open_stores
from workers.store.base import ObjectStore
from workers.store.stores import read_bytes

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

MIB = 1 << 20
TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "generation_config.json": "{}", "merges.txt": "a b\n"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of 14 MB in bfloat16; one sharded, one not, one in float32."""
    root = tmp_path_factory.mktemp("models")
    base = llama_tensors(0, layers=2, hidden=256, heads=4, vocab=12_000, dtype=torch.bfloat16)
    config = llama_config(layers=2, hidden=256, heads=4, vocab=12_000) | {"torch_dtype": "float32"}
    write_checkpoint(root / "base", base, config, extra_files=TOKENIZER)
    write_checkpoint(root / "sharded", fine_tune(base, 1, 0.01), config, shard_bytes=3 * MIB)
    wide = {name: tensor.float() for name, tensor in fine_tune(base, 2, 0.01).items()}
    write_checkpoint(root / "wide", wide, config)
    return root


def recipe(root: Path | str, method: str, **parameters: Any) -> dict[str, Any]:
    """A recipe over the two fine-tunes and, where the method takes one, their base."""
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"{root}/sharded"}, {"model": f"{root}/wide"}],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    if method not in {"linear", "slerp"}:
        found["base_model"] = f"{root}/base"
    return found


def shard_digests(files: list[dict[str, Any]]) -> dict[str, str]:
    """Digests of the weight files of a listing."""
    return {file["name"]: file["digest"] for file in files if file["name"].endswith(".safetensors")}


def test_ties_from_post_to_checkpoint(service: RunningService, models: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump(recipe(models, "ties", density=0.4, **{"lambda": 0.8}))
    answer = service.http.post(
        "/v1/merges",
        params={"output": str(tmp_path / "out")},
        content=text,
        headers={"content-type": "application/yaml"},
    )
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/merges/{answer.json()['id']}"
    done = service.wait(answer.json()["id"])
    assert done["state"] == "succeeded", done["error"]
    progress = done["progress"]
    assert progress["bytes_done"] == progress["bytes_total"] == done["price"]["bytes_written"]
    assert progress["parts_done"] == progress["parts_total"] > 0
    assert progress["bytes_read"] == done["price"]["bytes_read"]

    base, one, two = (read_checkpoint(models / name) for name in ("base", "sharded", "wide"))
    merged = read_checkpoint(tmp_path / "out")
    assert sorted(merged) == sorted(base)
    for name, tensor in base.items():
        expected = _ties64(tensor, [one[name], two[name]], 0.4, 0.8)
        actual = merged[name].double().numpy()
        assert merged[name].dtype == torch.bfloat16
        bound = np.maximum(np.abs(expected), 2.0**-126) * 2.0**-8  # half a unit of bfloat16, and a bit
        assert (np.abs(actual - expected) <= bound).all(), name


def _ties64(base: torch.Tensor, models: list[torch.Tensor], density: float, lam: float) -> Any:
    """The paper's three steps in float64 numpy, per tensor, keeping all magnitudes equal to the threshold."""
    origin = base.double().numpy().ravel()
    trimmed = []
    for model in models:
        tau = (model.float() - base.float()).double().numpy().ravel()
        kept = max(1, int(np.floor(density * tau.size + 1e-9)))
        threshold = np.sort(np.abs(tau))[-kept]
        trimmed.append(np.where(np.abs(tau) >= threshold, tau, 0.0))
    total = sum(trimmed)
    sign = np.where(total < 0, -1.0, 1.0)
    agree = [np.where(np.sign(t) == sign, t, 0.0) for t in trimmed]
    count = sum((np.sign(t) == sign).astype(float) for t in trimmed)
    merged = sum(agree) / np.maximum(count, 1.0)
    return (origin + lam * merged).reshape(base.shape)


def test_the_output_is_a_hugging_face_checkpoint(
    service: RunningService, models: Path, tmp_path: Path
) -> None:
    done = service.merge(recipe(models, "dare_ties", density=0.5), str(tmp_path / "out"), shard_bytes=4 * MIB)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1
    for shard in shards:
        with safe_open(out / shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == shard for key in opened.keys())  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, content in TOKENIZER.items():
        assert (out / name).read_text() == content
    manifest = json.loads((out / "mergemill.json").read_text())
    assert manifest["seed"] == 0
    assert manifest["recipe"]["merge_method"] == "dare_ties"
    assert set(manifest["tensors"]) == set(index["weight_map"])
    assert len(manifest["inputs"]) == 3
    front = (out / "README.md").read_text().split("---")[1]
    assert "merge" in yaml.safe_load(front)["tags"]
    assert not (out / ".mergemill").exists()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        file["name"] for file in service.http.get(done["links"]["files"]).json()["files"]
    )


def test_files_can_be_downloaded_in_ranges(service: RunningService, models: Path, tmp_path: Path) -> None:
    done = service.merge(recipe(models, "linear"), str(tmp_path / "out"))
    files = {file["name"]: file for file in service.http.get(done["links"]["files"]).json()["files"]}
    config = files["config.json"]
    body = service.http.get(config["url"]).content
    assert f"sha256:{hashlib.sha256(body).hexdigest()}" == config["digest"]
    part = service.http.get(config["url"], headers={"range": "bytes=2-9"})
    assert (part.status_code, part.content) == (206, body[2:10])
    missing = service.http.get(done["links"]["files"] + "/..%2Fbase%2Fconfig.json")
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/problem+json"


def test_any_way_to_cut_the_work_gives_the_same_bytes(
    service: RunningService, models: Path, tmp_path: Path
) -> None:
    """Parts and tensors, whole and split: with a survey of its own, or within the part."""
    cuts: dict[str, dict[str, int]] = {
        "default": {},
        "small": {"part_bytes": 5 * MIB},
        "split": {"part_bytes": 5 * MIB, "whole_tensor_bytes": 5 * MIB},
    }
    bytes_of = {}
    for method in ("dare_ties", "ties"):
        wanted = recipe(models, method, density=0.3)
        for name, options in cuts.items():
            out = tmp_path / f"{method}-{name}"
            done = service.merge(wanted, str(out), **options)
            listing = service.http.get(done["links"]["files"]).json()["files"]
            bytes_of[method, name] = (shard_digests(listing), sha256_of(out))
            assert (done["price"]["surveyed_tensors"] > 0) == ((method, name) == ("ties", "split"))
        assert bytes_of[method, "small"] == bytes_of[method, "split"] == bytes_of[method, "default"]
    assert bytes_of["ties", "default"] != bytes_of["dare_ties", "default"]


@pytest.mark.rgw
def test_part_sizes_workers_and_stores_give_the_same_bytes(
    driver: Driver, valkey_url: str, tmp_path: Path, rgw_settings: StoreSettings, rgw_bucket: str
) -> None:
    """Parts of 5 and of 64 MiB, made by one and by two worker processes, from a directory and from S3.

    The shard is of 67 MiB, so that neither bound is idle; most of it is copied, which is quick. Of the eight
    ways to have it, these are four that hold every pair.
    """
    base = llama_tensors(0, layers=1, hidden=256, heads=4, vocab=12_000, dtype=torch.bfloat16)
    buffer = {"model.positions": torch.arange(5_500_000)}
    models = tmp_path / "models"
    write_checkpoint(models / "base", base | buffer, {"torch_dtype": "bfloat16"})
    write_checkpoint(models / "sharded", fine_tune(base, 1, 0.01) | buffer, shard_bytes=3 * MIB)
    wide = {name: tensor.float() for name, tensor in fine_tune(base, 2, 0.01).items()}
    write_checkpoint(models / "wide", wide | buffer)
    store = open_stores(rgw_settings)
    upload_directory(store, models, rgw_bucket)
    small = {"part_bytes": 5 * MIB, "whole_tensor_bytes": 5 * MIB}
    large = {"part_bytes": 64 * MIB}
    here, there = f"file://{tmp_path}/out", f"{rgw_bucket}/out"
    digests, written = [], set()
    with Driver(FleetSettings(address="local", num_cpus=1)) as single:
        for cluster, workers, runs in (
            (driver, 2, [(models, here, small), (rgw_bucket, there, large)]),
            (single, 1, [(models, here, large), (rgw_bucket, there, small)]),
        ):
            witness = Witness(cluster, workers, tmp_path / f"witness-{workers}")
            with running_service(valkey_url, witness, store=rgw_settings) as service:  # type: ignore[arg-type]
                for root, out, options in runs:
                    witness.begin()
                    wanted = recipe(root, "ties", density=0.3) | {"dtype": "float32"}
                    done = service.merge(wanted, f"{out}-{workers}", **options)
                    parts, made = done["progress"]["parts_total"], witness.seen()
                    assert sum(batch.parts for batch in made) == parts
                    assert (parts > 10) if options is small else (parts == 2)
                    # Streams as they always are: several parts in one go, where there are more than a few
                    assert (max(batch.parts for batch in made) > 1) == (options is small)
                    assert (done["price"]["surveyed_tensors"] > 0) == (options is small)
                    assert (sum(batch.surveys for batch in made) > 0) == (options is small)
                    assert cluster.capacity().cpus == witness.at_once() == workers
                    assert len({batch.pid for batch in made if batch.parts}) == workers
                    listing = service.http.get(done["links"]["files"]).json()["files"]
                    digests.append(shard_digests(listing))
                    for shard in digests[-1]:  # and not only what is said of them
                        written.add(hashlib.sha256(read_bytes(store, f"{out}-{workers}/{shard}")).hexdigest())
                    assert not list(store.list(f"{out}-{workers}/.mergemill"))
                    config = next(file for file in listing if file["name"] == "config.json")
                    assert service.http.get(config["url"]).json()["torch_dtype"] == "float32"
    assert digests[0].keys() == {"model-00001-of-00001.safetensors"}
    assert digests == digests[:1] * 4
    assert len(written) == 1


def upload_directory(store: ObjectStore, root: Path, prefix: str) -> None:
    """Copy checkpoints into a bucket."""
    for path in root.rglob("*"):
        if path.is_file():
            store.put(join(prefix, *path.relative_to(root).parts), path.read_bytes())


def sha256_of(directory: Path) -> dict[str, str]:
    """SHA-256 of every weight file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safetensors")
    }


def test_edge_cases(service: RunningService, tmp_path: Path) -> None:
    """0-d, empty and one-element tensors, all-zero task vectors, identical integer buffers, density 0 and 1."""
    base = edge_tensors(0) | integer_buffers()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "same", base, shard_bytes=64)
    floats = {name: t + 1 if t.is_floating_point() else t for name, t in base.items()}
    write_checkpoint(tmp_path / "other", floats)
    for method, parameters in {
        "linear": {},
        "task_arithmetic": {},
        "ties": {"density": 0.5},
        "dare_ties": {"density": 0.0},
        "dare_linear": {"density": 1.0},
        "slerp": {"t": 0.5},
    }.items():
        wanted: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(tmp_path / "same")}, {"model": str(tmp_path / "other")}],
            "parameters": parameters,
        }
        if method not in {"linear", "slerp"}:
            wanted["base_model"] = str(tmp_path / "base")
        service.merge(wanted, str(tmp_path / f"out-{method}"))
        merged = read_checkpoint(tmp_path / f"out-{method}")
        assert {name: t.shape for name, t in merged.items()} == {name: t.shape for name, t in base.items()}
        for name, tensor in base.items():
            if not tensor.is_floating_point() or method == "dare_ties":  # density 0 is the base
                assert torch.equal(merged[name], tensor), (method, name)
            elif method in {"task_arithmetic", "dare_linear"}:
                assert torch.allclose(merged[name], tensor + 1), (method, name)


def test_tied_weights_that_are_absent_from_the_file(service: RunningService, tmp_path: Path) -> None:
    base = llama_tensors(0, layers=1, hidden=32, heads=2, vocab=64, dtype=torch.float32)
    base.pop("lm_head.weight", None)
    config = {"model_type": "llama", "tie_word_embeddings": True}
    write_checkpoint(tmp_path / "base", base, config)
    one = fine_tune(base, 1, 0.1)
    write_checkpoint(tmp_path / "one", one, config)
    redundant = fine_tune(base, 2, 0.1)
    redundant["lm_head.weight"] = redundant["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path / "two", redundant, config)
    models = [{"model": str(tmp_path / "one")}, {"model": str(tmp_path / "two")}]
    done = service.merge({"merge_method": "linear", "models": models}, str(tmp_path / "out"))
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "out")
    assert any("lm_head.weight" in notice for notice in done["notices"])


@pytest.mark.parametrize("before", ["single file", "more shards"])
def test_overwrite_leaves_exactly_the_new_checkpoint(
    service: RunningService, models: Path, tmp_path: Path, before: str
) -> None:
    out = tmp_path / "out"
    old = llama_tensors(9, layers=1, hidden=32, heads=2, vocab=64, dtype=torch.float32)
    adapter = {"adapter_model.safetensors": b"old", "adapter_config.json": "{}"}
    others = {
        "added_tokens.json": "{}",
        **adapter,
        "training.safetensors": b"somebody's",
        "notes.txt": "keep",
    }
    write_checkpoint(out, old, {"old": True}, None if before == "single file" else 4096, others)
    answer = service.http.post("/v1/merges", json={"recipe": recipe(models, "linear"), "output": str(out)})
    assert answer.status_code == 422
    assert "already holds a checkpoint" in answer.text
    assert read_checkpoint(out).keys() == old.keys()  # refused, so untouched
    service.merge(recipe(models, "linear"), str(out), overwrite=True)
    assert read_checkpoint(out).keys() == read_checkpoint(models / "base").keys()
    assert not (out / "model.safetensors").exists()
    assert len(list(out.glob("model*.safetensors"))) == 1
    assert not (out / "added_tokens.json").exists()  # it would be loaded with the new tokenizer
    assert not any((out / name).exists() for name in adapter)  # and so would an adapter
    assert (out / "training.safetensors").exists()
    assert (out / "notes.txt").exists()
    assert "old" not in json.loads((out / "config.json").read_text())


def test_two_jobs_with_one_output(service: RunningService, models: Path, tmp_path: Path) -> None:
    ids = [service.submit(recipe(models, "linear"), str(tmp_path / "out"))["id"] for _ in range(2)]
    states = sorted(service.wait(job)["state"] for job in ids)
    assert states == ["failed", "succeeded"]
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(models / "base").keys()
