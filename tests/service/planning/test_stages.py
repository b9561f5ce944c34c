"""Recipes of several documents make what their documents make one by one, computed again on the way or staged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from service.planning.checkpoint import Checkpoint
from service.planning.opening import open_checkpoint
from service.planning.plan import PLAN, PlanOptions
from service.planning.planner import Planned, examine, plan_recipe
from service.recipe import parse_documents, parse_recipe
from service.running.claim import Claim
from service.running.commit import Output, for_ever
from service.running.sidecars import config_json, manifest, model_card, tensor_blocks
from tests.checkpoints import fine_tune, llama_config, llama_tensors, write_checkpoint
from tests.workers.execute import run
from workers.errors import PlanError
from workers.sources import Derived
from workers.store.base import ObjectStore
from workers.store.local import LocalStore
from workers.store.uris import from_path
from workers.task import MergePiece

OPTIONS = PlanOptions(worker_memory_bytes=1 << 40, shard_bytes=40_000)
JOB = "merge-" + "0" * 26
SHAPE: dict[str, Any] = {"layers": 3, "hidden": 32, "heads": 2, "vocab": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with three fine-tunes, in bfloat16."""
    root = tmp_path_factory.mktemp("stages")
    base = llama_tensors(0, dtype=torch.bfloat16, **SHAPE)
    for number, name in enumerate(("base", "a", "b", "c")):
        tensors = fine_tune(base, number, 0.1) if number else base
        config = llama_config(dtype=torch.bfloat16, **SHAPE)
        write_checkpoint(root / name, tensors, config, extra_files={"tokenizer.json": f'"{name}"'})
    return root


def entry(root: Path, name: str, **parameters: Any) -> dict[str, Any]:
    """A model of a document: a directory of ``root``, or another document."""
    place = root / name
    return {"model": str(place) if place.is_dir() else name, "parameters": parameters}


def documents(root: Path, earlier: str, dtype: str | None) -> list[dict[str, Any]]:
    """A chain of three: ``earlier`` decides what the first two do."""
    base = {"base_model": str(root / "base")}
    two = [entry(root, name, weight=[0.2, 0.9], density=0.5) for name in "ab"]
    slices = [
        {"sources": [{"model": str(root / "a"), "layer_range": [0, 2]}]},
        {"sources": [{**entry(root, "b", scale=0.5), "layer_range": [1, 3]}]},
    ]
    first: dict[str, dict[str, Any]] = {
        "linear": {
            "merge_method": "linear",
            "models": [entry(root, each, weight=[0.1, 0.8]) for each in "ab"],
        },
        "dare": {"merge_method": "dare_linear", **base, "seed": 7, "models": two},
        "slices": {"merge_method": "passthrough", "slices": slices},
        "ties": {"merge_method": "ties", **base, "models": two},
        "stock": {"merge_method": "model_stock", **base, "models": [entry(root, each) for each in "abc"]},
    }
    if earlier == "slices":
        sources = [
            {"model": name, "layer_range": at} for name, at in (("first", [1, 4]), (str(root / "c"), [0, 3]))
        ]
        second = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 0.5}}
    elif earlier in ("ties", "stock"):
        models = [entry(root, "first"), entry(root, "c")]
        second = {"merge_method": "slerp", "base_model": "first", "models": models, "parameters": {"t": 0.3}}
    else:
        second = {
            "merge_method": "task_arithmetic",
            "base_model": "first",
            "models": [entry(root, "c", weight=0.7)],
        }
    others = [
        entry(root, "second", weight=0.5),
        entry(root, "c" if earlier == "slices" else "first", weight=0.25),
    ]
    last = {"merge_method": "linear", "models": others, "parameters": {"normalize": False}}
    common = {} if dtype is None else {"dtype": dtype}
    return [
        {"name": "first", **first[earlier], **common},
        {"name": "second", **second, **common},
        {**last, **common},
    ]


def by_hand(root: Path, wanted: Sequence[dict[str, Any]]) -> tuple[list[bytes], str | None]:
    """The last document's shards and config, each document merged by itself before the next."""
    for document in wanted:
        name = document.get("name", "last")

        def placed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: placed(inner) for key, inner in value.items() if key != "name"}
            if isinstance(value, list):
                return [placed(inner) for inner in value]
            return str(root / value) if value in ("first", "second") else value

        planned = plan_recipe(parse_recipe(placed(document)), OPTIONS, LocalStore(), {})
        (root / name).mkdir(parents=True)
        done = run(planned, root / name)
        config = config_json(planned)
        (root / name / "config.json").write_text(config or "")
        (root / name / "model.safetensors.index.json").write_text(planned.plan.index)
    return done.shards(), config


def plan(wanted: Sequence[dict[str, Any]], output: Path | None = None) -> Planned:
    where = None if output is None else from_path(str(output))
    return plan_recipe(parse_documents(list(wanted)), OPTIONS, LocalStore(), {}, output=where)


def derived(planned: Planned) -> list[Derived]:
    """The operands of the output that are earlier merges."""
    pieces = (piece for part in planned.plan.parts for piece in part.pieces)
    sources = (
        source for piece in pieces if isinstance(piece, MergePiece) for source in piece.arithmetic.sources
    )
    return [source for source in sources if isinstance(source, Derived)]


@pytest.mark.parametrize(
    ("earlier", "dtype"),
    [("linear", "bfloat16"), ("linear", "float32"), ("dare", None), ("slices", "float32"), ("ties", "bfloat16"),
     ("ties", "float32"), ("stock", None)],
)  # fmt: skip
def test_documents_together_make_what_they_make_one_by_one(
    models: Path, tmp_path: Path, earlier: str, dtype: str | None
) -> None:
    wanted = documents(models, earlier, dtype)
    shards, config = by_hand(tmp_path / "hand", wanted)
    planned = plan(wanted, tmp_path / "out")
    assert bool(planned.plan.stages) is (earlier in ("ties", "stock"))
    assert bool(derived(planned)) is (earlier not in ("ties", "stock"))
    done = run(planned, tmp_path / "out", order=3)
    assert done.shards() == shards
    assert config_json(planned) == config


def test_any_order_and_any_output_makes_the_same_bytes(models: Path, tmp_path: Path) -> None:
    wanted = documents(models, "ties", "bfloat16")
    made = [
        run(plan(each, tmp_path / name), tmp_path / name)
        for each, name in ((wanted, "x"), (wanted[::-1], "y"))
    ]
    assert made[0].shards() == made[1].shards()
    assert made[0].planned.plan.digest == made[1].planned.plan.digest  # though the staged files lie elsewhere
    assert plan(wanted[1:] + wanted[:1], tmp_path / "z").plan.digest == made[0].planned.plan.digest


def test_what_is_staged_is_hidden_and_priced(models: Path, tmp_path: Path) -> None:
    planned = plan(documents(models, "ties", "bfloat16"), tmp_path / "out")
    (first, second), whole = planned.plan.stages, planned.plan.total
    assert PLAN.validate_json(PLAN.dump_json(planned.plan)) == planned.plan
    names = [shard.name for stage in (first, second) for shard in stage.shards]
    assert len(set(names)) == len(names)
    assert all(name.startswith(".mergemill/stage-") for name in names)
    assert set(planned.plan.weight_map.values()) == {shard.name for shard in planned.plan.shards}
    prices = [first.price, second.price, planned.plan.price]
    assert whole.bytes_written == sum(price.bytes_written for price in prices) > 2 * prices[-1].bytes_written
    assert whole.parts == sum(len(each.parts) for each in planned.plan.whole)
    assert whole.peak_bytes == max(price.peak_bytes for price in prices)
    assert whole.shards == len(planned.plan.shards)


def test_the_card_and_the_manifest_tell_of_all_documents_and_of_no_stage(
    models: Path, tmp_path: Path
) -> None:
    wanted = documents(models, "ties", "bfloat16")
    done = run(plan(wanted, tmp_path / "out"), tmp_path / "out")
    card = model_card(done.planned, "1")
    assert all(f"`{method}`" in card for method in ("ties", "slerp", "linear"))
    assert card.count("---\n") == 2 + 2
    assert "name: first" in card
    assert "- `first`" not in card
    blocks = tensor_blocks(done.planned.plan, done.results)
    told = manifest(done.planned, blocks, [], {}, "1")
    assert told["recipe"] == parse_documents(wanted).to_json()
    assert told["inputs"].keys() == {from_path(str(models / name)) for name in ("base", "a", "b", "c")}
    assert "stage-" not in str(told)


def test_files_come_from_the_models_that_earlier_merges_are_made_of(models: Path) -> None:
    wanted = documents(models, "linear", None)
    wanted[0]["tokenizer_source"] = str(models / "b")
    assert Path(plan(wanted).tokenizer.files["tokenizer.json"].uri).parent.name == "b"


def test_what_is_only_copied_is_copied_from_where_it_is(models: Path, tmp_path: Path) -> None:
    halves = [{"sources": [{"model": "first", "layer_range": each}]} for each in ([0, 2], [1, 3])]
    wanted = [
        {"name": "first", "merge_method": "passthrough", "models": [entry(models, "a")]},
        {"merge_method": "passthrough", "slices": halves},
    ]
    planned = plan(wanted)
    assert not planned.plan.stages
    assert {piece.kind for part in planned.plan.parts for piece in part.pieces} == {"header", "copy"}
    assert {ref.uri for part in planned.plan.parts for ref in part.refs} == {
        from_path(str(models / "a" / "model.safetensors"))
    }
    assert '"num_hidden_layers": 4' in str(config_json(planned))


def test_merges_that_use_each_other_over_and_over_do_not_make_plans_that_explode(models: Path) -> None:
    chain: list[dict[str, Any]] = [
        {
            "name": "m0",
            "merge_method": "linear",
            "models": [entry(models, "a", weight=1), entry(models, "b", weight=1)],
        }
    ]
    for number in range(1, 24):
        both = [{"model": f"m{number - 1}", "parameters": {"weight": weight}} for weight in (0.25, 0.75)]
        chain.append({"name": f"m{number}", "merge_method": "linear", "models": both})
    planned = plan(chain)
    assert 2 <= len(planned.plan.stages) <= 8
    assert max(len(piece.refs) for part in planned.plan.parts for piece in part.pieces) <= 32


def test_what_is_wrong_with_an_earlier_merge_is_told_with_its_name(models: Path) -> None:
    wanted = documents(models, "linear", None)
    wanted[0]["models"][1]["model"] = str(models / "nothing")
    del wanted[1]["models"][0]["parameters"]
    wanted[2]["models"].append({"model": "unknown/hub", "parameters": {"weight": 1}})
    outcome = examine(parse_documents(wanted), OPTIONS, LocalStore(), {})
    assert len(outcome.problems) == 2
    assert outcome.planned is None
    wanted = documents(models, "slices", None)
    wanted[0]["slices"][1]["sources"][0]["layer_range"] = [1, 4]
    with pytest.raises(PlanError, match=r"first: slices\[1\].* goes beyond the 3 layers") as caught:
        plan(wanted)
    assert len(caught.value.problems) == 1


def test_a_merge_that_the_output_does_not_use_is_told_of_and_not_made(models: Path) -> None:
    wanted = documents(models, "linear", None)
    spare = {"name": "spare", "merge_method": "passthrough", "models": [{"model": "no/where"}]}
    planned = plan([spare, *wanted])
    assert planned.plan.notices[0] == "spare: the output does not use this merge, so it is not made"
    assert planned.plan.digest == plan(wanted).plan.digest


def test_two_merges_that_are_the_same_are_made_once(models: Path, tmp_path: Path) -> None:
    first = documents(models, "ties", "bfloat16")[0]
    twice = {
        "merge_method": "linear",
        "models": [entry(models, name, weight=0.5) for name in ("first", "again")],
    }
    planned = plan([first, first | {"name": "again"}, twice], tmp_path / "out")
    alone = plan([first, {**twice, "models": twice["models"][:1]}], tmp_path / "out")
    assert planned.plan.stages == alone.plan.stages
    ids = [identity for each in planned.plan.whole for identity in each.part_ids]
    assert len(set(ids)) == len(ids)
    output = Output(LocalStore(), from_path(str(tmp_path / "out")), JOB, for_ever)
    shards = tuple(shard.name for each in planned.plan.whole for shard in each.shards)
    claim = Claim(job=JOB, recipe={}, plan_digest=planned.plan.digest, shards=shards)
    uploads = output.open_uploads(planned.plan, claim, {})
    assert all(output.held_parts(name, uploads) == [] for name in shards)  # none was aborted
    assert run(planned, tmp_path / "out").shards()


def test_the_bytes_of_the_inputs_are_counted_once(models: Path, tmp_path: Path) -> None:
    wanted = documents(models, "ties", "bfloat16")
    planned = plan(wanted, tmp_path / "out")
    (size,) = {sum(each.ref.nbytes for each in found.tensors.values()) for found in planned.checkpoints}
    assert planned.plan.total.input_bytes == 4 * size
    assert PLAN.validate_json(PLAN.dump_json(planned.plan)).total == planned.plan.total
    last = {"merge_method": "ties", "base_model": str(models / "base"), "models": [{"model": "second"}]}
    assert plan([*documents(models, "linear", "bfloat16")[:2], last]).plan.total.input_bytes == 4 * size


def test_a_model_that_did_not_open_ends_planning_whoever_forgot_to_say_why(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(store: ObjectStore, uri: str) -> Checkpoint | None:
        return None if uri.endswith("/b") else open_checkpoint(store, uri)

    monkeypatch.setattr("service.planning.planner.open_checkpoint", silent)
    recipe = documents(models, "linear", None)[0]
    for value in (recipe, [recipe, {"merge_method": "passthrough", "models": [{"model": "first"}]}]):
        outcome = examine(parse_documents(value), OPTIONS, LocalStore(), {})
        assert outcome.planned is None
        assert outcome.problems == (f"{models / 'b'}: could not be opened, and nothing says why",)
    monkeypatch.setattr("service.planning.planner.open_checkpoint", lambda store, uri: None)
    with pytest.raises(PlanError, match="could not be opened") as caught:
        plan([recipe])
    assert len(caught.value.problems) == 2


def test_documents_that_are_not_run_are_not_told_of_as_merged(models: Path) -> None:
    spare = {"name": "spare", "merge_method": "model_stock", "base_model": str(models / "unused")}
    spare["models"] = [entry(models, "base"), entry(models, "c")]  # type: ignore[assignment]
    card = model_card(plan([spare, *documents(models, "linear", None)]), "1")
    told = card.partition("## Recipe")[0]
    assert "`linear`" in told and "`model_stock`" not in told
    assert str(models) not in card
    assert "base_model: unused" in card
