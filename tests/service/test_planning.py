"""Opening checkpoints and planning on real directories: every way in which an input can be wrong, all said at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.opening import open_checkpoint
from service.plan import PlanOptions
from service.planning import Planned, examine, overlap, plan_recipe
from service.recipe import parse_recipe
from tests.checkpoints import INDEX, SINGLE, llama_config, llama_tensors, write_checkpoint
from workers.errors import AccessDeniedError, ObjectNotFoundError, PlanError, StoreUnavailableError
from workers.store.base import ObjectInfo
from workers.store.local import LocalStore
from workers.task import part_id

LLAMA = llama_tensors(layers=1, hidden=16, heads=2, vocab=32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "model", LLAMA, llama_config(1, 16, 2, 32), extra_files={"tokenizer.json": "{}"}
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", LLAMA, llama_config(1, 16, 2, 32), shard_bytes=4096)


def problems(directory: Path, store: LocalStore | None = None) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(store or LocalStore(), f"file://{directory}")
    return list(caught.value.problems)


def planned(
    *directories: Path, method: str = "linear", store: LocalStore | None = None, **more: Any
) -> Planned:
    value = {"merge_method": method, "models": [{"model": str(each)} for each in directories]} | more
    return plan_recipe(
        parse_recipe(value), PlanOptions(worker_memory_bytes=1 << 40), store or LocalStore(), {}
    )


def edit_index(directory: Path, **changes: str | None) -> None:
    path = directory / INDEX
    document = json.loads(path.read_text())
    document["weight_map"] |= changes
    document["weight_map"] = {
        key: value for key, value in document["weight_map"].items() if value is not None
    }
    path.write_text(json.dumps(document))


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


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


def test_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        (problem,) = problems(tmp_path / name)
        assert problem.startswith(f"file://{tmp_path}/{name}: ")
        assert "neither model.safetensors nor model.safetensors.index.json" in problem


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


class Down(LocalStore):
    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        raise StoreUnavailableError(f"{prefix}: connection refused, 5 times")


def test_a_store_that_is_down_is_said_for_every_model_and_is_no_problem_of_theirs(
    model: Path, sharded: Path
) -> None:
    """A job that is half done waits for the store, where a problem of the plan would end it."""
    with pytest.raises(StoreUnavailableError) as caught:
        planned(model, sharded, store=Down())
    assert str(caught.value).count("connection refused") == 2


def test_all_problems_of_all_models_are_said_at_once(tmp_path: Path, model: Path, sharded: Path) -> None:
    shards_of(sharded)[0].unlink()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    names = [
        str(model),
        str(sharded),
        str(tmp_path / "bin"),
        str(tmp_path / "gone"),
        "org/unmapped",
        "./relative",
    ]
    recipe = parse_recipe({"merge_method": "linear", "models": [{"model": name} for name in names]})
    with pytest.raises(PlanError) as caught:
        plan_recipe(recipe, PlanOptions(), LocalStore(), {}, output=f"file://{model}/out")
    found = caught.value.problems
    assert len(found) == 6
    for says in (
        "overlaps the input",
        "model-00001-of",
        "pickles never are",
        "/gone: no model here",
        "org/unmapped",
        "'./relative'",
    ):
        assert sum(says in problem for problem in found) == 1, (says, found)


def looked_at(root: Path, *names: str, store: LocalStore | None = None, **more: Any) -> list[str]:
    """What is wrong with the TIES merge of models below ``root`` onto ``root/base``, in this little memory."""
    recipe = {
        "merge_method": "ties",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in names],
    }
    outcome = examine(
        parse_recipe(recipe | more), PlanOptions(worker_memory_bytes=1), store or LocalStore(), {}
    )
    assert outcome.planned is None
    assert (outcome.price is None) is not any("raise it to" in problem for problem in outcome.problems)
    return [problem.replace(str(root), "") for problem in (*outcome.problems, *outcome.away)]


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A directory of models that fit together and of some that do not."""
    base = {
        "w": torch.ones(4, 4),
        "x": torch.ones(2),
        "ids": torch.arange(3),
        "lm_head.weight": torch.ones(4),
    }
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "fits", base | {"w": torch.zeros(4, 4)})
    write_checkpoint(tmp_path / "shaped", base | {"w": torch.ones(4, 5)})
    write_checkpoint(tmp_path / "lacking", {name: base[name] for name in ("w", "ids", "lm_head.weight")})
    write_checkpoint(tmp_path / "surplus", base | {"y": torch.ones(1)})
    write_checkpoint(tmp_path / "counted", base | {"ids": torch.arange(3).flip(0)})
    return tmp_path


MEMORY = "the biggest task ("


def test_a_model_that_did_not_open_hides_nothing_of_the_others_nor_the_price(family: Path) -> None:
    found = looked_at(family, "gone", "shaped", "lacking", "surplus", "counted")
    assert len(found) == 6
    for says in (
        "/gone: no model here",
        "/shaped: shape differs from /base: w [4, 5], not [4, 4]",
        "/lacking: lacks tensors of /base: x",
        "/surplus: tensors that /base does not have: y",
        "/counted: integer or boolean buffers differ from /base: ids",
        MEMORY,
    ):
        assert sum(says in problem for problem in found) == 1, (says, found)


def test_a_model_that_did_not_open_costs_what_it_would_if_it_fitted(family: Path) -> None:
    def need(name: str) -> int:
        (said,) = [problem for problem in looked_at(family, "fits", name) if MEMORY in problem]
        return int(said.rpartition(" ")[2])

    twin = {
        "w": torch.zeros(4, 4),
        "x": torch.zeros(2),
        "ids": torch.arange(3),
        "lm_head.weight": torch.zeros(4),
    }
    write_checkpoint(family / "twin", twin)
    assert abs(need("none") - need("twin")) < 100  # ETags are priced, too, and may differ in length
    (alone,) = [problem for problem in looked_at(family, "fits") if MEMORY in problem]
    assert need("none") > int(alone.rpartition(" ")[2]) + 10_000


def test_without_the_base_only_what_no_base_could_reconcile_is_said(family: Path) -> None:
    gone = "file:///base: no model here: neither model.safetensors nor model.safetensors.index.json exists"
    (family / "base" / SINGLE).unlink()
    found = looked_at(family, "fits", "lacking", "surplus")
    assert [problem for problem in found if MEMORY not in problem] == [gone]
    found = looked_at(family, "fits", "shaped", "counted")
    assert [problem.partition(";")[0] for problem in found if MEMORY not in problem] == [
        "/counted: integer or boolean buffers differ from /fits: ids",
        "/shaped: shape differs from /fits: w [4, 5], not [4, 4]",
        gone,
    ]
    found = looked_at(
        family, "fits", "shaped", "counted", extra_tensors="drop"
    )  # the base may lack w and ids
    assert [problem for problem in found if MEMORY not in problem] == [gone]


def test_where_no_model_opened_nothing_is_priced(family: Path) -> None:
    assert len(looked_at(family / "nowhere", "a", "b")) == 3


def test_a_store_that_is_away_for_one_model_hides_nothing_of_the_others(family: Path) -> None:
    class Half(LocalStore):
        def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
            if "fits" in prefix:
                raise StoreUnavailableError(f"{prefix}: connection refused")
            return super().list(prefix, beside=beside)

    found = looked_at(family, "fits", "shaped", store=Half())
    assert [problem.partition(": ")[0] for problem in found[:-2]] == ["/shaped"]
    assert MEMORY in found[-2]
    assert "connection refused" in found[-1]


def test_buffers_that_could_not_be_compared_are_not_said_to_differ(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.planning.COMPARED_BYTES", 1)
    found = looked_at(family, "shaped", "counted")
    assert len(found) == 3
    assert "ids take no arithmetic" in found[1]


def test_misfits_are_said_together_with_an_output_inside_an_input(tmp_path: Path, model: Path) -> None:
    other = write_checkpoint(tmp_path / "other", {"x": torch.ones(2)})
    recipe = parse_recipe(
        {"merge_method": "linear", "models": [{"model": str(model)}, {"model": str(other)}]}
    )
    with pytest.raises(PlanError) as caught:
        plan_recipe(
            recipe, PlanOptions(worker_memory_bytes=1 << 40), LocalStore(), {}, output=f"file://{other}"
        )
    assert len(caught.value.problems) == 3  # missing, surplus, overlap


def test_buffers_are_compared_by_their_bytes(tmp_path: Path) -> None:
    base = {"w": torch.ones(3), "ids": torch.arange(9), "flag": torch.tensor(True)}
    one = write_checkpoint(tmp_path / "one", base)
    two = write_checkpoint(tmp_path / "two", base | {"w": torch.zeros(3)}, shard_bytes=8)
    three = write_checkpoint(
        tmp_path / "three", base | {"ids": torch.arange(9).flip(0), "flag": torch.tensor(False)}
    )
    assert planned(one, two).plan.weight_map.keys() == base.keys()
    with pytest.raises(PlanError) as caught:
        planned(one, two, three)
    assert caught.value.problems == (
        f"{three}: integer or boolean buffers differ from {one}: ids, flag; "
        "they are never averaged: set `buffers:` to the model whose values win",
    )
    assert planned(one, two, three, buffers=str(three)).plan.weight_map.keys() == base.keys()


def test_the_same_inputs_give_the_same_plan_and_a_changed_one_another(model: Path, sharded: Path) -> None:
    first, again = planned(model, sharded), planned(model, sharded)
    assert first.plan == again.plan
    (sharded / "unrelated.txt").write_text("x")
    assert planned(model, sharded).plan.digest == first.plan.digest
    write_checkpoint(model, LLAMA | {"model.norm.weight": torch.zeros(16)})
    changed = planned(model, sharded).plan
    assert changed.digest != first.plan.digest
    assert {part_id(part) for part in changed.parts}.isdisjoint(part_id(part) for part in first.plan.parts)


def test_the_tokenizer_is_the_one_that_is_asked_for(model: Path, sharded: Path) -> None:
    assert planned(sharded, model).tokenizer.uri == f"file://{sharded}"
    assert planned(sharded, model, tokenizer_source=str(model)).tokenizer.uri == f"file://{model}"
    assert (
        planned(sharded, model, base_model=str(model), tokenizer_source="base").tokenizer.uri
        == f"file://{model}"
    )


def test_names_with_odd_characters_work(tmp_path: Path) -> None:
    odd = write_checkpoint(
        tmp_path / "mödel 100%#?", {"w.ü \U0001f9ea": torch.ones(3)}, {"a": 1}, shard_bytes=1
    )
    found = planned(odd)
    assert list(found.plan.weight_map) == ["w.ü \U0001f9ea"]
    assert found.inputs.reference.config == {"a": 1}


def test_an_output_overlaps_an_input_that_it_is_holds_or_lies_in() -> None:
    inputs = ["s3://b/models/one", "s3://b/models/two"]
    assert overlap("s3://b/models/out", inputs) == []
    assert overlap("s3://b/models/one-merged", inputs) == []
    for output, count in (
        ("s3://b/models/one", 1),
        ("s3://b/models", 2),
        ("s3://b/models/two/x", 1),
        ("s3://b", 2),
    ):
        assert len(overlap(output, inputs)) == count


def test_a_symbolic_link_does_not_hide_an_overlap(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    models = (tmp_path / "models").as_uri()
    assert overlap((tmp_path / "link" / "out").as_uri(), [models])
    assert overlap((tmp_path / "link").as_uri(), [f"{models}/one"])
    assert not overlap((tmp_path / "out").as_uri(), [models])
