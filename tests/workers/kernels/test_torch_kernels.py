"""The torch kernels against the written steps, an element and an operation at a time in numpy's float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.philox import numpy_words
from workers.kernels.base import DROP_NUMBERS, KEEP_ALL, PAIR, PAIRS, Election, Formula, Operands, Term
from workers.kernels.torch_kernels import TorchKernels
from workers.random import mask_key
from workers.task import SURVEY_ELEMENTS

pytestmark = pytest.mark.fast

KERNELS = TorchKernels()
SPECIAL = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000,
    0x3F800000, 0xBF800000, 0x40000000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001,
]  # fmt: skip
NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def word(key: int, index: int) -> int:
    """The 32-bit Philox word of one flat element."""
    return int(numpy_words(key, index, 1)[0])


def bits(x: np.float32) -> int:
    return int(x.view(np.uint32)) & 0x7FFFFFFF


def sparse(operands: Operands, formula: Formula, term: Term, i: int) -> np.float32:
    value = np.float32(operands.models[term.model][i].item())
    if formula.task_vectors:
        assert operands.base is not None
        value = np.float32(value - np.float32(operands.base[i].item()))
    if term.keep_below < KEEP_ALL and not np.isnan(value):
        kept = word(operands.mask_keys[term.model], operands.first + i) < term.keep_below
        value = np.float32(value * np.float32(term.factor)) if kept else np.float32(0)
    return value


def trimmed(operands: Operands, formula: Formula, term: Term, i: int, equal_before: int) -> np.float32:
    value = sparse(operands, formula, term, i)
    threshold, take = term.trim_of(operands.first // SURVEY_ELEMENTS)
    below = bits(value) < threshold or (
        bits(value) == threshold and take is not None and equal_before >= take
    )
    return np.float32(0) if below else value


def terms_at(operands: Operands, formula: Formula) -> list[list[np.float32]]:
    """The trimmed elements of each term, in one block."""
    rows = []
    for term in formula.terms:
        row: list[np.float32] = []
        equal = 0
        for i in range(operands.numel):
            row.append(trimmed(operands, formula, term, i, equal))
            equal += bits(sparse(operands, formula, term, i)) == term.threshold
        rows.append(row)
    return rows


def merged(operands: Operands, formula: Formula) -> list[np.float32]:
    out = []
    rows = terms_at(operands, formula)
    for i in range(operands.numel):
        shares = [
            row[i] if term.weight == 1 else np.float32(row[i] * np.float32(term.weight))
            for row, term in zip(rows, formula.terms, strict=True)
        ]
        total = shares[0]
        for share in shares[1:]:
            total = np.float32(total + share)
        if formula.election is not None:
            total = agreed(shares, [term.weight for term in formula.terms], total, formula.election)
        if formula.divide is not None:
            total = np.float32(total / np.float32(formula.divide))
        if formula.lambda_ != 1:
            total = np.float32(total * np.float32(formula.lambda_))
        if formula.task_vectors:
            assert operands.base is not None
            total = np.float32(np.float32(operands.base[i].item()) + total)
        out.append(total)
    return out


def agreed(
    shares: Sequence[np.float32], weights: Sequence[float], total: np.float32, election: Election
) -> np.float32:
    positive = total > 0 or (total == 0 and election.zero_sign == 1)
    found = divisor = np.float32(0)
    for share, weight in zip(shares, weights, strict=True):
        if np.isnan(share) or (share > 0 if positive else share < 0):
            found = np.float32(found + share)
            part = {"abs_weights": abs(weight), "count": 1.0, "weights": weight, None: 0.0}[election.divisor]
            divisor = np.float32(divisor + np.float32(part))
    return found if election.divisor is None else np.float32(found / (divisor or np.float32(1)))


WEIGHTS = st.sampled_from([1.0, 0.5, -0.5, 0.3, -1.0, 2.0, 1e-40, 3e38, 0.0])
THRESHOLDS = st.sampled_from([0, 1, 0x3F000000, 0x3F800000, 0x40000000, 0x7F800000, DROP_NUMBERS])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Operands, Formula]:
    n, count = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    task_vectors = draw(st.booleans())
    values = st.lists(st.sampled_from(SPECIAL) | st.integers(0, 0xFFFFFFFF), min_size=n, max_size=n)
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

    def elements() -> torch.Tensor:
        raw = np.array(draw(values), dtype=np.uint32).view(np.float32)
        return torch.from_numpy(raw).to(draw(dtypes))

    block = draw(st.integers(0, 3))
    operands = Operands(
        first=block * SURVEY_ELEMENTS,
        base=elements() if task_vectors or draw(st.booleans()) else None,
        models=tuple(elements() for _ in range(count)),
        mask_keys=tuple(mask_key(3, index, "w") for index in range(count)),
    )
    terms = tuple(
        Term(
            model=draw(st.integers(0, count - 1)),
            weight=draw(WEIGHTS),
            keep_below=draw(st.sampled_from([KEEP_ALL, KEEP_ALL, 1 << 31, 0, 1 << 30])),
            factor=draw(st.sampled_from([1.0, 2.0, 1 / 0.3, math.inf])),
            threshold=draw(THRESHOLDS),
            cut=draw(st.none() | st.tuples(st.integers(0, 3), st.integers(0, 4))),
        )
        for _ in range(draw(st.integers(1, 6)))
    )
    divisors = st.sampled_from([None, "abs_weights", "count", "weights"])
    election = Election(draw(st.sampled_from([1, -1])), draw(divisors)) if draw(st.booleans()) else None
    divide = draw(st.sampled_from([None, 1.0, 0.3, -2.0]))
    return operands, Formula(terms, task_vectors, election, divide, draw(st.sampled_from([1.0, 0.7, -1.0])))


@settings(max_examples=300)
@given(problems(), st.sampled_from(list(NAN)))
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_every_step_of_a_formula_is_the_written_one(
    problem: tuple[Operands, Formula], dtype: torch.dtype
) -> None:
    operands, formula = problem
    out = torch.empty(operands.numel, dtype=dtype)
    found = KERNELS.merge(operands, formula, out)
    wanted = torch.from_numpy(np.array(merged(operands, formula), dtype=np.float32)).to(dtype)
    nan = torch.isnan(wanted)
    raw = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(raw)[~nan], wanted.view(raw)[~nan])
    assert out.view(raw)[nan].tolist() == [NAN[dtype]] * int(nan.sum())
    inputs = torch.stack([torch.isfinite(x) for x in operands.inputs])
    assert found.nonfinite == KERNELS.nonfinite(operands) == tuple((~inputs).sum(1).tolist())
    assert found.overflowed == int((inputs.all(0) & ~torch.isfinite(wanted)).sum())


@settings(max_examples=150)
@given(problems())
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_statistics_are_of_the_written_elements(problem: tuple[Operands, Formula]) -> None:
    operands, formula = problem
    rows = [
        [bits(value) if np.isfinite(value := sparse(operands, formula, term, i)) else 0 for i in range(operands.numel)]
        for term in formula.terms
    ]  # fmt: skip
    high = [row[0] >> 16 for row in rows]
    counts = np.full((len(rows), 1 << 16), 5)
    KERNELS.histogram(operands, formula, None, counts)
    lows = np.zeros_like(counts)
    KERNELS.histogram(operands, formula, high, lows)
    for row, counted, low, top in zip(rows, counts, lows, high, strict=True):
        assert (counted - 5).tolist() == np.bincount([b >> 16 for b in row], minlength=1 << 16).tolist()
        within = [b & 0xFFFF for b in row if b >> 16 == top]
        assert low.tolist() == np.bincount(within, minlength=1 << 16).tolist()
    thresholds = [row[-1] for row in rows]
    equal = KERNELS.equal_counts(operands, formula, thresholds)
    assert equal.tolist() == [[row.count(t) for row, t in zip(rows, thresholds, strict=True)]]
    elected = KERNELS.elected(operands, formula)
    assert elected == sum(signs(operands, formula))


def signs(operands: Operands, formula: Formula) -> list[int]:
    found = []
    for column in zip(*terms_at(operands, formula), strict=True):
        total: Any = None
        for value, term in zip(column, formula.terms, strict=True):
            finite = value if np.isfinite(value) else np.float32(0)
            share = finite if term.weight == 1 else np.float32(finite * np.float32(term.weight))
            total = share if total is None else np.float32(total + share)
        found.append(int(total > 0) - int(total < 0))
    return found


def long_operands(n: int) -> Operands:
    generator = np.random.default_rng(n)

    def elements(dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(generator.normal(0, 1, n).astype(np.float32)).to(dtype)

    base, *models = (elements(d) for d in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16))
    models[1][5] = math.inf
    models[2][-1] = math.nan
    return Operands(2 * SURVEY_ELEMENTS, base, tuple(models), tuple(mask_key(0, i, "w") for i in range(3)))


LONG = 2 * SURVEY_ELEMENTS + 37
FORMULA = Formula(
    (
        Term(0, 0.3, keep_below=1 << 31, factor=2.0, threshold=0x3F000000),
        Term(1, -0.5, threshold=0x3F800000, cut=(3, 1)),
        Term(2),
    ),
    task_vectors=True,
    election=Election(-1, "abs_weights"),
    lambda_=0.7,
)


def test_a_run_is_its_blocks_one_after_the_other() -> None:
    whole = long_operands(LONG)
    runs = [
        Operands(
            whole.first + start,
            None if whole.base is None else whole.base[start : start + SURVEY_ELEMENTS],
            tuple(model[start : start + SURVEY_ELEMENTS] for model in whole.models),
            whole.mask_keys,
        )
        for start in range(0, LONG, SURVEY_ELEMENTS)
    ]
    out = torch.empty(LONG, dtype=torch.bfloat16)
    found = KERNELS.merge(whole, FORMULA, out)
    parts = [torch.empty(run.numel, dtype=torch.bfloat16) for run in runs]
    founds = [KERNELS.merge(run, FORMULA, part) for run, part in zip(runs, parts, strict=True)]
    assert torch.equal(torch.cat(parts).view(torch.int16), out.view(torch.int16))
    assert found.nonfinite == (0, 0, 1, 1) == tuple(np.sum([f.nonfinite for f in founds], axis=0))
    assert found.overflowed == sum(f.overflowed for f in founds) == 0
    counts, summed = (np.zeros((3, 1 << 16), dtype=np.int64) for _ in range(2))
    KERNELS.histogram(whole, FORMULA, None, counts)
    for run in runs:
        KERNELS.histogram(run, FORMULA, None, summed)
    assert (counts == summed).all()
    assert counts.sum(1).tolist() == [LONG] * 3
    assert KERNELS.elected(whole, FORMULA) == sum(KERNELS.elected(run, FORMULA) for run in runs) != 0
    thresholds = [0x3F800000, 0x3F000000, 0]
    for of_run in (
        lambda run: KERNELS.equal_counts(run, FORMULA, thresholds),
        lambda r: KERNELS.norms(r, FORMULA),
    ):
        assert (of_run(whole) == np.concatenate([of_run(run) for run in runs])).all()


def test_norms_are_before_the_drop_and_after_and_unscaled() -> None:
    whole = long_operands(LONG)
    assert whole.base is not None
    norms = KERNELS.norms(whole, FORMULA)
    assert norms.shape == (3, 3, 2)
    assert norms.dtype == np.float64
    for index, model in enumerate(whole.models):
        vector = (model.float() - whole.base.float()).abs().double().nan_to_num(0, 0).numpy()
        assert norms[:, index, 0].sum() == pytest.approx(vector.sum(), rel=1e-12)
    assert (norms[:, 1:, 0] == norms[:, 1:, 1]).all()
    assert norms[:, 0, 1].sum() / norms[:, 0, 0].sum() == pytest.approx(0.5, abs=0.01)
    word_of = [word(whole.mask_keys[0], whole.first + i) < 1 << 31 for i in range(100)]
    short = Operands(whole.first, whole.base[:100], (whole.models[0][:100],), whole.mask_keys[:1])
    tau = (short.models[0].float() - whole.base[:100].float()).abs().double().numpy()
    after = KERNELS.norms(short, Formula((FORMULA.terms[0],), task_vectors=True))[0, 0, 1]
    assert after == pytest.approx(tau[word_of].sum(), rel=1e-12)


def test_products_are_both_squared_norms_and_the_dot() -> None:
    n = SURVEY_ELEMENTS + 3
    first, second = np.random.default_rng(0).normal(0, 1, (2, n)).astype(np.float32)
    second[7] = np.nan
    run = Operands(0, None, (torch.from_numpy(first), torch.from_numpy(second)), ())
    products = KERNELS.products(run, PAIR, PAIRS)
    second[7] = 0
    a, b = first.astype(np.float64), second.astype(np.float64)
    for block, run in enumerate((slice(0, SURVEY_ELEMENTS), slice(SURVEY_ELEMENTS, n))):
        wanted = [a[run] @ a[run], b[run] @ b[run], a[run] @ b[run]]
        assert products[block].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_without_anything_to_drop_there_need_be_no_keys() -> None:
    x = torch.tensor([1.0, math.nan])
    out = torch.empty(2)
    KERNELS.merge(Operands(0, None, (x,), ()), Formula((Term(0, keep_below=0),)), out)
    assert out[0] == 0
    assert math.isnan(out[1])
    with pytest.raises(ValueError, match="base"):
        KERNELS.merge(Operands(0, None, (x,), ()), Formula((Term(0),), task_vectors=True), out)
