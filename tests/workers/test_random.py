"""Philox against Random123's published vectors, and masks against a plain-integer Philox written here."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.philox import numpy_philox4x32, numpy_words
from workers.random import keep_mask, mask_key, philox4x32, words_below

pytestmark = pytest.mark.fast

WORD = 0xFFFFFFFF

# Random123's kat_vectors, the lines "philox4x32 10".
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def plain_philox(counter: int, key: int) -> list[int]:
    """One counter, in Python's own integers."""
    x = [counter >> shift & WORD for shift in (0, 32, 64, 96)]
    k = [key & WORD, key >> 32]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k[0], b & WORD, (a >> 32) ^ x[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return x


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter: str, key: str, answer: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    c = np.array([[int(word, 16)] * 3 for word in counter.split()], dtype=np.uint64)
    t = torch.from_numpy(c.astype(np.int64))
    drawn = philox4x32((t[0], t[1], t[2], t[3]), high << 32 | low)
    plain = numpy_philox4x32((c[0], c[1], c[2], c[3]), high << 32 | low)
    for word, same, expected in zip(drawn, plain, answer.split(), strict=True):
        assert word.tolist() == same.tolist() == [int(expected, 16)] * 3


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_plain_philox_of_these_tests_does_too(counter: str, key: str, answer: str) -> None:
    joined = sum(int(word, 16) << 32 * place for place, word in enumerate(counter.split()))
    low, high = (int(word, 16) for word in key.split())
    assert plain_philox(joined, high << 32 | low) == [int(word, 16) for word in answer.split()]


@given(
    key=st.integers(0, 2**64 - 1),
    first=st.one_of(st.integers(0, 70_000), st.integers(2**34 - 9, 2**34 + 9), st.integers(2**40, 2**45)),
    count=st.integers(0, 70),
    density=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_a_mask_is_a_comparison_of_the_word_that_belongs_to_the_element(
    key: int, first: int, count: int, density: float
) -> None:
    threshold = Fraction(str(density)) * 2**32 // 1
    expected = [plain_philox(i // 4, key)[i % 4] < threshold for i in range(first, first + count)]
    assert keep_mask(key, first, count, density).tolist() == expected


@given(
    key=st.integers(0, 2**64 - 1),
    first=st.one_of(st.integers(0, 70_000), st.integers(2**34 - 9000, 2**34), st.integers(2**50, 2**60)),
    count=st.integers(1, 9001),
    bound=st.integers(1, 2**32 - 1),
)
def test_words_drawn_in_torch_are_numpys(key: int, first: int, count: int, bound: int) -> None:
    words = numpy_words(key, first, count)
    assert words_below(key, first, count, bound).tolist() == (words < bound).tolist()
    # Bounds at a word itself show its every bit.
    word = int(words[0])
    assert bool(words_below(key, first, 1, word + 1)) and not bool(words_below(key, first, 1, word))


def test_a_mask_of_a_whole_equals_the_masks_of_its_parts_wherever_it_is_cut() -> None:
    key, count = mask_key(7, 2, "w"), 150_001  # several chunks of counters, and not a multiple of four
    whole = keep_mask(key, 5, count, 0.3)
    for cut in (1, 2, 3, 4, 65_531, 65_536, 131_071, count - 1):
        parts = keep_mask(key, 5, cut, 0.3), keep_mask(key, 5 + cut, count - cut, 0.3)
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("density", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_the_fraction_kept_is_the_density(density: float) -> None:
    n = 1 << 20
    kept = int(keep_mask(mask_key(0, 0, "w"), 0, n, density).sum())
    assert abs(kept - density * n) < 5 * (n * density * (1 - density)) ** 0.5


def test_a_denser_mask_contains_a_sparser_one() -> None:
    key = mask_key(0, 0, "w")
    sparse, dense = keep_mask(key, 0, 10_000, 0.2), keep_mask(key, 0, 10_000, 0.7)
    assert bool((dense | ~sparse).all())


def test_density_one_and_zero_draw_nothing() -> None:
    assert keep_mask(1, 3, 9, 1.0).tolist() == [True] * 9
    assert keep_mask(1, 3, 9, 0.0).tolist() == [False] * 9
    assert keep_mask(1, 3, 9, 1e-10).tolist() == [False] * 9  # below the resolution of 2**-32
    assert keep_mask(1, 3, 0, 0.5).shape == (0,)


def test_a_key_is_the_head_of_a_hash_of_canonical_json() -> None:
    text = '[12,3,"model.é.weight"]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert f"{mask_key(12, 3, 'model.é.weight'):016x}" == expected


def test_seed_model_and_tensor_each_change_the_key() -> None:
    keys = {mask_key(s, m, n) for s in (0, 1, 2**63) for m in (0, 1, 11) for n in ("a", "b", "1,a")}
    assert len(keys) == 27


def test_masks_of_different_models_are_independent() -> None:
    n = 1 << 18
    masks = [keep_mask(mask_key(0, model, "w"), 0, n, 0.5).double() for model in range(4)]
    for a in range(4):
        for b in range(a):
            assert abs(float(((masks[a] - 0.5) * (masks[b] - 0.5)).mean())) < 5 * 0.25 / n**0.5


def test_these_bits_never_change() -> None:
    """A mask drawn by an older release is drawn again."""
    mask = keep_mask(mask_key(42, 1, "model.layers.0.mlp.up_proj.weight"), 0, 64, 0.5)
    expected = [
        plain_philox(i // 4, mask_key(42, 1, "model.layers.0.mlp.up_proj.weight"))[i % 4] < 2**31
        for i in range(64)
    ]
    assert mask.tolist() == expected
    assert f"{mask_key(42, 1, 'model.layers.0.mlp.up_proj.weight'):016x}" == "314e54137f44d433"
    assert f"{int(''.join('01'[bit] for bit in mask.tolist()), 2):016x}" == "1e1afc1e6e9fc260"
