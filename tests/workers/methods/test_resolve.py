"""From a recipe's parameters to a method's: precedence, profiles, and every problem named at once."""

from __future__ import annotations

import time
from typing import Any

import pytest

from workers.errors import RecipeError
from workers.methods import METHODS, get_method
from workers.methods import resolve as resolve_module
from workers.methods.resolve import MAX_PARAMETERS, resolve_parameters

pytestmark = pytest.mark.fast


def resolve(
    name: str, given: Any = None, models: Any = ({},), profile: str | None = None, **more: Any
) -> Any:
    return resolve_parameters(METHODS[name], profile, given or {}, models, **more)


def problems(
    name: str, given: Any = None, models: Any = ({},), profile: str | None = None, **more: Any
) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve(name, given, models, profile, **more)
    return list(caught.value.problems)


# --- names ------------------------------------------------------------------------------------------------


def test_the_methods_are_known_by_name() -> None:
    assert set(METHODS) == {
        "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties",
        "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl", "consensus", "tsv",
        "knots", "model_stock", "nearswap", "arcee_fusion", "passthrough", "fisher", "fisher_ties", "regmean",
    }  # fmt: skip
    assert get_method("ties") is METHODS["ties"]


@pytest.mark.parametrize(
    ("name", "nearest"), [("tie", "ties"), ("dare_tie", "dare_ties"), ("lineer", "linear")]
)
def test_an_unknown_method_names_the_known_and_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(
        RecipeError, match=f"merge_method: '{name}'.*task_arithmetic.*did you mean '{nearest}'"
    ):
        get_method(name)


def test_a_method_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(RecipeError) as caught:
        get_method("xyzzy")
    assert "did you mean" not in str(caught.value)


# --- precedence -------------------------------------------------------------------------------------------


def test_defaults() -> None:
    parameters, models = resolve("ties", models=({}, {}))
    assert (parameters.normalize, parameters.lambda_, parameters.trim_scope) == (True, 1.0, "tensor")
    assert [(model.weight, model.density) for model in models] == [(1.0, 1.0)] * 2
    for name, normalize in [
        ("linear", True),
        ("task_arithmetic", False),
        ("dare_linear", False),
        ("dare_ties", False),
    ]:
        assert resolve(name)[0].normalize is normalize


def test_a_model_wins_over_the_recipe_and_that_over_the_default() -> None:
    given = {"weight": 0.5, "density": 0.2, "lambda": 0.7, "normalize": False}
    parameters, models = resolve("ties", given, ({"weight": 2}, {"density": 1}, {}))
    assert (parameters.lambda_, parameters.normalize) == (0.7, False)
    assert [(model.weight, model.density) for model in models] == [(2.0, 0.2), (0.5, 1.0), (0.5, 0.2)]


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    parameters, (model,) = resolve("ties", {"lambda": "1e-1"}, ({"weight": "2e3", "density": 1},))
    assert (parameters.lambda_, model.weight) == (0.1, 2000.0)


def test_int8_mask_changes_nothing() -> None:
    for name in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        with_mask, without = resolve(name, {"int8_mask": True})[0], resolve(name)[0]
        assert with_mask.model_dump(mode="json") == without.model_dump(mode="json")


# --- profiles ---------------------------------------------------------------------------------------------


def test_the_mergekit_profile() -> None:
    parameters, _ = resolve("ties", profile="mergekit")
    assert (parameters.keep_count, parameters.equal_magnitudes, parameters.divisor, parameters.normalize) == (
        "mergekit", "exact_k", "weights", True,
    )  # fmt: skip
    parameters, _ = resolve("dare_ties", profile="mergekit")
    assert (parameters.rescale, parameters.divisor, parameters.normalize) == ("l1", "weights", False)
    assert resolve("dare_linear", profile="mergekit")[0].rescale == "l1"


def test_the_paper_profile_trims_over_the_whole_model() -> None:
    for name in ("ties", "dare_ties"):
        assert resolve(name, profile="paper")[0].survey_scope == "model"
    parameters, _ = resolve("ties", {"trim_scope": "tensor"}, profile="paper")
    assert (parameters.keep_count, parameters.zero_sign, parameters.divisor) == ("paper", "majority", "count")
    parameters, _ = resolve("dare_ties", {"trim_scope": "tensor"}, profile="paper")
    assert (parameters.retrim, parameters.trim_density, parameters.normalize) == (True, 0.2, True)
    assert resolve("dare_ties", {"retrim": False}, profile="paper")[0].retrim is False


def test_every_method_knows_both_profiles_and_what_the_recipe_says_wins() -> None:
    assert all(set(method.profiles) == {"paper", "mergekit"} for method in METHODS.values())
    assert resolve("ties", {"divisor": "count"}, profile="mergekit")[0].divisor == "count"
    assert resolve("dare_ties", {"rescale": "none"}, profile="mergekit")[0].rescale == "none"


def test_mergekits_boolean_rescale() -> None:
    assert resolve("dare_linear", {"rescale": False})[0].rescale == "none"
    assert resolve("dare_linear", {"rescale": True})[0].rescale == "inverse"
    assert resolve("dare_linear", {"rescale": True}, profile="mergekit")[0].rescale == "l1"
    assert resolve("dare_linear", {"rescale": False}, profile="mergekit")[0].rescale == "none"


def test_an_unknown_profile() -> None:
    assert problems("ties", profile="papre") == [
        "profile: 'papre' is not a profile of ties (it has: paper, mergekit)"
    ]


# --- problems ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "model", "start"),
    [
        ({"densty": 0.5}, {}, "parameters.densty: is not a parameter of ties; did you mean 'density'?"),
        ({"lambda_": 1}, {}, "parameters.lambda_: is not a parameter of ties; did you mean 'lambda'?"),
        (
            {},
            {"wieght": 1},
            "models[0].parameters.wieght: is not a parameter of ties; did you mean 'weight'?",
        ),
        ({}, {"lambda": 1}, "models[0].parameters.lambda: is set for the whole merge"),
        ({"t": 0.5}, {}, "parameters.t: is not a parameter of ties"),
        ({"density": 1.5}, {}, "parameters.density: input should be less than or equal to 1 (got 1.5)"),
        ({}, {"density": -0.1}, "models[0].parameters.density: input should be greater than or equal to 0"),
        ({}, {"density": float("nan")}, "models[0].parameters.density: input should be "),
        ({}, {"weight": float("inf")}, "models[0].parameters.weight: input should be "),
        ({}, {"weight": 1e39}, "models[0].parameters.weight: 1e+39 is beyond float32's range"),
        ({}, {"weight": True}, "models[0].parameters.weight: must be a number, not true or false"),
        ({"lambda": "much"}, {}, "parameters.lambda: input should be a valid number"),
        ({"divisor": "sum"}, {}, "parameters.divisor: input should be 'abs_weights', 'count' or 'weights'"),
        ({"trim_scope": "layer"}, {}, "parameters.trim_scope: input should be 'tensor' or 'model'"),
        (
            {"trim_scope": "model", "equal_magnitudes": "exact_k"},
            {},
            "parameters: equal_magnitudes 'exact_k' needs trim_scope 'tensor'",
        ),
        ({"weight": [0, 1]}, {}, "parameters.weight: give one value"),
        ({}, {"weight": [0.1, 0.9]}, "models[0].parameters.weight: give one value"),
        ({}, {"weight": []}, "models[0].parameters.weight: give one value"),
        (
            {"weight": [{"filter": "mlp", "value": 1}]},
            {},
            "parameters.weight: give one value",
        ),
        ({}, {"weight": {"value": 1}}, "models[0].parameters.weight: give one value"),
    ],
)
def test_a_problem_names_its_field(given: Any, model: Any, start: str) -> None:
    (problem,) = problems("ties", given, (model,))
    assert problem.startswith(start)


def test_all_problems_come_at_once() -> None:
    found = problems(
        "ties",
        {"lamda": 1, "density": 2, "normalize": "perhaps", "int8_mask": [True]},
        ({"weight": 1}, {"weight": "x", "t": 1}, {"density": 7}),
        profile="folk",
    )
    assert [problem.split(":")[0] for problem in found] == [
        "models[1].parameters.t",
        "models[1].parameters.weight",
        "models[2].parameters.density",
        "parameters.density",
        "parameters.int8_mask",
        "parameters.lamda",
        "parameters.normalize",
        "profile",
    ]


def test_sections_name_the_models() -> None:
    found = problems(
        "ties", {}, ({}, {"density": 2}), sections=("models[1].parameters", "models[2].parameters")
    )
    assert found == ["models[2].parameters.density: input should be less than or equal to 1 (got 2)"]


def test_slerp_needs_t() -> None:
    assert problems("slerp", {}, ({}, {})) == ["parameters.t: is required"]
    assert resolve("slerp", {"t": 0.25}, ({}, {}))[0].t == 0.25
    (problem,) = problems("slerp", {"t": 1.01}, ({}, {}))
    assert problem.startswith("parameters.t: input should be less than or equal to 1")


def test_passthrough_takes_a_scale() -> None:
    (problem,) = problems("passthrough", {"weight": 1})
    assert problem == "parameters.weight: is not a parameter of passthrough (known here: scale)"


def test_schemas_describe_what_a_recipe_may_say() -> None:
    schema = METHODS["ties"].parameters.model_json_schema(by_alias=True)
    assert "lambda" in schema["properties"]
    assert schema["additionalProperties"] is False
    assert METHODS["ties"].model_parameters.model_json_schema()["properties"]["density"]["maximum"] == 1


# --- bounded work -----------------------------------------------------------------------------------------


def test_a_hundred_thousand_unknown_names_are_one_problem_and_no_time() -> None:
    begun = time.process_time()
    given = {f"densit{number}": 1 for number in range(100_000)}
    assert problems("ties", given) == ["parameters: 100000 parameters, more than the 64 that are read"]
    assert problems("ties", {}, (given,)) == [
        "models[0].parameters: 100000 parameters, more than the 64 that are read"
    ]
    assert time.process_time() - begun < 1


def test_hints_are_looked_for_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(resolve_module, "get_close_matches", lambda name, *_, **__: asked.append(name) or [])
    unknown = {f"{number}{'x' * 10_000}": 1 for number in range(MAX_PARAMETERS)}
    found = problems("ties", unknown, (unknown,) * 64)
    assert len(found) == 65 * MAX_PARAMETERS
    assert len(asked) == 50
    assert max(map(len, [*found, *asked])) < 250


def test_what_was_given_is_shown_shortly() -> None:
    (problem,) = problems("ties", {"lambda": "x" * 10_000})
    assert len(problem) < 200
    (problem,) = problems("ties", {"trim_scope": 1 << 100_000})
    assert problem.endswith("(got an endless number)")
