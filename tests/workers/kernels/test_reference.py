"""The reference kernels: rounding, bits and sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.kernels import reference, scalars
from workers.kernels.base import Divisor
from workers.task import SURVEY_ELEMENTS

pytestmark = pytest.mark.fast

RAW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def floats(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


def raw(x: torch.Tensor) -> list[int]:
    width = {2: 0xFFFF, 4: 0xFFFFFFFF}[x.element_size()]
    return [value & width for value in x.view(RAW[x.dtype]).tolist()]


# --- dtypes -----------------------------------------------------------------------------------------------


def test_every_bfloat16_and_float16_survives_the_way_through_float32() -> None:
    everything = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    for dtype in (torch.bfloat16, torch.float16):
        x = everything.view(dtype)
        back = reference.round_to(reference.to_float32(x), dtype)
        finite = ~torch.isnan(x)
        assert torch.equal(back[finite].view(torch.int16), x[finite].view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "canonical"), [(torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00), (torch.float32, 0x7FC00000)]
)
def test_nan_is_written_canonically_whatever_its_sign_and_payload(dtype: torch.dtype, canonical: int) -> None:
    payloads = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FC12345]
    many = floats(payloads * 9 + [0x3F800000])  # vector body and tail
    assert raw(reference.round_to(many, dtype))[:-1] == [canonical] * 45
    assert reference.round_to(many, dtype)[-1] == 1.0
    assert raw(reference.round_to(floats(payloads[1:2]), dtype)) == [canonical]


def plain_bfloat16(bits: int) -> int:
    """To nearest even, in integers."""
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


@given(
    st.lists(
        st.integers(0, 0xFFFFFFFF).filter(lambda b: b & 0x7FFFFFFF <= 0x7F800000), min_size=1, max_size=40
    )
)
def test_bfloat16_rounds_to_nearest_even(bits: list[int]) -> None:
    assert raw(reference.round_to(floats(bits), torch.bfloat16)) == [plain_bfloat16(b) for b in bits]


@given(
    st.lists(
        st.integers(0, 0xFFFFFFFF).filter(lambda b: b & 0x7FFFFFFF <= 0x7F800000), min_size=1, max_size=40
    )
)
def test_float16_rounds_as_ieee_754_does(bits: list[int]) -> None:
    with np.errstate(over="ignore"):
        wanted = np.array(bits, dtype=np.uint32).view(np.float32).astype(np.float16).view(np.uint16)
    assert raw(reference.round_to(floats(bits), torch.float16)) == wanted.tolist()


def test_rounding_to_float32_changes_nothing_and_leaves_its_input() -> None:
    x = floats([0x80000000, 0x00000001, 0x7F800000, 0xFFC00001])
    assert raw(reference.round_to(x, torch.float32)) == [0x80000000, 0x00000001, 0x7F800000, 0x7FC00000]
    assert raw(x)[3] == 0xFFC00001


def test_dtype_names_are_those_of_safetensors() -> None:
    assert reference.TORCH_DTYPES["BF16"] is torch.bfloat16
    assert set(reference.TORCH_DTYPES) == {"F32", "F16", "BF16"}


# --- bits and masks ---------------------------------------------------------------------------------------

ANY_BITS = st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=70)


@given(ANY_BITS)
def test_magnitude_bits_are_ordered_as_magnitudes(bits: list[int]) -> None:
    x = floats(bits)
    got = reference.magnitude_bits(x).tolist()
    assert got == [b & 0x7FFFFFFF for b in bits]
    finite = [(b, abs(v)) for b, v in zip(got, x.tolist(), strict=True) if math.isfinite(v)]
    assert [v for _, v in sorted(finite)] == sorted(v for _, v in finite)


@given(ANY_BITS)
def test_nonfinite_elements_are_read_as_zero(bits: list[int]) -> None:
    x = floats(bits)
    finite = [math.isfinite(value) for value in x.tolist()]
    assert raw(reference.finite_or_zero(x)) == [b if ok else 0 for b, ok in zip(bits, finite, strict=True)]
    assert reference.finite_bits(x).tolist() == [
        b & 0x7FFFFFFF if ok else 0 for b, ok in zip(bits, finite, strict=True)
    ]
    assert raw(x) == bits


@given(ANY_BITS, st.integers(0, 0x7F800000))
def test_trim_keeps_bits_or_writes_plus_zero(bits: list[int], threshold: int) -> None:
    kept = reference.trim(floats(bits), threshold)
    assert raw(kept) == [b if b & 0x7FFFFFFF >= threshold else 0 for b in bits]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.integers(0, 60))
def test_trim_equals_takes_the_first(values: list[int], take: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    (threshold,) = reference.magnitude_bits(torch.tensor([2.0])).tolist()
    left, wanted = take, []
    for value in values:
        if value == 2:
            wanted.append(2.0 if left > 0 else 0.0)
            left -= 1
        else:
            wanted.append(3.0 if value == 3 else 0.0)
    assert reference.trim_equals(x, threshold, take).tolist() == wanted
    assert x.tolist() == values


def test_drop_keeps_nan() -> None:
    x = torch.tensor([1.0, 2.0, math.nan, math.nan, math.inf])
    mask = torch.tensor([True, False, True, False, False])
    dropped = reference.drop(x, mask, 4.0).tolist()
    assert dropped[:2] == [4.0, 0.0]
    assert math.isnan(dropped[2])
    assert math.isnan(dropped[3])
    assert dropped[4] == 0.0


# --- scalars and sums -------------------------------------------------------------------------------------


def test_dividing_is_not_multiplying_by_the_reciprocal() -> None:
    x = np.random.default_rng(0).normal(0, 1, 1003).astype(np.float32)
    for divisor in (3.0, 0.7, 1.4000000000000001):
        quotients = reference.divide(torch.from_numpy(x), divisor).numpy()
        assert (quotients == x / np.float32(divisor)).all()
        assert (quotients != x * np.float32(1 / divisor)).any()


def test_scalars_are_rounded_to_float32_once() -> None:
    assert reference.float32(0.1) == float(np.float32(0.1)) != 0.1
    assert reference.float32(1e300) == math.inf
    x = torch.tensor([3.0])
    assert reference.scale(x, 0.1).item() == float(np.float32(3) * np.float32(0.1))
    assert reference.divide(x, 0.1).item() == float(np.float32(3) / np.float32(0.1))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=16))
def test_accumulate_adds_in_order(values: list[float]) -> None:
    wanted = np.float32(values[0])
    for value in values[1:]:
        wanted = np.float32(wanted + np.float32(value))
    vectors = [torch.full((9,), value) for value in values]
    assert reference.accumulate(vectors).tolist() == [float(wanted)] * 9
    assert [vector[0].item() for vector in vectors] == values


def test_weights_that_vanish_divide_by_one() -> None:
    assert scalars.weight_sum([0.5, 1.0]) == 1.5
    assert scalars.weight_sum([-0.5]) == -0.5
    assert scalars.weight_sum([0.1, 0.2, -0.3]) == 1.0  # 2.8e-17
    assert scalars.weight_sum([0.0]) == 1.0


def halving(values: list[float]) -> float:
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


BLOCK = SURVEY_ELEMENTS


@pytest.mark.parametrize("n", [0, 1, 2, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_block_sums_are_the_written_tree_in_each_block(n: int) -> None:
    values = np.random.default_rng(n).normal(0, 1, n) * 10.0 ** np.random.default_rng(n).integers(-9, 9, n)
    padded = [*values.tolist(), *[0.0] * (-n % BLOCK)]
    x = torch.from_numpy(values)
    wanted = [halving(padded[at : at + BLOCK]) for at in range(0, n, BLOCK)]
    assert reference.block_sums(x).tolist() == wanted
    assert x.tolist() == values.tolist()


def test_elect_reads_both_zeros_alike() -> None:
    total = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45])
    assert reference.elect(total).tolist() == [1, -1, 1, 1, 1, -1]
    assert reference.elect(total, -1).tolist() == [1, -1, -1, -1, 1, -1]


@pytest.mark.parametrize("divisor", [None, "abs_weights", "count", "weights"])
def test_consensus_keeps_nan_and_lets_infinity_win(divisor: Divisor | None) -> None:
    rows = [[math.nan, math.inf, 0.0, 1.0, -0.0], [1.0, -5.0, math.nan, 1.0, 0.0]]
    merged = reference.consensus([torch.tensor(row) for row in rows], [0.5, 0.5], 1, divisor).tolist()
    assert math.isnan(merged[0])
    assert merged[1] == math.inf
    assert math.isnan(merged[2])
    assert merged[3] == (0.5 if divisor == "count" else 1.0)
    assert math.copysign(1, merged[4]) == 1.0


def test_slerp_coefficients() -> None:
    assert scalars.slerp_coefficients(0.25, 1.0, 0.0, 0.0) == (0.75, 0.25)
    assert scalars.slerp_coefficients(0.25, 4.0, 9.0, 6.0) == (0.75, 0.25)
    first, second = scalars.slerp_coefficients(0.5, 4.0, 9.0, 0.0)
    assert first == pytest.approx(0.5**0.5)
    assert second == pytest.approx(0.5**0.5)
    # Rounding may push a cosine beyond 1, where it has no angle.
    assert scalars.slerp_coefficients(0.5, 1.0, 1.0, 1.0000000000000002) == (0.5, 0.5)
