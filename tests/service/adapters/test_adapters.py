"""Models with adapters: fitted by name and shape, streamed as what they add, and refused with every reason at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.access import grant
from service.keys import Limits, Scope, new_key
from service.planning.plan import PlanOptions
from service.planning.planner import Planned, plan_recipe
from service.recipe import parse_recipe
from service.running.sidecars import manifest
from tests.adapters import PREFIX, factors, write_adapter
from tests.checkpoints import Tensors, fine_tune, llama_config, llama_tensors, write_checkpoint
from tests.workers.execute import run
from tests.workers.merges import opened
from workers.errors import ForbiddenError, PlanError
from workers.store.local import LocalStore
from workers.task import CopyPiece, MergePiece

pytestmark = pytest.mark.fast

SHAPE: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 2, "vocab": 32, "intermediate": 40}
BASE = llama_tensors(1, **SHAPE)
TUNED = fine_tune(BASE, 2, 4e-3)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
LORA = factors(3, BASE, {Q: 4, DOWN: 4})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", BASE, llama_config(**SHAPE))
    write_checkpoint(tmp_path / "tuned", TUNED, llama_config(**SHAPE))
    write_adapter(tmp_path / "lora", LORA)
    return tmp_path


def plan(root: Path, method: str, models: list[Any], **more: Any) -> Planned:
    listed = [each if isinstance(each, dict) else {"model": each} for each in models]
    recipe = parse_recipe({"merge_method": method, "models": listed} | more)
    options = PlanOptions(worker_memory_bytes=1 << 40)
    return plan_recipe(recipe, options, LocalStore(), {"org/": root.as_uri()}, baseline_bytes=0)


def problems(root: Path, name: str = "org/base+org/lora") -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(root, "passthrough", [name])
    return [problem.replace(f"{root.as_uri()}/", "") for problem in caught.value.problems]


def expected(name: str, lora: Tensors, scale: float, *, transposed: bool = False) -> torch.Tensor:
    """A tensor of the base with an adapter merged into it, in float64."""
    module = name.removesuffix(".weight")
    a, b = (lora.get(f"{PREFIX}{module}.lora_{each}.weight") for each in "AB")
    if a is None or b is None:
        return BASE[name].double()
    delta = b.double() @ a.double()
    return BASE[name].double() + scale * (delta.T if transposed else delta)


@pytest.mark.parametrize("name", ["org/base+org/lora", {"model": "org/base", "adapter": "org/lora"}])
def test_a_model_with_an_adapter_is_what_merging_it_would_make(root: Path, tmp_path: Path, name: Any) -> None:
    planned = plan(root, "passthrough", [name])
    pieces = [piece for part in planned.plan.parts for piece in part.pieces]
    assert {piece.name for piece in pieces if isinstance(piece, MergePiece)} == {
        f"{Q}.weight",
        f"{DOWN}.weight",
    }
    assert sum(isinstance(piece, CopyPiece) for piece in pieces) == len(BASE) - 2
    found = opened(run(planned, tmp_path / "out"))
    assert set(found) == set(BASE)
    for key, tensor in found.items():
        assert (tensor.double() - expected(key, LORA, 2.0)).abs().max() <= 1e-7, key


def test_adapters_are_merged_like_models(root: Path, tmp_path: Path) -> None:
    other = factors(5, BASE, {Q: 2, "lm_head": 2})
    write_adapter(root / "other", other, r=2, use_rslora=True)
    planned = plan(
        root,
        "task_arithmetic",
        [
            {"model": "org/base+org/lora", "parameters": {"weight": 0.5}},
            {"model": "org/base", "adapter": "org/other", "parameters": {"weight": -1}},
            {"model": "org/tuned", "parameters": {"weight": 0.25}},
        ],
        base_model="org/base",
    )
    found = opened(run(planned, tmp_path / "out"))
    for key, tensor in found.items():
        base = BASE[key].double()
        wanted = base + 0.5 * (expected(key, LORA, 2.0) - base)
        wanted -= expected(key, other, 8 / math.sqrt(2)) - base
        wanted += 0.25 * (TUNED[key].double() - base)
        assert (tensor.double() - wanted).abs().max() <= 1e-6, key


def test_a_base_with_an_adapter_is_a_base(root: Path, tmp_path: Path) -> None:
    planned = plan(
        root, "task_arithmetic", ["org/tuned"], base_model="org/base+org/lora", parameters={"lambda": 2}
    )
    found = opened(run(planned, tmp_path / "out"))
    base = expected(f"{Q}.weight", LORA, 2.0)
    wanted = base + 2 * (TUNED[f"{Q}.weight"].double() - base)
    assert (found[f"{Q}.weight"].double() - wanted).abs().max() <= 1e-6


def test_layers_move_with_their_adapters(root: Path, tmp_path: Path) -> None:
    source = {"model": "org/base+org/lora", "layer_range": [1, 2]}
    value = {"merge_method": "passthrough", "slices": [{"sources": [source]}] * 2}
    options = PlanOptions(worker_memory_bytes=1 << 40)
    planned = plan_recipe(
        parse_recipe(value), options, LocalStore(), {"org/": root.as_uri()}, baseline_bytes=0
    )
    found = opened(run(planned, tmp_path / "out"))
    for layer in (0, 1):
        made = found[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        assert (made - expected(f"{DOWN}.weight", LORA, 2.0)).abs().max() <= 1e-7


def test_weights_that_are_stored_the_other_way_round(root: Path, tmp_path: Path) -> None:
    square, wide = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"
    lora = factors(7, BASE, {square: 4, wide: 4}, transposed=True)
    write_adapter(root / "gpt", lora, fan_in_fan_out=True)
    found = opened(run(plan(root, "passthrough", ["org/base+org/gpt"]), tmp_path / "out"))
    for module in (square, wide):
        wanted = expected(f"{module}.weight", lora, 2.0, transposed=True)
        assert (found[f"{module}.weight"].double() - wanted).abs().max() <= 1e-7
    write_adapter(root / "linear", lora)  # what is no square can lie one way only, whatever the config says
    found = opened(run(plan(root, "passthrough", ["org/base+org/linear"]), tmp_path / "out2"))
    wanted = expected(f"{wide}.weight", lora, 2.0, transposed=True)
    assert (found[f"{wide}.weight"].double() - wanted).abs().max() <= 1e-7
    plain = expected(f"{square}.weight", lora, 2.0)
    assert (found[f"{square}.weight"].double() - plain).abs().max() <= 1e-7


def test_convolutions(root: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    kernel, a, b = (torch.randn(*s, generator=generator) for s in ((6, 3, 2, 2), (4, 3, 2, 2), (6, 4, 1, 1)))
    write_checkpoint(root / "base", {"conv.weight": kernel})
    write_adapter(root / "lora", {f"{PREFIX}conv.lora_A.weight": a, f"{PREFIX}conv.lora_B.weight": b})
    (found,) = opened(run(plan(root, "passthrough", ["org/base+org/lora"]), tmp_path / "out")).values()
    delta = torch.nn.functional.conv2d(a.double().permute(1, 0, 2, 3), b.double()).permute(1, 0, 2, 3)
    assert (found.double() - kernel.double() - 2 * delta).abs().max() <= 2e-6


def test_embeddings_and_modules_that_are_held_whole(root: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(16, 4, generator=generator)
    saved, head = fine_tune(BASE, 10), fine_tune(BASE, 11)["lm_head.weight"]
    lora = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
        f"{PREFIX}model.embed_tokens.base_layer.weight": saved["model.embed_tokens.weight"],
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}model.layers.0.input_layernorm.weight": saved["model.layers.0.input_layernorm.weight"],
    }
    write_adapter(root / "lora", lora, modules_to_save=["lm_head", "input_layernorm"])
    found = opened(run(plan(root, "passthrough", ["org/base+org/lora"]), tmp_path / "out"))
    wanted = saved["model.embed_tokens.weight"].double() + 2 * (b.double() @ a.double()).T
    assert (found["model.embed_tokens.weight"].double() - wanted).abs().max() <= 2e-6
    assert torch.equal(found["lm_head.weight"], head)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(found[name], saved[name])
    assert torch.equal(found["model.norm.weight"], BASE["model.norm.weight"])


def test_an_embedding_that_is_square_is_still_one(root: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((8, 8), (4, 8), (8, 4)))
    write_checkpoint(root / "base", {"embed_tokens.weight": weight})
    at = f"{PREFIX}embed_tokens.lora_embedding_"
    write_adapter(root / "lora", {f"{at}A": a, f"{at}B": b})
    (found,) = opened(run(plan(root, "passthrough", ["org/base+org/lora"]), tmp_path / "out")).values()
    assert (found.double() - weight.double() - 2 * (b.double() @ a.double()).T).abs().max() <= 2e-6


def test_keys_may_name_the_adapter_and_lack_the_head(root: Path, tmp_path: Path) -> None:
    headless = {
        f"{PREFIX}{key.removeprefix(f'{PREFIX}model.')}".replace("A.w", "A.default.w"): LORA[key]
        for key in LORA
    }
    write_adapter(root / "lora", headless)
    found = opened(run(plan(root, "passthrough", ["org/base+org/lora"]), tmp_path / "out"))
    assert (found[f"{Q}.weight"].double() - expected(f"{Q}.weight", LORA, 2.0)).abs().max() <= 1e-7
    backbone = {key.removeprefix("model."): value for key, value in BASE.items() if key != "lm_head.weight"}
    write_checkpoint(root / "bare", backbone, llama_config(**SHAPE))
    write_adapter(root / "lora", LORA)
    found = opened(run(plan(root, "passthrough", ["org/bare+org/lora"]), tmp_path / "out2"))
    assert (found[f"{Q[6:]}.weight"].double() - expected(f"{Q}.weight", LORA, 2.0)).abs().max() <= 1e-7


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({f"{PREFIX}x.y.lora_A.weight": (4, 3), f"{PREFIX}x.y.lora_B.weight": (3, 4)}, {},
         "lora on base: changes modules that the model does not have: x.y.weight"),
        ({f"{PREFIX}{Q}.lora_A.weight": (4, 17)}, {}, "has factors that do not fit the model's tensors: "
         f"{Q}.weight [16, 16] (A [4, 17], B [16, 4])"),
        ({f"{PREFIX}{Q}.lora_A.weight": (3, 16)}, {}, f"has factors that do not fit together: {Q}.weight (A [3, 16],"),
        ({f"{PREFIX}{Q}.lora_B.weight": (4,)}, {}, "has factors that do not fit together"),
        ({}, {"r": 8}, f"has factors of another rank than its config says: {Q}.weight (4, not 8), {DOWN}.weight"),
        ({f"{PREFIX}{Q}.lora_B.bias": (16,)}, {}, "1 tensor(s) that are no factors of a plain LoRA"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector.weight": (16,)}, {}, "such as base_model.model.model.layers.0."),
        ({f"{PREFIX}{Q}.bias": (16,)}, {}, f"holds tensors that the model does not have: {Q}.bias"),
        ({f"{PREFIX}lm_head.weight": (33, 16)}, {}, "of another shape than the model's: lm_head.weight [33, 16], not"),
        ({f"{PREFIX}model.norm.weight": (16,)}, {}, "that are no factors and that `modules_to_save` does not name"),
        ({f"{PREFIX}{DOWN}.lora_A.weight": None}, {}, f"1 module(s) without exactly one A and one B, such as {DOWN}"),
        (dict.fromkeys(LORA), {}, "it holds no tensors"),
        ({f"{PREFIX}{Q}.lora_B.weight": (0, 4)}, {}, "has factors that do not fit together: "
         f"{Q}.weight (A [4, 16], B [0, 4])"),
        ({f"{PREFIX}{Q}.lora_A.weight": (16385, 16), f"{PREFIX}{Q}.lora_B.weight": (16, 16385)},
         {"rank_pattern": {Q: 16385}}, f"of a higher rank than the 16384 that are added: {Q}.weight (16385)"),
        ({f"{Q}.lora_A.default.weight": (4, 16)}, {}, "1 tensor(s) whose place another one takes as well, such as "),
        ({f"{PREFIX}lm_head.weight": (32, 16), f"{PREFIX}lm_head.base_layer.weight": (32, 16)},
         {"modules_to_save": ["lm_head"]}, "1 tensor(s) whose place another one takes as well, such as "),
        ({}, {"use_dora": True}, "lora/adapter_config.json: `use_dora` is set"),
        ({}, {"rank_pattern": {"(a*)*": 2}}, "`rank_pattern` has the regular expression '(a*)*'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_at_plan_time(
    root: Path, changes: dict[str, tuple[int, ...] | None], config: dict[str, Any], says: str
) -> None:
    made = {key: value for key, value in LORA.items() if key not in changes}
    made |= {key: torch.zeros(shape) for key, shape in changes.items() if shape is not None}
    write_adapter(root / "lora", made, **config)
    found = problems(root)
    assert len(found) == 1
    assert says in found[0]


def test_all_that_does_not_fit_is_told_at_once(root: Path) -> None:
    wrong = LORA | {
        f"{PREFIX}{Q}.lora_A.weight": torch.zeros(4, 17),
        f"{PREFIX}lm_head.weight": torch.zeros(3),
    }
    wrong |= {f"{PREFIX}x.{each}.weight": torch.zeros(4, 4) for each in ("lora_A", "lora_B")}
    write_adapter(root / "lora", wrong)
    write_adapter(root / "other", LORA, use_dora=True)
    with pytest.raises(PlanError) as caught:
        plan(root, "linear", ["org/base+org/lora", "org/base+org/other", "org/nowhere+org/gone"])
    assert len(caught.value.problems) == 6


def test_tied_heads(root: Path, tmp_path: Path) -> None:
    tied = {name: tensor for name, tensor in BASE.items() if name != "lm_head.weight"}
    config = llama_config(**SHAPE, tied=True)
    write_checkpoint(root / "base", tied, config)
    write_adapter(root / "lora", factors(3, BASE, {"lm_head": 4}))
    assert "changes an output head that is tied to the embedding" in problems(root)[0]
    own_head = {f"{PREFIX}lm_head.weight": torch.zeros(32, 16)}
    write_adapter(root / "lora", own_head, modules_to_save=["lm_head"])
    assert "holds tensors that the model does not have: lm_head.weight" in problems(root)[0]
    write_checkpoint(root / "base", BASE, config)
    assert "holds an output head of its own, which the model ties to the embedding" in problems(root)[0]
    a, b = torch.ones(4, 32), torch.ones(16, 4)
    lora = {f"{PREFIX}model.embed_tokens.lora_embedding_{k}": v for k, v in (("A", a), ("B", b))}
    write_adapter(root / "lora", lora)
    stored = tied | {"lm_head.weight": BASE["model.embed_tokens.weight"]}
    write_checkpoint(root / "base", stored, config)
    found = opened(run(plan(root, "passthrough", ["org/base+org/lora"]), tmp_path / "out"))
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert (found["lm_head.weight"] - BASE["model.embed_tokens.weight"] - 8).abs().max() <= 1e-6


def test_two_modules_never_become_one(root: Path) -> None:
    encoders = {f"{each}_encoder.{Q[6:]}.weight": BASE[f"{Q}.weight"] for each in ("question", "ctx")}
    backbone = {key.removeprefix("model."): value for key, value in BASE.items()}
    write_checkpoint(root / "base", backbone)
    write_adapter(root / "lora", factors(3, encoders, {key.removesuffix(".weight"): 4 for key in encoders}))
    (found,) = problems(root)
    assert "changes modules that the model does not have: " in found
    assert all(key in found for key in encoders)


def test_a_weight_without_elements_takes_no_adapter(root: Path) -> None:
    write_checkpoint(root / "base", BASE | {"empty.weight": torch.zeros(0, 16)})
    a, b = torch.zeros(4, 16), torch.zeros(0, 4)
    write_adapter(root / "lora", {f"{PREFIX}empty.lora_A.weight": a, f"{PREFIX}empty.lora_B.weight": b})
    assert "has factors that do not fit together: empty.weight (A [4, 16], B [0, 4])" in problems(root)[0]


def test_a_quantised_model_takes_no_adapter(root: Path) -> None:
    write_checkpoint(root / "base", BASE | {f"{Q}.weight": torch.zeros(16, 16, dtype=torch.int8)})
    assert "takes arithmetic on a dtype that has none (a quantised model?)" in problems(root)[0]


def test_files_that_are_no_adapter(root: Path) -> None:
    weights, config = (root / "lora" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    text = config.read_text()
    config.write_text('{"r": 4, "r": 8}')
    assert "it has the key 'r' twice" in problems(root)[0]
    config.write_text("[" * 100_000)
    assert "is not valid JSON" in problems(root)[0]
    config.write_text("[]")
    assert "is not a JSON object" in problems(root)[0]
    with config.open("wb") as file:
        file.truncate(5 << 20)
    assert "has 5242880 bytes, more than the" in problems(root)[0]
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert problems(root)[0].startswith("lora/adapter_model.safetensors: ")
    weights.rename(weights.with_suffix(".bin"))
    assert "pickles never are" in problems(root)[0]
    config.unlink()
    assert problems(root) == ["lora: no adapter here: adapter_config.json does not exist"]


def test_an_adapter_is_pinned_and_is_in_the_manifest(root: Path) -> None:
    planned = plan(root, "passthrough", ["org/base+org/lora"])
    place = (root / "lora").as_uri()
    document = manifest(planned, {}, [], {}, "0.1.0")
    assert document["inputs"][place] == {
        f"{place}/{name}": LocalStore().head(f"{place}/{name}").etag
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert list(document["inputs"]) == [(root / "base").as_uri(), place]
    assert document["models"] == {"org/base": (root / "base").as_uri(), "org/lora": place}
    etags = {ref.etag for part in planned.plan.parts for ref in part.refs}
    assert document["inputs"][place][f"{place}/adapter_model.safetensors"] in etags
    write_adapter(root / "lora", {key: value + 1 for key, value in LORA.items()})
    assert plan(root, "passthrough", ["org/base+org/lora"]).plan.digest != planned.plan.digest


def test_both_places_have_to_be_allowed() -> None:
    recipe = parse_recipe(
        {
            "merge_method": "ties",
            "base_model": "s3://b/ok/base+s3://b/secret/one",
            "models": [
                {"model": "s3://b/ok/x+s3://b/ok/y"},
                {"model": "s3://b/ok/x", "adapter": "s3://b/secret/two"},
            ],
        }
    )
    key = new_key("a", [Scope.SUBMIT], 0.0, inputs=["s3://b/ok"], outputs=[])[0]
    with pytest.raises(ForbiddenError) as caught:
        grant(key, recipe.places, None, {}, Limits())
    assert [each.partition(": ")[0] for each in caught.value.problems] == [
        "s3://b/secret/one",
        "s3://b/secret/two",
    ]


def test_an_output_does_not_overlap_an_adapter(root: Path) -> None:
    recipe = parse_recipe({"merge_method": "passthrough", "models": [{"model": "org/base+org/lora"}]})
    with pytest.raises(PlanError, match="overlaps the input"):
        options = PlanOptions(worker_memory_bytes=1 << 40)
        plan_recipe(
            recipe, options, LocalStore(), {"org/": root.as_uri()}, output=(root / "lora" / "out").as_uri()
        )


def test_factors_of_a_half_precision_file(root: Path, tmp_path: Path) -> None:
    lora = {key: value.bfloat16() for key, value in LORA.items()}
    save_file(lora, root / "lora" / "adapter_model.safetensors")
    found = opened(run(plan(root, "passthrough", ["org/base+org/lora"]), tmp_path / "out"))
    assert (found[f"{Q}.weight"].double() - expected(f"{Q}.weight", lora, 2.0)).abs().max() <= 1e-7
