"""Recipes that name a Fisher or Gram matrices beside each model: what is read, what goes with what, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergemill.recipes import localise
from service.access import grant
from service.keys import ApiKey, Limits, Scope
from service.planning.plan import PlanOptions
from service.planning.planner import Outcome, Planned, examine
from service.planning.price import BASELINE_BYTES, workspace_bytes
from service.planning.salvage import salvage
from service.recipe import parse_recipe
from service.running.sidecars import manifest, model_card
from tests.checkpoints import Tensors, write_checkpoint
from workers.errors import ForbiddenError, PlanError, RecipeError
from workers.store.local import LocalStore
from workers.task import PART, Arithmetic, MergePiece, ModelInput, TensorRef, part_id

pytestmark = pytest.mark.fast

LAYERS = [f"model.layers.{number}.{name}.weight" for number in range(2) for name in ("mlp", "norm")]
"""Two layers of a matrix ``[6, 4]`` and a vector of 4."""


def tensors(seed: int, vocabulary: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn((6, 4) if ".mlp." in name else (4,), generator=generator) for name in LAYERS}
    return (
        {"model.embed_tokens.weight": torch.randn(8, 4, generator=generator), **found}
        if vocabulary
        else found
    )


def fisher(seed: int) -> Tensors:
    return {name: tensor**2 for name, tensor in tensors(seed).items()}


def gram(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(9, 4, generator=generator) for name in LAYERS if ".mlp." in name}
    return {name: x.T @ x for name, x in inputs.items()}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base, two models ``a`` and ``b``, and of each ``fisher-a``, ``gram-a`` …"""
    for seed, name in enumerate(["base", "a", "b"]):
        write_checkpoint(tmp_path / name, tensors(seed), {"tie_word_embeddings": True})
        write_checkpoint(tmp_path / f"fisher-{name}", fisher(seed))
        write_checkpoint(tmp_path / f"gram-{name}", gram(seed))
    return tmp_path


def recipe(root: Path, method: str, *, key: str | None = None, **more: Any) -> dict[str, Any]:
    key = key or ("gram" if method == "regmean" else "fisher")
    models = [{"model": str(root / name), key: str(root / f"{key}-{name}")} for name in "ab"]
    base = {"base_model": str(root / "base")} if method == "fisher_ties" else {}
    return {"merge_method": method, "models": models} | base | more


def examined(root: Path, value: dict[str, Any], **more: Any) -> Outcome:
    options = PlanOptions(worker_memory_bytes=1 << 40, **more)
    return examine(parse_recipe(value), options, LocalStore(), {}, output=(root / "out").as_uri())


def planned(root: Path, value: dict[str, Any], **more: Any) -> Planned:
    return examined(root, value, **more).result()


def wrong(root: Path, value: dict[str, Any]) -> list[str]:
    """What is wrong with it, without the place of everything."""
    outcome = examined(root, value)
    assert outcome.planned is None
    return [problem.replace(str(root), "") for problem in outcome.problems]


def arithmetics(found: Planned) -> dict[str, Arithmetic]:
    pieces = [piece for part in found.plan.parts for piece in part.pieces if isinstance(piece, MergePiece)]
    return {piece.name: piece.arithmetic for piece in pieces}


# --- what a recipe says -----------------------------------------------------------------------------------


def refused(value: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(value)
    return "\n".join(caught.value.problems)


def test_a_method_says_which_checkpoint_it_lacks_and_which_it_has_no_use_for() -> None:
    models = [{"model": "/a", "fisher": "/f"}, {"model": "/b"}]
    said = refused({"merge_method": "fisher", "models": models})
    assert said == "models[1].fisher: is required: `fisher` takes a checkpoint of each model's"
    said = refused({"merge_method": "regmean", "models": models})
    assert "models[0].gram: is required" in said and "models[0].fisher: `regmean` has no use for it" in said
    assert "models[0].fisher: `linear` has no use for it" in refused(
        {"merge_method": "linear", "models": models}
    )
    listed = [{"model": "/base", "fisher": "/f"}, {"model": "/a", "fisher": "/f"}]
    said = refused({"merge_method": "fisher_ties", "base_model": "/base", "models": listed})
    assert said.startswith("models[0].fisher: the base has no task vector")
    del listed[0]["fisher"]
    assert parse_recipe({"merge_method": "fisher_ties", "base_model": "/base", "models": listed}).places == [
        "/base",
        "/a",
        "/f",
    ]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_weights_are_not_negative(method: str) -> None:
    key = "gram" if method == "regmean" else "fisher"
    models = [{"model": "/a", key: "/f", "parameters": {"weight": -1}}]
    assert "models[0].parameters.weight" in refused({"merge_method": method, "models": models})


def test_everything_that_is_read_is_named_once(family: Path) -> None:
    value = recipe(family, "fisher_ties")
    value["models"][1]["fisher"] = value["models"][0]["fisher"]
    found = parse_recipe(value)
    names = [str(family / name) for name in ("base", "a", "b")]
    assert (found.names, found.statistics) == (names, [str(family / "fisher-a")])
    assert found.places == [*names, str(family / "fisher-a")]
    assert found.most_inputs == 4
    assert parse_recipe(found.to_json()) == found


def test_the_client_makes_places_of_them(family: Path) -> None:
    value = {"merge_method": "fisher", "models": [{"model": "a", "fisher": "./fisher-a"}]}
    assert localise(value, family)["models"] == [
        {"model": (family / "a").as_uri(), "fisher": (family / "fisher-a").as_uri()}
    ]
    value["models"][0]["fisher"] = "./none"  # type: ignore[index]
    with pytest.raises(RecipeError, match=r"models\[0\]\.fisher: \./none"):
        localise(value, family)


def test_they_are_inputs_to_a_keys_access_and_to_the_output(family: Path) -> None:
    found = parse_recipe(recipe(family, "fisher"))
    prefixes = [(family / name).as_uri() for name in ("a", "b", "fisher-a", "fisher-b")]

    def access(inputs: list[str]) -> None:
        key = ApiKey(
            id="k" * 12, name="k", scopes=(Scope.SUBMIT,), inputs=tuple(inputs), digest="0" * 64, created_at=0
        )
        grant(key, found.places, None, {}, Limits())

    access(prefixes)
    with pytest.raises(ForbiddenError, match=r"fisher-b: the key k* does not allow reading there"):
        access(prefixes[:3])
    with pytest.raises(PlanError, match=r"overlaps the input .*/fisher-b"):
        examine(found, PlanOptions(), LocalStore(), {}, output=(family / "fisher-b").as_uri()).result()


def test_what_is_left_of_a_wrong_recipe_still_reads_them(family: Path) -> None:
    value = recipe(family, "fisher", parameters={"weigth": 1})
    refused(value)
    kept = salvage(value)
    assert kept is not None
    assert (kept.merge_method, kept.statistics) == (
        "fisher",
        [str(family / f"fisher-{name}") for name in "ab"],
    )
    joined = value["models"][1]["fisher"]
    value["models"][1]["fisher"] = f"{joined}+/lora"
    assert salvage(value) is not None  # the models, at least
    value["models"][1]["fisher"] = joined
    del value["models"][0]["fisher"]
    averaged = salvage(value)
    assert averaged is not None
    assert (averaged.merge_method, averaged.statistics) == ("linear", [])


# --- what goes with what ----------------------------------------------------------------------------------


def test_each_tensor_goes_with_its_fisher_and_is_split_with_it(family: Path) -> None:
    found = planned(family, recipe(family, "fisher"))
    for name, arithmetic in arithmetics(found).items():
        own = [found.inputs.statistics[str(family / f"fisher-{each}")].tensors[name].ref for each in "ab"]
        assert list(arithmetic.statistics) == own
        assert arithmetic.refs[2:] == tuple(own)
    size = sum(tensor.nbytes for tensor in tensors(0).values())
    assert found.plan.price.input_bytes == found.plan.price.bytes_read == 4 * size


def test_gradients_and_filters_say_weights_as_ever(family: Path) -> None:
    value = recipe(family, "fisher")
    value["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}
    found = arithmetics(planned(family, value))
    said = {name: found[name].models[0].parameters["weight"] for name in LAYERS}
    assert said == dict(zip(LAYERS, [0, 0.5, 1, 0.5], strict=True))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_survey_does_not_read_the_fishers(tmp_path: Path, scope: str) -> None:
    numel = 3 << 20
    for name in ("base", "a", "b", "fisher-a", "fisher-b"):
        write_checkpoint(tmp_path / name, {"w": torch.ones(numel, dtype=torch.bfloat16)})
    value = recipe(tmp_path, "fisher_ties", parameters={"density": 0.5, "trim_scope": scope})
    found = planned(tmp_path, value, part_bytes=5 << 20, whole_tensor_bytes=5 << 20).plan
    (survey,) = found.surveys
    assert all(len(run.refs) == 3 and not run.statistics for task in survey.tasks for run in task)
    assert found.price.bytes_read == 2 * numel * (5 + survey.passes * 3)
    pieces = [piece for part in found.parts for piece in part.pieces if isinstance(piece, MergePiece)]
    assert len(pieces) > 1
    for piece in pieces:
        (first, last), refs = (piece.arithmetic.first, piece.arithmetic.last), piece.arithmetic.statistics
        assert [ref.nbytes for ref in refs] == [2 * (last - first)] * 2
        assert refs[0].start - refs[0].end == 2 * (first - last)


def test_layers_go_with_the_fishers_of_where_they_come_from(family: Path) -> None:
    sources = [
        {"model": str(family / "a"), "fisher": str(family / "fisher-a"), "layer_range": [1, 2]},
        {"model": str(family / "b"), "fisher": str(family / "fisher-b"), "layer_range": [0, 1]},
    ]
    found = planned(family, {"merge_method": "fisher", "slices": [{"sources": sources}]})
    (one, two) = arithmetics(found)["model.layers.0.mlp.weight"].statistics
    known = found.inputs.statistics
    assert one == known[str(family / "fisher-a")].tensors["model.layers.1.mlp.weight"].ref
    assert two == known[str(family / "fisher-b")].tensors["model.layers.0.mlp.weight"].ref


def test_a_head_that_is_tied_goes_with_the_embeddings_fisher(family: Path) -> None:
    head = {"lm_head.weight": tensors(1)["model.embed_tokens.weight"].clone()}
    write_checkpoint(family / "a", tensors(1) | head, {"tie_word_embeddings": True})
    found = planned(family, recipe(family, "fisher", missing_tensors="error"))
    merged = arithmetics(found)
    assert merged["lm_head.weight"].statistics[1] == merged["model.embed_tokens.weight"].statistics[1]


def test_only_layers_with_gram_matrices_are_solved_for(family: Path) -> None:
    found = planned(family, recipe(family, "regmean", parameters={"weight": 0.5}))
    for name, arithmetic in arithmetics(found).items():
        is_linear = ".mlp." in name
        assert arithmetic.method == ("regmean" if is_linear else "linear")
        assert [ref.nbytes for ref in arithmetic.statistics] == [64, 64] * is_linear
        assert [model.parameters for model in arithmetic.models] == [{"weight": 0.5}] * 2
    (said,) = [notice for notice in found.plan.notices if "gram" in notice]
    assert said.startswith(
        "without a `gram`, and merged by `linear`: model.embed_tokens.weight, model.layers.0.norm"
    )


def test_gram_matrices_are_of_the_side_that_the_layers_inputs_are_on(family: Path) -> None:
    said = wrong(family, recipe(family, "regmean", parameters={"fan_in_fan_out": True}))
    assert said[0].startswith(
        "/gram-a: shape is not what the models' tensors ask for: model.layers.0.mlp.weight [4, 4], not [6, 6]"
    )


def test_its_price_counts_gram_matrices_as_they_are(tmp_path: Path) -> None:
    """A narrow layer of many inputs has a Gram matrix that is far bigger than itself."""
    for name in "ab":
        write_checkpoint(tmp_path / name, {"w": torch.ones(2, 512)})
        write_checkpoint(tmp_path / f"gram-{name}", {"w": torch.eye(512)})
    price = planned(tmp_path, recipe(tmp_path, "regmean")).plan.price
    assert price.input_bytes == 2 * 4 * (2 * 512 + 512**2)
    assert price.peak_bytes - price.arena_bytes - workspace_bytes(4) - BASELINE_BYTES > 64 * 512**2


# --- what does not fit ------------------------------------------------------------------------------------


def test_a_fisher_lacks_nothing_unless_all_of_them_may(family: Path) -> None:
    name = LAYERS[0]
    without = fisher(1)
    del without[name]
    write_checkpoint(family / "fisher-a", without)
    (said,) = wrong(family, recipe(family, "fisher"))
    assert said == f"/fisher-a: lacks tensors of its model: {name}; give every model a `fisher` that has them"
    assert wrong(family, recipe(family, "fisher", missing_tensors="base")) == [said]
    write_checkpoint(family / "fisher-b", without)
    one, two = wrong(family, recipe(family, "fisher"))
    assert one.endswith("or set `missing_tensors: base` to merge them by `linear`") and "/fisher-b" in two
    found = planned(family, recipe(family, "fisher", missing_tensors="base"))
    assert arithmetics(found)[name].method == "linear"
    assert f"without a `fisher`, and merged by `linear`: {name}" in found.plan.notices
    assert len(wrong(family, recipe(family, "fisher_ties", missing_tensors="base"))) == 2


def test_everything_wrong_with_statistics_is_said_at_once(family: Path) -> None:
    write_checkpoint(
        family / "fisher-a", fisher(1) | {LAYERS[0]: torch.ones(4, 6), "layers.0.mlp": torch.ones(2)}
    )
    write_checkpoint(family / "fisher-b", fisher(2) | {LAYERS[1]: torch.ones(4, dtype=torch.int32)})
    assert sorted(wrong(family, recipe(family, "fisher"))) == [
        "/fisher-a: shape is not what the models' tensors ask for: model.layers.0.mlp.weight [4, 6], not [6, 4]",
        "/fisher-a: tensors that /a does not have: layers.0.mlp; set `extra_tensors: drop` to leave them out",
        "/fisher-b: no arithmetic is done on its dtypes: model.layers.0.norm.weight (I32)",
    ]


def test_statistics_of_another_model_are_noticed_or_dropped(family: Path) -> None:
    write_checkpoint(family / "gram-b", {"layers.0.mlp": torch.eye(4)} | gram(2))
    (said,) = wrong(family, recipe(family, "regmean"))
    assert "/gram-b: tensors that /b does not have: layers.0.mlp" in said
    found = planned(family, recipe(family, "regmean", extra_tensors="drop"))
    assert any("layers.0.mlp is not in" in notice for notice in found.plan.notices)


def test_a_gram_matrix_is_of_a_matrix_and_of_every_model(family: Path) -> None:
    write_checkpoint(family / "gram-a", gram(1) | {LAYERS[1]: torch.eye(4)})
    said = "\n".join(wrong(family, recipe(family, "regmean")))
    assert (
        "/gram-a: tensors of models that can have none: model.layers.0.norm.weight [4, 4]; leave them out"
        in said
    )
    assert "/gram-b: lacks tensors of its model: model.layers.0.norm.weight" in said


@pytest.mark.parametrize("method", ["fisher", "fisher_ties", "regmean"])
@pytest.mark.parametrize("gone", [["{}-b"], ["{}-a", "{}-b"], ["b"], ["a", "{}-b"], ["a", "b"]])
def test_what_did_not_open_hides_nothing_of_the_rest(family: Path, method: str, gone: list[str]) -> None:
    key = "gram" if method == "regmean" else "fisher"
    whole = planned(family, recipe(family, method)).plan.price
    names = [name.format(key) for name in gone]
    for name in names:
        (family / name / "model.safetensors").unlink()
    outcome = examined(family, recipe(family, method))
    assert [sum(f"/{name}: no model here" in each for each in outcome.problems) for name in names] == [
        1
    ] * len(names)
    assert len(outcome.problems) == len(names)
    if names == ["a", "b"] and method != "fisher_ties":
        assert outcome.price is None
    else:
        assert outcome.price is not None
        assert outcome.price.input_bytes <= whole.input_bytes
        if method != "regmean" and "a" not in names:
            assert outcome.price.input_bytes == whole.input_bytes


# --- what is told -----------------------------------------------------------------------------------------


def test_a_card_and_a_manifest_name_them(family: Path) -> None:
    found = planned(family, recipe(family, "fisher"))
    card = model_card(found, "0")
    assert "- `fisher-a` (statistics)" in card and "fisher: fisher-a" in card
    assert str(family) not in card
    told = manifest(found, {}, [], {}, "0")
    for name in ("a", "b", "fisher-a", "fisher-b"):
        assert list(told["inputs"][(family / name).as_uri()]) == [
            (family / name / "model.safetensors").as_uri()
        ]


def test_tasks_without_statistics_are_what_they_were(family: Path) -> None:
    """Their ids are hashes of their JSON, and a job under way goes on with them."""
    plain = {"merge_method": "linear", "models": [{"model": str(family / name)} for name in "ab"]}
    (part,) = planned(family, plain).plan.parts
    assert b'"statistic"' not in PART.dump_json(part)
    (other,) = planned(family, recipe(family, "fisher")).plan.parts
    assert PART.validate_json(PART.dump_json(other)) == other
    assert part_id(other) != part_id(part)
    ref = TensorRef("file:///m", "e", 0, 4, "F32")
    assert ModelInput(0, ref).statistic is None
