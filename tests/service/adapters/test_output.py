"""Adapters as outputs: put together exactly, truncated to the nearest, or taken from a fine-tune; worked out here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from service.adapters.output import draft, errors
from service.planning.matching import match
from service.planning.opening import open_checkpoint
from service.planning.pairing import Inputs
from service.planning.plan import PlanOptions
from service.planning.planner import Planned, plan_recipe
from service.planning.price import part_peak_bytes
from service.recipe import parse_documents, parse_recipe
from service.running.commit import Output, for_ever
from service.running.publish import publish, published
from service.running.sidecars import adapter_config_json, model_card
from tests.adapters import PREFIX, factors, write_adapter
from tests.checkpoints import (
    Tensors,
    fine_tune,
    llama_config,
    llama_tensors,
    read_checkpoint,
    write_checkpoint,
)
from tests.workers.execute import Done, run
from workers.errors import NonFiniteError, PlanError, RecipeError
from workers.safetensors_format import parse
from workers.sources import Arithmetic, Derived, Gathered, LowRank, RowRun
from workers.store.local import LocalStore
from workers.task import part_id

pytestmark = pytest.mark.fast

SHAPE: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 2, "vocab": 32, "intermediate": 40}
BASE = llama_tensors(1, **SHAPE)
Q, DOWN, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
ONE, TWO = factors(3, BASE, {Q: 4, DOWN: 4}), factors(4, BASE, {Q: 2, UP: 2})
RECIPE: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "org/base",
    "models": [
        {"model": "org/base+org/one", "parameters": {"weight": 0.75}},
        {"model": "org/base", "adapter": "org/two", "parameters": {"weight": -0.5}},
    ],
    "parameters": {"lambda": 2},
    "output_kind": "adapter",
}
SCALES = {"one": 2 * 0.75 * 2.0, "two": 2 * -0.5 * 8 / math.sqrt(2)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", BASE, llama_config(**SHAPE))
    write_checkpoint(tmp_path / "tuned", fine_tune(BASE, 2, 4e-3), llama_config(**SHAPE))
    write_adapter(tmp_path / "one", ONE)
    write_adapter(tmp_path / "two", TWO, r=2, use_rslora=True)
    return tmp_path


def plan(root: Path, options: PlanOptions | None = None, **changes: Any) -> Planned:
    recipe = parse_recipe({key: value for key, value in (RECIPE | changes).items() if value is not ...})
    options = options or PlanOptions(worker_memory_bytes=1 << 40)
    return plan_recipe(recipe, options, LocalStore(), {"org/": root.as_uri()}, baseline_bytes=0)


def problems(root: Path, **changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan(root, **changes)
    return list(caught.value.problems)


def made(done: Done) -> Tensors:
    from safetensors.torch import load_file

    return load_file(done.output / "adapter_model.safetensors")


def delta(tensors: Tensors, module: str) -> torch.Tensor:
    a, b = (tensors.get(f"{PREFIX}{module}.lora_{each}.weight") for each in "AB")
    rows, columns = BASE[f"{module}.weight"].shape
    return (
        torch.zeros(rows, columns, dtype=torch.float64) if a is None or b is None else b.double() @ a.double()
    )


def wanted(module: str) -> torch.Tensor:
    return SCALES["one"] * delta(ONE, module) + SCALES["two"] * delta(TWO, module)


def test_factors_are_put_together_exactly(root: Path, tmp_path: Path) -> None:
    done = run(plan(root), tmp_path / "out")
    found = made(done)
    assert {key: tuple(value.shape) for key, value in found.items() if Q in key} == {
        f"{PREFIX}{Q}.lora_A.weight": (6, 16),
        f"{PREFIX}{Q}.lora_B.weight": (16, 6),
    }
    assert len(found) == 6
    for module in (Q, DOWN, UP):
        assert (delta(found, module) - wanted(module)).abs().max() <= 1e-6
    assert torch.equal(found[f"{PREFIX}{Q}.lora_A.weight"][:4], ONE[f"{PREFIX}{Q}.lora_A.weight"])
    told = errors(done.results)
    assert told["relative_error"] == 0
    assert set(told["relative_errors"]) == {Q, DOWN, UP}


def test_a_lower_rank_is_the_nearest_there_is(root: Path, tmp_path: Path) -> None:
    done = run(plan(root, rank=3), tmp_path / "out")
    found, lost, total = made(done), 0.0, 0.0
    told = errors(done.results)
    for module, rank in ((Q, 3), (DOWN, 3), (UP, 2)):
        assert found[f"{PREFIX}{module}.lora_A.weight"].shape[0] == rank
        whole = wanted(module)
        best = torch.linalg.svdvals(whole)[rank:].square().sum().item()
        left = (delta(found, module) - whole).square().sum().item()
        assert left == pytest.approx(best, rel=1e-5, abs=1e-12)
        assert told["relative_errors"][module] == pytest.approx(
            math.sqrt(best) / whole.norm().item(), abs=1e-7
        )
        lost, total = lost + best, total + whole.square().sum().item()
    assert told["relative_error"] == pytest.approx(math.sqrt(lost / total), abs=1e-7)


def test_an_adapter_is_taken_from_a_fine_tune(root: Path, tmp_path: Path) -> None:
    models = [{"model": "org/tuned", "parameters": {"weight": 1}}]
    planned = plan(root, models=models, parameters=..., rank=5)
    assert any("5 tensor(s), which stay as the base" in each for each in planned.plan.notices) or any(
        "which stay as the base" in each for each in planned.plan.notices
    )
    done = run(planned, tmp_path / "out")
    found, tuned = made(done), read_checkpoint(root / "tuned")
    matrices = [
        name.removesuffix(".weight") for name in BASE if BASE[name].dim() == 2 and "embed" not in name
    ]
    assert {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in found} == set(matrices)
    for module in matrices:
        whole = tuned[f"{module}.weight"].double() - BASE[f"{module}.weight"].double()
        best = torch.linalg.svdvals(whole)[5:].square().sum().sqrt().item()
        assert (delta(found, module) - whole).norm().item() == pytest.approx(best, rel=1e-4)
        assert errors(done.results)["relative_errors"][module] == pytest.approx(
            best / whole.norm().item(), rel=1e-6
        )


def test_fine_tunes_and_adapters_go_together(root: Path, tmp_path: Path) -> None:
    models = [{"model": "org/base+org/one"}, {"model": "org/tuned+org/two"}, {"model": "org/base"}]
    done = run(plan(root, models=models, merge_method="linear", parameters=..., rank=16), tmp_path / "out")
    tuned = read_checkpoint(root / "tuned")[f"{Q}.weight"].double()
    whole = 2 * delta(ONE, Q) + tuned - BASE[f"{Q}.weight"].double() + 8 / math.sqrt(2) * delta(TWO, Q)
    assert (delta(made(done), Q) - whole / 3).abs().max() <= 1e-6


def test_the_config_is_what_peft_wants(root: Path, tmp_path: Path) -> None:
    planned = plan(root)
    store, place = LocalStore(), (tmp_path / "out").as_uri()
    done = run(planned, tmp_path / "out")
    output = Output(store, place, "job", for_ever)
    results = {part_id(part): result for part, result in zip(planned.plan.parts, done.results, strict=True)}
    files = publish(planned, results, output, overwrite=False)
    names = [file.name for file in files]
    assert names == [
        "adapter_model.safetensors",
        "README.md",
        "adapter_config.json",
        "mergemill.json",
        names[-1],
    ]
    assert published(output, planned.plan.digest) == files
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {DOWN: 4, UP: 2, Q: 6}
    assert set(config["target_modules"]) == set(ranks)
    assert config["base_model_name_or_path"] == "org/base"
    assert json.loads((tmp_path / "out" / "mergemill.json").read_text())["adapter"]["relative_error"] == 0
    assert output.existing() is not None
    again = [{"model": "org/base", "adapter": "org/out"}]
    round_trip = run(plan(root, models=again, parameters=...), tmp_path / "again")
    for module in ranks:
        assert (delta(made(round_trip), module) - wanted(module)).abs().max() <= 1e-6


def test_ranks_of_many_modules_are_read_back(root: Path, tmp_path: Path) -> None:
    modules = [f"model.layers.{number}.self-attn.q_proj" for number in range(180)]
    base = {f"{module}.weight": torch.zeros(8, 8) for module in modules}
    write_checkpoint(root / "base", base)
    ranks = {module: 2 if number < 80 else 4 for number, module in enumerate(modules)}
    one = factors(5, base, ranks)
    write_adapter(root / "one", one, rank_pattern=dict.fromkeys(modules[:80], 2))
    planned = plan(root, models=[{"model": "org/base+org/one"}], parameters=...)
    done = run(planned, tmp_path / "out")
    results = {part_id(part): result for part, result in zip(planned.plan.parts, done.results, strict=True)}
    publish(
        planned, results, Output(LocalStore(), (tmp_path / "out").as_uri(), "job", for_ever), overwrite=False
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == 80
    again = run(plan(root, models=[{"model": "org/base+org/out"}], parameters=...), tmp_path / "again")
    for key, tensor in made(done).items():
        assert torch.equal(made(again)[key], tensor)


def test_an_adapter_takes_no_place_that_holds_one(root: Path, tmp_path: Path) -> None:
    store = LocalStore()
    assert Output(store, (root / "one").as_uri(), "job", for_ever).existing() == "adapter_config.json"
    assert Output(store, (tmp_path / "free").as_uri(), "job", for_ever).existing() is None
    Output(store, (root / "one").as_uri(), "job", for_ever).make_room({"model-00001-of-00001.safetensors"})
    assert (root / "one" / "adapter_config.json").exists()
    Output(store, (root / "one").as_uri(), "job", for_ever).make_room({"adapter_model.safetensors"})
    assert not (root / "one" / "adapter_config.json").exists()


def test_weights_that_are_stored_the_other_way_round(root: Path, tmp_path: Path) -> None:
    write_checkpoint(root / "base", BASE, llama_config(**SHAPE) | {"model_type": "gpt2"})
    models = [{"model": "org/tuned"}]
    planned = plan(root, models=models, parameters=..., rank=16)
    found = made(run(planned, tmp_path / "out"))
    assert found[f"{PREFIX}{UP}.lora_A.weight"].shape == (16, 40)
    whole = read_checkpoint(root / "tuned")[f"{UP}.weight"].double() - BASE[f"{UP}.weight"].double()
    a, b = (found[f"{PREFIX}{UP}.lora_{each}.weight"].double() for each in "AB")
    assert ((b @ a).T - whole).abs().max() <= 1e-7
    lora = factors(7, BASE, {UP: 4}, transposed=True)
    write_adapter(root / "gpt", lora, fan_in_fan_out=True)
    found = made(run(plan(root, models=[{"model": "org/base+org/gpt"}], parameters=...), tmp_path / "out2"))
    assert found[f"{PREFIX}{UP}.lora_A.weight"].shape == (4, 40)
    assert torch.equal(found[f"{PREFIX}{UP}.lora_B.weight"], 2 * lora[f"{PREFIX}{UP}.lora_B.weight"])


def test_embeddings_keep_their_kind(root: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(16, 4, generator=generator)
    at = f"{PREFIX}model.embed_tokens.lora_embedding_"
    write_adapter(root / "lora", {f"{at}A": a, f"{at}B": b})
    found = made(run(plan(root, models=[{"model": "org/base+org/lora"}], parameters=...), tmp_path / "out"))
    assert torch.equal(found[f"{at}A"], a)
    assert torch.equal(found[f"{at}B"], 2 * b)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model": ..., "merge_method": "linear"}, "base_model: an adapter needs the model that it lies on"),
        ({"base_model": "org/base+org/one"}, "base_model: an adapter needs the model that it lies on, without"),
        ({"merge_method": "ties"}, "merge_method: what `ties` makes is no sum of what the models add to the base"),
        ({"rank": 0}, "rank: "),
        ({"output_kind": "lora"}, "output_kind: "),
        ({"output_kind": "model", "rank": 4}, "rank: is that of an adapter"),
        ({"models": [{"model": "org/tuned"}]}, "rank: is required where models are no adapters on the base model"),
        ({"models": [{"model": "org/base+org/one", "parameters": {"weight": 0}}]}, "models: none adds anything"),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, "the weights do not add up to 1"),
        ({"tokenizer_source": "base"}, "tokenizer_source: an adapter has no tokenizer"),
        ({"tokenizer": {"source": "union"}}, "tokenizer: an adapter has no tokenizer"),
        ({"chat_template": "chatml"}, "chat_template: an adapter has no tokenizer"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_refused(root: Path, changes: dict[str, Any], says: str) -> None:
    assert any(says in each for each in problems(root, **changes)), problems(root, **changes)


def test_the_plan_is_whole_and_its_parts_fit_what_they_are_priced(root: Path) -> None:
    planned = plan(root, rank=2).plan
    (shard,) = planned.shards
    assert shard.name == "adapter_model.safetensors"
    header = parse(shard.header.encode(), shard.size)
    assert sum(part.nbytes for part in planned.parts) == shard.size
    assert [entry.name for entry in header.entries] == [
        name
        for part in planned.parts
        for piece in part.pieces[1:]
        for name, _ in piece.outputs  # type: ignore[union-attr]
    ]
    assert all(part_peak_bytes(part, 0) <= planned.price.peak_bytes for part in planned.parts)
    assert plan(root, rank=2).plan == planned


def test_what_is_not_finite_is_told(root: Path, tmp_path: Path) -> None:
    broken = ONE | {f"{PREFIX}{Q}.lora_A.weight": ONE[f"{PREFIX}{Q}.lora_A.weight"].clone()}
    broken[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = math.nan
    write_adapter(root / "one", broken)
    with pytest.raises(NonFiniteError, match=r"one holds 1 NaN or Inf"):
        run(plan(root), tmp_path / "out")
    with pytest.raises(PlanError, match="raise it to at least"):
        plan(root, PlanOptions(worker_memory_bytes=1 << 20))


def test_factors_may_be_written_in_half_precision(root: Path, tmp_path: Path) -> None:
    found = made(run(plan(root, dtype="bfloat16"), tmp_path / "out"))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert torch.equal(found[f"{PREFIX}{Q}.lora_A.weight"][:4], ONE[f"{PREFIX}{Q}.lora_A.weight"].bfloat16())


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_an_adapter_is_made_of_an_earlier_merge(root: Path, tmp_path: Path, method: str) -> None:
    """What it adds is not lost, however the merge is read: computed on the way, staged, or copied."""
    models = [{"model": "org/tuned+org/two"}]
    if method != "passthrough":
        models.append({"model": "org/base+org/one"})
    first = {"merge_method": method, "models": models}
    first |= {"base_model": "org/base"} if method == "ties" else {}
    last = RECIPE | {"models": [{"model": "first+org/one"}], "parameters": {}, "rank": 16}
    store, options = LocalStore(), PlanOptions(worker_memory_bytes=1 << 40)
    roots, place = {"org/": root.as_uri()}, (root / "first").as_uri()
    planned = plan_recipe(parse_recipe(first), options, store, roots, 0)
    run(planned, root / "first")
    (root / "first" / "model.safetensors.index.json").write_text(planned.plan.index)
    same = parse_recipe(last | {"models": [{"model": place, "adapter": "org/one"}]})
    by_hand = plan_recipe(same, options, store, roots, 0)
    graph = parse_documents([{"name": "first", **first}, last])
    together = plan_recipe(graph, options, store, roots, 0, output=(tmp_path / "out").as_uri())
    found = made(run(together, tmp_path / "out"))
    wanted = made(run(by_hand, tmp_path / "hand"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert delta(found, Q).norm() > 0.1


def test_what_is_computed_on_the_way_is_no_part_of_an_adapter(root: Path) -> None:
    base, tuned = (open_checkpoint(LocalStore(), (root / each).as_uri()) for each in ("base", "tuned"))
    recipe = parse_recipe(RECIPE | {"models": [{"model": "org/tuned"}], "rank": 4})
    tensors = match(recipe, Inputs(base, {"org/base": base, "org/tuned": tuned})).tensors
    name = f"{Q}.weight"
    (tensor,) = [each for each in tensors if each.name == name]
    assert isinstance(tensor.source, Arithmetic)
    derived = Derived("derived", tensor.source, "F32")
    gathered = Gathered("gathered", (base.tensors[name].ref,), (RowRun(256, ((0, 0),)),), "F32")
    made_so = replace(tensor.source.models[0], ref=derived)
    says = f"{name}: is computed on the way"
    for source in (derived, gathered, LowRank("low_rank", derived, (), (16, 16), 0)):
        model = replace(tensor.source.models[0], ref=source)
        wrong = replace(tensor, source=replace(tensor.source, models=(model,)))
        assert any(says in each for each in draft(recipe, base, [wrong]).problems)
    seen = replace(base, tensors={**base.tensors, name: replace(base.tensors[name], gathered=gathered)})
    assert any(says in each for each in draft(recipe, seen, [tensor]).problems)
    alone = Arithmetic(
        name, "passthrough", {}, None, (replace(made_so, ref=tuned.tensors[name].ref),), 0, 256, 0, 256
    )
    kept = draft(recipe, base, [replace(tensor, source=alone)])
    assert any("another model's values" in each for each in kept.problems)


def test_the_config_and_the_card_call_the_base_the_same(root: Path) -> None:
    """Of two directories with one name; a document that is not run names one more, and says nothing of its place."""
    write_checkpoint(root / "org" / "base", fine_tune(BASE, 5, 4e-3), llama_config(**SHAPE))
    here, other = str(root / "base"), str(root / "org" / "base")
    common: dict[str, Any] = {"merge_method": "ties", "models": [{"model": str(root / "tuned")}]}
    first = common | {"name": "first", "base_model": other}
    spare = common | {"name": "spare", "base_model": str(root / "none" / "base")}
    last = RECIPE | {"base_model": here, "models": [{"model": "first"}, {"model": other}], "rank": 2}
    options = PlanOptions(worker_memory_bytes=1 << 40)
    planned = plan_recipe(parse_documents([spare, first, last]), options, LocalStore(), {}, 0)
    card, config = model_card(planned, "1"), json.loads(adapter_config_json(planned))
    assert f"- `{config['base_model_name_or_path']}` (base)" in card
    assert str(root) not in card
    shown = list(yaml.safe_load_all(card.split("```yaml\n")[1].split("```")[0]))
    assert shown[2]["base_model"] == config["base_model_name_or_path"]
    assert {each["base_model"] for each in shown} == {"base", "base-2", "base-3"}
