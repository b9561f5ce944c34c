"""Sizes, strictly read and stably written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemill.sizes import binary_text, parse_size, size_text

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000), ("64MiB", 67_108_864), ("1000", 1000), ("1 B", 1), ("1.5 GiB", 1_610_612_736),
        ("2kB", 2000), ("2KB", 2000), ("2KiB", 2048), ("0.1TB", 100_000_000_000), ("4TiB", 4_398_046_511_104),
    ],
)  # fmt: skip
def test_units_mean_what_they_say(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "5gb", "5G", "5 gigabytes", "-1GB", "+1GB", "1e9", "0", "0GB", "1.5", "0.1kiB", "5GB ", " 5GB", "5  GB",
     "1,5GB", "٥GB", "1_000", ".5GB", "5.GB", "0x10", "nan", "0.0001KB"],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole"):
        parse_size(text)


@given(st.integers(1, 10**15), st.sampled_from(["", "kB", "MB", "GiB"]))
def test_whole_numbers_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * {"": 1, "kB": 1000, "MB": 10**6, "GiB": 2**30}[unit]


def test_bounds_are_written_as_they_are_given() -> None:
    assert [binary_text(n) for n in (1, 1023, 3 << 10, 5 << 20, 4 << 30, 5 << 40)] == [
        "1", "1023", "3KiB", "5MiB", "4GiB", "5TiB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (9_995, "10.0 kB"),
     (99_949, "99.9 kB"), (99_950, "100 kB"), (5 * 10**9, "5.00 GB"), (3 * 10**18, "3000 PB")],
)  # fmt: skip
def test_three_digits(count: int, text: str) -> None:
    assert size_text(count) == text
