"""Matching: what is paired with what, and everything that does not fit, all at once, with the option that allows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.planning.checkpoint import Checkpoint, StoredTensor
from service.planning.matching import Match, OutputTensor, match, needs_digest
from service.recipe import Recipe
from tests.service.headers import Spec, checkpoint, inputs_of, recipe_of
from workers.sources import Change
from workers.task import Arithmetic, TensorRef

pytestmark = pytest.mark.fast

F32 = ("F32", (4, 3))
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def matched(recipe: Recipe, **checkpoints: Checkpoint) -> Match:
    return match(recipe, inputs_of(recipe, {f"/{name}": found for name, found in checkpoints.items()}))


def made(name: str, spec: Spec, **more: Any) -> Checkpoint:
    return checkpoint(f"file:///{name}", spec, **more)


def arithmetic(found: OutputTensor) -> Arithmetic:
    assert isinstance(found.source, Arithmetic)
    return found.source


def by_name(found: Match) -> dict[str, OutputTensor]:
    assert found.problems == ()
    return {tensor.name: tensor for tensor in found.tensors}


def test_equal_checkpoints_are_paired_in_the_references_order() -> None:
    base = made("base", {"b": F32, "a": ("F32", ())})
    found = matched(
        recipe_of("ties", 2),
        base=base,
        m0=made("m0", {"a": ("F32", ()), "b": F32}),
        m1=made("m1", {"b": F32, "a": ("F32", ())}),
    )
    assert [tensor.name for tensor in found.tensors] == ["b", "a"]
    assert found.notices == ()
    run = arithmetic(found.tensors[0])
    assert run.base == base.tensors["b"].ref
    assert [model.index for model in run.models] == [0, 1]
    assert [model.ref.uri for model in run.models] == [f"file:///m{i}/model.safetensors" for i in (0, 1)]
    assert (run.numel, run.first, run.last) == (12, 0, 12)


def test_every_misfit_of_every_model_is_listed_at_once_with_its_remedy() -> None:
    names = {f"layer{i}": F32 for i in range(12)}
    found = matched(
        recipe_of("ties", 3),
        base=made("base", names | {EMBEDDING: ("F32", (100, 8)), "ids": ("I64", (3,))}, digests={"ids": "1"}),
        m0=made(
            "m0", {"layer0": F32, EMBEDDING: ("F32", (101, 8)), "ids": ("I64", (3,))}, digests={"ids": "2"}
        ),
        m1=made(
            "m1",
            names
            | {"layer3": ("F32", (3, 4)), "new": F32, EMBEDDING: ("F32", (100, 8)), "ids": ("I64", (4,))},
        ),
        m2=made("m2", names | {EMBEDDING: ("F32", (100, 8)), HEAD: ("F32", (100, 8)), "ids": ("I32", (3,))}),
    )
    text = "\n".join(found.problems)
    for line in (
        "/m0: lacks tensors of /base: layer1, layer2, layer3, layer4, layer5, layer6, layer7, layer8 and 3 more; set",
        f"/m0: vocabulary size differs from /base: {EMBEDDING} [101, 8], not [100, 8]; set `tokenizer_source",
        "/m0: integer or boolean buffers differ from /base: ids; they are never averaged: set `buffers:`",
        "/m1: shape differs from /base: layer3 [3, 4], not [4, 3]; set `mismatched_tensors: base`",
        "/m1: tensors that /base does not have: new; set `extra_tensors: drop`",
        "/m1: dtype or shape differs from /base where no arithmetic is possible: ids (I64[4], not I64[3]); set",
        "/m2: has an output head of its own, which /base ties to the embedding: lm_head.weight; set",
        "/m2: dtype or shape differs from /base where no arithmetic is possible: ids (I32[3], not I64[3])",
    ):  # fmt: skip
        assert line in text, (line, text)
    assert len(found.problems) == 8


def test_the_options_allow_what_they_name() -> None:
    checkpoints = {
        "base": made("base", {"a": F32, "b": F32, EMBEDDING: ("F32", (9, 2))}),
        "m0": made("m0", {"a": F32, "extra": F32, EMBEDDING: ("F32", (8, 2))}),
        "m1": made("m1", {"a": F32, "b": F32, EMBEDDING: ("F32", (9, 2))}),
    }
    options = {"missing_tensors": "base", "extra_tensors": "drop", "mismatched_tensors": "base"}
    found = matched(recipe_of("ties", 2, **options), **checkpoints)
    tensors = by_name(found)
    assert list(tensors) == ["a", "b", EMBEDDING]
    assert arithmetic(tensors["b"]).models[0].ref == arithmetic(tensors["b"]).base  # a zero task vector
    assert tensors[EMBEDDING].source == checkpoints["base"].tensors[EMBEDDING]
    assert len(found.notices) == 3
    for option in options:
        rest = {name: value for name, value in options.items() if name != option}
        assert any(
            option in problem for problem in matched(recipe_of("ties", 2, **rest), **checkpoints).problems
        )


def test_without_a_base_a_model_that_lacks_a_tensor_sits_out() -> None:
    recipe = recipe_of("linear", 3, missing_tensors="base")
    found = matched(recipe, m0=made("m0", {"a": F32}), m1=made("m1", {}), m2=made("m2", {"a": F32}))
    assert [model.index for model in arithmetic(by_name(found)["a"]).models] == [0, 2]
    recipe = recipe_of("slerp", 2, {"t": 0.5}, missing_tensors="base", out_dtype="bfloat16")
    found = matched(recipe, m0=made("m0", {"a": F32}), m1=made("m1", {}))
    assert arithmetic(by_name(found)["a"]).method == "passthrough"
    assert by_name(found)["a"].dtype == "BF16"


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_a_tensor_that_no_model_has_is_a_problem_or_the_bases(method: str) -> None:
    base, model = made("base", {"a": F32, "b": F32}), made("m0", {"a": F32})
    found = matched(recipe_of(method, 1, base_model="/base"), base=base, m0=model)
    assert found.problems == (
        "/m0: lacks tensors of /base: b; set `missing_tensors: base` to take them from the base "
        "(or to let the model sit out)",
    )
    found = matched(recipe_of(method, 1, base_model="/base", missing_tensors="base"), base=base, m0=model)
    assert by_name(found)["b"].source == base.tensors["b"]


def test_a_tied_head_that_is_in_no_file_stays_out() -> None:
    spec = {EMBEDDING: ("BF16", (9, 2))}
    found = matched(
        recipe_of("linear", 2), m0=made("m0", spec, config=TIED), m1=made("m1", spec, config=TIED)
    )
    assert list(by_name(found)) == [EMBEDDING]
    assert found.notices == ()


def test_a_redundant_copy_of_a_tied_head_is_left_out_with_a_notice() -> None:
    spec = {EMBEDDING: ("BF16", (9, 2))}
    redundant = spec | {HEAD: ("BF16", (9, 2))}
    found = matched(
        recipe_of("ties", 1), base=made("base", spec, config=TIED), m0=made("m0", redundant, config=TIED)
    )
    assert list(by_name(found)) == [EMBEDDING]
    assert found.notices == (f"/m0: {HEAD} is tied by its config.json and left out",)


@pytest.mark.parametrize("config", [UNTIED, None, {}])
def test_a_model_that_untied_its_head_is_an_error(config: dict[str, Any] | None) -> None:
    spec = {EMBEDDING: ("BF16", (9, 2))}
    untied = made("m0", spec | {HEAD: ("BF16", (9, 2))}, config=config)
    found = matched(recipe_of("ties", 1), base=made("base", spec, config=TIED), m0=untied)
    assert len(found.problems) == 1
    assert "has an output head of its own, which /base ties to the embedding" in found.problems[0]
    found = matched(
        recipe_of("ties", 1, extra_tensors="drop"), base=made("base", spec, config=TIED), m0=untied
    )
    assert list(by_name(found)) == [EMBEDDING]


@pytest.mark.parametrize(
    "config", [TIED, {}]
)  # Gemma and GPT-2 tie by default, and their configs do not say it
def test_the_embedding_stands_for_a_tied_head_where_the_base_has_one(config: dict[str, Any]) -> None:
    spec = {EMBEDDING: ("BF16", (9, 2))}
    base = made("base", spec | {HEAD: ("BF16", (9, 2))}, config=UNTIED)
    model = made("m0", spec, config=config)
    found = matched(recipe_of("ties", 1), base=base, m0=model)
    assert arithmetic(by_name(found)[HEAD]).models[0].ref == model.tensors[EMBEDDING].ref
    assert found.notices == (f"/m0: {HEAD} is tied to {EMBEDDING}, which stands for it",)


@pytest.mark.parametrize("config", [UNTIED, None])
def test_a_head_that_is_missing_and_not_tied_is_missing(config: dict[str, Any] | None) -> None:
    spec = {EMBEDDING: ("BF16", (9, 2))}
    base = made("base", spec | {HEAD: ("BF16", (9, 2))}, config=UNTIED)
    found = matched(recipe_of("ties", 1), base=base, m0=made("m0", spec, config=config))
    assert len(found.problems) == 1
    assert f"lacks tensors of /base: {HEAD}" in found.problems[0]


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F64", "F8_E4M3", "U8"])
def test_what_has_no_arithmetic_is_copied_when_equal_and_never_cast(dtype: str) -> None:
    spec = {"w": F32, "b": (dtype, (5,))}
    recipe = recipe_of("ties", 2, out_dtype="float16")
    base = made("base", spec, digests={"b": "same"})
    models = {f"m{i}": made(f"m{i}", spec, digests={"b": "same"}) for i in range(2)}
    found = by_name(matched(recipe, base=base, **models))
    assert found["b"].source == base.tensors["b"]
    assert (found["b"].dtype, found["w"].dtype) == (dtype, "F16")
    assert needs_digest(
        recipe, inputs_of(recipe, {"/base": base, "/m0": models["m0"], "/m1": models["m1"]})
    ) == ["b"]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("I64", "integer or boolean"), ("BOOL", "integer or boolean"), ("F64", "F64 tens"), ("F8_E5M2", "F8_E5M2 tens")],
)  # fmt: skip
def test_what_has_no_arithmetic_and_differs_names_tensor_and_model(dtype: str, kind: str) -> None:
    spec = {"counts": (dtype, (5,))}
    checkpoints = {name: made(name, spec, digests={"counts": name[-1]}) for name in ("base", "m0", "m1")}
    found = matched(recipe_of("ties", 2), **checkpoints)
    assert len(found.problems) == 2
    assert all(
        kind in problem and "counts" in problem and "`buffers:`" in problem for problem in found.problems
    )
    assert [problem[:3] for problem in found.problems] == ["/m0", "/m1"]
    for winner in ("base", "m0", "m1"):
        chosen = by_name(matched(recipe_of("ties", 2, buffers=f"/{winner}"), **checkpoints))
        assert chosen["counts"].source == checkpoints[winner].tensors["counts"]


def test_the_winner_of_buffers_may_be_spelled_in_either_way_that_the_recipe_lists_it() -> None:
    spec = {"b": ("I64", (5,))}
    base, one = made("base", spec, digests={"b": "1"}), made("one", spec, digests={"b": "2"})
    for winner in ("/one", "file:///one"):
        models = [{"model": "/one"}, {"model": "file:///one"}]
        recipe = recipe_of("ties", 0, models=models, buffers=winner)
        found = match(recipe, inputs_of(recipe, {"/base": base, "/one": one, "file:///one": one}))
        assert by_name(found)["b"].source == one.tensors["b"]


def test_a_winner_that_is_made_on_the_way_is_made_and_not_copied() -> None:
    base, one = made("base", {"w": F32}), made("m0", {"w": F32})
    lora = TensorRef("file:///lora", "e", 0, 16, "F32"), TensorRef("file:///lora", "e", 16, 28, "F32")
    weight = replace(one.tensors["w"], changes=(Change(lora[1], lora[0], 1.0, transposed=False),))
    adapted = replace(one, tensors={"w": weight})
    quantised = made("m1", {"w": ("I8", (4, 3))})
    for checkpoints in ({"base": base, "m0": adapted}, {"base": adapted, "m0": base}):
        winner = next(name for name, each in checkpoints.items() if each is adapted)
        recipe = recipe_of("ties", 2, buffers=f"/{winner}")
        found = by_name(matched(recipe, **checkpoints, m1=quantised))["w"]
        run = arithmetic(found)
        assert (run.method, [model.ref for model in run.models]) == ("passthrough", [weight.source])
        assert (found.dtype, found.shape) == F32
        plain = recipe_of("ties", 2, buffers="/m1")
        assert by_name(matched(plain, **checkpoints, m1=quantised))["w"].source == quantised.tensors["w"]


def test_buffers_need_no_digest_where_a_winner_is_named_or_nobody_else_has_them() -> None:
    spec = {"b": ("I64", (5,)), "w": F32}
    base, model, bare = made("base", spec), made("m0", spec), made("m0", {"w": F32})
    named, unnamed, alone = recipe_of("ties", 1, buffers="/m0"), recipe_of("ties", 1), recipe_of("linear", 1)
    assert needs_digest(named, inputs_of(named, {"/base": base, "/m0": model})) == []
    assert needs_digest(unnamed, inputs_of(unnamed, {"/base": base, "/m0": bare})) == []
    assert needs_digest(alone, inputs_of(alone, {"/m0": model})) == []
    assert by_name(matched(recipe_of("linear", 2), m0=base, m1=base))["b"].source == base.tensors["b"]


def test_a_float_here_and_an_integer_there_is_a_problem() -> None:
    found = matched(
        recipe_of("linear", 2),
        m0=made("m0", {"w": F32}),
        m1=made("m1", {"w": ("I32", (4, 3))}, digests={"w": "1"}),
    )
    assert found.problems[0].startswith(
        "/m1: dtype or shape differs from /m0 where no arithmetic is possible: w (I32[4, 3], not"
    )


def test_dtypes_may_be_mixed_and_the_output_has_the_references_or_the_one_that_is_asked_for() -> None:
    checkpoints = {
        "base": made("base", {"w": ("BF16", (4,)), "v": ("F32", (4,))}),
        "m0": made("m0", {"w": ("F32", (4,)), "v": ("F16", (4,))}),
    }
    kept = by_name(matched(recipe_of("ties", 1), **checkpoints))
    assert (kept["w"].dtype, kept["w"].nbytes, kept["v"].dtype) == ("BF16", 8, "F32")
    cast = by_name(matched(recipe_of("ties", 1, out_dtype="float16"), **checkpoints))
    assert {tensor.dtype for tensor in cast.values()} == {"F16"}


def test_the_base_among_the_models_is_skipped_and_the_others_keep_their_places() -> None:
    recipe = recipe_of("ties", 0, models=[{"model": "/a"}, {"model": "/base"}, {"model": "/b"}])
    spec = {"w": F32}
    found = matched(recipe, base=made("base", spec), a=made("a", spec), b=made("b", spec))
    assert [(m.index, m.ref.uri[8:9]) for m in arithmetic(by_name(found)["w"]).models] == [(0, "a"), (2, "b")]


def test_slerp_starts_at_the_base_model_wherever_it_is_listed() -> None:
    spec = {"w": F32}
    checkpoints = {name: made(name, spec) for name in ("m0", "m1")}
    turned = by_name(matched(recipe_of("slerp", 2, {"t": 0.3}, base_model="/m1"), **checkpoints))["w"]
    assert [model.index for model in arithmetic(turned).models] == [1, 0]
    assert arithmetic(turned).base is None
    straight = by_name(matched(recipe_of("slerp", 2, {"t": 0.3}), **checkpoints))["w"]
    assert [model.index for model in arithmetic(straight).models] == [0, 1]


def test_a_model_listed_twice_counts_twice() -> None:
    recipe = recipe_of("linear", 0, models=[{"model": "/a"}, {"model": "/a", "parameters": {"weight": 3}}])
    found = arithmetic(by_name(matched(recipe, a=made("a", {"w": F32})))["w"])
    assert [model.parameters["weight"] for model in found.models] == [1.0, 3.0]
    assert found.models[0].ref == found.models[1].ref


def test_passthrough_copies_bytes_unless_the_dtype_changes() -> None:
    model = made("m0", {"w": F32, "b": ("I64", (2,))})
    copied = by_name(matched(recipe_of("passthrough", 1), m0=model))
    assert all(isinstance(tensor.source, StoredTensor) for tensor in copied.values())
    cast = by_name(matched(recipe_of("passthrough", 1, out_dtype="bfloat16"), m0=model))
    assert arithmetic(cast["w"]).method == "passthrough"
    assert cast["b"].source == model.tensors["b"]


def test_parameters_are_resolved_for_each_model() -> None:
    spec = {"w": F32}
    recipe = recipe_of(
        "ties", 0, {"density": 0.4, "lambda": 0.8},
        models=[{"model": "/a", "parameters": {"density": 0.1}}, {"model": "/b"}],
    )  # fmt: skip
    found = arithmetic(
        by_name(matched(recipe, base=made("base", spec), a=made("a", spec), b=made("b", spec)))["w"]
    )
    assert [model.parameters for model in found.models] == [
        {"density": 0.1, "weight": 1.0}, {"density": 0.4, "weight": 1.0},
    ]  # fmt: skip
    assert found.parameters["lambda"] == 0.8


BOTH = {EMBEDDING: ("BF16", (9, 2)), HEAD: ("BF16", (9, 2)), "w": ("BF16", (9, 2))}
ALONE = {EMBEDDING: ("BF16", (9, 2)), "w": ("BF16", (9, 2))}


@pytest.mark.parametrize(
    ("method", "base", "m0", "tied"),
    [
        ("ties", made("base", BOTH, config=TIED), made("m0", BOTH, config=TIED), {HEAD}),
        # A model's own bytes stand for both, whatever its config does not say:
        ("ties", made("base", BOTH, config=TIED), made("m0", ALONE, config={}), {HEAD}),
        ("linear", made("base", BOTH), made("m0", BOTH, config=TIED), {HEAD}),
        ("ties", made("base", BOTH, config=UNTIED), made("m0", BOTH, config=TIED), set()),
        ("ties", made("base", BOTH, config=TIED), made("m0", BOTH, config=UNTIED), set()),
        ("ties", made("base", BOTH, config={}), made("m0", BOTH, config={}), set()),
        ("ties", made("base", BOTH), made("m0", BOTH), set()),
    ],
)  # fmt: skip
def test_a_stored_head_is_the_embedding_once_more_only_where_all_models_tie_it(
    method: str, base: Checkpoint, m0: Checkpoint, tied: set[str]
) -> None:
    found = by_name(matched(recipe_of(method, 1), base=base, m0=m0))
    assert {name for name, tensor in found.items() if tensor.is_tied} == tied
    assert all(tensor.is_counted is not tensor.is_tied for tensor in found.values())


def test_what_is_tied_to_nothing_that_is_merged_counts() -> None:
    lone = {HEAD: ("BF16", (9, 2))}
    other = {EMBEDDING: ("BF16", (9, 3)), HEAD: ("BF16", (9, 2))}
    integers = {EMBEDDING: ("I64", (9, 2)), HEAD: ("BF16", (9, 2))}
    for spec in (lone, other, integers):
        base, m0 = (made(name, spec, config=TIED, digests={EMBEDDING: "d"}) for name in ("base", "m0"))
        found = by_name(matched(recipe_of("ties", 1), base=base, m0=m0))
        assert found[HEAD].is_counted


def test_of_two_names_that_are_tied_to_an_embedding_both_repeat_it() -> None:
    names = ("shared.weight", "model.decoder.embed_tokens.weight", HEAD)
    spec = dict.fromkeys(names, ("BF16", (9, 2)))
    base, m0 = (made(name, spec, config=TIED) for name in ("base", "m0"))
    found = by_name(matched(recipe_of("ties", 1), base=base, m0=m0))
    assert [found[name].is_tied for name in names] == [False, True, True]
