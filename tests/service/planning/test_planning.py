"""Planning on real directories: all problems of all models are said at once, and what a plan depends on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.places import overlap
from service.planning.plan import PlanOptions
from service.planning.planner import examine, plan_recipe
from service.recipe import parse_recipe
from tests.adapters import factors, write_adapter
from tests.checkpoints import SINGLE, write_checkpoint
from tests.service.models_on_disk import LLAMA, planned, shards_of
from workers.errors import PlanError, StoreUnavailableError
from workers.store.base import ObjectInfo
from workers.store.local import LocalStore
from workers.task import part_id


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


def test_a_name_of_no_place_and_a_broken_model_are_said_together(model: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "copied", LLAMA | {"ids": torch.arange(3)})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / SINGLE).write_bytes(b"not a header")
    for first, second in itertools.permutations([model, tmp_path / "copied"]):
        names = ["0", str(first), str(second), str(tmp_path / "broken")]
        for method in ("linear", "ties"):
            value = {"merge_method": method, "models": [{"model": name} for name in names]}
            recipe = parse_recipe(value | ({"base_model": "0"} if method == "ties" else {}))
            problems = examine(recipe, PlanOptions(), LocalStore(), {}).problems
            assert any(problem.startswith("'0' is a hub name") for problem in problems)
            assert any("broken" in problem for problem in problems)


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
    monkeypatch.setattr("service.planning.planner.COMPARED_BYTES", 1)
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


def test_a_directory_that_is_both_model_and_adapter_is_pinned_as_both(model: Path, sharded: Path) -> None:
    write_adapter(model, factors(1, LLAMA, {"model.layers.0.self_attn.q_proj": 4}))
    value = [{"model": str(model)}, {"model": str(sharded), "adapter": str(model)}]
    found = planned(merge_method="linear", models=value)
    names = {uri.rpartition("/")[2] for uri in found.pins[model.as_uri()]}
    assert names == {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}


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
