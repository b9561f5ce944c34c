"""The comparison itself: it has to see what it is there to see."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.checkpoints import read_checkpoint, write_checkpoint
from tests.oracle.bench import Bench
from tests.oracle.cases import DARE, PARITY, with_models, write_inputs
from tests.oracle.compare import Distance, Mask, cancelled, distance, mask_of, scale_of, undefined_by_trim
from tests.oracle.exact import Nearness, exact, nearness
from tests.oracle.methods import METHOD_CASES, STORED
from tests.oracle.report import Results, markdown

pytestmark = pytest.mark.fast

NONE = torch.zeros(3, dtype=torch.bool)


def test_an_error_is_measured_in_units_of_the_bound() -> None:
    ours, theirs = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 2.0 + 3e-6, 0.0])
    found = distance(ours, theirs, torch.tensor([1.0, 2.0, 0.0]), NONE)
    assert (found.elements, found.differing, found.over) == (3, 1, 1)
    assert found.worst == pytest.approx(1.5, rel=0.1)
    assert distance(ours, theirs, torch.full((3,), 4.0), NONE).over == 0


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e-30])
def test_nothing_odd_passes(odd: float) -> None:
    ours, theirs = torch.tensor([1.0, odd, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    assert distance(ours, theirs, torch.tensor([1.0, 0.0, 1.0]), NONE).over == 1
    assert distance(theirs, ours, torch.tensor([1.0, 0.0, 1.0]), NONE).worst == math.inf


def test_undefined_elements_are_counted_and_left_out() -> None:
    undefined = torch.tensor([False, True, False])
    found = distance(torch.ones(3), torch.tensor([1.0, 9.0, 1.0]), torch.ones(3), undefined)
    assert found == Distance(elements=2, undefined=1)


def test_only_equals_across_the_threshold_are_undefined() -> None:
    base = torch.zeros(6)
    model = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])
    cases = {
        0.17: [],  # keeps the 3
        0.34: [1, 2, 3],  # keeps the 3 and one of the 2s
        0.67: [],  # keeps all 2s
        1.0: [],
        0.0: [],
    }
    for density, expected in cases.items():
        assert undefined_by_trim(base, [model], [density]).nonzero().flatten().tolist() == expected
    assert not undefined_by_trim(base, [base], [0.5]).any()


def test_scales_by_hand() -> None:
    base, one, two = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([-1.0])
    own = [{"weight": 0.5}, {"weight": -1.5}]
    assert scale_of("ties", {}, base, [one, two], own).item() == 1 + 0.5 * 2 + 1.5 * 2
    assert scale_of("linear", {}, None, [one, two], own).item() == 0.5 * 3 + 1.5
    assert scale_of("linear", {"normalize": False}, None, [one, two], own).item() == 0.5 * 3 + 1.5
    assert scale_of("slerp", {"t": 0.5}, None, [one, two], [{}, {}]).item() == 4


@pytest.mark.parametrize("rescale", ["inverse", "l1"])
def test_a_mask_is_read_off_and_a_wrong_factor_is_seen(rescale: str) -> None:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(4000, generator=generator)
    model = base + torch.randn(4000, generator=generator) * 1e-2
    keep = torch.rand(4000, generator=generator) < 0.25
    tau = model.double() - base.double()
    factor = 4.0 if rescale == "inverse" else float(tau.abs().sum() / tau[keep].abs().sum())
    merged = torch.where(keep, base + factor * tau, base.double()).float()
    found = mask_of(merged, base, model, 0.25, rescale)
    assert found.over == 0
    assert found.kept == pytest.approx(int(keep.sum()), abs=8)
    assert found.sigmas(0.25) < 5 < found.sigmas(0.3)
    wrong = torch.where(keep, base + 1.001 * factor * tau, base.double()).float()
    assert mask_of(wrong, base, model, 0.25, "inverse").over > 900


def test_the_report_names_what_is_wrong() -> None:
    versions = {"mergekit": "0.1.5"}
    good = Results(
        versions, {PARITY[0]: Distance(10, 3, 0, 0.5, 1)}, {}, {(DARE[0], "x", "l1"): Mask(100, 10, 0)}
    )
    assert list(good.problems()) == []
    assert "| ties | 10 | 1 | 70.00% | 0 | 0.50 |" in markdown(good, 1, [])
    bad = Results(
        versions,
        {PARITY[0]: Distance(10, 3, 1, 2.0, 0), PARITY[1]: Distance(), PARITY[2]: Distance(10, undefined=5)},
        {},
        {(DARE[0], "x", "l1"): Mask(100, 50, 1)},
    )
    problems = list(bad.problems())
    assert [problem.split()[0] for problem in problems] == [
        "ties:", "ties-weights:", "ties-sum:", "dare_linear-0.1", "dare_linear-0.1",
    ]  # fmt: skip
    assert all(problem in markdown(bad, 1, problems) for problem in problems)


def test_what_is_in_too_few_recipes_is_named() -> None:
    cases = {case: Distance(1) for case in METHOD_CASES if case.method in ("sce", "ram")}
    assert list(Results({}, cases, {}, {}).too_few()) == [
        "several documents is in 0 recipes, fewer than 20",
        "adapters is in 0 recipes, fewer than 20",
    ]
    cases.pop(next(iter(cases)))
    cases.pop(next(iter(cases)))
    cases.pop(next(iter(cases)))
    assert next(Results({}, cases, {}, {}).too_few()).endswith("is in 9 recipes, fewer than 10")


def test_results_that_are_stored_as_bfloat16_are_their_float32_ones_rounded_once(tmp_path: Path) -> None:
    bench, case = Bench(tmp_path), next(case for case in STORED if case.name == "linear-stored")
    write_inputs(tmp_path / "inputs")
    tensors = read_checkpoint(bench.model("float32/a"))
    stored = {name: each.bfloat16() for name, each in tensors.items()}
    for place, held in (("ours/linear-mergekit", tensors), ("theirs/linear", tensors)):
        write_checkpoint(tmp_path / place, held)
    for place in (bench.ours(case), bench.theirs(case)):
        write_checkpoint(place, stored)
    assert bench.stored(case) == Distance(sum(each.numel() for each in tensors.values()))
    first = next(iter(stored))
    write_checkpoint(bench.ours(case), stored | {first: stored[first] * 1.01})
    found = bench.stored(case)
    assert found.differing == found.over > 0


def test_renaming_models_leaves_the_case_alone() -> None:
    renamed = with_models(PARITY[0].recipe, lambda name: f"/m/{name}")
    assert renamed["base_model"] == "/m/float32/base"
    assert [entry["model"] for entry in renamed["models"]] == [f"/m/float32/{name}" for name in "abc"]
    assert PARITY[0].recipe["base_model"] == "float32/base"


def test_names_are_unique() -> None:
    names = [case.name for case in (*PARITY, *DARE)]
    assert len(set(names)) == len(names)


def test_float64_tells_whose_rounding_it_is() -> None:
    base, near, far = torch.tensor([1.0]), torch.tensor([1.5]), torch.tensor([2.0])
    own = [{"weight": 1.0}, {"weight": -0.9}]
    recipe = ("task_arithmetic", {"normalize": True, "lambda": 0.5}, base, [near, far], own)
    truth, unsure = exact(*recipe)
    assert truth.item() == pytest.approx(1 + 0.5 * (0.5 - 0.9) / 0.1)
    assert not unsure.any()
    off = truth.float() + 3e-5
    assert scale_of(*recipe, widened=False).item() == pytest.approx(1 + (0.5 + 0.9) / 0.1)
    assert scale_of(*recipe).item() == pytest.approx(1 + 19 * (0.5 + 0.9) / 0.1)
    assert nearness(truth.float(), off, *recipe).verdict == "mergekit's"
    assert nearness(off, truth.float(), *recipe).verdict == "Mergemill's"
    assert nearness(off, off, *recipe).verdict == "both tools'"
    assert Nearness().verdict == "not established"


def test_weights_that_vanish_widen_nothing() -> None:
    own = [{"weight": 0.1 + 0.2}, {"weight": -0.3}]
    tensors = (torch.zeros(1), [torch.ones(1), torch.ones(1)], own)
    assert scale_of("task_arithmetic", {"normalize": True}, *tensors).item() == pytest.approx(0.6)
    assert cancelled([0.3, 0.4]) == 1


@pytest.mark.parametrize("method", ["multislerp", "karcher", "sce"])
def test_in_float64_methods_do_what_they_are_known_to(method: str) -> None:
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    base = torch.zeros(2) if method == "sce" else None
    truth, _ = exact(method, {}, base, [one, two], [{}, {}])
    # Two directions at right angles: the one in the middle, at the mean length. SCE: no signs disagree.
    expected = [3.0, 1.0] if method == "sce" else [math.sqrt(2), math.sqrt(2)]
    assert truth.tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="float64"):
        exact("ties", {}, base, [one, two], [{}, {}])
