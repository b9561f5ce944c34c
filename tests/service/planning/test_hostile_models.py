"""Checkpoints of somebody who means harm: refused while planning, in bounded time and memory, with a short message."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.planning import checkpoint as limits
from service.planning import opening
from service.planning import planner as planning
from service.planning.checkpoint import is_copied, parse_index, shard_uri
from service.planning.opening import open_checkpoint
from tests.checkpoints import INDEX, SINGLE, write_checkpoint
from tests.fuzzing import fuzzed
from tests.service.models_on_disk import planned
from workers.errors import HeaderError, PlanError
from workers.safetensors_format import MAX_TENSORS
from workers.store.local import LocalStore


def problems(directory: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(LocalStore(), f"file://{directory}")
    assert all(len(problem) < 2_000 for problem in caught.value.problems)
    return list(caught.value.problems)


def test_headers_of_100_mb_take_bounded_memory() -> None:
    command = [sys.executable, "-m", "tests.service.hostile_headers"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=110)
    found = {kind: (kib / 1024, said) for kind, (kib, said) in json.loads(done.stdout).items()}
    assert found["tensors"][1] == f"{MAX_TENSORS} tensors"
    assert found["tensors"][0] < 500
    assert found["a name"][0] < 300
    assert "has a name of" in found["a name"][1]
    for kind in ("lists", "metadata", "too many tensors"):
        mib, said = found[kind]
        assert "values: it is not one of up to" in said
        assert mib < 50, kind


def test_headers_of_all_shards_are_bounded_together(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_HEADERS_BYTES", 500)
    (problem,) = problems(sharded)
    assert "the headers have" in problem


def test_a_checkpoint_of_many_shards_is_as_bounded_as_one(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_TENSORS", 5)
    assert "more than the 5 tensors that are read" in problems(sharded)[0]


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize("size", [1 << 40, 200_000_000])
def test_endless_files_are_not_read(name: str, size: int, sharded: Path) -> None:
    with (sharded / name).open("r+b") as file:
        file.truncate(size)  # sparse: it takes no room
    assert f"{name} has {size} bytes, more than the" in problems(sharded)[0]


def test_an_index_of_millions_is_refused_before_it_is_read() -> None:
    text = b'{"weight_map":{' + b",".join([b'"a":"b.safetensors"'] * (MAX_TENSORS + 2000)) + b"}}"
    with pytest.raises(HeaderError, match="names more than the 262144 tensors"):
        parse_index(text, "file:///index")


def test_a_directory_of_too_many_files(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_FILES", 2)
    assert "holds more than 2 files" in problems(model)[0]


def nested(depth: int, key: str = "text_config") -> str:
    return f'{{"{key}":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (nested(100), "more than 64 levels"),  # reads well, and would fail when it is written
        (nested(900), "levels deep"),
        (nested(100_000), "nested too deeply"),
        ('{"a":' + "[" * 200 + "]" * 200 + "}", "more than 64 levels"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        ('{"a": [' + "[]," * 300_000 + "[]]}", "values, more than the"),
        ('{"a": 1' + "0" * 5000 + "}", "integer string conversion"),
        ("[]", "not a JSON object"),
        ("\udcff", "utf-8"),
    ],
    ids=lambda value: value[:12],
)
def test_a_config_that_could_not_be_written_again_is_refused_while_planning(
    text: str, says: str, model: Path
) -> None:
    (model / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = problems(model)
    assert says in problem
    assert "config.json" in problem


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "..\\model.safetensors", "/model.safetensors", "C:\\model.safetensors", "a/b.safetensors",
     "\\\\host\\share.safetensors", "file:///etc/x.safetensors", ".hidden.safetensors", "..safetensors", "NUL",
     "a\0.safetensors", "a\n.safetensors", "a.safetensors\n", "\u202ea.safetensors", "\ud800.safetensors",
     "\udcff.safetensors", "\u2028.safetensors", "a" * 300 + ".safetensors", "é" * 130 + ".safetensors",
     "a.safetensors\0.bin", "a.bin", "a.pt", "a.pkl", "a.safetensors.bin", "a.SAFETENSORS", True, 1, None, [], {}],
)  # fmt: skip
def test_an_index_points_to_nothing_but_a_safetensors_file_beside_it(file: Any) -> None:
    with pytest.raises(HeaderError, match=r"not a \.safetensors file beside it") as caught:
        parse_index(json.dumps({"weight_map": {"a": file}}).encode(), "s3://bucket/model/index")
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("%2e%2e%2fa.safetensors", "%252e%252e%252fa.safetensors"), ("a?b=c.safetensors", "a%3Fb%3Dc.safetensors"),
        ("a#b.safetensors", "a%23b.safetensors"), ("a;b&c.safetensors", "a%3Bb%26c.safetensors"),
        ("mоdel.safetensors", "m%D0%BEdel.safetensors"), ("CON.safetensors", "CON.safetensors"),
    ],
)  # fmt: skip
def test_odd_names_are_the_names_of_files_beside_the_index(file: str, path: str) -> None:
    index = json.dumps({"weight_map": {"a": file}}).encode()
    assert parse_index(index, "s3://b/index") == {"a": file}
    assert shard_uri("file:///model", file) == f"file:///model/{path}"
    assert shard_uri("s3://bucket/model", file) == f"s3://bucket/model/{file}"


@pytest.mark.parametrize("text", ['{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}',
                                  '{"weight_map":{},"weight_map":{"a":"b.safetensors"}}'])  # fmt: skip
def test_an_index_says_nothing_twice(text: str) -> None:
    with pytest.raises(HeaderError, match="twice"):
        parse_index(text.encode(), "file:///index")


@fuzzed(150)
@given(st.data())
def test_any_index_is_a_map_to_files_beside_it_or_refused(data: st.DataObject) -> None:
    leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just("a.safetensors")
    value = data.draw(
        st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=8), leaf, max_size=5)})
        | st.recursive(leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    )
    text = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse_index(bytes(text), "file:///index")
    except HeaderError as error:
        assert len(str(error)) < 2_000
        return
    assert found
    for file in found.values():
        assert "/" not in file
        assert shard_uri("file:///model", file).startswith("file:///model/")


def test_what_is_copied_has_a_name_that_every_store_and_every_json_takes() -> None:
    for name in ("tokenizer.json", "vocab.txt", "modeling_näme.py", "a b.json"):
        assert is_copied(name)
    for name in ("a.json\n", "\x1b[31m.json", "\udcff.json", ".env.json", ".json", "\u202ea.txt", "a" * 300 + ".json",
                 "../a.json", "pytorch_model.bin", "model.pt", "model.pkl", "x.npz"):  # fmt: skip
        assert not is_copied(name)


def test_a_file_name_that_no_manifest_can_hold_is_left_behind(model: Path) -> None:
    (model / os.fsdecode(b"\xff.json")).write_text("{}")
    assert set(open_checkpoint(LocalStore(), f"file://{model}").files) == {"tokenizer.json"}


def test_a_tokenizer_that_nobody_can_hold_fails_while_planning(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MAX_COPIED_BYTES", 3)
    (model / "tokenizer.json").write_text("{   }")
    with pytest.raises(
        PlanError, match=r"tokenizer.json has 5 bytes, more than the 3 of a file that is copied"
    ):
        planned(model)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "tokenizer.json"])
def test_pipes_are_not_waited_for(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(4)})
    if name == INDEX:
        (tmp_path / SINGLE).unlink()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "tokenizer.json":
        assert not open_checkpoint(LocalStore(), f"file://{tmp_path}").files
    elif name == "config.json":
        assert open_checkpoint(LocalStore(), f"file://{tmp_path}").config is None
    else:
        assert "no model here" in problems(tmp_path)[0]


@fuzzed(100)
@given(st.data())
def test_any_header_opens_or_is_refused_with_a_short_message(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("model", numbered=True)
    write_checkpoint(place, {"a": torch.zeros(4), "b": torch.ones(2, 2), "c": torch.zeros(0, 3)})
    content = bytearray((place / SINGLE).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        byte = data.draw(st.sampled_from(list(b'0123456789[]{},:"- .eE\\')) | st.integers(0, 255))
        content[data.draw(st.integers(0, 8 + length - 1))] = byte
    (place / SINGLE).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        found = open_checkpoint(LocalStore(), f"file://{place}")
    except PlanError as error:
        assert all(len(problem) < 2_000 for problem in error.problems)
    else:
        assert all(tensor.ref.end <= len(content) for tensor in found.tensors.values())
