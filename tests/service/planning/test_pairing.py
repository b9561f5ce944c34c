"""Slices and modules: which tensor of which model goes where, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from service.planning.matching import Match, match
from service.planning.plan import PlanOptions, draft_plan, make_plan
from service.recipe import Region, language, parse_recipe
from service.recipe.regions import region_of
from tests.service.headers import Spec, checkpoint, inputs_of, llama
from workers.errors import RecipeError
from workers.task import Arithmetic, TensorRef

pytestmark = pytest.mark.fast

F32 = ("F32", (2,))
SIX = llama(6, 8, 12, 4, 16, "F32")
FOUR = llama(4, 8, 12, 4, 16, "F32")


def matched(value: Mapping[str, Any], **specs: Spec) -> Match:
    """Match the models ``/<name>``, which have these tensors and their depth in config.json."""
    recipe = parse_recipe(value)
    made = {
        f"/{name}": checkpoint(
            f"file:///{name}",
            spec,
            config={"num_hidden_layers": sum(".input_layernorm." in key for key in spec)},
        )
        for name, spec in specs.items()
    }
    return match(recipe, inputs_of(recipe, made))


def sliced(*slices: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    """A passthrough of ``(model, first layer, one past the last)``."""
    listed = [
        {"sources": [{"model": f"/{name}", "layer_range": [start, end]}]} for name, start, end in slices
    ]
    return {"merge_method": "passthrough", "slices": listed} | more


def sources(found: Match) -> dict[str, tuple[str, ...]]:
    """For every output tensor the models and names that it is made of."""
    made = {}
    for tensor in found.tensors:
        source = tensor.source
        refs = source.refs if isinstance(source, Arithmetic) else (source.ref,)
        made[tensor.name] = tuple(_named(ref) for ref in refs)
    return made


def arithmetics(found: Match) -> dict[str, Arithmetic]:
    """What is computed, by the output tensor's name."""
    return {t.name: t.source for t in found.tensors if isinstance(t.source, Arithmetic)}


def _named(ref: TensorRef) -> str:
    model = ref.uri.split("/")[3]
    spec = SIX if model in ("a", "c") else FOUR
    own = checkpoint("", spec).tensors
    return f"{model}:{next(name for name, tensor in own.items() if tensor.ref.start == ref.start)}"


def test_slices_take_their_layers_in_order_and_number_them_anew() -> None:
    found = matched(sliced(("a", 0, 3), ("b", 2, 4), ("a", 1, 2)), a=SIX, b=FOUR)
    assert found.problems == ()
    made = sources(found)
    assert [name for name in made if "q_proj" in name] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(6)
    ]
    origins = [made[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in range(6)]
    assert origins == [
        f"{model}:model.layers.{layer}.mlp.up_proj.weight"
        for model, layer in (("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 1))
    ]
    assert made["model.embed_tokens.weight"] == ("a:model.embed_tokens.weight",)
    assert set(made) == set(SIX)
    assert next(iter(made)) == "model.embed_tokens.weight"
    assert list(made)[-1] == "lm_head.weight"


def test_embeddings_come_from_the_first_slice_norms_and_heads_from_the_last() -> None:
    found = matched(sliced(("a", 0, 3), ("b", 2, 4)), a=SIX, b=FOUR)
    made = sources(found)
    assert made["model.embed_tokens.weight"] == ("a:model.embed_tokens.weight",)
    assert made["model.norm.weight"] == ("b:model.norm.weight",)
    assert made["lm_head.weight"] == ("b:lm_head.weight",)
    assert any(
        "come from slices[0].sources, norms and heads from slices[1].sources" in n for n in found.notices
    )


def test_gradients_lie_over_each_slice() -> None:
    value = {
        "merge_method": "slerp",
        "base_model": "/a",
        "slices": [
            {"sources": [{"model": "/a", "layer_range": [0, 3]}, {"model": "/c", "layer_range": [3, 6]}]},
            {"sources": [{"model": "/c", "layer_range": [5, 6]}, {"model": "/a", "layer_range": [5, 6]}]},
        ],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0.2, 1]}, {"value": 0.5}]},
    }
    found = arithmetics(matched(value, a=SIX, c=SIX))
    t = {name: source.parameters["t"] for name, source in found.items()}
    assert [t[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == [0, 0.2, 1, 1]
    assert {value for name, value in t.items() if "mlp" not in name} == {0.5}
    assert [_named(ref) for ref in found["model.layers.1.self_attn.q_proj.weight"].refs] == [
        "a:model.layers.1.self_attn.q_proj.weight", "c:model.layers.4.self_attn.q_proj.weight",
    ]  # fmt: skip


def test_the_base_of_a_slice_is_the_slices_own_and_has_its_layers() -> None:
    value = {
        "merge_method": "task_arithmetic",
        "base_model": "/a",
        "slices": [
            {
                "sources": [
                    {"model": "/c", "layer_range": [0, 2]},
                    {"model": "/b", "layer_range": [1, 3]},
                ],
                "base_model": "/b",
            },
            {"sources": [{"model": "/a", "layer_range": [0, 1]}, {"model": "/a", "layer_range": [4, 5]}]},
        ],
    }
    found = sources(matched(value, a=SIX, b=FOUR, c=SIX))
    up = "mlp.up_proj.weight"
    assert [found[f"model.layers.{n}.{up}"] for n in range(3)] == [
        (f"b:model.layers.1.{up}", f"c:model.layers.0.{up}"),
        (f"b:model.layers.2.{up}", f"c:model.layers.1.{up}"),
        (f"a:model.layers.0.{up}", f"a:model.layers.4.{up}"),  # other layers of the base are a model, too
    ]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            sliced(("b", 2, 6)),
            "slices[0].sources[0].layer_range: [2, 6] goes beyond the 4 layers (`model.layers.`) of /b",
        ),
        (sliced(("plain", 0, 1)), "slices: no tensor of /plain has the number of a layer in its name"),
        (
            sliced(("towers", 0, 1)),
            "slices: layers could be those of `vision.blocks.` (2 layers), `text.layers.` (2 layers): say which under "
            "`modules`",
        ),
        (sliced(*[("a", 0, 6)] * 50), None),
    ],
)
def test_what_does_not_fit_is_named(value: dict[str, Any], problem: str | None) -> None:
    towers = {f"{part}.{n}.w": F32 for part in ("vision.blocks", "text.layers") for n in range(2)}
    found = matched(value, a=SIX, b=FOUR, plain={"w": F32}, towers=towers)
    if problem is None:
        assert found.problems == ()
        assert len(found.tensors) == 50 * 6 * 9 + 3
    else:
        assert found.tensors == ()
        assert found.problems[0].startswith(problem)


def test_more_tensors_than_are_written_are_refused_before_they_are_made() -> None:
    wide = {f"layers.{n}.experts.{e}.w": F32 for n in range(100) for e in range(100)}
    found = matched(sliced(*[("wide", 0, 100)] * 27), wide=wide)
    assert found.problems == ("slices: the output would have more than the 262144 tensors that are written",)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (sliced(("a", 3, 1)), "slices[0].sources[0].layer_range: [3, 1] ends before it begins"),
        (sliced(("a", -2, 1)), "slices[0].sources[0].layer_range[0]: Input should be greater than or equal to 0"),
        (sliced(("a", 0, 2), models=[{"model": "/a"}]), "slices: there are `models` already"),
        ({"merge_method": "linear", "slices": [{"sources": [{"model": "/a"}]}]}, "slices[0].sources[0].layer_range: "),
        (
            {"merge_method": "ties", "base_model": "/b", "slices": sliced(("a", 0, 2))["slices"]},
            "slices[0].sources: the base model '/b' is not one of them; list it, with the layers",
        ),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "/a", "layer_range": [0, 1]}] * 2}]},
            "slices[0].sources: `passthrough` takes 1 model(s), there are 2",
        ),
        (
            {
                "merge_method": "linear",
                "slices": [
                    {"sources": [{"model": "/a", "layer_range": [0, 2]}, {"model": "/b", "layer_range": [0, 3]}]}
                ],
            },
            "slices[0].sources[1].layer_range: [0, 3] is not as many layers as the slice's first source has, 2",
        ),
        (
            {"merge_method": "linear", "slices": [sliced(("a", 0, 2))["slices"][0] | {"parameters": {"wait": 1}}]},
            "slices[0].parameters.wait: is not a parameter of linear; did you mean 'weight'?",
        ),
        (
            {
                "merge_method": "linear",
                "modules": {"default": {"models": [{"model": "/a"}], "parameters": {"norm": [1, 2]}}},
            },
            "modules.default.parameters.norm: is not a parameter of linear; did you mean 'normalize'?",
        ),
        ({"merge_method": "linear", "modules": {"default": {}}}, "modules.default: a module has either"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_before_its_models_are_read(
    value: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(value)
    assert any(
        found.startswith(problem.replace("1 to 1", "1 model(s)")) for found in caught.value.problems
    ), caught.value


def modular(**modules: Any) -> dict[str, Any]:
    """A linear merge of modules, each of one model or of what is given."""
    listed = {n: m if isinstance(m, dict) else {"models": [{"model": m}]} for n, m in modules.items()}
    return {"merge_method": "linear", "modules": listed}


TOWERS: Spec = {
    **{f"model.vision_tower.encoder.layers.{n}.w": F32 for n in range(3)},
    **{f"model.language_model.layers.{n}.w": F32 for n in range(2)},
    "model.projector.w": F32,
    "lm_head.weight": F32,
}


def test_each_module_is_made_of_its_own_models() -> None:
    found = matched(modular(vision_tower="/one", default="/two"), one=TOWERS, two=TOWERS)
    assert found.problems == ()
    made = {
        tensor.name: tensor.source.refs[0].uri[8:11]
        for tensor in found.tensors
        if isinstance(tensor.source, Arithmetic)
    }
    assert made == {name: "one" if "vision" in name else "two" for name in TOWERS}
    aliased = matched(modular(vision_tower="/one", text_decoder="/two"), one=TOWERS, two=TOWERS)
    assert aliased.tensors == found.tensors


def test_a_module_of_slices_keeps_the_others_whole() -> None:
    cut = {"slices": [{"sources": [{"model": "/one", "layer_range": [1, 3]}]}] * 2}
    found = matched(modular(vision_tower=cut, default="/two"), one=TOWERS, two=TOWERS)
    assert [tensor.name for tensor in found.tensors] == [
        *(f"model.vision_tower.encoder.layers.{n}.w" for n in range(4)), *list(TOWERS)[3:],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (modular(vision_towr="/one", default="/two"), "modules.vision_towr: no tensor's name begins with"),
        (
            modular(vision_tower="/one"),
            "modules: none takes 4 tensor(s), such as model.language_model.layers.0.w; add",
        ),
        (
            modular(default="/one", text_decoder="/two"),
            "modules.text_decoder: another module takes all that is left",
        ),
    ],
)
def test_modules_take_each_tensor_once(value: dict[str, Any], problem: str) -> None:
    found = matched(value, one=TOWERS, two=TOWERS)
    assert found.problems[0].startswith(problem)


def test_a_gradient_over_whole_models_lies_over_each_stack() -> None:
    value = {"merge_method": "linear", "models": [{"model": "/one", "parameters": {"weight": [1, 3]}}]}
    found = {t.name: t.source for t in matched(value, one=TOWERS).tensors}
    weights = {
        name: source.models[0].parameters["weight"]
        for name, source in found.items()
        if isinstance(source, Arithmetic)
    }
    assert list(weights.values()) == [1, 2, 3, 1, 3, 1, 1]


def test_a_plan_of_slices_depends_on_every_value_and_on_nothing_else() -> None:
    def digest(gradient: list[float], start: int = 0) -> str:
        value = {
            "merge_method": "linear",
            "slices": [{"sources": [{"model": "/a", "layer_range": [start, start + 3]}]}],
            "parameters": {"weight": gradient, "normalize": False},
        }
        recipe = parse_recipe(value)
        return make_plan(
            recipe, inputs_of(recipe, {"/a": checkpoint("file:///a", SIX)}), PlanOptions()
        ).digest

    same = digest([0.1, 0.5, 0.9])
    assert digest([0.1, 0.5, 0.9]) == same
    assert digest([0.1, 0.9]) == digest([0.1, 0.5, 0.9])  # the same values for all three layers
    assert len({same, digest([0.1, 0.6, 0.9]), digest([0.1, 0.5, 0.9], 1)}) == 3


def test_a_threshold_of_the_whole_model_takes_the_same_parameters_for_all() -> None:
    value = {
        "merge_method": "ties", "base_model": "/a", "models": [{"model": "/c"}], "profile": "paper",
        "parameters": {"density": [0.2, 0.4]},
    }  # fmt: skip
    recipe = parse_recipe(value)
    made = {name: checkpoint(f"file://{name}", SIX) for name in ("/a", "/c")}
    plan, problems = draft_plan(recipe, inputs_of(recipe, made), PlanOptions())
    assert plan is None
    assert problems[0].startswith("parameters: under `trim_scope: model` all tensors are surveyed as one")


def test_a_base_that_may_be_there_makes_task_vectors_of_layers() -> None:
    def listed(*names: str) -> dict[str, Any]:
        sources = [{"model": f"/{name}", "layer_range": [at, at + 2]} for at, name in enumerate(names)]
        return {"merge_method": "nuslerp", "slices": [{"sources": sources}]}

    with_base = matched(listed("a", "b", "c") | {"base_model": "/b"}, a=SIX, b=FOUR, c=SIX)
    weight = "model.layers.1.mlp.down_proj.weight"
    at = arithmetics(with_base)[weight]
    assert at.base is not None
    assert [_named(ref) for ref in at.refs] == [
        "b:model.layers.2.mlp.down_proj.weight",
        "a:model.layers.1.mlp.down_proj.weight",
        "c:model.layers.3.mlp.down_proj.weight",
    ]
    assert at.shape == SIX[weight][1]
    without = arithmetics(matched(listed("a", "c"), a=SIX, c=SIX))[weight]
    assert (without.base, len(without.models)) == (None, 2)
    with pytest.raises(RecipeError, match="the base model '/b' is not one of them"):
        parse_recipe(listed("a", "c") | {"base_model": "/b"})
    with pytest.raises(RecipeError, match=r"takes 2 model.* besides the base"):
        parse_recipe(listed("a", "b") | {"base_model": "/b"})


def test_profiles_differ_where_any_tensor_of_any_model_says_so() -> None:
    def said(*densities: Any) -> str:
        models = [
            {"model": f"/{name}", "parameters": {"density": density}}
            for name, density in zip("bc", densities, strict=True)
        ]
        recipe = parse_recipe({"merge_method": "ties", "base_model": "/a", "models": models})
        made = {name: checkpoint(f"file://{name}", SIX) for name in ("/a", "/b", "/c")}
        plan, problems = draft_plan(recipe, inputs_of(recipe, made), PlanOptions())
        assert plan is not None and not problems
        return "\n".join(plan.notices)

    assert "keep_count" not in said(1, 1)
    for densities in (
        (0.5, 1),
        (1, 0.5),
        (1, [{"filter": "mlp", "value": 0.5}, {"value": 1}]),
        (1, [1, 0.5]),
    ):
        found = said(*densities)
        assert "mergekit sets" in found and "`keep_count: mergekit`" in found
        assert found.count("`ties` is not the same everywhere") == 1


def test_many_slices_are_not_read_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    value = sliced(*[("a", number % 6, number % 6 + 1) for number in range(200)])
    read: list[str] = []

    def counting(*arguments: Any) -> Region:
        read.append(arguments[1])
        return region_of(*arguments)

    monkeypatch.setattr(language, "region_of", counting)
    found = matched(value, a=SIX)
    assert (len(found.tensors), found.problems) == (3 + 9 * 200, ())
    assert len(read) < 20
