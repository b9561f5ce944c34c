"""On a GPU: the same bits, pinned memory, and no more device memory than is priced. Skipped where there is none.

What a GPU does with the arithmetic is only known where these have run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.workers.kernels.formulas import DTYPES, cases, merged, statistics
from tests.workers.kernels.test_conveyor import BLOCK, long_run
from tests.workers.philox import numpy_words
from workers.arena import Arena
from workers.canonical import SURVEY_ELEMENTS
from workers.kernels import kernels_of, pin_of
from workers.kernels.base import Election, Formula, Operands, Term
from workers.kernels.conveyor import Conveyor
from workers.kernels.cpu import FusedKernels
from workers.kernels.gpu import CudaLanes
from workers.kernels.moves import CHUNK_ELEMENTS, device_bytes
from workers.kernels.torch_kernels import TorchKernels
from workers.random import words_below

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false"
)

FUSED = FusedKernels()
CUDA = torch.device("cuda")
BIG = Formula(
    (
        Term(0, 0.5, threshold=0x3CA00000, cut=(2, 3)),
        Term(1, 0.3, keep_below=1 << 31, factor=2.0),
        Term(2, -0.2, keep_below=1 << 30, factor=4.0, threshold=0x3C000000),
    ),
    True,
    Election(1, "abs_weights"),
    lambda_=0.9,
)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(case=cases(models=(1, 6)))
def test_merges_are_the_compiled_kernels(case: tuple[Operands, Formula, torch.dtype]) -> None:
    assert merged(kernels_of("cuda"), *case) == merged(FUSED, *case)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(case=cases(models=(1, 4)))
def test_statistics_are_the_compiled_kernels(case: tuple[Operands, Formula, torch.dtype]) -> None:
    run, formula, _ = case
    assert statistics(kernels_of("cuda"), run, formula) == statistics(FUSED, run, formula)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_widened_and_narrowed_alike(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    run = Operands(0, None, (every,), ())
    for out in DTYPES:
        for weight in (1.0, 0.3, 1e-30, 1e30):
            formula = Formula((Term(0, weight),))
            assert merged(kernels_of("cuda"), run, formula, out) == merged(FUSED, run, formula, out)


@pytest.mark.parametrize("step", [1, 2, 64])
def test_chunks_on_streams_are_the_compiled_kernels(step: int) -> None:
    kernels = TorchKernels(Conveyor(CUDA, CudaLanes(CUDA), step * BLOCK))
    run = long_run(5, 9, 12_345, 3, True)
    for dtype in DTYPES:
        assert merged(kernels, run, BIG, dtype) == merged(FUSED, run, BIG, dtype)
    assert statistics(kernels, run, BIG) == statistics(FUSED, run, BIG)


def test_words_are_numpys() -> None:
    for first in (0, 3, (1 << 34) - 50, 1 << 50):
        wanted = numpy_words(12345 << 40, first, 10_001) < 1 << 30
        found = words_below(12345 << 40, first, 10_001, 1 << 30, CUDA)
        assert found.is_cuda
        assert found.cpu().numpy().tolist() == wanted.tolist()


def test_an_arena_is_pinned_and_what_lies_in_it_is_merged() -> None:
    numel = 5 * SURVEY_ELEMENTS + 3
    arena = Arena(4 * 4 * numel + (1 << 16), pin_of("cuda"))
    run = long_run(3, 5, 3, 3, True)
    views = [extent.view for extent in arena.take([x.nbytes for x in run.inputs] + [2 * numel])]
    tensors = []
    for view, x in zip(views, run.inputs, strict=False):
        view[:] = x.view(torch.uint8).numpy().data
        tensors.append(torch.frombuffer(view, dtype=x.dtype))
        assert tensors[-1].is_pinned()
    out = torch.frombuffer(views[-1], dtype=torch.bfloat16)
    wanted = torch.empty(numel, dtype=torch.bfloat16)
    there = Operands(run.first, tensors[0], tuple(tensors[1:]), run.mask_keys)
    assert kernels_of("cuda").merge(there, BIG, out) == FUSED.merge(run, BIG, wanted)
    assert out.view(torch.int16).equal(wanted.view(torch.int16))


@pytest.mark.parametrize("models", [3, 8])
def test_device_memory_stays_below_its_price(models: int) -> None:
    kernels = TorchKernels(Conveyor(CUDA, CudaLanes(CUDA)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    most = 0
    for numel in (CHUNK_ELEMENTS // 3, 2 * CHUNK_ELEMENTS + 5, 1000, CHUNK_ELEMENTS // 2):
        tensors = [torch.randn(numel, generator=generator).bfloat16() for _ in range(models + 1)]
        run = Operands(0, tensors[0], tuple(tensors[1:]), tuple(range(models)))
        terms = tuple(Term(model, 0.3, 1 << 31, 2.0, 0x3C000000) for model in range(models))
        formula = Formula(terms, True, Election(1, "abs_weights"))
        kernels.merge(run, formula, torch.empty_like(tensors[0]))
        kernels.histogram(run, formula, None, np.zeros((models, 1 << 16), dtype=np.int64))
        kernels.norms(run, formula)
        most = max(most, device_bytes(numel, [2] * (models + 1), 2))
        assert 0 < torch.cuda.max_memory_allocated() <= most
        assert torch.cuda.max_memory_reserved() <= 1.1 * most
