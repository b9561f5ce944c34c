"""The check of a merge finds what is wrong: golden values by hand, and merges that are a little off."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import METHODS, case
from benchmarks.check import count_wrong, expect, samples
from benchmarks.inputs import SIZES

pytestmark = pytest.mark.fast


def _bf16(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16).double()


def test_recipes_read_what_they_should() -> None:
    made = case("ties", 3).recipe(lambda name: f"/m/{name}")
    assert [entry["model"] for entry in made["models"]] == ["/m/tune-1", "/m/tune-2", "/m/tune-3"]
    assert made["base_model"] == "/m/base"
    assert made["models"][0]["parameters"] == {"weight": 0.5, "density": 0.5}
    assert case("linear", 3).models == ("tune-1", "tune-2", "tune-3")
    assert case("slerp", 3).models == ("base", "tune-1")
    assert {len(case(method, 2).models) for method in METHODS} == {2, 3}


def test_samples_are_tensors_that_every_size_has() -> None:
    for size in SIZES.values():
        assert set(samples(size.layers)) < set(size.shapes())
        assert len(samples(size.layers)) == 4


def test_ties_by_hand() -> None:
    base = _bf16(1, 1, 1, 1)
    one = base + _bf16(0.5, 0.25, -0.125, 0.0625)  # trimmed: 0.5, 0.25
    two = base + _bf16(-0.25, 0.5, 0.125, -1)  # trimmed: 0.5, -1
    three = base + _bf16(-0.75, 0.125, 0.5, 0.25)  # trimmed: -0.75, 0.5
    merged, _, clear = expect("ties", [base, one, two, three])
    # sums -0.25, 0.75, 0.5, -1: the means of those that agree are -0.75, 0.375, 0.5, -1
    assert merged.tolist() == [0.25, 1.375, 1.5, 0.0]
    assert clear.all()


def test_other_methods_by_hand() -> None:
    base, one, two = _bf16(1, 0), _bf16(2, 1), _bf16(4, -1)
    assert expect("linear", [one, two])[0].tolist() == [3, 0]
    assert expect("task_arithmetic", [base, one, two])[0].tolist() == [3, 0]
    found = expect("slerp", [_bf16(1, 0), _bf16(0, 1)])[0]
    assert found.tolist() == pytest.approx(
        [0.8090169943749475, 0.5877852522924731]
    )  # cos and sin of 0.4 · 90°
    assert expect("slerp", [base, 2 * base])[0].tolist() == pytest.approx([1.4, 0])


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_two_units_in_the_last_place_and_nan_are_wrong(method: str) -> None:
    torch.manual_seed(1)
    base = (torch.randn(512) * 0.02).bfloat16().double()
    inputs = [base] + [(base + torch.randn(512) * 0.001).bfloat16().double() for _ in range(3)]
    inputs = inputs[: 2 if method == "slerp" else 4]
    right = expect(method, inputs)[0].bfloat16()
    assert count_wrong(method, inputs, right.double(), theirs=False) == 0
    off = right.clone()
    off[7] = torch.nextafter(right[7], torch.tensor(torch.inf, dtype=torch.bfloat16))
    off[7] = torch.nextafter(off[7], torch.tensor(torch.inf, dtype=torch.bfloat16))
    assert count_wrong(method, inputs, off.double(), theirs=False) == 1
    assert count_wrong(method, inputs, base, theirs=False) > 100  # a merge that copies a model
    assert count_wrong(method, inputs, torch.full_like(base, torch.nan), theirs=False) == 512


def test_a_dare_merge_that_keeps_all_or_nothing_is_wrong() -> None:
    torch.manual_seed(2)
    base = (torch.randn(20_000) * 0.02).bfloat16().double()
    tuned = [(base + torch.randn(20_000) * 0.01).bfloat16().double() for _ in range(3)]
    inputs = [base, *tuned]
    kept = [torch.where(torch.rand(20_000) < 0.5, x - base, 0.0) for x in tuned]
    total = kept[0] + kept[1] + kept[2]
    sign = torch.where(total >= 0, 1.0, -1.0)
    agreeing = [torch.where(v.sign() == sign, v, 0.0) for v in kept]
    right = (base + agreeing[0] + agreeing[1] + agreeing[2]).bfloat16().double()
    assert count_wrong("dare_ties", inputs, right, theirs=False) == 0
    assert count_wrong("dare_ties", inputs, base, theirs=False) > 1000
    assert count_wrong("dare_ties", inputs, tuned[0], theirs=False) > 1000
    assert count_wrong("dare_ties", inputs, right + 1, theirs=False) == 20_000
