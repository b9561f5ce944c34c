"""Opening checkpoints: every way in which an input can be wrong, all said at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.opening import open_checkpoint
from tests.checkpoints import INDEX, SINGLE, llama_config, write_checkpoint
from tests.service.models_on_disk import LLAMA, planned, shards_of
from workers.errors import AccessDeniedError, ObjectNotFoundError, PlanError
from workers.store.base import ObjectInfo
from workers.store.local import LocalStore


def problems(directory: Path, store: LocalStore | None = None) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(store or LocalStore(), f"file://{directory}")
    return list(caught.value.problems)


def edit_index(directory: Path, **changes: str | None) -> None:
    path = directory / INDEX
    document = json.loads(path.read_text())
    document["weight_map"] |= changes
    document["weight_map"] = {
        key: value for key, value in document["weight_map"].items() if value is not None
    }
    path.write_text(json.dumps(document))


def test_a_single_file_and_shards_open_to_the_same_tensors(model: Path, sharded: Path) -> None:
    one, many = (open_checkpoint(LocalStore(), f"file://{path}") for path in (model, sharded))
    assert {n: (t.shape, t.dtype) for n, t in one.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in many.tensors.items()
    }
    assert len(many.pins) == len(shards_of(sharded)) > 3
    assert one.config == llama_config(1, 16, 2, 32)
    assert set(one.files) == {"tokenizer.json"}
    assert one.nbytes == sum(tensor.nbytes for tensor in LLAMA.values())
    for name, tensor in LLAMA.items():
        ref = many.tensors[name].ref
        path = Path(ref.uri.removeprefix("file://"))
        assert path.read_bytes()[ref.start : ref.end] == bytes(tensor.view(torch.uint8).flatten().tolist())
    assert len(planned(model, sharded).plan.weight_map) == len(LLAMA)


def test_the_single_file_wins_where_both_are(sharded: Path) -> None:
    write_checkpoint(sharded, {"only": torch.ones(3)})
    assert set(open_checkpoint(LocalStore(), f"file://{sharded}").tensors) == {"only"}


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """As ``hf download`` leaves it: files of a snapshot are relative links to blobs that are named by digest."""
    (tmp_path / "blobs").mkdir()
    write_checkpoint(tmp_path / "plain", {"w": torch.ones(3)}, {"model_type": "llama"})
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    found = open_checkpoint(LocalStore(), snapshot.as_uri())
    assert list(found.tensors) == ["w"]
    assert found.config == {"model_type": "llama"}


def test_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lacks = "neither model.safetensors nor model.safetensors.index.json"
    for name, said in (("empty", lacks), ("missing", f"there is no directory {tmp_path}/missing")):
        (problem,) = problems(tmp_path / name)
        assert problem.startswith(f"file://{tmp_path}/{name}: ")
        assert "no model here: " in problem
        assert said in problem


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "x.gguf"]
)
def test_weights_in_other_formats_are_never_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (problem,) = problems(tmp_path)
    assert name in problem
    assert "only safetensors is read (pickles never are); convert it first" in problem


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert "holds model-00001-of-" in problems(sharded)[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "at least 8"),
        (b"\0\0\0", "at least 8"),
        (b"\xff" * 64, "not a safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "truncated or corrupt"),
        (struct.pack("<Q", 8) + b"not json", "does not begin with"),
        (struct.pack("<Q", 2) + b"{}" + b"x", "bytes that no tensor owns"),
    ],
)
def test_a_corrupt_file_is_named(content: bytes, says: str, model: Path) -> None:
    (model / SINGLE).write_bytes(content)
    (problem,) = problems(model)
    assert says in problem
    assert f"{model}/{SINGLE}" in problem


def test_a_truncated_file_is_named(model: Path) -> None:
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(data[:-1])
    (problem,) = problems(model)
    assert f"{model}/{SINGLE}: the file is truncated" in problem


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", ".hidden.safetensors",
             "a\\b.safetensors", "\0.safetensors", "x.safetensors\n", 3, None],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(file: Any, sharded: Path) -> None:
    path = sharded / INDEX
    document = json.loads(path.read_text())
    document["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(document))
    (problem,) = problems(sharded)
    assert "tensor 'lm_head.weight' points to" in problem
    assert INDEX in problem


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "null", "[" * 100_000, "\udcff"]
)
def test_a_broken_index_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = problems(sharded)
    assert INDEX in problem
    assert "weight_map" in problem


def test_every_shard_that_is_missing_or_broken_is_named_and_a_broken_config_too(sharded: Path) -> None:
    files = shards_of(sharded)
    files[0].unlink()
    files[1].unlink()
    files[2].write_bytes(b"x")
    (sharded / "config.json").write_text("{")
    found = problems(sharded)
    assert len(found) == 4
    for name in (*(file.name for file in files[:3]), "config.json"):
        assert sum(name in problem for problem in found) == 1, (name, found)


def test_an_index_and_its_shards_have_to_agree(sharded: Path) -> None:
    first, second = (path.name for path in shards_of(sharded)[:2])
    edit_index(sharded, **{"model.embed_tokens.weight": second})
    assert (
        f"tensor 'model.embed_tokens.weight' is in {first}, the index says '{second}'" in problems(sharded)[0]
    )
    edit_index(sharded, **{"model.embed_tokens.weight": first, "ghost": first})
    assert "the index lists 1 tensor(s) that no file holds, first 'ghost'" in problems(sharded)[0]
    edit_index(sharded, ghost=None, **{"model.norm.weight": None})
    assert "the index says None" in problems(sharded)[0]


def test_the_same_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    files = shards_of(sharded)
    files[-1].write_bytes(files[0].read_bytes())
    assert "is in two weight files" in problems(sharded)[0]


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\udcff"])
def test_a_broken_config_is_named(text: str, model: Path) -> None:
    (model / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = problems(model)
    assert f"{model}/config.json is not" in problem


def test_a_model_may_lack_a_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert open_checkpoint(LocalStore(), f"file://{model}").config is None


class Guarded(LocalStore):
    """A store that does not let us list, or read what has ``forbidden`` in its name; S3 then denies what is absent."""

    def __init__(self, forbidden: str = "\0", listing: bool = False) -> None:
        super().__init__()
        self._forbidden = forbidden
        self._listing = listing

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        if self._listing and self._forbidden not in prefix:
            return super().list(prefix, beside=beside)
        raise AccessDeniedError(f"not allowed to list {prefix}")

    def head(self, uri: str) -> ObjectInfo:
        if self._forbidden in uri:
            raise AccessDeniedError(f"not allowed to read {uri}")
        try:
            return super().head(uri)
        except ObjectNotFoundError:
            if self._listing:
                raise
            raise AccessDeniedError(f"not allowed to read {uri}") from None


def test_without_permission_to_list_a_model_opens_with_its_tokenizer(model: Path, sharded: Path) -> None:
    found = open_checkpoint(Guarded(), f"file://{model}")
    assert set(found.tensors) == set(LLAMA)
    assert set(found.files) == {"tokenizer.json"}
    assert set(open_checkpoint(Guarded(), f"file://{sharded}").tensors) == set(LLAMA)


def test_no_permission_is_said_for_every_model_at_once(tmp_path: Path, model: Path) -> None:
    for name in ("secret1", "secret2"):
        write_checkpoint(tmp_path / name, LLAMA)
    with pytest.raises(PlanError) as caught:
        planned(model, tmp_path / "secret1", tmp_path / "secret2", store=Guarded("secret", listing=True))
    assert len(caught.value.problems) == 2
    for name, problem in zip(("secret1", "secret2"), caught.value.problems, strict=True):
        assert problem.startswith(f"file://{tmp_path}/{name}: not allowed to read")
