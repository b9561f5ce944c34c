"""The k-th largest magnitude is exact, however good the guess was; what is expected comes from sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.kernels import cpu, ranks
from workers.kernels.base import Formula, Operands, Term
from workers.kernels.cpu import FusedKernels
from workers.kernels.torch_kernels import TorchKernels

Found = list[tuple[int, int]]
KERNELS = FusedKernels()
FORMULA = Formula((Term(0), Term(1)), task_vectors=True)

values = st.one_of(st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 0x3C000000, 0x3C000001, 2**31 - 1]))


def expected(bits: npt.NDArray[np.uint32], rank: int) -> tuple[int, int]:
    value = np.sort(bits)[::-1][rank - 1]
    return int(value), rank - int((bits > value).sum())


class Counting:
    """Counts by looking at everything, and how often."""

    def __init__(self, bits: npt.NDArray[np.uint32]) -> None:
        self.bits = bits.astype(np.int64)
        self.passes = 0

    def window(self, window: ranks.Window) -> tuple[npt.NDArray[np.int64], int]:
        self.passes += 1
        assert 0 < window.bins <= ranks.BINS
        inside = self.bits[(self.bits >= window.low) & (self.bits < window.top)]
        counts = np.bincount((inside - window.low) >> window.shift, minlength=window.bins)
        return counts, int((self.bits >= window.top).sum())

    def pivots(self, pivots: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        self.passes += 1
        return np.array([(self.bits >= pivot).sum() for pivot in pivots])


@pytest.mark.fast
@given(
    st.lists(values, min_size=1, max_size=60),
    st.data(),
    st.lists(values, min_size=1, max_size=5),
    st.booleans(),
)
def test_a_wrong_guess_costs_a_few_passes_and_no_more(
    found: list[int], data: st.DataObject, likely: list[int], common: bool
) -> None:
    bits = np.array(found, dtype=np.uint32)
    rank = data.draw(st.integers(1, len(found)))
    counting = Counting(bits)
    between = np.unique(np.array(likely if common else [], dtype=np.uint32))
    guess = ranks.Bracket(min(likely), max(likely), between)
    assert ranks.largest(counting.window, counting.pivots, rank, guess) == expected(bits, rank)
    assert counting.passes <= 4


@pytest.mark.fast
@given(st.lists(values, min_size=1, max_size=300), st.data())
def test_the_bracket_of_everything_holds_it(found: list[int], data: st.DataObject) -> None:
    bits = np.array(found, dtype=np.uint32)
    rank = data.draw(st.integers(1, len(found)))
    bracket = ranks.bracket(bits, rank, bits.size)
    assert bracket.low <= expected(bits, rank)[0] <= bracket.high
    assert set(bracket.common) <= set(found)
    assert ranks.largest_of(bits, rank) == expected(bits, rank)


@pytest.mark.fast
def test_more_values_than_there_are_are_refused() -> None:
    counting = Counting(np.array([1, 2, 3], dtype=np.uint32))
    for common in ([], [2]):
        guess = ranks.Bracket(1, 3, np.array(common, dtype=np.uint32))
        with pytest.raises(ValueError, match="no 4-th"):
            ranks.largest(counting.window, counting.pivots, 4, guess)


def tensors(kind: str, numel: int) -> Operands:
    """A base and two models of float32 or bfloat16, spread, tied or mostly equal, with NaN in one."""
    generator = torch.Generator().manual_seed(7)
    base = 0.02 * torch.randn(numel, generator=generator)
    models = [base + 0.0002 * torch.randn(numel, generator=generator) for _ in range(2)]
    if kind == "sorted":
        models[0] = base + torch.arange(numel) * 1e-6
    if kind == "equal":
        models = [base, base.clone()]
        models[0][:5] += 1
    models[1][17], models[1][numel - 1] = float("nan"), float("inf")
    if kind == "ties":
        return Operands(0, base.bfloat16(), tuple(model.bfloat16() for model in models), ())
    return Operands(0, base, tuple(models), ())


def sorted_out(run: Operands, formula: Formula, wanted: Sequence[int]) -> Found:
    found = []
    assert run.base is not None
    for term, rank in zip(formula.terms, wanted, strict=True):
        bits = (run.models[term.model].float() - run.base.float()).view(torch.int32) & 0x7FFFFFFF
        bits[bits >= 0x7F800000] = 0
        found.append(expected(bits.numpy().astype(np.uint32), rank))
    return found


@pytest.mark.parametrize("kind", ["spread", "ties", "sorted", "equal"])
@pytest.mark.parametrize("sample", [256, ranks.SAMPLE])
def test_the_compiled_kernels_find_what_sorting_finds(
    kind: str, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "SAMPLE", sample)
    numel = 2 * sample + 1000
    run = tensors(kind, numel)
    for share in (0.01, 0.2, 0.5, 1.0):
        wanted = [max(1, int(share * numel))] * 2
        right = sorted_out(run, FORMULA, wanted)
        assert list(KERNELS.largest(run, FORMULA, wanted)) == right
        assert list(TorchKernels().largest(run, FORMULA, wanted)) == right


@pytest.mark.fast
@pytest.mark.parametrize("numel", [1, 63, ranks.SAMPLE, ranks.SAMPLE + 1, 11_534_336, 2_000_000_011])
def test_a_sample_lies_within_the_tensor_and_does_not_overlap(numel: int) -> None:
    starts = cpu._sample_starts(numel)
    assert starts[0] >= 0
    assert (np.diff(starts) >= cpu.passes.PIECE).all()
    sampled = min(numel, ranks.SAMPLE)
    assert starts[-1] + (cpu.passes.PIECE if numel > sampled else 1) <= numel
    assert len(starts) == -(-sampled // cpu.passes.PIECE)
