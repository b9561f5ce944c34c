"""The compiled kernels give torch's bits, whatever they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.kernels.formulas import (
    DTYPES,
    SIZES,
    cases,
    elements,
    merged,
    operands,
    statistics,
)
from workers.kernels import cpu_passes, cpu_sums
from workers.kernels.base import Divisor, Election, Formula, Operands, Term
from workers.kernels.cpu import FusedKernels, prepare
from workers.kernels.cpu_compile import Kernel
from workers.kernels.torch_kernels import TorchKernels
from workers.task import SURVEY_ELEMENTS

FUSED, TORCH = FusedKernels(), TorchKernels()
ROOT = Path(__file__).parents[3]

BUSY = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


# --- anything ---------------------------------------------------------------------------------------------


@settings(BUSY, max_examples=150)
@given(case=cases())
def test_merges_are_torchs_bit_for_bit(case: tuple[Operands, Formula, torch.dtype]) -> None:
    assert merged(FUSED, *case) == merged(TORCH, *case)


@settings(BUSY, max_examples=30)
@given(case=cases(models=(6, 16)))
def test_merges_of_many_models_are_torchs(case: tuple[Operands, Formula, torch.dtype]) -> None:
    assert merged(FUSED, *case) == merged(TORCH, *case)


@settings(BUSY, max_examples=40)
@given(case=cases(models=(1, 4)))
def test_statistics_are_torchs(case: tuple[Operands, Formula, torch.dtype]) -> None:
    run, formula, _ = case
    assert statistics(FUSED, run, formula) == statistics(TORCH, run, formula)


@settings(BUSY, max_examples=30)
@given(run=st.booleans().flatmap(lambda base: operands(base, 2)))
def test_a_term_given_twice_is_added_twice(run: Operands) -> None:
    formula = Formula((Term(1, 0.5), Term(0), Term(1, -0.25)), election=Election(-1, "weights"))
    assert merged(FUSED, run, formula, torch.float32) == merged(TORCH, run, formula, torch.float32)


# --- every dtype, exhaustively ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_widened_and_narrowed_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    run = Operands(0, None, (every,), ())
    for out in DTYPES:
        assert merged(FUSED, run, Formula((Term(0),)), out) == merged(TORCH, run, Formula((Term(0),)), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_rounding_boundary_is_torchs(dtype: torch.dtype) -> None:
    # Around each value of 16 bits, and around the middle between it and the next: one step to either side.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    shift = 16 if dtype == torch.bfloat16 else 13
    steps = [offset + step for offset in (0, 1 << (shift - 1)) for step in (-1, 0, 1)]
    around = torch.cat([every + step for step in steps]).view(torch.float32)
    run = Operands(0, None, (around,), ())
    assert merged(FUSED, run, Formula((Term(0),)), dtype) == merged(TORCH, run, Formula((Term(0),)), dtype)


# --- blocks, tiles, splits --------------------------------------------------------------------------------


def big(numel: int, dtypes: tuple[torch.dtype, ...] = DTYPES, first: int = 0) -> Operands:
    rng = np.random.default_rng(numel)
    base, *models = (elements("ordinary", numel, dtype, rng) for dtype in (torch.bfloat16, *dtypes))
    return Operands(first, base, tuple(models), (1, 2 << 40, 3))


BIG = Formula(
    (
        Term(0, 0.5, threshold=0x3CA00000, cut=(1, 3)),
        Term(1, 0.3, keep_below=1 << 31, factor=2.0),
        Term(2, -0.2, keep_below=1 << 30, factor=4.0, threshold=0x3C000000),
    ),
    True,
    Election(1, "abs_weights"),
    lambda_=0.9,
)


@pytest.mark.parametrize("numel", [SURVEY_ELEMENTS - 1, SURVEY_ELEMENTS, 2 * SURVEY_ELEMENTS + 12_345])
def test_runs_of_several_blocks_are_torchs(numel: int) -> None:
    run = big(numel)
    assert merged(FUSED, run, BIG, torch.bfloat16) == merged(TORCH, run, BIG, torch.bfloat16)
    assert statistics(FUSED, run, BIG) == statistics(TORCH, run, BIG)


def test_the_words_of_elements_beyond_two_to_the_34_are_torchs() -> None:
    run = replace(big(5000), first=SURVEY_ELEMENTS * ((1 << 16) + 1))  # counters beyond 32 bits
    assert merged(FUSED, run, BIG, torch.float32) == merged(TORCH, run, BIG, torch.float32)


def part(run: Operands, start: int, end: int | None) -> Operands:
    assert run.base is not None
    return Operands(
        run.first + start, run.base[start:end], tuple(model[start:end] for model in run.models), run.mask_keys
    )


@pytest.mark.parametrize("split", [SURVEY_ELEMENTS, 2 * SURVEY_ELEMENTS])
def test_a_run_is_the_sum_of_its_parts(split: int) -> None:
    run = big(2 * SURVEY_ELEMENTS + 777)
    parts = [part(run, 0, split), part(run, split, None)]
    whole = torch.empty(run.numel)
    FUSED.merge(run, BIG, whole)
    outs = [torch.empty(piece.numel) for piece in parts]
    for piece, out in zip(parts, outs, strict=True):
        FUSED.merge(piece, BIG, out)
    assert torch.equal(torch.cat(outs).view(torch.int32), whole.view(torch.int32))

    counts = np.zeros((2, 3, 1 << 16), dtype=np.int64)
    FUSED.histogram(run, BIG, None, counts[0])
    for piece in parts:
        FUSED.histogram(piece, BIG, None, counts[1])
    assert np.array_equal(counts[0], counts[1])
    assert counts[0].sum() == 3 * run.numel
    together: list[Callable[[Operands], Any]] = [
        lambda piece: FUSED.norms(piece, BIG),
        lambda piece: FUSED.products(replace(piece, models=piece.models[:2])),
        lambda piece: FUSED.equal_counts(piece, BIG, [0, 0x3C000000, 0]),
    ]
    for statistic in together:
        assert np.array_equal(np.concatenate([statistic(piece) for piece in parts]), statistic(run))
    assert sum(FUSED.elected(piece, BIG) for piece in parts) == FUSED.elected(run, BIG)


def test_tiles_divide_blocks_and_hold_whole_counters() -> None:
    assert SURVEY_ELEMENTS % cpu_passes.TILE == 0
    assert cpu_passes.TILE % 4 == 0


@pytest.mark.parametrize("numel", SIZES)
def test_unaligned_neighbours_are_left_alone(numel: int) -> None:
    # Views that begin off every vector's alignment, within one buffer.
    buffer = torch.from_numpy(np.random.default_rng(1).normal(0, 1, 3 * numel + 9).astype(np.float32))
    models = tuple(buffer[1 + k * (numel + 1) :][:numel] for k in range(2))
    run, formula = Operands(0, None, models, ()), Formula((Term(0, 0.3), Term(1, 0.7)))
    kept = buffer.clone()
    assert merged(FUSED, run, formula, torch.bfloat16) == merged(TORCH, run, formula, torch.bfloat16)
    assert torch.equal(buffer, kept)


# --- by hand ----------------------------------------------------------------------------------------------


def merge_one(values: list[list[float]], formula: Formula, base: list[float] | None = None) -> list[float]:
    run = Operands(
        0,
        None if base is None else torch.tensor(base),
        tuple(torch.tensor(row) for row in values),
        tuple(range(len(values))),
    )
    out = torch.empty(run.numel)
    FUSED.merge(run, formula, out)
    return out.tolist()


def test_what_is_equal_to_the_threshold_stays_up_to_the_cut() -> None:
    values = [[2.0, -2.0, 1.0, 2.0, 3.0, -2.0, 0.5]]
    two = int(np.float32(2.0).view(np.int32))
    assert merge_one(values, Formula((Term(0, threshold=two),))) == [2, -2, 0, 2, 3, -2, 0]
    assert merge_one(values, Formula((Term(0, threshold=two, cut=(0, 2)),))) == [2, -2, 0, 0, 3, 0, 0]
    assert merge_one(values, Formula((Term(0, threshold=two, cut=(1, 2)),))) == [2, -2, 0, 2, 3, -2, 0]


@pytest.mark.parametrize(
    ("divisor", "wanted"), [(None, 2.5), ("abs_weights", 2.5 / 1.5), ("count", 1.25), ("weights", 2.5 / 1.5)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_election(divisor: Divisor | None, wanted: float, sign: Literal[1, -1]) -> None:
    rows = [[2.0 * sign, 1.0], [1.0 * sign, -2.0], [-1.0 * sign, 0.0]]
    formula = Formula((Term(0), Term(1, 0.5), Term(2)), election=Election(sign, divisor))
    found = merge_one(rows, formula)
    assert found[0] == pytest.approx(sign * wanted)
    # The sum is exactly zero: the sign is given, and one term has it.
    share = 0.5 if divisor in ("abs_weights", "weights") and sign < 0 else 1.0
    assert found[1] == sign / share


def test_subnormals_are_not_flushed() -> None:
    tiny = [1e-45, -1e-45, 3e-39, 1.1754942e-38]
    assert merge_one([tiny], Formula((Term(0),))) == torch.tensor(tiny).tolist()
    assert (
        merge_one([[1e-38] * 9], Formula((Term(0, weight=0.5),))) == (torch.full((9,), 1e-38) * 0.5).tolist()
    )
    half = torch.tensor([1, 0x3FF, 0x8001] * 7, dtype=torch.int32).to(torch.int16).view(torch.float16)
    out = torch.empty_like(half)
    FUSED.merge(Operands(0, None, (half,), ()), Formula((Term(0),)), out)
    assert torch.equal(out.view(torch.int16), half.view(torch.int16))


def test_subnormals_stay_where_a_library_has_the_thread_flush_them() -> None:
    tiny = torch.tensor([1e-45, -3e-39, 1e-38] * 9)
    run, formula, out = Operands(0, None, (tiny,), ()), Formula((Term(0, weight=0.5),)), torch.empty(27)

    def flushing() -> float:
        torch.set_flush_denormal(True)
        lost = float((tiny * 0.5).abs().sum())
        FUSED.merge(run, formula, out)
        return lost

    with ThreadPoolExecutor(1) as thread:  # the flag is the thread's own
        assert thread.submit(flushing).result() == 0
    assert torch.equal(out.view(torch.int32), (tiny * 0.5).view(torch.int32))
    assert out.count_nonzero() > 0


def test_zeros_keep_their_signs() -> None:
    minus = [-0.0] * 40
    for formula in (Formula((Term(0),)), Formula((Term(0), Term(0), Term(0, 0.5))), Formula((Term(0),) * 9)):
        assert [np.signbit(x) for x in merge_one([minus], formula)] == [True] * 40
    assert not np.signbit(merge_one([minus], Formula((Term(0),), election=Election()))).any()


@pytest.mark.parametrize("numel", [1, cpu_passes.TILE, SURVEY_ELEMENTS - 1, SURVEY_ELEMENTS])
def test_a_sum_of_minus_zeros_is_the_trees(numel: int) -> None:
    run = Operands(0, None, (torch.zeros(numel), torch.full((numel,), -1.0)), ())
    assert FUSED.products(run).tobytes() == TORCH.products(run).tobytes()


def test_overflow_is_told_from_bad_input() -> None:
    run = Operands(0, None, (torch.tensor([6e4, 1.0, float("inf"), float("nan"), -6e4] * 500),), ())
    out = torch.empty(run.numel, dtype=torch.float16)
    found = FUSED.merge(run, Formula((Term(0, weight=2.0),)), out)
    assert found.nonfinite == (1000,)
    assert found.overflowed == 1000
    assert out[:5].tolist()[0] == float("inf")
    assert out.view(torch.int16)[3] == 0x7E00


def test_every_kernel_can_be_made_ready_beforehand() -> None:
    prepare()
    found = [value for module in (cpu_passes, cpu_sums) for value in vars(module).values()]
    kernels = [kernel for kernel in found if isinstance(kernel, Kernel)]
    assert len(kernels) == 10
    assert all(kernel.ready for kernel in kernels)


def test_what_cannot_be_computed_is_refused() -> None:
    x = torch.zeros(8)
    formula = Formula((Term(0),), task_vectors=True)
    with pytest.raises(ValueError, match="base"):
        FUSED.merge(Operands(0, None, (x,), ()), formula, x.clone())
    with pytest.raises(ValueError, match="base"):
        FUSED.elected(Operands(0, None, (x,), ()), formula)
    for bad in (x[::2], torch.zeros(9), x.to("meta")):
        with pytest.raises(ValueError, match="contiguous"):
            FUSED.nonfinite(Operands(0, x, (bad,), ()))


# --- threads, processors ----------------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other() -> None:
    runs = [big(SURVEY_ELEMENTS + 100 * k) for k in range(4)]
    wanted = [(merged(FUSED, run, BIG, torch.bfloat16), statistics(FUSED, run, BIG)) for run in runs]

    def again(number: int) -> bool:
        run = runs[number % len(runs)]
        return (merged(FUSED, run, BIG, torch.bfloat16), statistics(FUSED, run, BIG)) == wanted[number % 4]

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(again, range(8)))


def run_bits(**variables: str) -> dict[str, Any]:
    dropped = ("ATEN_CPU_CAPABILITY", "NUMBA_CACHE_DIR", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"OMP_WAIT_POLICY": "passive", **variables}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.workers.kernels.bits"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=110,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_torchs_instruction_sets_and_threads_give_the_compiled_bits() -> None:
    runs = [run_bits(ATEN_CPU_CAPABILITY="default"), run_bits(ATEN_CPU_CAPABILITY="avx2"), run_bits()]
    assert runs[0]["capability"] == "DEFAULT"
    for run in runs:
        assert run["fused"] == runs[0]["fused"]
        assert run["one"] == run["fused"]
        assert run["two"] == run["fused"]
