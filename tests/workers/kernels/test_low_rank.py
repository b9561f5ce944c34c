"""Low-rank products: compiled against torch and against a loop over single numbers, bit for bit, however cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.kernels.formulas import DTYPES
from workers.kernels import cpu_low_rank, low_rank
from workers.kernels.low_rank import Product, rows_of
from workers.kernels.reference import round_to

_INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(elements: torch.Tensor) -> torch.Tensor:
    """The elements' bits."""
    return elements.view(_INTEGERS[elements.element_size()])


def matrix(seed: int, rows: int, columns: int, dtype: torch.dtype, turned: bool = False) -> torch.Tensor:
    """Random elements of which some are -0.0 or tiny; ``turned``, stored by columns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if turned else (rows, columns)
    made = torch.randn(shape, generator=generator)
    made[made.abs() < 0.05] *= -0.0
    made[made > 2] *= 1e-38
    return made.to(dtype).T if turned else made.to(dtype)


def products(seed: int, rows: int, columns: int, ranks: tuple[int, ...]) -> list[Product]:
    """Changes of these ranks in all dtypes, some of them turned."""
    found = []
    for number, rank in enumerate(ranks):
        dtype, turned = DTYPES[(seed + number) % 3], (seed + number) % 2 == 1
        left = matrix(seed + 2 * number, rows, rank, dtype, turned)
        right = matrix(seed + 2 * number + 1, rank, columns, dtype, turned)
        found.append(Product(left, right, [0.1, -1.7, 2.0][number % 3]))
    return found


def added_singly(run: torch.Tensor, changes: list[Product], columns: int) -> torch.Tensor:
    """The same once more: number by number, in numpy, of a run that begins with a row."""
    total = run.float().numpy().reshape(-1, columns)
    for change in changes:
        left, right = change.left.float().numpy(), change.right.float().numpy()
        added = np.zeros_like(total)
        for i, j in np.ndindex(total.shape):
            for rank in range(left.shape[1]):
                added[i, j] = np.float32(added[i, j] + np.float32(left[i, rank] * right[rank, j]))
        total = total + added * np.float32(change.scale)
    return round_to(torch.from_numpy(total).reshape(-1), run.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(0,), (1,), (2, 3), (4,), (7, 0, 9), ()])
def test_an_element_is_its_run_plus_each_product_one_number_after_the_other(
    dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    rows, columns = 5, 23
    run = matrix(9, rows, columns, dtype).reshape(-1)
    changes = products(3, rows, columns, ranks)
    wanted = added_singly(run, changes, columns)
    for kernels in (low_rank, cpu_low_rank):
        out = torch.empty_like(run)
        kernels.add_products(run, changes, 0, columns, out)
        assert torch.equal(bits(out), bits(wanted))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 5),
    st.integers(1, 9),
    st.sampled_from([1, 2, 15, 64, 2049, 4100]),
    st.lists(st.sampled_from([0, 1, 3, 8, 64, 1030]), max_size=3).filter(lambda ranks: sum(ranks) < 1100),
    st.data(),
)
def test_no_bit_depends_on_where_a_run_begins_and_ends(
    seed: int, rows: int, columns: int, ranks: list[int], data: st.DataObject
) -> None:
    dtype = DTYPES[seed % 3]
    run = matrix(seed, rows, columns, dtype).reshape(-1)
    changes = products(seed, rows, columns, tuple(ranks))
    wanted = torch.empty_like(run)
    low_rank.add_products(run, changes, 0, columns, wanted)
    cuts = data.draw(st.lists(st.integers(0, run.numel()), max_size=3))
    found = run.clone()
    for first, last in itertools.pairwise(sorted({0, *cuts, run.numel()})):
        above, offset = divmod(first, columns)
        count = rows_of(last - first, offset, columns)
        cut = [Product(change.left[above : above + count], change.right, change.scale) for change in changes]
        part = found[first:last]  # in place
        cpu_low_rank.add_products(part, cut, offset, columns, part)
    assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_follow_arithmetic_and_stay_in_their_rows_and_columns(dtype: torch.dtype) -> None:
    run = torch.ones(4 * 6, dtype=dtype)
    run[2] = float("nan")
    run[8] = float("inf")
    left, right = torch.ones(4, 2), torch.ones(2, 6)
    left[2, 1], right[0, 5] = float("-inf"), float("nan")
    wanted = torch.full((4, 6), 2.0)
    wanted[0, 2], wanted[1, 2], wanted[2], wanted[:, 5] = torch.nan, torch.inf, -torch.inf, torch.nan
    for kernels in (low_rank, cpu_low_rank):
        out = torch.empty_like(run)
        kernels.add_products(run, [Product(left, right, 0.5)], 0, 6, out)
        assert torch.equal(bits(out), bits(round_to(wanted.reshape(-1), dtype)))


@pytest.mark.parametrize("kernels", [low_rank, cpu_low_rank])
def test_factors_of_other_shapes_are_refused(kernels: object) -> None:
    run, right = torch.zeros(12), torch.zeros(2, 4)
    for left, other in [
        (torch.zeros(2, 2), right),
        (torch.zeros(3, 1), right),
        (torch.zeros(3, 2), torch.zeros(2, 5)),
    ]:
        with pytest.raises(ValueError, match="make no"):
            kernels.add_products(run, [Product(left, other, 1.0)], 0, 4, run)  # type: ignore[attr-defined]
    cpu_low_rank.add_products(run, [Product(torch.zeros(4, 2), right, 1.0)], 1, 4, run)  # over four rows
    with pytest.raises(ValueError, match="contiguous"):
        cpu_low_rank.add_products(run[::2], [], 0, 3, torch.zeros(6))
    with pytest.raises(ValueError, match="contiguous"):
        cpu_low_rank.add_products(run, [], 0, 3, torch.zeros(6))
