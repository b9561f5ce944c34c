"""Random recipes of the methods beyond the first five: a dozen of each, the same every time.

They are compared like :data:`tests.oracle.cases.PARITY`; of DARE's and DELLA's, whose draws differ by design, those
that drop nothing, and those of one model by their masks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.oracle.cases import PARITY, TUNED, Case

COUNT = 12
"""Recipes of each method."""

EXCEPTIONS = {
    "arcee_fusion": "mergekit takes the divergence of two rows in float32, where that of a fine-tune is rounding "
    "error: 1e-7 and less beside terms of about 10; ours is float64, so other elements stand out"
}
"""Why elements may be apart, by method, where a recipe is marked as such."""

Values = dict[str, Any]
Made = tuple[str | None, list[tuple[str, Values]], Values]
"""Base, models with their parameters, and global parameters."""


def _some(choose: random.Random, least: int, most: int = 3) -> list[str]:
    return choose.sample(TUNED, choose.randint(least, most))


def _weight(choose: random.Random) -> float:
    return round(choose.uniform(0.1, 1.5), 2)


def _lambda(choose: random.Random) -> Values:
    return choose.choice([{}, {"lambda": round(choose.uniform(0.3, 1.5), 2)}])


def _normalize(choose: random.Random) -> Values:
    return choose.choice([{}, {"normalize": True}, {"normalize": False}])


def _nuslerp(choose: random.Random) -> Made:
    models = choose.choice([["a", "far"], ["far", "b"], ["a", "b"], ["c", "b"]])
    base = choose.choice([None, "base"])
    how = choose.choice(
        [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]
    )
    return base, [(model, {"weight": _weight(choose)}) for model in models], how


def _multislerp(choose: random.Random) -> Made:
    models = choose.choice([_some(choose, 2), ["a", "far", "b"]])
    how = choose.choice([{}, {"normalize_weights": False}, {"normalize_weights": True, "eps": 1e-8}])
    return choose.choice([None, "base"]), [(model, {"weight": _weight(choose)}) for model in models], how


def _karcher(choose: random.Random) -> Made:
    models = choose.choice([_some(choose, 2), ["a", "far", "b"], ["far", "c"]])
    how = choose.choice([{}, {"max_iter": choose.randint(1, 20)}, {"tol": 1e-6}])
    return None, [(model, {}) for model in models], how


def _model_stock(choose: random.Random) -> Made:
    models = choose.choice([_some(choose, 2), ["a", "b", "far"]])
    return "base", [(model, {}) for model in models], choose.choice([{}, {"filter_wise": True}])


def _breadcrumbs(choose: random.Random) -> Made:
    own = [
        (model, {"weight": _weight(choose), "density": round(choose.uniform(0.05, 1), 3),
                 "gamma": choose.choice([0.0, 0.01, 0.1, round(choose.uniform(0, 0.5), 3)])})
        for model in _some(choose, 1)
    ]  # fmt: skip
    return "base", own, _lambda(choose) | _normalize(choose)


def _della(choose: random.Random) -> Made:
    own = [(model, {"weight": _weight(choose), "density": 1.0, "epsilon": 0.1}) for model in _some(choose, 1)]
    return "base", own, _lambda(choose) | _normalize(choose)


def _dare(choose: random.Random) -> Made:
    own = [(model, {"weight": _weight(choose), "density": 1.0}) for model in _some(choose, 1)]
    return "base", own, _lambda(choose) | _normalize(choose) | choose.choice([{}, {"rescale": False}])


def _drawn(choose: random.Random) -> Made:
    density = round(choose.uniform(0.2, 0.8), 2)
    epsilon = round(choose.uniform(0.02, 0.19), 2)
    return "base", [(choose.choice("ab"), {"weight": 1.0, "density": density, "epsilon": epsilon})], {}


def _sce(choose: random.Random) -> Made:
    models = choose.choice([_some(choose, 2), ["a", "far"], ["b", "far", "c"]])
    how = choose.choice([{}, {"select_topk": round(choose.uniform(0.01, 0.99), 2)}, {"select_topk": 0.1}])
    return "base", [(model, {}) for model in models], how


def _ram(choose: random.Random) -> Made:
    return "base", [(model, {}) for model in _some(choose, 1)], choose.choice([{}, {"epsilon": 1e-3}])


def _ramplus(choose: random.Random) -> Made:
    base, models, how = _ram(choose)
    more = {"r": round(choose.uniform(0, 2), 2), "alpha": round(choose.uniform(0.1, 3), 2)}
    return base, models, how | choose.choice([{}, more])


def _nearswap(choose: random.Random) -> Made:
    return "base", [(choose.choice([*TUNED, "far"]), {})], {"t": choose.choice([1e-4, 1e-3, 0.01, 0.1])}


def _arcee_fusion(choose: random.Random) -> Made:
    return "base", [(choose.choice(["far", "far", "a", "b", "c"]), {})], {}


def _passthrough(choose: random.Random) -> Made:
    return None, [(choose.choice(TUNED), {"scale": choose.choice([0.5, -1.0, _weight(choose), 1.0])})], {}


RECIPES: dict[str, Callable[[random.Random], Made]] = {
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "dare_linear": _dare,
    "dare_ties": _dare,
    "della": _della,
    "della_linear": _della,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs,
    "sce": _sce,
    "ram": _ram,
    "ramplus_tl": _ramplus,
    "model_stock": _model_stock,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "passthrough": _passthrough,
}
"""What makes a method's recipes."""


def _cases(make: Callable[[random.Random], Made], method: str, label: str, count: int) -> Iterator[Case]:
    choose = random.Random(f"{method} {label}")
    for number in range(count):
        # Of bfloat16 many changes are zero: which of those are drawn cannot be seen, and they rank lowest.
        group = "float32" if label else choose.choice(["float32", "float32", "tied", "bfloat16"])
        base, models, parameters = make(choose)
        recipe: Values = {
            "merge_method": method,
            "models": [{"model": f"{group}/{model}", "parameters": own} for model, own in models],
            "dtype": "float32",
        }
        if base is not None:
            recipe["base_model"] = f"{group}/{base}"
        if parameters:
            recipe["parameters"] = parameters
        yield Case(f"{method}-{label}{number:02}", recipe, group)


METHOD_CASES = tuple(case for method, make in RECIPES.items() for case in _cases(make, method, "", COUNT))
"""Every tensor of these has to agree within the bound, but for :func:`is_excepted` ones."""

STORED = tuple(
    Case(f"{case.name}-stored", {**case.recipe, "out_dtype": "bfloat16"}, case.group)
    for number, case in enumerate((*PARITY, *METHOD_CASES))
    if number < len(PARITY) or number % 3 == 0
)
"""Float32 arithmetic that is stored as bfloat16: each tool rounds its own float32 results, once."""

DELLA_MASKS = tuple(
    case for method in ("della", "della_linear") for case in _cases(_drawn, method, "mask-", 6)
)
"""One model of weight 1 each, so that the mask can be read off the result."""


def is_excepted(case: Case) -> bool:
    """Whether elements of this recipe may be apart, for the reason in :data:`EXCEPTIONS`."""
    return case.method in EXCEPTIONS and not any("far" in entry["model"] for entry in case.recipe["models"])
